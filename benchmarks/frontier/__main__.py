"""What does a reward cost in fidelity and diversity? Samplers and fine-tuning on the embedded prior.

    python -m benchmarks.frontier --minutes 9          # runs cells that are missing, for nine minutes
    python -m benchmarks.frontier --tune --minutes 9   # the cells on which every method's settings are chosen
    python -m benchmarks.frontier --estimate           # how many cells are in, and hours that the others will take
    python -m benchmarks.frontier --table              # the table, its JSON, and the picture

A cell is one method at one strength for one reward and seed, on given weights; its line is on the disk the moment it is
done, and what has a line is not run again. Settings are chosen on another reward, other prompts and another seed: of
the variants that keep .8 of the plain samples' fidelity the one of highest reward, else the most faithful.
Needs peft (`pip install "tiltopt[lora]"`); the picture matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier.cells import REWARDS, TUNING, TUNING_SEED, Cell, Workshop, run_job
from benchmarks.frontier.methods import EVALUATIONS, METHODS
from benchmarks.frontier.picture import draw
from benchmarks.frontier.table import aggregate, text
from benchmarks.query_efficiency.cells import append, missing, read
from benchmarks.query_efficiency.measure import weights_id
from tiltopt.errors import TiltoptError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "frontier.jsonl"
FAITHFUL = 0.8


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS), metavar="REWARD")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further job after this long")
    parser.add_argument("--tune", action="store_true", help="run the cells on which settings are chosen")
    parser.add_argument("--estimate", action="store_true", help="run nothing; how much is in, and how long is left")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table, write JSON and picture")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines of the finished cells")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints" / "frontier")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pictures" / "frontier.png")
    return parser.parse_args(argv)


def tuning_cells(methods: Sequence[str], prior: str) -> list[Cell]:
    """Every variant of the methods that have several, at their middle strength; and the plain samples."""
    cells = [Cell(TUNING, "prior", TUNING_SEED, 0.0, "", prior)]
    for name in methods:
        known = METHODS[name]
        if len(known.variants) > 1:
            middle = known.strengths[len(known.strengths) // 2]
            cells += [Cell(TUNING, name, TUNING_SEED, middle, variant, prior) for variant in known.variants]
    return cells


def chosen(method: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The variant that the tuning cells speak for; the first where they are missing."""
    variants = METHODS[method].variants
    tuned = [row for row in rows if row["reward"] == TUNING]
    plain = next((row["fidelity"] for row in tuned if row["method"] == "prior"), None)
    found = {row["variant"]: row for row in tuned if row["method"] == method and row["variant"] in variants}
    if len(variants) == 1 or plain is None or set(found) != set(variants):
        return next(iter(variants))
    faithful = {name: row for name, row in found.items() if row["fidelity"] >= FAITHFUL * plain}
    if faithful:
        return max(faithful, key=lambda name: faithful[name]["rewards"][TUNING])
    return max(found, key=lambda name: found[name]["fidelity"])


def cells_of(options: argparse.Namespace, prior: str, rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """What was asked for, seed by seed, so that an interrupted benchmark holds complete comparisons."""
    if options.tune:
        return tuning_cells(options.methods, prior)
    return [
        Cell(reward, method, seed, strength, chosen(method, rows), prior)
        for seed in options.seeds
        for reward in options.rewards
        for method in options.methods
        for strength in METHODS[method].strengths
    ]


def work(cells: Sequence[Cell], shop: Workshop, results: Path, minutes: float) -> int:
    """Run the missing cells, job by job, until the time is up. Returns how many are still missing; those of a job that
    fails are."""
    started, failed = time.monotonic(), 0
    left = missing(cells, read(results))  # type: ignore[arg-type]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done", flush=True)
    jobs = [list(group) for _, group in itertools.groupby(left, key=lambda cell: cell.job)]
    for number, job in enumerate(jobs):
        if time.monotonic() - started > 60 * minutes:
            return sum(map(len, jobs[number:])) + failed
        rest, rows = len(job), run_job(job, shop)
        while rest:
            try:
                row = next(rows)
            except (TiltoptError, RuntimeError, ValueError) as error:
                failed += rest
                print(f"FAILED {' '.join(map(str, job[0].key[:4]))}: {error}", file=sys.stderr, flush=True)
                break
            rest -= 1
            append(results, row)
            name = f"{row['reward']} {row['method']} seed {row['seed']} strength {row['budget']}"
            kept = f"fidelity {row['fidelity'] or 0:.2f}, diversity {row['diversity']:.3f}"
            print(
                f"{name}: {row['rewards'][row['reward']]:.4g}, {kept}, {row['evaluations']:.0f} evaluations a picture, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
    return failed


def estimate(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> str:
    """How many cells are in, and processor hours of the others: at what an evaluation took in the cells of the same
    method, else in all cells."""
    left = missing(cells, rows)  # type: ignore[arg-type]
    told = f"{len(cells) - len(left)} of {len(cells)} cells are in"
    if not rows:
        return f"{told}; run one to know how long the others take"

    def rate(some: Sequence[Mapping[str, Any]]) -> float:
        last = [row for row in some if not METHODS[row["method"]].together]
        ends = {
            (r["method"], r["reward"], r["seed"], r["variant"]): r for r in sorted(some, key=_strength) if r not in last
        }
        counted = [*last, *ends.values()]  # seconds and evaluations of a job's last cell are of the whole job
        return sum(row["seconds"] for row in counted) / sum(row["evaluations"] * row["pictures"] for row in counted)

    hours = 0.0
    for cell in left:
        same = [row for row in rows if row["method"] == cell.method]
        hours += rate(same or rows) * planned(cell) * rows[-1]["pictures"] / 3600
    return f"{told}; the others take about {hours:.1f} processor hours"


def _strength(row: Mapping[str, Any]) -> float:
    return float(row["strength"])


def planned(cell: Cell) -> float:
    """Evaluations per picture, about; of a job that gives several cells an equal part for each."""
    method = METHODS[cell.method]
    if method.kind == "train":
        return EVALUATIONS * max(method.strengths) / len(method.strengths)
    if method.kind == "chains":
        return EVALUATIONS / len(method.strengths)
    if method.kind == "noises":
        return EVALUATIONS * cell.strength / max(method.strengths)
    return EVALUATIONS if method.kind == "price" else EVALUATIONS / 12


def show(results: Path, prior: str, picture: Path) -> int:
    """Print the table of the cells on these weights, and write it as JSON beside the results and as a picture."""
    rows = read(results)
    mine = [row for row in rows if row["prior"] == prior]
    reported = [row for row in mine if row["reward"] != TUNING and row["variant"] == chosen(row["method"], mine)]
    if not reported:
        print(f"no finished cell in {results} for the weights {prior}; run the benchmark first", file=sys.stderr)
        return 1
    blocks = aggregate(reported)
    print(text(blocks))
    record = {
        "prior": prior,
        "dates": sorted({row["date"] for row in reported}),
        "machine": reported[-1]["machine"],
        "settings": {name: chosen(name, mine) for name in METHODS if len(METHODS[name].variants) > 1},
        "blocks": blocks,
        "cells": mine,
    }
    results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(blocks, picture)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 when nothing is missing or the table was made, 3 when cells are left, 1 on an error."""
    options = parse(argv)
    torch.set_num_threads(1)
    prior, rows = weights_id(), read(options.results)
    if options.table:
        return show(options.results, prior, options.picture)
    cells = cells_of(options, prior, rows)
    if options.estimate:
        print(estimate(cells, rows))
        return 0
    left = work(cells, Workshop(options.work), options.results, options.minutes)
    print("all cells are done; see --table" if left == 0 else f"{left} cells are left", flush=True)
    return 0 if left == 0 else 3


if __name__ == "__main__":
    sys.exit(main())
