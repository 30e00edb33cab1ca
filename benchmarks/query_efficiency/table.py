"""From finished cells to the numbers that are compared: means over seeds with 95 % intervals, and queries to a goal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy import stats

from benchmarks.query_efficiency.cells import Budget
from benchmarks.query_efficiency.methods import ABLATIONS, DEFAULT, METHODS
from tiltopt.online.report.text import table

Row = Mapping[str, Any]


def interval(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Mean over seeds and the half width of its 95 % t interval, t_{.975, n-1} s / sqrt(n); None for one seed."""
    x = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not x:
        return {"mean": None, "half_width": None, "n": 0}
    half = None
    if len(x) > 1:
        half = float(stats.t.ppf(0.975, len(x) - 1)) * statistics.stdev(x) / math.sqrt(len(x))
    return {"mean": statistics.fmean(x), "half_width": half, "n": len(x)}


def aggregate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One block per reward and budget: every method's rounds, last round and cost, and the queries to the goal."""
    groups = sorted({(row["reward"], row["budget"]) for row in rows}, key=lambda g: (g[0], -Budget.parse(g[1]).total))
    return [_block(reward, Budget.parse(budget), rows) for reward, budget in groups]


def _block(reward: str, budget: Budget, rows: Sequence[Row]) -> dict[str, Any]:
    rows = [r for r in rows if (r["reward"], r["budget"]) == (reward, str(budget))]
    present = [name for name in METHODS if any(r["method"] == name for r in rows)]
    methods = {name: _method([r for r in rows if r["method"] == name]) for name in present}
    _relate(methods)
    common = _common(methods, rows)
    goals = {key: goal(common, budget, what, without) for key, (_, what, without) in GOALS.items()}
    return {"reward": reward, "budget": str(budget), "methods": methods, **goals, "reached": reached(common)}


def _relate(methods: dict[str, Any]) -> None:
    """Adds each method's fidelity as a share of that of plain samples; None where either is missing."""
    plain = methods.get("prior", {}).get("fidelity", {}).get("mean")
    for summary in methods.values():
        mean = summary["fidelity"]["mean"]
        summary["fidelity_of_prior"] = None if not plain or mean is None else mean / plain


def _common(methods: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Our default and the baselines on the seeds that all of them have run: a goal compares like with like."""
    methods = {name: m for name, m in methods.items() if METHODS[name].kind != "variant"}
    seeds = set.intersection(*[set(m["seeds"]) for m in methods.values()]) if methods else set()
    if not seeds:
        return {}
    common = {name: _method([r for r in rows if r["method"] == name and r["seed"] in seeds]) for name in methods}
    _relate(common)
    return common


def _method(rows: Sequence[Row]) -> dict[str, Any]:
    """One method on one reward and budget, over its seeds."""
    rounds = [
        {"queries": row["queries"]} | {key: interval(r["rounds"][i].get(key) for r in rows) for key in ("mean", "kept")}
        for i, row in enumerate(rows[0]["rounds"])
    ]
    last = [row["rounds"][-1] for row in rows]
    return {
        "seeds": sorted(row["seed"] for row in rows),
        "rounds": rounds,
        "last": rounds[-1]["mean"],
        "best": interval(r["best"] for r in last),
        "kept": rounds[-1]["kept"],
        "fidelity": interval(r["fidelity"] for r in last),
        "diversity": interval(r["diversity"] for r in last),
        "evaluations": interval(row["evaluations"] for row in rows),
        "of_training": interval(row.get("of_training", 0) for row in rows),
        "seconds": interval(row["seconds"] for row in rows),
    }


FAITHFUL = 0.8
"""Share of the prior's fidelity that a method must keep; a baseline that does not sets no goal."""


GOALS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "goal": ("mean of the round", "mean", ()),
    "goal_others": ("mean of the round, without our own ablations", "mean", ABLATIONS),
    "kept_goal": ("best batch so far", "kept", ()),
    "kept_goal_others": ("best batch so far, without our own ablations", "kept", ABLATIONS),
}
"""What the default is held to: (how it is called, what is compared, baselines left out)."""


def goal(
    methods: Mapping[str, Any], budget: Budget, what: str = "mean", without: Sequence[str] = ()
) -> dict[str, Any] | None:
    """After how many queries our default reached what the best faithful baseline has at its end.

    Args:
        methods: summaries over common seeds.
        what: `mean`, the mean answer of a round (for best-of-N that of its best batch so far); or `kept`, the mean of
            the best batch so far, the same for every method.
        without: baselines that set no goal.

    Returns:
        `set_aside` (baselines that paid for their reward with fidelity, which set no goal), `baseline`, `value` (its
        mean over seeds), `queries` (of our default, at the end of the first round whose mean over seeds is as high;
        None if no round is), and `tilted_queries` (those of them after round 0, which is the same plain samples for
        every method and teaches only); None unless our default and a baseline have run.
    """
    ratios = {n: m.get("fidelity_of_prior") for n, m in methods.items() if METHODS[n].kind == "baseline"}
    set_aside = [n for n, ratio in ratios.items() if ratio is not None and ratio < FAITHFUL]
    ends = {n: methods[n]["rounds"][-1][what]["mean"] for n in ratios if n not in (*set_aside, *without)}
    ends = {n: value for n, value in ends.items() if value is not None}
    if DEFAULT not in methods or not ends:
        return None
    name = max(ends, key=ends.__getitem__)
    queries = _first(methods[DEFAULT]["rounds"], what, ends[name])
    return {
        "set_aside": set_aside,
        "baseline": name,
        "value": ends[name],
        "queries": queries,
        "tilted_queries": None if queries is None else queries - budget.initial,
        "of": budget.total,
        "tilted_of": budget.total - budget.initial,
    }


def reached(methods: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """After how many queries our default reached the end of each baseline: {baseline: {"mean": ..., "kept": ...}}.

    None: not at all, or not recorded. Empty where our default has not run.
    """
    if DEFAULT not in methods:
        return {}
    ours, found = methods[DEFAULT]["rounds"], {}
    for name in (n for n in methods if METHODS[n].kind == "baseline"):
        end = methods[name]["rounds"][-1]
        found[name] = {what: _first(ours, what, end[what]["mean"]) for what in ("mean", "kept")}
    return found


def _first(rounds: Sequence[Mapping[str, Any]], what: str, value: float | None) -> int | None:
    """Queries after the first round that is as high as `value`."""
    ours = ((r["queries"], r[what]["mean"]) for r in rounds)
    return next((n for n, mean in ours if None not in (mean, value) and mean >= value), None)


def text(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""
    parts = []
    for block in blocks:
        cells = []
        for name, m in block["methods"].items():
            numbers = [m[key] for key in ("last", "kept", "best", "fidelity", "diversity")]
            ratio = m["fidelity_of_prior"]
            cells.append(
                [METHODS[name].label, *map(shown, numbers), "" if ratio is None else f"{ratio:.2f}",
                 f"{m['evaluations']['mean']:.0f}", f"{m['of_training']['mean']:.0f}", f"{m['seconds']['mean']:.0f}",
                 str(len(m["seeds"]))]
            )  # fmt: skip
        head = [
            "method",
            "last round",
            "kept",
            "best",
            "fidelity",
            "diversity",
            "of prior's",
            "evaluations",
            "of training",
            "seconds",
            "seeds",
        ]
        parts.append(f"{block['reward']}, {block['budget']} queries\n{table(head, cells)}\n{sentence(block)}")
    return "\n\n".join(parts)


def shown(x: Mapping[str, Any]) -> str:
    """mean +- half width, three significant digits."""
    if x["mean"] is None:
        return "-"
    return f"{x['mean']:.3g}" + ("" if x["half_width"] is None else f" ± {x['half_width']:.2g}")


def sentence(block: Mapping[str, Any]) -> str:
    """The goals in words."""
    if block["goal"] is None:
        return "no comparison yet: our default and at least one baseline must have run on a common seed."
    return "\n".join(f"{name}: {_reached(block[key])}" for key, (name, _, _) in GOALS.items() if block[key] is not None)


def _reached(goal: Mapping[str, Any]) -> str:
    label = METHODS[goal["baseline"]].label
    best = f"the best baseline that keeps {FAITHFUL} of the prior's fidelity, {label}, ends at {goal['value']:.4g}"
    if goal["queries"] is None:
        return f"{best}; our default has not reached that in {goal['of']} queries."
    return (
        f"{best}; our default reached that after {goal['queries']} of {goal['of']} queries, "
        f"{goal['tilted_queries']} of {goal['tilted_of']} after round 0."
    )
