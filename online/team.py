"""The processes of one run: who writes, and how they exchange small objects. One process needs no set-up.

What only rank 0 may do is done through `on_main`, whose outcome, good or bad, is known to every rank, so that none
waits for ever; what rank 0 alone may hold (a store, a black box, a model on its way) is `Kept`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from tiltopt.errors import ConfigError, TiltoptError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """`size` processes that run the same program; rank 0 alone writes.

    Every method is collective: all ranks must call it in the same order. Those that exchange anything raise
    `PeerError` when the connection to another process breaks.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_accelerate(cls, device: str = "auto", timeout_hours: float = 24.0) -> Team:
        """The processes started by `accelerate launch` or `torchrun` (one process when started plainly).

        Args:
            device: "auto" for what accelerate assigns to the process, else a torch device.
            timeout_hours: how long a rank waits for another; long, because rank 0 may wait for slow answers. A rank
                that dies is noticed by the launcher, which ends the others.
        """
        from accelerate import Accelerator, InitProcessGroupKwargs

        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=timeout_hours))
        # without being told, accelerate takes several CPU processes for several lonely ones
        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[patience])
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes != started:
            raise ConfigError(
                f"expected {started} processes, as the launcher says, got {accelerator.num_processes} from accelerate. "
                "Start them with torchrun, or with `accelerate launch --multi_gpu --num_processes N` "
                "(ACCELERATE_USE_CPU=1 on CPUs)."
            )
        chosen = accelerator.device if device == "auto" else device_of(device)
        return cls(accelerator.process_index, accelerator.num_processes, chosen)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This rank's items with their positions, dealt round robin."""
        return [(i, item) for i, item in enumerate(items) if i % self.size == self.rank]

    def broadcast(self, value: T | None) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        box: list[Any] = [value if self.is_main else None]
        with self._exchange():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, mine: Sequence[tuple[int, T]], total: int) -> list[T]:
        """All items in order of their positions, on every rank, from what each rank made of its share."""
        if self.size == 1:
            parts: list[Any] = [list(mine)]
        else:
            parts = [None] * self.size
            with self._exchange():
                dist.all_gather_object(parts, list(mine))
        placed = {position: item for part in parts for position, item in part}
        if sorted(placed) != list(range(total)):
            missing = sorted(set(range(total)) - set(placed))
            raise RuntimeError(f"expected {total} items from {self.size} processes, positions {missing} are missing")
        return [placed[i] for i in range(total)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with self._exchange():
                dist.barrier()

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around what all processes do together: what breaks there is the connection to one of them."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(
                f"rank {self.rank} lost another process of the run ({_first_line(error)}). Nothing "
                "answered is lost: see that process's output, then resume the run."
            ) from error

    def leave(self) -> None:
        """End the exchange between the processes, when all is done. Collective; nothing of this team works after it.

        Without it the threads of the exchange may outlive the interpreter: a finished process aborts on its way out.
        """
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device that a setting names; for "auto" the accelerator of this machine, else its processor.

    Raises:
        ConfigError: it is not here.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = there if there is not None else torch.device("cpu")
    device = here if name == "auto" else torch.device(name)
    if device.type not in ("cpu", here.type):
        raise ConfigError(f"`device`: expected cpu or {here.type}, which this machine has, got {name!r}.")
    return device


class Kept(Generic[T]):
    """Something that rank 0 made and keeps: it comes out of `on_main` whole there, and empty on every other rank.

        work = on_main(team, lambda: Kept(make()))
        on_main(team, lambda: work.value.go_on())

    Args:
        value: any object; it is never sent anywhere.
    """

    def __init__(self, *value: T) -> None:
        self._value = value

    @property
    def value(self) -> T:
        """The object. Rank 0 only."""
        if not self._value:
            raise RuntimeError("expected rank 0, which alone keeps this object, got another process of the team")
        return self._value[0]

    @property
    def or_none(self) -> T | None:
        """The object on rank 0, None elsewhere."""
        return self._value[0] if self._value else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


class PeerError(TiltoptError, RuntimeError):
    """Another process of the run stopped; the cause is in its message or in that process's own output."""


def on_main(team: Team, action: Callable[[], T]) -> T:
    """Rank 0's `action()`, on every rank. Collective.

    Raises:
        PeerError: on the other ranks, when `action` raised on rank 0 (where the error itself is raised); on any, when
            the connection to another broke.
    """
    if team.size == 1:
        return action()
    if team.is_main:
        try:
            result = action()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the others may be gone; the error itself is what matters
                team.broadcast(("error", f"{type(error).__name__}: {error}"))
            raise
        team.broadcast(("ok", result))
        return result
    told: tuple[str, Any] = team.broadcast(None)  # type: ignore[arg-type]  # of rank 0
    status, value = told
    if status == "error":
        raise PeerError(f"rank 0 stopped: {value}")
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
