"""The frontiers as a picture: what is kept against the reward, a line per method through its strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier.methods import METHODS, OURS
from benchmarks.frontier.table import KEPT

COLOURS = {
    "prior": "#999999",
    "das": "#000000",
    "das_published": "#0072B2",
    "fk_steering": "#E69F00",
    "tds": "#56B4E9",
    "best_of_n": "#666666",
    "guidance": "#D55E00",
    "demon": "#CC79A7",
    "policy_gradient": "#009E73",
    "backpropagation": "#882255",
}
MARKS = {"price": "o", "chains": "s", "noises": "D", "train": "^", "plain": "*"}


def draw(blocks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel per reward (columns) and for fidelity and diversity (rows), means over seeds, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.8 * len(blocks) + 2.6, 3.2 * len(KEPT)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(KEPT), len(blocks), squeeze=False)
    handles: dict[str, Any] = {}
    for column, block in enumerate(blocks):
        for row, what in enumerate(KEPT):
            panel = axes[row][column]
            panel.tick_params(labelsize=7)
            panel.set_xlabel(block["reward"], fontsize=8)
            panel.set_ylabel(what, fontsize=8)
            for name, points in block["methods"].items():
                handles[METHODS[name].label] = _line(panel, name, block["reward"], points, what)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _line(panel: Any, name: str, reward: str, points: Sequence[Mapping[str, Any]], what: str) -> Any:
    known = [point for point in points if point[what]["mean"] is not None]
    x, y = [point["rewards"][reward]["mean"] for point in known], [point[what]["mean"] for point in known]
    style = {"color": COLOURS[name], "linewidth": 2.2 if name == OURS else 1.2, "markersize": 4}
    return panel.plot(x, y, "-", marker=MARKS[METHODS[name].kind], **style)[0]
