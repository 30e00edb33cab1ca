"""Small parts of drawing in groups: conditionings side by side, and a count of the steps taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiltopt.samplers import StepInfo
from tiltopt.types import Conditioning


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Several conditionings as one."""

    def join(trees: Sequence[Any]) -> Any:
        first = trees[0]
        if first is None:
            return None
        if isinstance(first, Tensor):
            return torch.cat(list(trees))
        if isinstance(first, dict):
            return {k: join([t[k] for t in trees]) for k in first}
        joined = [join(list(column)) for column in zip(*trees, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)

    return Conditioning(tuple(p for part in parts for p in part.prompts), join([part.embeds for part in parts]))


class StepCounter:
    """A sampler's callback that counts denoising steps over all groups."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, info: StepInfo) -> None:
        """Step 0 is the initial noise and is not counted."""
        if info.k > 0:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
