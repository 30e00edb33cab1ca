"""The processes of one run: who writes, and how they exchange small objects. One process needs no set-up."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tiltopt.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """`size` processes that run the same program; rank 0 alone writes.

    Every method is collective: all ranks must call it in the same order.
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
        chosen = accelerator.device if device == "auto" else torch.device(device)
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
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, mine: Sequence[tuple[int, T]], total: int) -> list[T]:
        """All items in order of their positions, on every rank, from what each rank made of its share."""
        if self.size == 1:
            parts: list[Any] = [list(mine)]
        else:
            parts = [None] * self.size
            dist.all_gather_object(parts, list(mine))
        placed = {position: item for part in parts for position, item in part}
        if sorted(placed) != list(range(total)):
            missing = sorted(set(range(total)) - set(placed))
            raise RuntimeError(f"expected {total} items from {self.size} processes, positions {missing} are missing")
        return [placed[i] for i in range(total)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the exchange between the processes, when all is done. Collective; nothing of this team works after it.

        Without it the threads of the exchange may outlive the interpreter: a finished process aborts on its way out.
        """
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
