"""`prior.memory = "auto"`: how many rows go through the networks at once, and with which levers, so that they fit.

The first drawing of a run tries one row and two of one step, on the device itself, and keeps what it chose in the run's
folder. Later processes take that; where it does not fit they take less, with a note there. Pictures depend on it in
their last bits alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tiltopt.errors import PriorError
from tiltopt.online.store.files import read_json, write_json
from tiltopt.online.team import Team, on_main
from tiltopt.samplers.micro_batch import RowLimit, is_out_of_memory
from tiltopt.samplers.work import Backward, peak_bytes
from tiltopt.types import Conditioning

FILE = "memory.json"
ROWS = "rows.json"
SHARE = 0.8
"""Of the free memory that is used; the rest is for fragments and what grows."""
MOST_ROWS = 64
"""On an accelerator more rows at once are hardly faster."""
ENOUGH_ROWS = 8
"""With so many, checkpointing costs more time than further rows gain."""


@dataclass(frozen=True)
class Choice:
    """Args:
    micro_batch: rows per network call.
    gradient_checkpointing, vae_dtype: levers of the prior, see docs/priors.md.
    row_bytes, free_bytes: what a row takes, and what was free for all of them when this was chosen.
    notes: what later processes changed, for people.
    """

    micro_batch: int
    gradient_checkpointing: bool
    vae_dtype: str
    row_bytes: int
    free_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        levers = [f"{self.micro_batch} rows a call", f"VAE in {self.vae_dtype}"]
        if self.gradient_checkpointing:
            levers.append("gradient checkpointing")
        return f"{', '.join(levers)} ({_gib(self.row_bytes)} a row, {_gib(self.free_bytes)} free)"


def recall(folder: Path, team: Team, rows: RowLimit) -> None:
    """Start with what fitted, if an earlier process of the run in `folder` had to take fewer rows. Collective."""
    known = on_main(team, lambda: read_json(folder / ROWS, {}))
    if rows.size is not None and known.get("tried") == rows.size:
        rows.size = min(rows.size, known["fitted"])


def keep(folder: Path, team: Team, rows: RowLimit, tried: int) -> None:
    """Keep for later processes what fitted where `tried` rows did not; the least of all ranks. Collective."""
    rows.size = min(team.collect([(team.rank, rows.size or tried)], team.size))
    if team.is_main and rows.size < tried:
        write_json(folder / ROWS, {"tried": tried, "fitted": rows.size})


def settle(
    folder: Path,
    team: Team,
    prior: Any,
    look: Callable[[Tensor, Sequence[str]], Tensor],
    cond: Conditioning,
    *,
    wanted: int,
    backward: Backward,
    change_precision: bool,
) -> Choice:
    """The choice of the run in `folder`, made, kept, said and applied to the prior. Collective; see `choose`.

    Raises:
        PriorError: not even one row fits.
    """
    kept = on_main(team, lambda: read_json(folder / FILE, {}))
    before = None if not kept else Choice(**{**kept, "notes": tuple(kept["notes"])})
    if before is not None:
        _apply(prior, before)

    def chosen(most: int) -> Choice:
        return choose(prior, look, cond, wanted=most, backward=backward, change_precision=change_precision)

    found = chosen(before.micro_batch if before else wanted)
    found = team.broadcast(found)  # the levers of rank 0, and as many rows as fit everywhere
    _apply(prior, found)
    if team.size > 1:
        mine = chosen(found.micro_batch).micro_batch
        found = dataclasses.replace(found, micro_batch=min(team.collect([(team.rank, mine)], team.size)))
    if before is not None and _levers(found) == _levers(before):
        return before
    if before is not None:
        note = f"less memory than before on {_name(team.device)}: {found}, in the place of {before}"
        found = dataclasses.replace(found, notes=(*before.notes, note))
    if team.is_main:
        write_json(folder / FILE, dataclasses.asdict(found))
        print(f"memory: {found.notes[-1] if found.notes else found}", flush=True)
    return found


def choose(
    prior: Any,
    look: Callable[[Tensor, Sequence[str]], Tensor],
    cond: Conditioning,
    *,
    wanted: int,
    backward: Backward,
    change_precision: bool,
) -> Choice:
    """As many rows as fit, at most `wanted`, with the levers that let them; the prior is left with these. A decoder in
    half precision saves time too; checkpointing costs it, and is for devices that take fewer than `ENOUGH_ROWS`.

    Args:
        look: clean events and their prompts -> n rows: decoding, and what is computed from designs.
        cond: one row at least.
        backward: how far gradients of a look go back.
        change_precision: whether the decoder may be put into bfloat16, on CUDA.

    Raises:
        PriorError: not even one row fits.
    """
    device = torch.device(prior.device)
    row = free = rows = 0
    for lever, enough in _ladder(prior, device, backward, change_precision):
        if rows >= min(wanted, enough):
            break
        if lever:
            prior.use(**lever)
        free = available(device)
        try:
            one, two = (peak_bytes(prior, cond.select([0] * n), look, backward) for n in (1, 2))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row, rows = max(row, free), 0
            continue
        row = max(two - one, 1)
        rows = int((SHARE * free - max(one - row, 0)) // row)
    if rows < 1:
        raise PriorError(
            f"one row takes {_gib(row)} or more, and {_gib(free)} are free on {_name(device)}. What helps: "
            "prior.gradient_checkpointing, prior.vae_dtype=bfloat16, prior.guidance_decoder, a smaller prior.size, "
            "sampler.gradient=none (docs/priors.md)."
        )
    vae_dtype = str(getattr(prior, "vae_dtype", torch.float32)).removeprefix("torch.")
    return Choice(min(rows, wanted), bool(getattr(prior, "gradient_checkpointing", False)), vae_dtype, row, free)


def wanted_rows(team: Team, micro_batch: int, rows: int) -> int:
    """How many rows a job would have go through the networks at once: on a CPU more than `micro_batch` gain nothing.

    Args:
        rows: that it has at all.
    """
    return min(MOST_ROWS, rows) if team.device.type == "cuda" else micro_batch


def available(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)


def _ladder(
    prior: Any, device: torch.device, backward: Backward, change_precision: bool
) -> list[tuple[dict[str, Any], int]]:
    """What is tried, one after the other, each on top of those before, and with how many rows it is not needed."""
    steps: list[tuple[dict[str, Any], int]] = [({}, MOST_ROWS)]
    if not hasattr(prior, "use"):
        return steps
    if change_precision and device.type == "cuda" and prior.vae_dtype == torch.float32:
        steps.append(({"vae_dtype": "bfloat16"}, MOST_ROWS))
    if backward != "none" and not prior.gradient_checkpointing:
        steps.append(({"gradient_checkpointing": True}, ENOUGH_ROWS))
    return steps


def _apply(prior: Any, choice: Choice) -> None:
    if hasattr(prior, "use"):
        prior.use(vae_dtype=choice.vae_dtype, gradient_checkpointing=choice.gradient_checkpointing)


def _levers(choice: Choice) -> tuple[Any, ...]:
    return choice.micro_batch, choice.gradient_checkpointing, choice.vae_dtype


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
