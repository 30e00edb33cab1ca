"""Work on prompts x particles in pieces that fit in memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tiltopt.types import Conditioning

Rows = tuple[Tensor | None, ...]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device ran out of memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return bool(should_reduce_batch_size(error))


class MicroBatches:
    """Applies a function to the B * P rows of a batch, piece by piece, and halves the pieces when memory runs out.

    Pieces end at prompt boundaries while a piece holds at least one prompt's particles, and lie within one prompt
    otherwise. The size only ever shrinks, and stays shrunk for the rest of the run.

    Args:
        cond: B prompts.
        num_particles: P.
        size: rows per piece; None: all at once.
    """

    def __init__(self, cond: Conditioning, num_particles: int, size: int | None) -> None:
        self._cond = cond
        self._per_prompt = num_particles
        self.num_rows = len(cond.prompts) * num_particles
        self.size = self.num_rows if size is None else min(size, self.num_rows)
        self._cache: dict[tuple[int, int], Conditioning] = {}

    def map(self, fn: Callable[..., Rows], *inputs: Tensor) -> Rows:
        """fn(first row, conditioning, *pieces of inputs) -> tuple of tensors or None, concatenated over all rows."""
        pieces: list[Rows] = []
        start = 0
        while start < self.num_rows:
            stop = self._stop(start)
            try:
                pieces.append(fn(start, self._rows(start, stop), *(t[start:stop] for t in inputs)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or stop - start == 1:
                    raise
                self._shrink(stop - start, str(error))
                continue
            start = stop
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _stop(self, start: int) -> int:
        if self.size >= self._per_prompt:
            return min(start + self.size // self._per_prompt * self._per_prompt, self.num_rows)
        end_of_prompt = (start // self._per_prompt + 1) * self._per_prompt
        return min(start + self.size, end_of_prompt)

    def _rows(self, start: int, stop: int) -> Conditioning:
        key = (start, stop)
        if key not in self._cache:
            self._cache[key] = self._cond.select([row // self._per_prompt for row in range(start, stop)])
        return self._cache[key]

    def _shrink(self, tried: int, reason: str) -> None:
        self.size = max(1, tried // 2)
        self._cache.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"Out of memory with {tried} rows at once ({reason.splitlines()[0]}); going on with {self.size}. "
            f"Pass `micro_batch={self.size}` to start there.",
            ResourceWarning,
            stacklevel=2,
        )
