"""Cells of the query-efficiency benchmark, and the file that remembers which are done."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Budget:
    """`initial` queries, then `rounds` times `batch`; written 64+16x4, and 64+16x4:1 where all are of one prompt."""

    initial: int
    batch: int
    rounds: int
    one_prompt: bool = False

    def __post_init__(self) -> None:
        if self.initial < 2 or self.batch < 2 or self.rounds < 1:
            raise ValueError(f"a budget needs at least 2 queries a round and 1 round, got {self}.")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "64+16x4" or "64+16x4:1"."""
        match = re.fullmatch(r"(\d+)\+(\d+)x(\d+)(:1)?", text)
        if match is None:
            raise ValueError(
                f"expected a budget such as 64+16x4 (initial + batch x rounds) or 64+16x4:1, got {text!r}."
            )
        return cls(*map(int, match.groups()[:3]), one_prompt=match.group(4) is not None)

    def __str__(self) -> str:
        return f"{self.initial}+{self.batch}x{self.rounds}" + (":1" if self.one_prompt else "")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Queries of each round, round 0 first."""
        return (self.initial, *[self.batch] * self.rounds)

    @property
    def total(self) -> int:
        """Queries in all."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Cell:
    """One run of one method. `prior` names the weights: runs on different weights are never compared."""

    reward: str
    method: str
    seed: int
    budget: Budget
    prior: str

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """What makes two runs the same cell."""
        return self.reward, self.method, self.seed, str(self.budget), self.prior

    @property
    def folder(self) -> str:
        """Name of the cell's working folder."""
        return "_".join((self.reward, self.method, str(self.seed), str(self.budget), self.prior))


def key_of(row: Mapping[str, Any]) -> tuple[str, str, int, str, str]:
    """The key of a line of the results file."""
    return row["reward"], row["method"], row["seed"], row["budget"], row["prior"]


def read(path: Path) -> list[dict[str, Any]]:
    """The finished cells, the newest line of each; a line that was cut short by a kill is passed over."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if not path.is_file():
        return []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            warnings.warn(f"{path}, line {number}, is not a finished cell; its cell will be run again.", stacklevel=2)
    return list(rows.values())


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, on the disk when this returns. A leading newline closes whatever an earlier kill left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def missing(cells: Iterable[Cell], rows: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells that have no line yet, in order."""
    done = {key_of(row) for row in rows}
    return [cell for cell in cells if cell.key not in done]
