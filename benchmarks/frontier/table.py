"""Cells put together: every method's frontier, and how the default's compares at equal reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.frontier.cells import REWARDS
from benchmarks.frontier.methods import METHODS, OURS
from benchmarks.query_efficiency.table import interval, shown
from tiltopt.online.report.text import table

Row = Mapping[str, Any]
KEPT = ("fidelity", "diversity")
"""What a reward may cost."""


def aggregate(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One block per reward: of every method its points, weakest first, and what it keeps against the default's."""
    blocks = []
    for reward in (name for name in REWARDS if any(row["reward"] == name for row in rows)):
        own = [row for row in rows if row["reward"] == reward]
        present = [name for name in METHODS if any(row["method"] == name for row in own)]
        methods = {name: _points([row for row in own if row["method"] == name]) for name in present}
        against = {name: _against(own, name, reward) for name in present if name not in (OURS, "prior")}
        blocks.append({"reward": reward, "methods": methods, "against": against if OURS in present else {}})
    return blocks


def _points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    points = []
    for strength in sorted({row["strength"] for row in rows}, key=lambda s: _order(rows[0]["method"], s)):
        found = [row for row in rows if row["strength"] == strength]
        names = sorted({name for row in found for name in row["rewards"]} & set(REWARDS))
        point: dict[str, Any] = {"strength": strength, "seeds": sorted(row["seed"] for row in found)}
        point["rewards"] = {name: interval(row["rewards"][name] for row in found) for name in names}
        for key in (*KEPT, "ess", "evaluations", "seconds"):
            point[key] = interval(row[key] for row in found)
        points.append(point)
    return points


def _order(method: str, strength: float) -> float:
    """Weakest first: a low price is a strong tilt."""
    return -strength if METHODS[method].kind == "price" else strength


def _against(rows: Sequence[Row], rival: str, reward: str) -> dict[str, Any]:
    """How much more the default keeps at the rival's rewards, over seeds; and how often it does not reach that far.

    Frontier against frontier: within a seed, which shares prompts and noise, what each of both keeps at the rewards of
    the rival's points is read off the upper line through its own points and the plain samples.
    """
    found: dict[str, Any] = {}
    seeds = sorted({r["seed"] for r in rows if r["method"] == rival} & {r["seed"] for r in rows if r["method"] == OURS})
    for what in KEPT:
        differences, beyond, points = [], 0, 0
        for seed in seeds:
            ours = [r for r in rows if r["seed"] == seed and r["method"] in (OURS, "prior") and r[what] is not None]
            theirs = [r for r in rows if r["seed"] == seed and r["method"] in (rival, "prior") and r[what] is not None]
            lines = [[(r["rewards"][reward], r[what]) for r in some] for some in (ours, theirs)]
            own = []
            for row in (row for row in theirs if row["method"] == rival):
                points += 1
                mine, its = (at_reward(line, row["rewards"][reward]) for line in lines)
                if mine is None or its is None:
                    beyond += 1
                else:
                    own.append(mine - its)
            if own:
                differences.append(float(np.mean(own)))
        found[what] = interval(differences) | {"beyond": beyond, "points": points}
    return found


def at_reward(points: Sequence[tuple[float, float]], reward: float) -> float | None:
    """The best that is kept at a reward or above, where points may be mixed: the upper envelope's line at that reward.

    Args:
        points: (reward, what is kept).

    Returns:
        None above the highest reward; at or below the lowest, what its point keeps.
    """
    if not points or reward > max(x for x, _ in points):
        return None
    if reward <= min(x for x, _ in points):
        return max(y for x, y in points if x == min(p for p, _ in points))
    best = -np.inf
    for x0, y0 in points:
        for x1, y1 in points:
            if x0 <= reward <= x1:
                best = max(best, y1 if x0 == x1 else y0 + (y1 - y0) * (reward - x0) / (x1 - x0))
    return float(best)


def text(blocks: Sequence[Mapping[str, Any]]) -> str:
    """The table for people."""
    parts = []
    for block in blocks:
        others = [name for name in REWARDS if name != block["reward"]]
        header = [
            "method",
            "strength",
            block["reward"],
            *others,
            "fidelity",
            "diversity",
            "ESS",
            "evaluations",
            "seeds",
        ]
        cells = []
        for name, points in block["methods"].items():
            for point in points:
                numbers = [point["rewards"][key] for key in (block["reward"], *others)]
                numbers += [point[key] for key in ("fidelity", "diversity", "ess")]
                cells.append(
                    [METHODS[name].label, f"{point['strength']:g}", *map(shown, numbers),
                     f"{point['evaluations']['mean']:.0f}", str(len(point["seeds"]))]
                )  # fmt: skip
        parts.append(table(header, cells))
        parts += [_sentence(name, found) for name, found in block["against"].items()]
    return "\n\n".join(parts)


def _sentence(rival: str, found: Mapping[str, Any]) -> str:
    told = ", ".join(f"{what} {shown(found[what])}" for what in KEPT)
    beyond = found["fidelity"]["beyond"]
    reach = f"; {beyond} of its {found['fidelity']['points']} points lie beyond DAS()'s rewards" if beyond else ""
    return f"at the rewards of {METHODS[rival].label}, DAS() keeps more by: {told}{reach}"
