"""The page of several runs: each held against the first, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tiltopt.errors import ConfigError
from tiltopt.online.report import charts, gallery
from tiltopt.online.report.numbers import interval
from tiltopt.online.report.record import RunRecord, summarise
from tiltopt.online.settings.run import flat

COLUMNS = "run,answers,prior mean,last mean,lift,best,best-of-N,fidelity,ESS,nats,seconds".split(",")
PROMPTS = 8  # prompts of which every run shows a picture
OWN = ("run_dir", "project")
"""Settings that differ between any two runs and tell nothing."""


def context(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Everything that `comparison.html.j2` shows.

    Args:
        records: of two or more runs of one reward.

    Raises:
        ConfigError: answers in different units, or of different rewards.
    """
    summaries = [summarise(record) for record in records]
    for key in ("reward", "unit"):
        if len({str(summary.get(key) or "") for summary in summaries}) > 1:
            told = ", ".join(f"{r.folder.name}: {s.get(key)}" for r, s in zip(records, summaries, strict=True))
            raise ConfigError(f"expected runs with the same {key}, which alone can be compared, got {told}.")
    unit = str(summaries[0].get("unit") or "")
    places = charts.decimals_for([v for record in records for v in record.queries["value"].astype(float)])
    names = names_of(records)
    lines = [(name, summary["rounds"]) for name, summary in zip(names, summaries, strict=True)]
    found = [paired(records[0], record) for record in records[1:]]
    gains = list(zip(names[1:], (difference for difference, _ in found), strict=True))
    return {
        "title": f"{len(records)} runs that maximise {summaries[0].get('reward') or 'a black box'}",
        "lead": f"Each is held against {names[0]}.",
        "folder": " and ".join(names),
        "columns": COLUMNS,
        "runs": [
            {"name": name, "colour": i % charts.RUNS, "cells": _cells(summary, places)}
            for i, (name, summary) in enumerate(zip(names, summaries, strict=True))
        ],
        "curve_wide": charts.rounds_curve(lines, unit=unit),
        "curve_narrow": charts.rounds_curve(lines, width=420, height=320, unit=unit),
        "intervals_wide": charts.intervals_plot(gains, unit=unit),
        "intervals_narrow": charts.intervals_plot(gains, width=420, unit=unit),
        "differences": [
            _difference(name, difference, by, places, unit)
            for name, (difference, by) in zip(names[1:], found, strict=True)
        ],
        "prompts": _prompts(records, places, unit),
        "settings": settings_that_differ(records),
    }


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """The runs' folders, with as much of their paths as tells them apart."""
    parts = [record.folder.resolve().parts for record in records]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(record.folder) for record in records]


def paired(first: RunRecord, other: RunRecord) -> tuple[dict[str, float | int | None], str]:
    """How much higher the other run's last answers are, as a mean with its 95 % interval, and what pairs them.

    Where both runs asked the same queries (prompt and seed) in the last round that both have, these are the pairs; else
    the means of each prompt in the last round of each run.
    """
    rounds = [_last_rounds(record) for record in (first, other)]
    shared = max(rounds[0] & rounds[1], default=None)
    if shared is not None:
        a, b = (_answered(record, shared)[["prompt", "seed", "value"]] for record in (first, other))
        both = a.merge(b, on=["prompt", "seed"], suffixes=("_first", "_other"))
        if len(both) > 1:
            return interval(both["value_other"] - both["value_first"]), "prompt and seed"
    if not rounds[0] or not rounds[1]:
        return interval([]), "–"
    means = [
        _answered(r, max(n)).groupby("prompt")["value"].mean() for r, n in zip((first, other), rounds, strict=True)
    ]
    return interval((means[1] - means[0]).dropna()), "prompt"


def settings_that_differ(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Dotted key and each run's value of the settings that are not the same in all runs."""
    trees = [flat(record.settings) for record in records]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if key not in OWN]
    values = {key: [str(tree.get(key, "–")) for tree in trees] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def _answered(record: RunRecord, round_: int) -> pd.DataFrame:
    queries = record.queries
    return queries[(queries["round"] == round_) & (queries["state"] == "answered")].astype({"value": float})


def _last_rounds(record: RunRecord) -> set[int]:
    """Rounds that were drawn and have answers."""
    kinds = record.kinds
    answered = record.queries.loc[record.queries["state"] == "answered", "round"].unique()
    return {int(number) for number in answered if kinds[int(number)] in ("plain", "tilted")}


def _cells(summary: Mapping[str, Any], places: int) -> list[str]:
    rounds = [row for row in summary["rounds"] if row["mean"] is not None]
    last: Mapping[str, Any] = rounds[-1] if rounds else {}
    best = max((row["best"] for row in rounds), default=None)
    numbers = [
        (summary["prior"].get("mean"), places),
        (last.get("mean"), places),
        (last.get("mass_lift"), 1),
        (best, places),
        (summary.get("best_of_n"), places),
        (last.get("fidelity"), 2),
        (last.get("ess_mean"), 2),
        (last.get("nats_mean"), 2),
        (summary.get("seconds"), 0),
    ]
    return [str(summary["answered"]), *(charts.number(value, digits) for value, digits in numbers)]


def _difference(name: str, found: Mapping[str, Any], by: str, places: int, unit: str) -> list[str]:
    mean, low, high = (charts.number(found[key], places) for key in ("mean", "low", "high"))
    return [
        name,
        f"{mean} {unit}".strip(),
        "–" if found["low"] is None else f"{low} to {high}",
        str(found["pairs"]),
        by,
    ]


def _prompts(records: Sequence[RunRecord], places: int, unit: str) -> list[list[gallery.Card]]:
    """Of the first prompts that every run has answered in a tilted round: the median card of each run."""
    rows = [gallery.typical(record, "tilted") for record in records]
    shared = [prompt for prompt in rows[0] if all(prompt in found for found in rows)][:PROMPTS]
    return [
        [gallery.card(record, found[prompt], places, unit) for record, found in zip(records, rows, strict=True)]
        for prompt in shared
    ]
