"""Numbers of an evaluation: its `summary.json` and the table at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from PIL import Image

from tiltopt.online.engine import Drawn
from tiltopt.online.settings import Settings
from tiltopt.online.summary import software_versions, summarise
from tiltopt.online.tables import cell, table

PLAIN, TILTED = 0, 1
"""Rounds of the table of queries."""


class Fidelity(Protocol):
    """A judge of pictures; see `tiltopt.online.judge.Judge`."""

    def accuracy(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float: ...


def evaluation_summary(
    settings: Settings,
    queries: pd.DataFrame,
    images: Sequence[Image.Image],
    tilted: Sequence[Drawn],
    judge: Fidelity | None,
    unit: str,
) -> dict[str, Any]:
    """`summary.json` of an evaluation.

    `gain` compares the two pictures of each pair: mean difference of their answers, its standard error, and the number
    of pairs. `prompts` lists each prompt's means.
    """
    half = len(tilted)
    names = list(queries["prompt"])
    fidelity = [
        _fidelity(judge, images[:half], names[:half]),
        _fidelity(judge, images[half:], names[half:]),
    ]
    ess = [drawn.ess for drawn in tilted if drawn.ess is not None]
    rounds: list[dict[str, Any]] = [
        {"round": PLAIN, "fidelity": fidelity[0]},
        {"round": TILTED, "fidelity": fidelity[1], "ess_mean": float(np.mean(ess)) if ess else None},
    ]
    plain_values = queries["value"][:half].to_numpy(dtype=float)
    values = queries["value"][half:].to_numpy(dtype=float)
    difference = values - plain_values
    difference = difference[np.isfinite(difference)]
    n = len(difference)
    summary = summarise(
        settings.to_dict(),
        queries,
        rounds,
        reference=plain_values.tolist(),
        reference_fidelity=fidelity[0],
        unit=unit,
        versions=software_versions(),
    )
    return summary | {
        "kind": "evaluation",
        "best_of_n": None,
        "surrogate": settings.surrogate,
        "gain": {
            "mean": float(difference.mean()) if n else None,
            "standard_error": float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
            "pairs": n,
        },
        "prompts": _per_prompt(queries),
    }


def evaluation_table(summary: Mapping[str, Any]) -> str:
    """Per prompt: number of pairs, mean answer of the plain and the tilted pictures, and what had been predicted."""
    rows = [
        [row["prompt"], str(row["pairs"]), cell(row["plain"]), cell(row["tilted"]), cell(row["predicted"])]
        for row in summary["prompts"]
    ]
    plain, tilted = summary["rounds"][PLAIN], summary["rounds"][TILTED]
    pairs = str(summary["gain"]["pairs"])
    rows.append(["all", pairs, cell(plain["mean"]), cell(tilted["mean"]), cell(tilted["predicted_mean"])])
    lines = [table(["prompt", "pairs", "plain", "tilted", "predicted"], rows)]
    gain, unit = summary["gain"], f" {summary['unit']}" if summary["unit"] else ""
    if gain["mean"] is not None:
        lines.append(f"tilted - plain: {cell(gain['mean'])} ± {cell(gain['standard_error'])}{unit} (standard error)")
    if tilted["fidelity"] is not None:
        lines.append(f"fidelity: plain {cell(plain['fidelity'], 2)}, tilted {cell(tilted['fidelity'], 2)}")
    return "\n".join(lines)


def _per_prompt(queries: pd.DataFrame) -> list[dict[str, Any]]:
    def mean(values: pd.Series) -> float | None:
        x = values.astype(float).dropna()
        return float(x.mean()) if len(x) else None

    rows = []
    for prompt, batch in queries.groupby("prompt", sort=False):
        plain, tilted = batch[batch["round"] == PLAIN], batch[batch["round"] == TILTED]
        row = {"prompt": prompt, "pairs": len(tilted), "plain": mean(plain["value"]), "tilted": mean(tilted["value"])}
        rows.append(row | {"predicted": mean(tilted["predicted"])})
    return rows


def _fidelity(judge: Fidelity | None, images: Sequence[Image.Image], prompts: Sequence[str]) -> float | None:
    share = math.nan if judge is None else float(judge.accuracy(images, prompts))
    return share if math.isfinite(share) else None
