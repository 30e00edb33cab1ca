"""Many rewards in one number: the default against the best rival of each, in standard deviations of the prior.

    python -m benchmarks.query_efficiency --pooled        # the rewards of the zoo that are set aside for reporting

For every reward the rival is the one with the best mean among those that keep `FAITHFUL` of the prior's fidelity in
all their tilted rounds together. It is chosen after the fact and with all seeds, which favours it. Differences are
paired by seed; the interval of the pooled mean is a bootstrap over rewards, and over the seeds of each.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.query_efficiency.cells import Budget
from benchmarks.query_efficiency.methods import ABLATIONS, DEFAULT, METHODS
from benchmarks.query_efficiency.table import FAITHFUL, interval
from tiltopt.online.report.text import table

Row = Mapping[str, Any]
WHAT = {"kept": "what is kept", "mean": "the last round's mean"}
DRAWS = 10_000


def pooled(rows: Sequence[Row], budget: str, sds: Mapping[str, float]) -> dict[str, Any]:
    """The comparison at one budget.

    Args:
        rows: finished cells.
        sds: standard deviation of plain samples of each reward to be pooled, reward units.

    Returns:
        `rewards` (a dictionary for each reward in which the default, plain samples and a rival have run: `seeds`,
        `fidelity` and `gain` of every method, and for `kept` and `mean` the best rival, the paired difference to it and
        to each ablation with its interval, all in sd), and `all` (for `kept` and `mean`: the mean over rewards, its
        95 % interval, how many are at least .5 and at least -.1, of how many; and the default's mean fidelity).
    """
    rows = [row for row in rows if row["budget"] == budget and row["reward"] in sds]
    found = {}
    for reward, sd in sds.items():
        of = {name: {r["seed"]: r for r in rows if (r["reward"], r["method"]) == (reward, name)} for name in METHODS}
        present = [name for name, cells in of.items() if cells]
        rivals = [n for n in present if METHODS[n].kind == "baseline" and n not in (*ABLATIONS, "prior")]
        if DEFAULT in present and "prior" in present and rivals:
            seeds = sorted(set.intersection(*[set(of[name]) for name in present]))
            if seeds:
                found[reward] = _reward({n: [of[n][s] for s in seeds] for n in present}, rivals, seeds, sd)
    together = {}
    for what in WHAT:
        differences = [entry[what]["each"] for entry in found.values()]
        if differences:
            means = [statistics.fmean(each) for each in differences]
            low, high = bootstrap(differences)
            together[what] = {
                "mean": statistics.fmean(means),
                "low": low,
                "high": high,
                "at_least_half": sum(m >= 0.5 for m in means),
                "not_worse": sum(m >= -0.1 for m in means),
                "of": len(means),
            }
    fidelity = [entry["fidelity"][DEFAULT] for entry in found.values()]
    return {
        "budget": budget,
        "rewards": found,
        "all": together | ({"fidelity": statistics.fmean(fidelity), "least": min(fidelity)} if fidelity else {}),
    }


def _reward(of: Mapping[str, Sequence[Row]], rivals: Sequence[str], seeds: Sequence[int], sd: float) -> dict[str, Any]:
    """One reward: every method's cells, in the order of the same seeds."""
    prior = tilted_fidelity(of["prior"])
    fidelity = {name: tilted_fidelity(cells) / prior for name, cells in of.items()}
    ends = {
        what: {name: [row["rounds"][-1][what] / sd for row in cells] for name, cells in of.items()} for what in WHAT
    }
    entry: dict[str, Any] = {"seeds": list(seeds), "fidelity": fidelity}
    base = statistics.fmean(row["rounds"][-1]["mean"] / sd for row in of["prior"])
    entry["gain"] = {name: statistics.fmean(ends["mean"][name]) - base for name in of}
    for what, values in ends.items():
        faithful = [name for name in rivals if fidelity[name] >= FAITHFUL]
        rival = max(faithful, key=lambda name: statistics.fmean(values[name]))
        each = _paired(values[DEFAULT], values[rival])
        entry[what] = {
            "rival": rival,
            "each": each,
            "difference": interval(each),
            "ablations": {n: interval(_paired(values[DEFAULT], values[n])) for n in ABLATIONS if n in values},
        }
    others = [name for name in of if name in ("version_0_1", entry["kept"]["rival"])]
    entry["half"] = {name: half_the_queries(of[DEFAULT], of[name]) for name in others}
    return entry


def _paired(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def tilted_fidelity(cells: Sequence[Row]) -> float:
    """Share of the pictures of all rounds but round 0, over all seeds, that the judge recognises.

    Rounds of a cell are equally large after round 0.
    """
    return statistics.fmean(r["fidelity"] for row in cells for r in row["rounds"][1:])


def half_the_queries(ours: Sequence[Row], theirs: Sequence[Row]) -> bool:
    """Whether ours keeps as much after half of the tilted queries as the other at its end, by the mean over seeds."""
    half = (len(ours[0]["rounds"]) - 1) // 2
    end = statistics.fmean(row["rounds"][-1]["kept"] for row in theirs)
    return statistics.fmean(row["rounds"][half]["kept"] for row in ours) >= end


def bootstrap(differences: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over rewards of the mean over seeds, both drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    rows = [np.asarray(each) for each in differences]
    for i in range(draws):
        chosen = rng.integers(len(rows), size=len(rows))
        means[i] = np.mean([rows[j][rng.integers(len(rows[j]), size=len(rows[j]))].mean() for j in chosen])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def told(result: Mapping[str, Any]) -> str:
    """The comparison for people."""
    head = ["reward", "seeds", "gain, sd", "fidelity", "kept less best rival's", "rival", "mean less best rival's"]
    head += ["rival", "kept less 0.1's"]
    lines = []
    for reward, entry in result["rewards"].items():
        kept, mean = entry["kept"], entry["mean"]
        older = kept["ablations"].get("version_0_1")
        gain, fidelity = entry["gain"][DEFAULT], entry["fidelity"][DEFAULT]
        first = [reward, str(len(entry["seeds"])), f"{gain:.2f}", f"{fidelity:.2f}"]
        rest = [_shown(kept["difference"]), kept["rival"], _shown(mean["difference"]), mean["rival"]]
        lines.append([*first, *rest, "" if older is None else _shown(older)])
    parts = [f"{result['budget']}, in standard deviations of the prior", table(head, lines)]
    for what, words in WHAT.items():
        if what in result["all"]:
            x = result["all"][what]
            parts.append(
                f"{words}: {x['mean']:+.2f} sd over the best rival of each reward, 95 % {x['low']:+.2f} to "
                f"{x['high']:+.2f}; at least .5 on {x['at_least_half']}, not worse than -.1 on {x['not_worse']} of "
                f"{x['of']}"
            )
    if "fidelity" in result["all"]:
        parts.append(
            f"fidelity {result['all']['fidelity']:.2f} of the prior's, {result['all']['least']:.2f} at the least"
        )
    return "\n".join(parts)


def _shown(x: Mapping[str, Any]) -> str:
    return f"{x['mean']:+.2f}" + ("" if x["half_width"] is None else f" ± {x['half_width']:.2f}")


def budgets_of(rows: Sequence[Row]) -> list[str]:
    """The budgets that have cells, the smallest first."""
    return sorted({row["budget"] for row in rows}, key=lambda text: Budget.parse(text).total)
