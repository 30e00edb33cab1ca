"""Measurements made elsewhere, taken into a run as a warm start."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tiltopt.designs import IMAGES, DesignType, design_type
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import NewQuery, Origin, RoundRecord
from tiltopt.online.settings.objectives import objectives_of
from tiltopt.online.settings.run import Settings
from tiltopt.online.store import files
from tiltopt.online.store.features import pack

EXPECTED = (
    "expected a table with the columns `value` and either `image` (a file, relative to the table; where designs are no "
    "images `design`, a file or a text) or `f0`, `f1`, ... (features), and optionally `prompt` and `sem`"
)


@dataclass(frozen=True)
class Measurements:
    """A table of measurements, checked.

    Args:
        values: (n,) rewards, finite; of several objectives the first.
        outcomes: (n,) numbers of each objective by its name; empty where an answer is one number.
        sems: (n,) standard errors, None where unknown.
        prompts: (n,) texts, empty where unknown.
        designs: (n,) of the run's type, or None when the table holds features.
        features: (n, d) float32, or None when the table holds designs.
        fingerprint: SHA-256 of the table.
    """

    values: tuple[float, ...]
    outcomes: Mapping[str, tuple[float, ...]]
    sems: tuple[float | None, ...]
    prompts: tuple[str, ...]
    designs: tuple[Any, ...] | None
    features: Tensor | None
    fingerprint: str


_FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""How a cell begins that a spreadsheet takes for a formula, perhaps escaped."""


def escaped(text: str) -> str:
    """Text as `tiltopt export` writes it into a CSV file: an apostrophe keeps a spreadsheet from running it."""
    return f"'{text}" if _FORMULA.match(text) else text


def unescaped(text: str) -> str:
    """What `escaped` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def csv_of(table: pd.DataFrame) -> bytes:
    """A table as a CSV file of which a spreadsheet runs nothing."""
    safe = table.rename(columns=escaped).map(lambda cell: escaped(cell) if isinstance(cell, str) else cell)
    return safe.to_csv(index=False).encode("utf-8")


def read_measurements(path: str | Path, settings: Settings | None = None) -> Measurements:
    """Reads and checks a table (CSV) of measurements.

    Args:
        settings: of the run: its objectives are columns in the place of `value` and `sem`, and its designs are of its
            type. None: one number per answer, images.

    Raises:
        ConfigError: not such a table, no rows, a value that is not a finite number, or a design that is not there or
            is none.
    """
    settings = settings if settings is not None else Settings()
    objectives, kind = [objective.name for objective in objectives_of(settings)], design_type(settings.design)
    path = Path(path)
    try:
        content = path.read_bytes()
        table = _read(content)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {EXPECTED}, got {error}.") from error
    twice = sorted({name for name in table.columns if list(table.columns).count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: expected each column once, got {', '.join(twice)} several times; keep one of each.")
    widths = [name for name in table.columns if name[:1] == "f" and name[1:].isdigit()]
    missing = [name for name in (objectives or ("value",)) if name not in table]
    if missing or (_column(kind) in table) == bool(widths):
        expected = EXPECTED.replace("`value`", " and ".join(f"`{name}`" for name in objectives or ("value",)))
        raise ConfigError(f"{path}: {expected}, got the columns {', '.join(map(str, table.columns))}.")
    if table.empty:
        raise ConfigError(f"{path}: expected at least one row, got none.")
    has_sem = "sem" in table and not objectives
    sems = _numbers(path, table, "sem", optional=True) if has_sem else [math.nan] * len(table)
    prompts = table["prompt"] if "prompt" in table else [""] * len(table)
    return Measurements(
        values=tuple(_numbers(path, table, objectives[0] if objectives else "value")),
        outcomes={name: tuple(_numbers(path, table, name)) for name in objectives},
        sems=tuple(None if math.isnan(sem) else sem for sem in sems),
        prompts=tuple(unescaped(str(prompt)) for prompt in prompts),
        designs=None if widths else tuple(_designs(path, table, kind)),
        features=_features(path, table, widths) if widths else None,
        fingerprint=hashlib.sha256(content).hexdigest(),
    )


def import_measurements(optimizer: Optimizer, found: Measurements, source: str) -> int:
    """Enters measurements as a round of their own, of the kind "imported", in one transaction; their designs first.

    Args:
        optimizer: the run, open for writing, with nothing outstanding.
        found: the measurements.
        source: where they come from, for the round's notes.

    Returns:
        How many were entered.

    Raises:
        StoreError: queries wait for answers, the same table was imported before, or the features are of another map.
    """
    store = optimizer.store
    if optimizer.settings.pairwise:
        raise StoreError(
            "expected a run whose answers are values, got one of comparisons (model.name = 'pairwise'), which measured "
            "values cannot teach; choose another surrogate."
        )
    names = tuple(objective.name for objective in objectives_of(optimizer.settings))
    if tuple(found.outcomes) != names:
        asked, given = (", ".join(some) or "one number" for some in (names, found.outcomes))
        raise StoreError(f"expected measurements of {asked}, as this run's answers are, got {given}; read them for it.")
    waiting = store.counts()["asked"]
    if waiting:
        raise StoreError(
            f"expected a run with nothing outstanding, got {waiting} queries that wait for an answer; resume the run, "
            "or answer or abandon them, then import."
        )
    mark = f"imported from {source} (SHA-256 {found.fingerprint})"
    if any(found.fingerprint in note for record in store.rounds() for note in record.notes):
        raise StoreError(f"{source} was imported into this run before; its measurements are there already.")
    designs = found.designs or ()
    vectors = found.features if found.features is not None else _see(optimizer, designs, found.prompts)
    with optimizer.entering():
        round_, first = store.next()
        record = RoundRecord(round_, "imported", len(found.values), notes=(mark,))
        origin = Origin("imported")
        new = [
            NewQuery(first + i, i, prompt, 0, pack(vectors[i]), origin=origin) for i, prompt in enumerate(found.prompts)
        ]
        store.reserve(record, [q.number for q in new])
        known = {query.number: design for query, design in zip(new, designs, strict=False)}
        files.write_queries(optimizer.folder, known, optimizer.kind)
        answers = {q.number: known for q, known in zip(new, zip(found.values, found.sems, strict=True), strict=True)}
        outcomes = {
            q.number: {name: (found.outcomes[name][i], None) for name in names} for i, q in enumerate(new) if names
        }
        width = getattr(optimizer.engine, "num_features", None)  # an engine of one's own need not tell
        store.add_round(record, new, optimizer.engine.feature_id, answers, outcomes, width)
        optimizer.checkpoint()
    return len(new)


def _see(optimizer: Optimizer, designs: Sequence[Any], prompts: Sequence[str]) -> Tensor:
    """(n, d) features; designs of one shape are looked at together."""
    rows: dict[int, Tensor] = {}
    shapes = [optimizer.kind.events([design]).shape for design in designs]
    for shape in dict.fromkeys(shapes):
        here = [i for i, other in enumerate(shapes) if other == shape]
        seen = optimizer.engine.features([designs[i] for i in here], [prompts[i] for i in here])
        rows |= dict(zip(here, seen, strict=True))
    return torch.stack([rows[i] for i in range(len(designs))])


def _read(content: bytes) -> pd.DataFrame:
    """The table as text: `None` and `NA` are prompts like any other, and an empty cell is an empty text."""
    table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, skipinitialspace=True, header=None)
    names, rows = table.iloc[0], table.iloc[1:]  # pandas would rename a column that is there twice
    return rows.reset_index(drop=True).set_axis([unescaped(str(name)) for name in names], axis=1)


def _column(kind: DesignType) -> str:
    """Where a table holds the designs."""
    return "image" if kind is IMAGES else "design"


def _designs(path: Path, table: pd.DataFrame, kind: DesignType) -> list[Any]:
    """Of every row: what its file holds, or what its text says where the type can be written so."""
    found = []
    for row, cell in enumerate(table[_column(kind)], start=2):
        said, file = unescaped(cell), path.parent / cell
        where = f"{path}, line {row}: `{_column(kind)}`"
        if kind.written and not file.is_file():
            try:
                found.append(kind.parse(said))
            except ValueError as error:
                raise ConfigError(f"{where}: {error}.") from error
        elif cell and file.is_file():
            found.append(_open(file, kind))
        else:
            raise ConfigError(f"{where} must name a file, got {cell!r}, which is not there.")
    return found


def _open(path: Path, kind: DesignType) -> Any:
    try:
        design = kind.load(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected {'an image' if kind is IMAGES else 'a design'}, got {error}.") from error
    return design.convert("RGB") if kind is IMAGES else design


def _features(path: Path, table: pd.DataFrame, widths: Sequence[str]) -> Tensor:
    names = [f"f{i}" for i in range(len(widths))]
    if sorted(names) != sorted(widths):
        raise ConfigError(f"{path}: expected the feature columns f0 ... f{len(widths) - 1}, got {', '.join(widths)}.")
    columns = [_numbers(path, table, name) for name in names]
    return torch.from_numpy(np.asarray(columns, dtype=np.float32).T.copy())


def _numbers(path: Path, table: pd.DataFrame, name: str, optional: bool = False) -> list[float]:
    numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
    for row, (number, given) in enumerate(zip(numbers, table[name], strict=True), start=2):
        empty = optional and not given.strip()
        if not empty and (not math.isfinite(number) or (name == "sem" and number < 0)):
            kind = "a number >= 0" if name == "sem" else "a finite number"
            raise ConfigError(f"{path}, line {row}: `{name}` must be {kind}, got {given!r}. Nothing was imported.")
    return numbers.tolist()
