"""What every stage of the recipe shares: places, schedules, averages, checkpoints, one-line logs."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

EMBEDDED = Path(__file__).resolve().parent.parent
WORK = Path(__file__).resolve().parent / "work"


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that every stage has."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--work", type=Path, default=WORK, help="folder of the working files")
    return out


def training_options(out: argparse.ArgumentParser, *, steps: int, batch: int, lr: float, pool: str = "train") -> None:
    """Add the options that every training stage has."""
    out.add_argument("--pool", default=pool, help="name of the picture pool to train on")
    out.add_argument("--steps", type=int, default=steps, help="length of the run, and of its learning-rate schedule")
    out.add_argument("--minutes", type=float, help="end by the clock instead of --steps (then not repeatable)")
    out.add_argument("--batch", type=int, default=batch, help="pictures per step and process")
    out.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def stream(*keys: int | str) -> np.random.Generator:
    """A NumPy generator that is a pure function of its keys, so any sample can be drawn alone and in any order."""
    return np.random.default_rng([_number(k) for k in keys])


def torch_stream(*keys: int | str) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(int(stream(*keys).integers(2**63 - 1)))


def _number(key: int | str) -> int:
    return key if isinstance(key, int) else int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


def pixels(images: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """(n, 3, H, W) float in [0, 1] -> (n, H, W, 3) uint8."""
    return images.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def cosine(progress: float, floor: float = 0.02) -> float:
    """Factor on the learning rate: 1 at progress 0, `floor` at progress 1."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class Clock:
    """How far a run is, by steps or, if `minutes` is given, by the seconds that it has trained (also before a stop)."""

    def __init__(self, steps: int, minutes: float | None, spent: float = 0.0) -> None:
        self.steps, self.minutes, self.spent, self.start = steps, minutes, spent, time.monotonic()

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.start

    def progress(self, step: int) -> float:
        return step / max(self.steps, 1) if self.minutes is None else self.seconds() / (60 * self.minutes)


class Average:
    """Exponential moving average of parameters, with a warm-up so that early averages are not the first weights."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        keep = min(self.decay, (step + 1) / (step + 12))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - keep)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        for p, v in zip(parameters, self.values, strict=True):
            p.copy_(v)


def save_state(path: Path, **state: Any) -> None:
    """Write a training checkpoint in one atomic replacement: a stop at any instant leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None when there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def log(stage: str, **values: float | int | str) -> None:
    """One line a person and a script can both read."""
    parts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
    print(time.strftime("%H:%M:%S"), stage, "  ".join(parts), flush=True)


def batches(total: int, size: int) -> Iterable[slice]:
    """Consecutive slices that cover range(total)."""
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


def with_article(noun: str) -> str:
    """'cat' -> 'a cat', 'ant' -> 'an ant'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
