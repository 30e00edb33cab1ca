"""Faults by the hundred: `python -m tests.fakes.faults --each 200 --seed 7 --json benchmarks/results/faults.json`.

Prints, for every kind of run, how many faults of each sort struck and everything that went wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.fakes.faults.book import Book
from tests.fakes.faults.faults import Fault, What, draw_fault
from tests.fakes.faults.runs import KINDS, Plain
from tests.fakes.faults.trial import Trial

SIZES = {"refuse": 0.3, "full": 0.3, "clock": -1e6}
"""Of the faults of a sweep."""


def warm_up(kind: Plain, root: Path) -> tuple[dict[str, Any], int, float]:
    """A run without faults in this process, so that its forks have everything imported, and one in a fork.

    Returns:
        What a run ends as, its write boundaries, and how many seconds it takes.
    """
    here = Trial(kind, root / "warm")
    kind.carry_on(here.folder, {}, kind.box(here.book, 0))
    trial = Trial(kind, root / "reference")
    started = time.monotonic()
    made = trial.attempt()
    seconds = time.monotonic() - started
    if made.ending != "complete":
        raise RuntimeError(f"a run without faults ended {made.ending}: {made.words}")
    return kind.digest(trial.folder), made.boundaries, seconds


def draw_terms(rng: random.Random, queries: int) -> Mapping[str, Any]:
    """Budgets and rules of one trial: none in half of them."""
    choice = rng.choice(("none", "none", "none", "max_queries", "max_calls", "leave"))
    if choice == "leave":
        return {"on_unknown": "leave"}
    return {} if choice == "none" else {choice: rng.randrange(2, queries + 4)}


def storm(kind: Plain, root: Path, faults: int, seed: int) -> dict[str, Any]:
    """Trials with one to three faults each until so many have struck."""
    rng = random.Random(f"{type(kind).__name__} {seed}")
    reference, boundaries, seconds = warm_up(kind, root)
    lines = len(Book(root / "reference.book").lines())
    started = time.monotonic()
    struck: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    wrong: list[str] = []
    unbooked: list[float] = []
    trials = 0
    while sum(struck.values()) < faults:
        terms = draw_terms(rng, len(reference["queries"]))
        trial = Trial(kind, root / f"trial_{trials:04d}", terms, flaky=rng.random() < 0.3)
        for _ in range(rng.choice((1, 1, 2, 3))):
            made = trial.attempt(draw_fault(rng, boundaries, lines, seconds), beside=rng.randrange(kind.at_once))
            struck[made.fault.what] += made.struck
            endings[f"{made.fault.what}: {made.ending}"] += made.struck
            if made.over:
                break
        trial.finish()
        wrong += [f"{trial.history()}: {what}" for what in trial.wrong(reference if not terms else None)]
        unbooked += trial.unbooked()
        trials += 1
    return {
        "faults": dict(struck),
        "endings": dict(sorted(endings.items())),
        "trials": trials,
        "wrong": wrong,
        "most_seconds_unbooked_by_a_kill": round(max(unbooked, default=0.0), 3),
        "boundaries_of_one_run": boundaries,
        "seconds_of_one_run": round(seconds, 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def sweep(kind: Plain, root: Path, step: int, what: What) -> dict[str, Any]:
    """A run that meets the same fault at every `step`-th of its write boundaries."""
    reference, boundaries, _ = warm_up(kind, root)
    wrong: list[str] = []
    struck: Counter[str] = Counter()
    for at in range(1, boundaries + 1, step):
        trial = Trial(kind, root / f"boundary_{at:04d}")
        made = trial.attempt(Fault(what, at, size=SIZES.get(what, 0.0)))
        struck[made.ending] += made.struck
        trial.finish()
        wrong += [f"{trial.history()}: {what}" for what in trial.wrong(reference)]
    return {"boundaries": boundaries, "struck": dict(struck), "wrong": wrong, "queries": len(reference["queries"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--each", type=int, default=20, help="faults of each kind of run")
    parser.add_argument("--sweep", type=int, default=0, metavar="STEP", help="the same fault at each STEP-th boundary")
    parser.add_argument("--what", default="kill", choices=typing.get_args(What), help="the fault of a sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write what is printed")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # the threads of a parent do not live in its forks
    shared = Path("/dev/shm")  # what is tested is the order of writes, not the disk
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tiltopt-", dir=shared if os.access(shared, os.W_OK) else None) as folder:
        for name in options.kinds:
            root = Path(folder) / name
            root.mkdir()
            print(name, file=sys.stderr, flush=True)
            with KINDS[name].prepared(root) as kind:
                found[name] = (
                    sweep(kind, root, options.sweep, options.what)
                    if options.sweep
                    else storm(kind, root, options.each, options.seed)
                )
    machine = {"cores": os.cpu_count(), "platform": platform.platform(), "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({"machine": machine, "seed": options.seed, "kinds": found}, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(kind["wrong"] for kind in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
