"""The runs in a folder, as a page of all of them shows them: read again only when their files have changed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltopt.errors import ConfigError, TiltoptError
from tiltopt.online.report import charts, gallery
from tiltopt.online.report.record import RunRecord, load_run, summarise
from tiltopt.online.settings.source import PERSON
from tiltopt.online.store import files

DEPTH = 3
"""Folders below the one that is served in which runs are looked for."""

WATCHED = ("config.json", "queries.sqlite", "queries.sqlite-wal", "store.json", "summary.json", "results.jsonl")
"""Files of a run whose change means that there is something new to see."""


@dataclass(frozen=True)
class Seen:
    """A run as it was when its files last changed.

    Args:
        record: None where it cannot be read.
        trouble: why.
    """

    record: RunRecord | None
    trouble: str = ""


class Runs:
    """Looks for runs and keeps what was read of each. Safe to call from several threads.

    Args:
        folder: a run's, or one that holds runs.

    Raises:
        ConfigError: no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = files.folder_there(folder, "a folder that holds runs")
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[str, Seen]] = {}

    def places(self) -> dict[str, Path]:
        """A short name for addresses -> the folder of each run, in the order of their paths."""
        found = []
        for root, inner, names in os.walk(self.folder):
            place = Path(root)
            inner[:] = sorted(inner) if len(place.relative_to(self.folder).parts) < DEPTH else []
            if any(name in names for name in ("config.json", "store.json")):
                found.append(place)
                inner.clear()
        return {hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:10]: place for place in found}

    def place(self, key: str) -> Path | None:
        """The run's folder, None for a name that no run has."""
        return self.places().get(key)

    def name(self, place: Path) -> str:
        """How the run is called on the page."""
        return str(place.relative_to(self.folder)) if place != self.folder else place.resolve().name

    def stamp(self, key: str | None = None) -> str:
        """Changes whenever a run does; without a key, whenever any does or one comes or goes."""
        places = self.places() if key is None else {key: self.place(key)}
        told = [(key, _stamp(place)) for key, place in places.items() if place is not None]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def seen(self, key: str) -> Seen:
        """The run as it is now.

        Raises:
            ConfigError: no such run.
        """
        place = self.place(key)
        if place is None:
            raise ConfigError(f"no run {key!r} in {self.folder}.")
        stamp = _stamp(place)
        with self._lock:
            known = self._seen.get(key)
            if known is None or known[0] != stamp:
                known = (stamp, _read(place))
                self._seen[key] = known
            return known[1]

    def rows(self) -> list[dict[str, Any]]:
        """One row per run, the newest first; see `row`."""
        found = [(_touched(place), row(key, self.name(place), self.seen(key))) for key, place in self.places().items()]
        return [told for _, told in sorted(found, key=lambda pair: pair[0], reverse=True)]


def row(key: str, name: str, seen: Seen) -> dict[str, Any]:
    """What the list says of a run: `key`, `name`, `state`, `budget` (answers of those planned), and as text `reward`,
    `best`, `last` (mean of the last round), `gain` (that minus the prior's mean), `lift` (share of the last round above
    the prior's 95th percentile, over 5 %), `trouble`; `rated`: whether a person
    can rate it from here; `picture`: of the best answer that is recognised, as a `data:` address."""
    record = seen.record
    blank = dict.fromkeys(("reward", "budget", "best", "last", "gain", "lift", "unit", "picture"), "")
    if record is None:
        return blank | {"key": key, "name": name, "state": "not readable", "trouble": seen.trouble, "rated": False}
    summary = summarise(record)
    rounds = [round_ for round_ in summary["rounds"] if round_.get("mean") is not None]
    last, prior = (rounds[-1]["mean"] if rounds else None), summary["prior"].get("mean")
    places = charts.decimals_for(record.queries["value"].astype(float).dropna())
    planned = planned_queries(record.settings)
    return blank | {
        "key": key,
        "name": name,
        "state": state(record),
        "reward": summary["reward"],
        "unit": summary["unit"],
        "budget": f"{summary['answered']} of {planned}" if planned else str(summary["answered"]),
        "best": charts.number(max((round_["best"] for round_ in rounds), default=None), places),
        "last": charts.number(last, places),
        "gain": "–" if last is None or prior is None else f"{last - prior:+.{places}f}",
        "lift": charts.number(rounds[-1].get("mass_lift") if rounds else None, 1),
        "trouble": f"{summary['failed']} failed" if summary["failed"] else "",
        "rated": rateable(record),
        "picture": (gallery.hero(record, places, "") or {"uri": ""})["uri"],
    }


def state(record: RunRecord) -> str:
    """Complete, running (a process has the right to write it), waiting for a person or Python, or stopped."""
    writer = files.writer(record.folder)
    if record.complete:
        return "complete"
    if writer is not None:
        return "open here" if writer == os.getpid() else "running"
    waiting = int((record.queries["state"] == "asked").sum())
    return f"stopped, {waiting} waiting" if waiting else "stopped"


def rateable(record: RunRecord) -> bool:
    """Whether a person answers this run, or may begin to."""
    source, named = record.source, dict(record.settings.get("reward", {})).get("name")
    if record.evaluation:
        return False
    return source == PERSON or (source is not None and source.kind == "ask/tell" and not record.told and not named)


def planned_queries(settings: Mapping[str, Any]) -> int:
    """Queries of the whole run, or the budget where that is less; 0 where the settings do not say."""
    if "rounds" not in settings:
        return 0
    first, later = int(settings["initial_batch_size"]), int(settings["batch_size"])
    evaluated = dict(settings.get("evaluate", {}))
    if evaluated.get("surrogate"):  # every round has the pairs of all seeds and prompt lists
        first = later = later * int(evaluated.get("seeds", 1)) * (2 if evaluated.get("seen") else 1)
    planned = first + int(settings["rounds"]) * later
    budget = dict(settings.get("reward", {})).get("max_queries")
    return planned if budget is None else min(planned, int(budget))


def _read(place: Path) -> Seen:
    try:
        return Seen(load_run(place))
    except (TiltoptError, OSError, KeyError, ValueError) as error:  # a run that somebody is just making or moving
        return Seen(None, f"{type(error).__name__}: {error}")


def _stamp(place: Path) -> str:
    return repr([_facts(place / name) for name in WATCHED] + [files.writer(place)])


def _touched(place: Path) -> int:
    return max((fact[0] for name in WATCHED if (fact := _facts(place / name)) is not None), default=0)


def _facts(path: Path) -> tuple[int, int] | None:
    """When a file was written and how long it is; None where there is none."""
    try:
        known = path.stat()
    except OSError:
        return None
    return known.st_mtime_ns, known.st_size


def compared(runs: Runs, keys: Sequence[str]) -> list[RunRecord]:
    """The records of several runs.

    Raises:
        ConfigError: fewer than two, an unknown one, or one that cannot be read.
    """
    unique = list(dict.fromkeys(keys))
    if len(unique) < 2:
        raise ConfigError(f"expected two or more runs to compare, got {len(unique)}.")
    found = []
    for key in unique:
        seen = runs.seen(key)
        if seen.record is None:
            raise ConfigError(seen.trouble)
        found.append(seen.record)
    return found
