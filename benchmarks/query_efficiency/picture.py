"""The table as a picture: the mean answer of every round against the queries asked so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.query_efficiency.methods import METHODS

DASHES = {"ours": "-", "variant": "-.", "baseline": "--"}


def draw(blocks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel per reward (columns) and budget (rows), lines over rounds with 95 % intervals, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rewards = list(dict.fromkeys(b["reward"] for b in blocks))
    budgets = list(dict.fromkeys(b["budget"] for b in blocks))
    figure = Figure(figsize=(3.6 * len(rewards) + 2.6, 3.2 * len(budgets)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(budgets), len(rewards), squeeze=False)
    handles: dict[str, Any] = {}
    for block in blocks:
        panel = axes[budgets.index(block["budget"])][rewards.index(block["reward"])]
        panel.set_title(f"{block['reward']}, {block['budget']}", fontsize=9)
        panel.set_xlabel("queries", fontsize=8)
        panel.tick_params(labelsize=7)
        for name, method in block["methods"].items():
            handles[METHODS[name].label] = _line(panel, name, method)
    axes[0][0].set_ylabel("mean answer of the round", fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _line(panel: Any, name: str, method: Mapping[str, Any]) -> Any:
    """One method in one panel."""
    queries = [r["queries"] for r in method["rounds"]]
    means = [r["mean"]["mean"] for r in method["rounds"]]
    halves = [r["mean"]["half_width"] or 0.0 for r in method["rounds"]]
    kind, colour = METHODS[name].kind, METHODS[name].colour
    low, high = zip(*[(m - h, m + h) for m, h in zip(means, halves, strict=True)], strict=True)
    if kind == "ours":
        panel.fill_between(queries, low, high, color=colour, alpha=0.12, linewidth=0)
    width = 2.2 if kind == "ours" else 1.2
    return panel.plot(queries, means, DASHES[kind], color=colour, linewidth=width, marker="o", markersize=2.5)[0]
