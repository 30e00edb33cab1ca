"""Aligned plain text for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltopt.online.hooks import drawn_by
from tiltopt.online.report.numbers import PLAIN_NEEDED, TAIL
from tiltopt.surrogates.acquisition import ACQUISITIONS

ROUND_COLUMNS = (
    ("round", "round"),
    ("queries", "queries"),
    ("mean", "mean"),
    ("best", "best"),
    ("mass_lift", "lift"),
    ("predicted_mean", "predicted"),
    ("ess_mean", "ESS"),
    ("nats_mean", "nats"),
    ("alpha", "α"),
    ("fidelity", "fidelity"),
    ("seconds", "seconds"),
)
"""Of a round's row in `summary.json`: key, and name of the column."""

ALWAYS = 4
"""So many of the first columns are shown whether or not a round has a number for them."""

DECIMALS = {"mass_lift": 1, "ess_mean": 2, "nats_mean": 2, "alpha": 4, "fidelity": 2, "seconds": 1}


def _particles(summary: Mapping[str, Any]) -> int | None:
    return dict(summary.get("settings", {}).get("sampler", {})).get("num_particles")


def how_drawn(summary: Mapping[str, Any]) -> str:
    """What the last tilted round was in truth where its weights did nothing; empty where they worked."""
    rounds = reversed(summary.get("rounds", ()))
    last: Mapping[str, Any] = next((row for row in rounds if row.get("ess_median") is not None), {})
    said = drawn_by(last, _particles(summary))
    return f"{said}: ESS {last['ess_median']:.2f} of {_particles(summary)}" if said else ""


def lift_told(summary: Mapping[str, Any]) -> str:
    """What the mass lift of the last tilted round says, or how to have one; empty before the first."""
    tilted = [row for row in summary.get("rounds", ()) if row.get("kind") == "tilted" and row.get("mean") is not None]
    if not tilted:
        return ""
    last, settings = tilted[-1], summary.get("settings", {})
    if last.get("mass_lift") is None:
        scored = (
            dict(settings.get("reward", {})).get("name") and dict(settings.get("model", {})).get("name") != "pairwise"
        )
        key = "reference_samples" if scored and not settings.get("objectives") else "initial_batch_size"
        return (
            "lift, the share of a round in the prior's best twentieth over that twentieth, takes "
            f"{PLAIN_NEEDED} plain answers: --config.{key}={PLAIN_NEEDED}"
        )
    return (
        f"lift {last['mass_lift']:.1f}: {100 * TAIL * last['mass_lift']:.0f} % of the last round lies above the "
        f"prior's 95th percentile, as {100 * TAIL:.0f} % of plain samples do"
    )


def price_told(summary: Mapping[str, Any]) -> str:
    """What the price of a nat means, in numbers of the last tilted round; empty before the first."""
    rounds = reversed(summary.get("rounds", ()))
    last: Mapping[str, Any] = next((row for row in rounds if row.get("alpha") is not None), {})
    if not last:
        return ""
    settings = summary.get("settings", {})
    acquisition = ACQUISITIONS.get(dict(settings.get("acquisition", {})).get("name", ""))
    own = {"nats": "nats of the acquisition", "spread": "spreads of the answers"}
    unit = own.get(acquisition.unit if acquisition else "reward", summary.get("unit") or "reward")
    told = f"α {last['alpha']:.4g} {unit} per nat: so much more must be hoped for to go a nat further from the prior"
    budget = dict(settings.get("sampler", {})).get("budget_nats")
    if last.get("nats_mean") is not None:
        told += f"; the last queries went {last['nats_mean']:.1f} nats" + (
            f", {budget:g} are allowed" if budget else ""
        )
    return told


def blind_told(summary: Mapping[str, Any]) -> str:
    """That the features do not show what is rewarded, and what is to be done; empty where they do, or nobody knows."""
    seen = summary.get("sight", {})
    if not seen.get("blind"):
        return ""
    best = seen.get("best_kind")
    remedy = "`tiltopt features` ranks what features there are"
    if best is not None:
        known = best == dict(summary.get("settings", {}).get("features", {})).get("kind")
        remedy = (
            "no feature block of this package predicts them better; add one of your own (docs/adding.md)"
            if known
            else f"of the feature blocks {best} predicts them best: --config.features.kind={best} in a new run"
        )
    return f"the features do not show what is rewarded: {seen['told']}. {remedy[0].upper()}{remedy[1:]}."


def columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """{key: name} of `ROUND_COLUMNS`, with the number of particles that an ESS is of; without those that no round has
    a number for."""
    particles, rows = _particles(summary), summary.get("rounds", ())
    shown = [
        pair for i, pair in enumerate(ROUND_COLUMNS) if i < ALWAYS or any(row.get(pair[0]) is not None for row in rows)
    ]
    return {key: f"{name} of {particles}" if name == "ESS" and particles else name for key, name in shown}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns separated by two spaces: the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def round_table(summary: Mapping[str, Any]) -> str:
    """The rounds of a `summary.json`, then the prior and best-of-N to compare with; a dash where there is no number.

    Queries are counted over the run so far. Rewards are in the unit named below the table.
    """
    shown = columns(summary)
    rows = [[cell(row.get(key), DECIMALS.get(key, 3)) for key in shown] for row in summary["rounds"]]
    lines = [table(list(shown.values()), rows)]
    if how_drawn(summary):
        lines.append(f"the last round was {how_drawn(summary)}")
    unit = f" {summary['unit']}" if summary.get("unit") else ""
    prior = summary.get("prior", {})
    if prior.get("mean") is not None:
        count = f"{prior['samples']} " if prior.get("samples") else ""
        took, whole = prior.get("seconds"), summary.get("seconds")
        what = "plain samples" if took is None else "reference samples"
        share = f"; {took:.1f} s, {100 * took / whole:.0f} % of the time" if took is not None and whole else ""
        lines.append(
            f"prior: mean {cell(prior['mean'])}, 95th percentile {cell(prior.get('p95'))}{unit} "
            f"({count}{what}{_fidelity(prior.get('fidelity'))}{share})"
        )
    lines += [told for told in (price_told(summary), lift_told(summary)) if told]
    if summary.get("best_of_n") is not None:
        lines.append(f"best-of-N with as many queries: {cell(summary['best_of_n'])}{unit}")
    lines += [told for told in (blind_told(summary),) if told]
    trouble = [f"{summary[key]} {key}" for key in ("failed", "abandoned") if summary.get(key)]
    if trouble:
        lines.append("queries without an answer: " + ", ".join(trouble))
    if note := dict(summary.get("pareto") or {}).get("note"):
        lines.append(str(note))
    return "\n".join(lines)


def cell(value: Any, decimals: int = 3) -> str:
    """A number with fixed decimals (significant digits when it is large), an integer as it is, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value != value:
        return "-"
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.4g}"


def _fidelity(value: float | None) -> str:
    return "" if value is None else f", fidelity {value:.2f}"
