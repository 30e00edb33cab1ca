"""The pictures of a page as inline SVG, drawn by matplotlib: rewards over queries, predictions against answers, runs
beside each other, frontiers.

Colours and text come from the page's style sheet, so the pictures follow its light and dark themes. A dot that stands
for a query links to it (`#query-12`).
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from tiltopt.surrogates.calibration import Z90

MAX_DOTS = 1500
"""Answers drawn one by one in a picture; beyond that every m-th is drawn."""

RUNS = 6
"""Colours of runs; beyond that they are used again."""

NAMES = ("card", "line", "muted", "prior", "mean", "best", "predicted", "miss", *(f"run-{i}" for i in range(RUNS)))
COLOURS = {name: f"#0000{i:02x}" for i, name in enumerate(NAMES)}
"""Stand-ins for the colours of the style sheet, which matplotlib does not know."""

SIZE = 12
"""Of text, SVG units."""

_alone = threading.Lock()  # what matplotlib is set to is of the whole process


def number(value: float | None, decimals: int) -> str:
    """With fixed decimals and a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("-", "−") if float(text) != 0 else text.removeprefix("-")


def decimals_for(values: Sequence[float]) -> int:
    """Decimals that show two digits of the values' standard deviation."""
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    spread = float(x.std()) if len(x) > 1 else abs(float(x[0])) if len(x) else 1.0
    return 2 if spread == 0 else min(8, max(0, 1 - math.floor(math.log10(spread))))


def reward_curve(
    queries: pd.DataFrame, summary: Mapping[str, Any], *, width: int = 1040, height: int = 360, unit: str = ""
) -> str:
    """Every answer as a dot over the number of queries asked, with the mean and the predicted mean of each round, the
    best so far, and the prior's mean and 95th percentile.

    The band around the predicted mean is plus and minus the mean predicted standard deviation of the round.

    Args:
        queries: the table of `Optimizer.queries()`.
        summary: the content of `summary.json`.
        width, height: of the picture.
        unit: of the reward.
    """
    data = queries.reset_index(drop=True).astype({"value": float, "predicted": float, "predicted_sd": float})
    data["place"] = np.arange(1, len(data) + 1)
    seen = data[data["state"] == "answered"]
    prior = summary.get("prior", {})
    levels = {key: prior[key] for key in ("mean", "p95") if prior.get(key) is not None}
    bands = _bands(data)
    heights = [*seen["value"], *levels.values(), *(edge for band in bands for edge in band[3:])]
    figure, axes = _axes(width, height, (0.0, max(1, len(data)) + 0.5), _padded(heights))
    _name(axes, "queries asked", unit or "reward")
    _round_marks(axes, data, width)
    for key, style, name in (("mean", (0, (7, 5)), "prior mean"), ("p95", (0, (2, 3)), "prior 95 %")):
        if key in levels:
            axes.axhline(
                levels[key], color=COLOURS["prior"], linewidth=1.5, linestyle=style, gid=f"class:prior of-{key}"
            )
            _label(axes, name, axes.get_xlim()[1], levels[key], (-4, 8), "right")
    for first, last, mean, low, high in bands:
        span = [first - 0.5, last + 0.5]
        axes.fill_between(span, low, high, color=COLOURS["predicted"], alpha=0.16, linewidth=0, gid="class:band")
        axes.plot(span, [mean, mean], color=COLOURS["predicted"], linewidth=2.5, gid="class:predicted")
    shown = seen.iloc[:: max(1, math.ceil(len(seen) / MAX_DOTS))]
    few = len(shown) < 400
    dots = axes.scatter(
        shown["place"],
        shown["value"],
        s=20 if few else 8,
        color=COLOURS["mean"],
        alpha=0.38,
        linewidths=0,
        gid="class:dots",
    )
    if few:
        dots.set_urls([f"#query-{number_}" for number_ in shown["id"]])
    if len(seen):
        best = seen["value"].cummax()
        places = [*seen["place"], axes.get_xlim()[1]]
        axes.step(places, [*best, best.iloc[-1]], where="post", color=COLOURS["best"], linewidth=2, gid="class:best")
    means = seen.groupby("round")[["place", "value"]].mean()
    axes.plot(means["place"], means["value"], color=COLOURS["mean"], **LINE, gid="class:mean")
    return _svg(figure, "Rewards over the number of queries asked")


def calibration_plot(queries: pd.DataFrame, *, width: int = 460, height: int = 420, unit: str = "") -> str:
    """Predictions over answers with 90 % intervals (mean +- 1.645 sd) and the diagonal, where both would agree.

    Intervals that miss the answer are marked. Empty when no answered query came with a prediction.
    """
    data = predicted_answers(queries)
    if data.empty:
        return ""
    data = data.iloc[:: max(1, math.ceil(len(data) / 400))]
    value, mean = data["value"].astype(float), data["predicted"].astype(float)
    reach = Z90 * data["predicted_sd"].astype(float)
    span = _padded([*value, *(mean - reach), *(mean + reach)])
    figure, axes = _axes(width, height, span, span)
    suffix = f" ({unit})" if unit else ""
    _name(axes, f"answer{suffix}", f"predicted{suffix}")
    axes.plot(span, span, color=COLOURS["prior"], linewidth=1, linestyle=(0, (5, 5)), gid="class:diagonal")
    held = (value - mean).abs() <= reach
    for kind, colour, rows in (("hit", COLOURS["mean"], held), ("miss", COLOURS["miss"], ~held)):
        if rows.any():
            low, high = (mean - reach)[rows], (mean + reach)[rows]
            axes.vlines(value[rows], low, high, color=colour, alpha=0.35, linewidth=1)
            dots = axes.scatter(
                value[rows], mean[rows], s=20, color=colour, linewidths=0, zorder=3, gid=f"class:{kind}"
            )
            dots.set_urls([f"#query-{number_}" for number_ in data["id"][rows]] if "id" in data else [])
    return _svg(figure, "Predictions against answers")


def rounds_curve(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, width: int = 1040, height: int = 360, unit: str = ""
) -> str:
    """Mean answer of each round over the number of queries asked, one line per run.

    Args:
        runs: name and rounds (as in `summary.json`) of each.
        width, height: of the picture.
        unit: of the reward.
    """
    points = [
        [(row["queries"], row["mean"]) for row in rounds if row["mean"] is not None and row["queries"] > 0]
        for _, rounds in runs
    ]
    everything = [point for line in points for point in line]
    end = max((x for x, _ in everything), default=1)
    figure, axes = _axes(width, height, (0.0, end * 1.02), _padded([y for _, y in everything]))
    _name(axes, "queries asked", unit or "reward")
    for i, line in enumerate(points):
        axes.plot([x for x, _ in line], [y for _, y in line], color=_run(i), **LINE, gid="class:run")
    return _svg(figure, "Mean answer of each round over the number of queries asked")


def intervals_plot(
    rows: Sequence[tuple[str, Mapping[str, Any]]], *, width: int = 1040, row_height: int = 34, unit: str = ""
) -> str:
    """Differences with their intervals, one below the other, and the line of no difference. Empty without any.

    Args:
        rows: name and interval (`mean`, `low`, `high`) of each, from the second run on; None is left out.
        width: of the picture.
        row_height: of each row, in SVG units.
        unit: of the differences.
    """
    known = [(i, name, found) for i, (name, found) in enumerate(rows) if found["mean"] is not None]
    if not known:
        return ""
    edges = [found[key] for _, _, found in known for key in ("low", "high", "mean") if found[key] is not None]
    height = 30 + 44 + row_height * len(known)
    figure, axes = _axes(width, height, _padded([0.0, *edges]), (0.0, float(len(known))), left=16)
    axes.set_yticks([])
    _name(axes, f"difference to the first run{f' ({unit})' if unit else ''}", "")
    axes.axvline(0.0, color=COLOURS["prior"], linewidth=1, linestyle=(0, (5, 5)), gid="class:diagonal")
    for place, (i, name, found) in enumerate(known):
        y = len(known) - place - 0.65
        _interval(axes, {"mean": y, "low": None}, found, _run(i + 1), across=True)
        _label(axes, name, axes.get_xlim()[0], y, (2, 9), "left")
    return _svg(figure, "Differences to the first run")


def front_plot(
    dots: Sequence[Mapping[str, Any]], x_name: str, y_name: str, *, width: int = 520, height: int = 400
) -> str:
    """One dot per way of making designs, with its intervals, and the line through those that no other one beats.

    Args:
        dots: `name` and, in both directions more being better, `x` and `y`: {mean, low, high}, ends None where unknown.
        x_name, y_name: of the axes.
        width, height: of the picture.
    """
    known = [(i, dot) for i, dot in enumerate(dots) if dot["x"]["mean"] is not None and dot["y"]["mean"] is not None]
    if not known:
        return ""
    spans = [[dot[axis][key] for _, dot in known for key in ("mean", "low", "high") if dot[axis][key] is not None]
             for axis in "xy"]  # fmt: skip
    figure, axes = _axes(width, height, _padded(spans[0]), _padded(spans[1]))
    _name(axes, x_name, y_name)
    best = undominated([(dot["x"]["mean"], dot["y"]["mean"]) for _, dot in known])
    _front(axes, [(known[i][1]["x"]["mean"], known[i][1]["y"]["mean"]) for i in best])
    middle = sum(axes.get_xlim()) / 2
    for i, dot in known:
        _interval(axes, dot["x"], dot["y"], _run(i))
        right = dot["x"]["mean"] > middle
        _label(
            axes, dot["name"], dot["x"]["mean"], dot["y"]["mean"], (-7 if right else 7, 9), "right" if right else "left"
        )
    return _svg(figure, f"{y_name} against {x_name}")


def objectives_plot(
    dots: Sequence[tuple[float, float, int, bool]], x_name: str, y_name: str, *, width: int = 560, height: int = 420
) -> str:
    """Every answer by two of its objectives, and the line through the best.

    Args:
        dots: both values, the query's number, and whether it is one of the front.
        x_name, y_name: of the objectives.
        width, height: of the picture.
    """
    figure, axes = _axes(width, height, _padded([x for x, *_ in dots]), _padded([y for _, y, *_ in dots]))
    _name(axes, x_name, y_name)
    _front(axes, [(x, y) for x, y, _, best in dots if best])
    for wanted, style in (
        (False, {"s": 24, "alpha": 0.38, "linewidths": 0}),
        (True, {"s": 60, "edgecolors": COLOURS["card"]}),
    ):
        of_kind = [(x, y, number_) for x, y, number_, best in dots if best == wanted]
        if of_kind:
            x, y, numbers = zip(*of_kind, strict=True)
            drawn = axes.scatter(x, y, color=COLOURS["mean"], zorder=3, **style)
            drawn.set_urls([f"#query-{number_}" for number_ in numbers])
    return _svg(figure, f"{y_name} against {x_name}")


def curve_plot(
    lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    x_name: str,
    y_name: str,
    *,
    width: int = 520,
    height: int = 320,
) -> str:
    """Lines through means, with their intervals.

    Args:
        lines: name -> points: x, and {mean, low, high}, None where unknown.
        x_name, y_name: of the axes.
        width, height: of the picture.
    """
    known = {name: [(x, y) for x, y in points if y["mean"] is not None] for name, points in lines.items()}
    edges = [y[key] for points in known.values() for _, y in points for key in ("mean", "low", "high")]
    across = [x for points in known.values() for x, _ in points]
    figure, axes = _axes(width, height, _padded(across), _padded([y for y in edges if y is not None]))
    _name(axes, x_name, y_name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for i, (name, points) in enumerate(known.items()):
        axes.plot([x for x, _ in points], [y["mean"] for _, y in points], color=_run(i), **LINE, label=name)
        for x, y in points:
            _interval(axes, {"mean": x, "low": None}, y, _run(i))
    if len(known) > 1:  # the names stand in a row above the lines, which may lie on each other
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=SIZE, borderpad=0
        )
        for text in legend.get_texts():
            text.set_color(COLOURS["muted"])
    return _svg(figure, f"{y_name} against {x_name}")


def undominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points to which no other one is at least equal in both numbers and better in one."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(other[0] >= point[0] and other[1] >= point[1] and other != point for other in points)

    return [i for i, point in enumerate(points) if not beaten(point)]


def predicted_answers(queries: pd.DataFrame) -> pd.DataFrame:
    """The answered queries that a surrogate had predicted."""
    columns = queries[["value", "predicted", "predicted_sd"]].astype(float)
    return queries[(queries["state"] == "answered") & np.isfinite(columns).all(axis=1)]


LINE: dict[str, Any] = {
    "linewidth": 2.5,
    "marker": "o",
    "markersize": 8,
    "markeredgecolor": COLOURS["card"],
    "markeredgewidth": 1.5,
    "solid_joinstyle": "round",
}
"""How a line with its points is drawn."""


def _run(i: int) -> str:
    return COLOURS[f"run-{i % RUNS}"]


def _axes(
    width: int, height: int, x_range: tuple[float, float], y_range: tuple[float, float], *, left: int = 62
) -> tuple[Figure, Axes]:
    """An empty picture of so many SVG units, with round numbers along its sides."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    sides = {"left": left / width, "right": 1 - 16 / width, "bottom": 44 / height, "top": 1 - 30 / height}
    axes = figure.subplots(gridspec_kw=sides)
    axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    axes.set_autoscale_on(False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["prior"])
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.yaxis.grid(True, color=COLOURS["line"], linewidth=1)
    axes.tick_params(length=0, labelsize=SIZE, labelcolor=COLOURS["muted"], pad=6)
    for axis, room in ((axes.xaxis, width / 110), (axes.yaxis, height / 70)):
        axis.set_major_locator(MaxNLocator(nbins=max(5, round(room)), steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    return figure, axes


def _name(axes: Axes, x_name: str, y_name: str) -> None:
    axes.set_xlabel(x_name, fontsize=SIZE, color=COLOURS["muted"])
    axes.set_ylabel(y_name, fontsize=SIZE, color=COLOURS["muted"])


def _label(axes: Axes, text: str, x: float, y: float, shift: tuple[float, float], side: str) -> None:
    """A text above everything else; the style sheet gives it an outline of the page's colour."""
    style: dict[str, Any] = {
        "fontsize": SIZE,
        "color": COLOURS["muted"],
        "fontweight": "bold",
        "ha": side,
        "va": "center",
    }
    axes.annotate(text, (x, y), shift, textcoords="offset points", zorder=9, gid="class:label", **style)


def _interval(axes: Axes, x: Mapping[str, Any], y: Mapping[str, Any], colour: str, *, across: bool = False) -> None:
    """A dot with its intervals in either direction; `across`: x and y in each other's place."""
    x, y = (y, x) if across else (x, y)
    if x["low"] is not None:
        axes.hlines(y["mean"], x["low"], x["high"], color=colour, linewidth=2.5)
    if y["low"] is not None:
        axes.vlines(x["mean"], y["low"], y["high"], color=colour, linewidth=2.5)
    axes.plot([x["mean"]], [y["mean"]], color=colour, **LINE)


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    corners = sorted(points)
    dashed: dict[str, Any] = {
        "color": COLOURS["prior"],
        "linewidth": 1.5,
        "linestyle": (0, (7, 5)),
        "gid": "class:front",
    }
    axes.plot([x for x, _ in corners], [y for _, y in corners], **dashed)


def _round_marks(axes: Axes, data: pd.DataFrame, width: int) -> None:
    """Faint lines between rounds, and their names above the plot where there is room."""
    per_place = (width - 78) / axes.get_xlim()[1]
    for number_, batch in data.groupby("round"):
        first, last = batch["place"].min(), batch["place"].max()
        if first > 1:
            axes.axvline(first - 0.5, color=COLOURS["line"], linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        room = (last - first + 1) * per_place
        if room > 18:
            name = f"round {number_}" if room > 62 else str(number_)
            _label(axes, name, (first + last) / 2, axes.get_ylim()[1], (0, 12), "center")


def _bands(data: pd.DataFrame) -> list[tuple[float, float, float, float, float]]:
    """(first place, last place, mean, mean - sd, mean + sd) of the predictions of each round that has any."""
    found = []
    for _, batch in data.groupby("round"):
        mean, sd = batch["predicted"].mean(), batch["predicted_sd"].mean()
        if math.isfinite(mean):
            sd = sd if math.isfinite(sd) else 0.0
            found.append((batch["place"].min(), batch["place"].max(), mean, mean - sd, mean + sd))
    return found


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """A range around the finite values with 5 % of room on both sides."""
    x = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    if not len(x):
        return -1.0, 1.0
    low, high = float(x.min()), float(x.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _svg(figure: Figure, title: str) -> str:
    """The picture for the inside of a page: colours of the style sheet, text of its font, no address, no empty ids."""
    file = io.StringIO()
    width, height = (round(72 * side) for side in figure.get_size_inches())
    with _alone, rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{title} {width}"}):
        figure.savefig(file, format="svg", transparent=True)
    body = file.getvalue().partition("</metadata>")[2]
    body = re.sub(r"<style.*?</style>|<clipPath.*?</clipPath>| clip-path=\"[^\"]*\"|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"#0000([0-9a-f]{2})", lambda m: f"var(--{NAMES[int(m[1], 16)]})", body)
    body = re.sub(r"font: [^;\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", body)  # as older releases write it
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    links = r'<a xlink:href="#query-(\d+)"[^>]*>', r'<a href="#query-\1"><title>#\1</title>'
    body = re.sub(*links, body).replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]+)"', body))
    body = re.sub(r' id="class:([^"]+)"', r' class="\1"', body)
    body = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\n\s*", "\n", body))
    name = escape(title)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}"><title>{name}</title>{body.strip()}'
