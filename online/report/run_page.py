"""The page of a run: what was reached, reward curve, rounds, calibration, before and after, galleries, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltopt.online.queries import maximised
from tiltopt.online.report import charts, gallery
from tiltopt.online.report.page import image_uri
from tiltopt.online.report.record import RunRecord, summarise
from tiltopt.online.report.text import DECIMALS, blind_told, columns, how_drawn, lift_told, price_told
from tiltopt.online.settings.run import flat
from tiltopt.online.settings.source import ASK_TELL, PERSON

FRONT = 24
"""Designs of the front that are shown."""
GLANCE = 12
"""Pictures of a run at a glance."""


def context(record: RunRecord, per_round: int) -> dict[str, Any]:
    """Everything that `report.html.j2` shows, as plain values, escaped SVG and data URIs.

    Args:
        record: of the run.
        per_round: images shown of each round, the best ones.
    """
    summary = summarise(record)
    unit = str(summary.get("unit") or "")
    data = record.queries
    answered = data[data["state"] == "answered"]
    places = charts.decimals_for(answered["value"].astype(float))
    curve = {"queries": data, "summary": summary, "unit": unit}
    return {
        "title": _title(record, summary),
        "lead": _lead(record, summary),
        "banner": gallery.failures(record, summary),
        "blind": blind_told(summary),
        "go_on": record.go_on,
        "damaged": [f"{told} Its numbers come from the store." for told in record.damaged.values()],
        "best": gallery.hero(record, places, unit),
        "tiles": _tiles(summary, places, unit),
        "verdict": _verdict(summary, places, unit),
        "lift": lift_told(summary) if summary.get("kind") != "evaluation" else "",
        "price": price_told(summary),
        "curve_wide": charts.reward_curve(**curve),
        "curve_narrow": charts.reward_curve(**curve, width=420, height=320),
        "thinned": len(answered) > charts.MAX_DOTS,
        "calibration": charts.calibration_plot(data, unit=unit),
        "calibration_rows": _calibration_rows(summary, places),
        "columns": list(columns(summary).values()),
        "rows": _rows(summary, places),
        "notes": [(summary["round"], note) for summary in record.rounds for note in summary["notes"]],
        "pairs": gallery.before_and_after(record, places, unit),
        "rounds": gallery.galleries(record, places, unit, per_round),
        "front": _front(record),
        "settings": flat(record.settings),
        "versions": dict(summary.get("versions", {})),
        "folder": record.folder.name,
    }


def _front(record: RunRecord) -> dict[str, Any] | None:
    """Of several objectives: the picture of the first two that are maximised, and the designs that nothing beats."""
    if not record.objectives:
        return None
    names = [objective.name for objective in record.objectives]
    rows = record.queries[record.queries["id"].isin(record.front["front"])].sort_values(names[0], kind="stable")
    spread = {name: charts.decimals_for(record.queries[name].dropna()) for name in names}
    shown = [record.objectives[i].name for i in maximised(record.objectives)][:2]
    best = set(record.front["front"])
    answered = record.queries[record.queries[names].notna().all(axis=1)]
    dots = [
        (float(row[shown[0]]), float(row[shown[1]]), int(row["id"]), int(row["id"]) in best)
        for _, row in answered.iterrows()
        if len(shown) == 2
    ]
    volumes = [v for v in record.front["hypervolume"] if v is not None]
    conditions = [
        f"{objective.name} ≥ {objective.above:g}" for objective in record.objectives if objective.above is not None
    ]
    return {
        "plot": charts.objectives_plot(dots, *shown) if dots else "",
        "names": names,
        "rows": [
            [str(int(row["id"])), *(charts.number(row[name], spread[name]) for name in names)]
            for _, row in rows.iterrows()
        ],
        "cards": [(image_uri(record.image(int(row["id"]))), int(row["id"])) for _, row in rows.iterrows()][:FRONT],
        "hypervolume": charts.number(volumes[-1], charts.decimals_for(volumes)) if volumes else "",
        "reference": ", ".join(f"{v:.4g}" for v in record.front["reference_point"] or ()),
        "conditions": ", ".join(conditions),
        "feasible": record.front["feasible"],
        "note": record.front["note"],
    }


def glance(record: RunRecord) -> dict[str, Any]:
    """What `glance.html.j2` shows: the curve, and a row of the best answers."""
    summary = summarise(record)
    unit = str(summary.get("unit") or "")
    answered = record.queries[record.queries["state"] == "answered"].astype({"value": float}).dropna(subset="value")
    places = charts.decimals_for(answered["value"])
    best = answered.sort_values("value", ascending=False, kind="stable").head(GLANCE)
    return {
        "lead": _lead(record, summary),
        "folder": record.folder.name,
        "banner": gallery.failures(record, summary),
        "curve": charts.reward_curve(record.queries, summary, unit=unit) if len(answered) else "",
        "best": [gallery.card(record, row, places, unit) for _, row in best.iterrows()],
    }


def _title(record: RunRecord, summary: Mapping[str, Any]) -> str:
    if record.source == PERSON:
        return "Maximising what a person prefers" if len(record.comparisons) else "Maximising a person's ratings"
    return "Maximising the answers told" if record.source == ASK_TELL else f"Maximising {summary['reward']}"


def _lead(record: RunRecord, summary: Mapping[str, Any]) -> str:
    settings = record.settings
    if record.direct:
        drawn = int((record.queries["round"] == 1).sum())
        sampler, prior = dict(settings["sampler"]), dict(settings["prior"])
        return (
            f"{drawn} pictures drawn from the prior “{prior['path']}” by “{sampler['name']}”, tilted by the reward "
            f"itself at {sampler['alpha']:g} {summary.get('unit') or 'reward units'} per nat."
        )

    def name(section: str, key: str = "name") -> str:
        return str(dict(settings.get(section, {})).get(key, "?"))

    answered, rounds = summary.get("answered", 0), len(summary.get("rounds", ()))
    what = f"{answered} answers of the black box"
    if len(record.comparisons):
        what = f"{int((record.comparisons['outcome'] != 'failed').sum())} comparisons of {answered} designs"
    how = f" ({how_drawn(summary)})" if how_drawn(summary) else ""
    return (
        f"{what} in {rounds} round{'s' if rounds != 1 else ''}: designs drawn from the "
        f"prior “{name('prior', 'path')}” by “{name('sampler')}”{how}, "
        f"guided by a “{name('model')}” surrogate and the “{name('acquisition')}” acquisition."
    )


def _tiles(summary: Mapping[str, Any], places: int, unit: str) -> list[tuple[str, str, str]]:
    """(name, value, unit) of the numbers that matter most."""
    prior, last = summary.get("prior", {}), _last(summary)
    tiles = [
        ("mean of the last round", last.get("mean"), places, unit),
        ("mass lift, last round (prior 1, most 20)", last.get("mass_lift"), 1, ""),
        ("prior mean", prior.get("mean"), places, unit),
    ]
    tiles += [("prior 95th percentile", prior.get("p95"), places, unit)]
    tiles += [("best-of-N, as many queries", summary.get("best_of_n"), places, unit)]
    tiles += [("fidelity, last round", last.get("fidelity"), 2, ""), ("fidelity, prior", prior.get("fidelity"), 2, "")]
    shown = [(name, charts.number(value, digits), u) for name, value, digits, u in tiles if value is not None]
    if summary.get("seconds") is not None:
        shown.append(("wall-clock time", _duration(summary["seconds"]), ""))
    return shown


def _verdict(summary: Mapping[str, Any], places: int, unit: str) -> str:
    """One sentence that compares the last round's mean with the prior and with best-of-N, whichever way it went."""
    mean, prior = _last(summary).get("mean"), summary.get("prior", {})
    if mean is None or len(summary.get("rounds", ())) < 2:
        return ""
    parts = []
    for value, name in (
        (prior.get("p95"), "the 95th percentile of plain samples"),
        (summary.get("best_of_n"), "best-of-N for the same number of queries"),
    ):
        if value is not None:
            side = "above" if mean > value else "below" if mean < value else "equal to"
            parts.append(f"{side} {name} ({charts.number(value, places)})")
    if not parts:
        return ""
    return f"The last round's mean, {charts.number(mean, places)} {unit}".rstrip() + ", is " + " and ".join(parts) + "."


def _rows(summary: Mapping[str, Any], places: int) -> list[list[str]]:
    return [
        [
            str(row[key]) if isinstance(row.get(key), int) else charts.number(row.get(key), DECIMALS.get(key, places))
            for key in columns(summary)
        ]
        for row in summary.get("rounds", ())
    ]


def _calibration_rows(summary: Mapping[str, Any], places: int) -> list[list[str]]:
    rows = []
    for check in summary.get("calibration", ()):
        if check.get("n") == 0 or check.get("nll") is None:
            continue
        cover, tau = check.get("coverage90"), check.get("kendall_tau")
        rows.append(
            [
                str(check.get("round", "")),
                "–" if cover is None else f"{100 * cover:.0f} %",
                charts.number(tau, 2),
                _gap(check, places),
                charts.number(check.get("optimism_gap"), places),
                charts.number(check.get("nll"), 2),
            ]
        )
    return rows


def _gap(check: Mapping[str, Any], places: int) -> str:
    gap, error = check.get("mean_gap"), check.get("mean_gap_se")
    return charts.number(gap, places) + ("" if error is None else f" ± {charts.number(error, places)}")


def _last(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last round with an answer."""
    return next((row for row in reversed(summary.get("rounds", ())) if row.get("mean") is not None), {})


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
