"""Which method finds good designs with the fewest answers? On the embedded prior, against honest rivals.

    python -m benchmarks.query_efficiency --minutes 9             # runs cells that are missing, for nine minutes
    python -m benchmarks.query_efficiency --rewards symmetry --methods linear_ucb greedy --seeds 0 --budgets 16+8x4
    python -m benchmarks.query_efficiency --table                 # the table, its JSON, and the picture
    python -m benchmarks.query_efficiency --pooled                # the zoo's reporting rewards in one number

A cell is one run of one method: (reward, method, seed, budget), on given weights. Its line is on the disk the moment it
is done, cells that have a line are not run again, and a cell of the loop that was killed goes on where it stood. So the
benchmark can be run in pieces, in the background, and by several processes with different `--seeds`.
docs/query_efficiency.md says what is compared, and how.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.query_efficiency.cells import Budget, Cell, append, missing, read
from benchmarks.query_efficiency.measure import weights_id
from benchmarks.query_efficiency.methods import METHODS, REWARDS, TUNED, Rivals
from benchmarks.query_efficiency.picture import draw
from benchmarks.query_efficiency.pooled import budgets_of, pooled, told
from benchmarks.query_efficiency.run import Workshop, run_cell
from benchmarks.query_efficiency.table import aggregate, text
from benchmarks.zoo import ZOO
from tiltopt.errors import TiltoptError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "query_efficiency.jsonl"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rewards", nargs="+", choices=list(REWARDS), default=list(TUNED), metavar="REWARD")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=Budget.parse,
        default=["16+8x4", "64+16x4"],
        metavar="N+BxR[:1]",
        help=":1 asks for one prompt alone",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after this long")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table, write JSON and picture")
    parser.add_argument("--pooled", action="store_true", help="run nothing; the default against rivals over the zoo")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines of the finished cells")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints" / "query_efficiency")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pictures" / "query_efficiency.png")
    parser.add_argument("--keep", action="store_true", help="keep the folders of finished runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every method")
    parser.add_argument("--rival", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the rivals")
    options = parser.parse_args(argv)
    options.budgets = [b if isinstance(b, Budget) else Budget.parse(b) for b in options.budgets]
    if bad := [change for change in (*options.set, *options.rival) if "=" not in change]:
        parser.error(f"--set and --rival take KEY=VALUE, got {bad[0]!r}")
    known = {field.name: type(field.default) for field in dataclasses.fields(Rivals)}
    given = dict(change.split("=", 1) for change in options.rival)
    if unknown := [key for key in given if key not in known]:
        parser.error(f"--rival takes {', '.join(known)}, got {unknown[0]!r}")
    options.rivals = Rivals(**{key: known[key](value) for key, value in given.items()})
    return options


def cells_of(options: argparse.Namespace, prior: str) -> list[Cell]:
    """What was asked for, seed by seed, so that an interrupted benchmark holds complete comparisons."""
    return [
        Cell(reward, method, seed, budget, prior)
        for seed in options.seeds
        for budget in options.budgets
        for reward in options.rewards
        for method in options.methods
    ]


def work(
    cells: Sequence[Cell],
    shop: Workshop,
    results: Path,
    minutes: float,
    keep: bool = False,
    one: Callable[[Cell, Workshop], dict[str, Any]] = run_cell,
) -> int:
    """Run the missing cells until the time is up. Returns how many are still missing; a cell that fails is one."""
    started = time.monotonic()
    left = missing(cells, read(results))
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done", flush=True)
    failed = 0
    for number, cell in enumerate(left):
        if time.monotonic() - started > 60 * minutes:
            return len(left) - number + failed
        name = f"{cell.reward} {cell.method} seed {cell.seed} {cell.budget}"
        try:
            row = one(cell, shop)
        except (TiltoptError, RuntimeError, ValueError) as error:
            failed += 1
            print(f"FAILED {name}: {error}", file=sys.stderr, flush=True)
            continue
        append(results, row)
        if not keep:
            shutil.rmtree(shop.folder / "runs" / cell.folder, ignore_errors=True)
        last = row["rounds"][-1]
        print(f"{name}: last round {last['mean']:.4g}, best {last['best']:.4g}, {row['seconds']:.0f} s", flush=True)
    return failed


def show(results: Path, prior: str, picture: Path) -> int:
    """Print the table of the runs on these weights, and write it as JSON beside the results and as a picture."""
    rows = read(results)
    mine = [row for row in rows if row["prior"] == prior]
    if len(mine) < len(rows):
        print(f"{len(rows) - len(mine)} cells were run on other weights and are left out", file=sys.stderr)
    if not mine:
        print(f"no finished cell in {results} for the weights {prior}; run the benchmark first", file=sys.stderr)
        return 1
    blocks = aggregate(mine)
    print(text(blocks))
    dates = sorted({row["date"] for row in mine})
    record = {"prior": prior, "dates": dates, "machine": mine[-1]["machine"], "blocks": blocks}
    results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(blocks, picture)
    return 0


def show_pooled(results: Path, prior: str, rewards: Sequence[str]) -> int:
    """Print the comparison over the rewards of the zoo at every budget, and write it beside the results."""
    rows = [row for row in read(results) if row["prior"] == prior]
    zoo = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text(encoding="utf-8"))["rewards"]
    sds = {name: zoo[name]["sd"] for name in rewards if name in zoo}
    found = [result for budget in budgets_of(rows) if (result := pooled(rows, budget, sds))["rewards"]]
    if not found:
        print(f"no reward of the zoo in {results} has the default, plain samples and a rival", file=sys.stderr)
        return 1
    print("\n\n".join(told(result) for result in found))
    dates = sorted({row["date"] for row in rows if row["reward"] in sds})
    record = {"prior": prior, "dates": dates, "machine": rows[-1]["machine"], "budgets": found}
    path = results.with_name(f"{results.stem}_pooled.json")
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 when nothing is missing or the table was made, 3 when cells are left, 1 on an error."""
    options = parse(argv)
    torch.set_num_threads(1)
    changes = dict(change.split("=", 1) for change in options.set)
    try:
        prior = weights_id(changes.get("prior.path", "embedded"), changes.get("features.path", "embedded"))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.table:
        return show(options.results, prior, options.picture)
    if options.pooled:
        asked = options.rewards if options.rewards != list(TUNED) else [n for n, r in ZOO.items() if r.reporting]
        return show_pooled(options.results, prior, asked)
    shop = Workshop(options.work, tuple(options.set), options.rivals)
    left = work(cells_of(options, prior), shop, options.results, options.minutes, options.keep)
    print("all cells are done; see --table" if left == 0 else f"{left} cells are left", flush=True)
    return 0 if left == 0 else 3


if __name__ == "__main__":
    sys.exit(main())
