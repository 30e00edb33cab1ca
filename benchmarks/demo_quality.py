"""Does the demo do what it claims? Three seeds, each judged by the numbers that its run writes.

    python benchmarks/demo_quality.py                          # under two minutes a seed on two CPU cores
    python benchmarks/demo_quality.py --runs checkpoints/a checkpoints/b   # of finished runs

For every seed: the mean answer of the last round must lie above the 95th percentile of plain samples of the prior on
the same prompts, and above what best-of-N reaches with as many queries; the independent judge must recognise 0.8 times
as many of its pictures as of the prior's, or more; time and memory must stay within what README promises.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tiltopt.cli import main as tiltopt
from tiltopt.online.report.text import table

RESULT = Path(__file__).parent / "results" / "demo_quality.json"


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one run, and whether each claim holds."""
    last, prior = summary["rounds"][-1], summary["prior"]
    return {
        "seed": summary["settings"]["seed"],
        "prior_mean": prior["mean"],
        "prior_p95": prior["p95"],
        "best_of_n": summary["best_of_n"],
        "last_mean": last["mean"],
        "best": max(row["best"] for row in summary["rounds"]),
        "prior_fidelity": prior["fidelity"],
        "last_fidelity": last["fidelity"],
        "queries": last["queries"],
        "seconds": summary["seconds"],
        "peak_memory_mb": summary["peak_memory_mb"],
        "beats_p95": last["mean"] > prior["p95"],
        "beats_best_of_n": last["mean"] > summary["best_of_n"],
        "keeps_fidelity": last["fidelity"] >= 0.8 * prior["fidelity"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, nargs="*", help="these finished runs instead")
    parser.add_argument("--config", default="config/ucb.py:demo")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/demo_quality"))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    folders = options.runs or []
    for seed in [] if options.runs else options.seeds:
        folder = options.folder / f"seed_{seed}"
        if not (folder / "summary.json").is_file():
            arguments = [f"--config={options.config}", f"--config.run_dir={folder}", f"--config.seed={seed}"]
            if tiltopt(["run", *arguments]) != 0:
                return 1
        folders.append(folder)
    rows = [figures(json.loads((folder / "summary.json").read_text(encoding="utf-8"))) for folder in folders]
    held = all(row["beats_p95"] and row["beats_best_of_n"] and row["keeps_fidelity"] for row in rows)
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(table(list(rows[0]), cells))
    print("all claims hold" if held else "NOT all claims hold")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    record = {
        "date": date.today().isoformat(),
        "machine": machine,
        "config": options.config,
        "runs": rows,
        "held": held,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
