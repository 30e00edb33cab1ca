"""What is left of a run on disk, read without a model and without the right to write; and the run in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tiltopt.errors import StoreError
from tiltopt.online.evaluation.judge import Judge, judge_of, judged
from tiltopt.online.queries import EXTRA_KINDS, Objective, RoundRecord, maximised
from tiltopt.online.report.front import UNIT as MERIT
from tiltopt.online.report.front import columns_of, front_numbers, merits, reference_of
from tiltopt.online.report.numbers import best_of_n, prior_statistics, round_summary, software_versions
from tiltopt.online.report.sight import Sight, sight
from tiltopt.online.report.thurstone import UNIT, with_utilities
from tiltopt.online.settings.objectives import objectives_of
from tiltopt.online.settings.renamed import translated
from tiltopt.online.settings.source import PERSON, Source, how_to_go_on, presumed
from tiltopt.online.store import run_folder
from tiltopt.online.store.files import (
    existing,
    image_path,
    jsonable,
    read_image,
    read_json,
    read_summaries,
    round_folder,
    write_json,
)
from tiltopt.online.store.rows import COLUMNS, REFERENCE
from tiltopt.online.store.store import Store

TABLE = (
    "round kind queries mean best mass_lift predicted_mean fidelity ess_mean ess_median nats_mean alpha seconds".split()
)
"""Of a round's summary, what the run's summary repeats."""


DIRECT, BESIDE = "results.jsonl", "plain.jsonl"
"""Files of direct sampling: a line for each tilted picture, and for each plain one beside it."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Args:
        folder: the run's folder, `checkpoints/<run>`.
        settings: of the run, as a plain dict.
        queries: columns of `tiltopt.online.store.rows.COLUMNS`, and from a store `acquired ess log_z`, ordered
            by id. In a run of comparisons `value` is the utility that they give a query (see
            `tiltopt.online.report.thurstone`).
        rounds: the summary of every round, in order; see `round_summary`.
        summary: the content of `summary.json`; empty when the run has not written one yet.
        reference: rewards of plain samples that were scored for the report; None when there are none.
        reference_fidelity: the judge's accuracy on them.
        reference_seconds: what drawing and scoring them took; None where that is not known.
        comparisons: columns of `tiltopt.online.store.comparisons.COLUMNS`; empty in a run of values.
        damaged: round summaries that cannot be read, and why.
        source: who answers; None where that is not known.
        objectives: of a run of several; the queries then have a column for each, and `value` is what they are worth
            together (`tiltopt.online.report.front.merits`).
        front: see `tiltopt.online.report.front.front_numbers`; empty in a run of one number per answer.
    """

    folder: Path
    settings: Mapping[str, Any]
    queries: pd.DataFrame
    rounds: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    reference: tuple[float, ...] | None = None
    reference_fidelity: float | None = None
    reference_seconds: float | None = None
    comparisons: pd.DataFrame = field(default_factory=pd.DataFrame)
    damaged: Mapping[int, str] = field(default_factory=dict)
    source: Source | None = None
    objectives: tuple[Objective, ...] = ()
    front: Mapping[str, Any] = field(default_factory=dict)

    def image(self, id: int) -> Path:
        """Where the image of a query is."""
        return image_path(self.folder, id)

    @property
    def evaluation(self) -> bool:
        """Whether round 0 is plain and every other one tilted for the same prompts and seeds: an evaluation of
        surrogates, or direct sampling beside plain samples."""
        return self.summary.get("kind") == "evaluation" or (self.direct and len(self.rounds) == 2)

    @property
    def direct(self) -> bool:
        """Whether this is no run, but pictures sampled for a known reward."""
        return self.summary.get("kind") == "direct"

    @property
    def kinds(self) -> dict[int, str]:
        """What each round is: see `RoundRecord`."""
        return {int(summary["round"]): str(summary["kind"]) for summary in self.rounds}

    @property
    def told(self) -> bool:
        """Whether anybody has answered yet; imported measurements do not count."""
        own = self.queries["round"].map(self.kinds) != "imported"
        return bool(len(self.comparisons)) or bool((own & (self.queries["state"] == "answered")).any())

    @property
    def unrecognised(self) -> frozenset[int]:
        """Queries that name a subject which the judge knows and does not see in their images."""
        return frozenset(number for summary in self.rounds for number in summary.get("unrecognised") or ())

    @property
    def drawn(self) -> int:
        """Planned rounds that were drawn; imported measurements and refinements are none."""
        return sum(kind not in EXTRA_KINDS for kind in self.kinds.values())

    @property
    def planned(self) -> int:
        """Rounds that will have been drawn in the end."""
        return (
            1 + len(self.summary.get("surrogates", "1")) if self.evaluation else int(self.settings.get("rounds", 0)) + 1
        )

    @property
    def go_on(self) -> str:
        """How the run goes on, in words; empty when it is complete."""
        return "" if self.complete else how_to_go_on(self.source, self.folder)

    @property
    def complete(self) -> bool:
        """Every planned round is drawn and no query waits for an answer."""
        return self.drawn >= self.planned and not (self.queries["state"] == "asked").any()

    @property
    def plain(self) -> tuple[list[float], float | None]:
        """Rewards of plain samples of the prior and the judge's accuracy on them: the reference samples, or else the
        answers of the first plain round."""
        if self.reference is not None:
            return list(self.reference), self.reference_fidelity
        first = next((summary for summary in self.rounds if summary["kind"] == "plain"), None)
        return ([], None) if first is None else (_answers(self.queries, first["round"]), first.get("fidelity"))


def load_run(folder: str | Path, store: Store | None = None) -> RunRecord:
    """Reads a run's folder.

    Args:
        folder: the run's folder.
        store: the run's store, when the caller has it open.

    Raises:
        ConfigError: not the folder of a run.
        StoreError: one of its files is damaged; the message names it. A damaged summary of a round is none of these:
            the store knows what it said, except what was measured besides (the fidelity).
    """
    path = existing(folder)
    if store is None and (path / DIRECT).exists():
        return direct_record(path, read_json(path / "config.json"), read_json(path / "summary.json", {}))
    if store is None and _evaluated(path):
        return _load_evaluation(path)
    if store is None:
        with run_folder.reading(path) as opened:
            return load_run(path, opened)
    comparisons = store.comparisons.frame()
    settings = run_folder.stored_settings(path, store)
    objectives = objectives_of(settings)
    queries = with_utilities(_table(store), comparisons)
    if objectives:
        queries = with_objectives(queries, store, objectives)
    records = store.rounds()
    written, damaged = read_summaries(path, [known.round for known in records])
    reference, fidelity, seconds = _reference(path, store)
    plain = reference if reference is not None else _first_plain(queries, records)
    rounds = []
    batches = dict(list(queries.groupby("round")))
    asked = 0
    for known in records:
        batch = batches.get(known.round, queries.iloc[:0])
        asked += len(batch)
        rounds.append(written.get(known.round, {}) | round_summary(known, batch, asked, comparisons, plain))
    source = store.source()
    own = queries["round"].map({known.round: known.kind for known in records}) != "imported"
    answered = bool(len(comparisons)) or bool((own & (queries["state"] == "answered")).any())
    front: dict[str, Any] = {}
    if objectives:
        point = reference_of(objectives, settings.reference_point, store.first_outcomes(objectives))
        front = front_numbers(queries, objectives, point, [known.round for known in records])
        volumes = zip(rounds, front["hypervolume"], strict=True)
        rounds = [{**summary, "hypervolume": volume} for summary, volume in volumes]
    return RunRecord(
        folder=path,
        settings=settings.to_dict(),
        queries=queries,
        rounds=tuple(rounds),
        summary=read_json(path / "summary.json", {}),
        reference=reference,
        reference_fidelity=fidelity,
        reference_seconds=seconds,
        comparisons=comparisons if len(comparisons) else pd.DataFrame(),
        damaged=damaged,
        objectives=objectives,
        front=front,
        source=presumed(None if source is None else Source.from_dict(source), answered, settings.reward),
    )


def write_round_summary(folder: Path, store: Store, round_: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Write `round_NNN/summary.json` with `measured` numbers added; returns its content."""
    known = {record.round: record for record in store.rounds()}
    if round_ not in known:
        raise StoreError(f"no round {round_}: the run has {len(known)} rounds.")
    comparisons = store.comparisons.frame()
    whole = with_utilities(_table(store), comparisons)
    objectives = objectives_of(run_folder.stored_settings(folder, store))
    if objectives:
        whole = with_objectives(whole, store, objectives)
    batch, plain = whole[whole["round"] == round_], _first_plain(whole, list(known.values()))
    summary = round_summary(known[round_], batch, store.asked_through(round_), comparisons, plain) | jsonable(measured)
    write_json(round_folder(folder, round_) / "summary.json", summary)
    return summary


def with_objectives(queries: pd.DataFrame, store: Store, objectives: Sequence[Objective]) -> pd.DataFrame:
    """The table of all queries with a column per objective, and what they are worth together as `value`."""
    columns = columns_of(store.outcomes(), list(queries["id"]), [objective.name for objective in objectives])
    out = queries.reset_index(drop=True).join(columns)
    tilted = [record.round for record in store.rounds() if record.kind == "tilted"]
    first = out["round"] < min(tilted) if tilted else out["round"] >= 0
    out["value"] = merits(out, objectives, first)
    return out


def write_reference_summary(folder: Path, store: Store, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Write `reference/summary.json`, which is to the reference samples what a round's is to a round."""
    known = store.reference_round()
    if known is None:
        raise StoreError("no reference samples have been drawn.")
    batch = _table(store, REFERENCE)
    summary = round_summary(known, batch, len(batch), pd.DataFrame()) | jsonable(measured)
    write_json(folder / "reference" / "summary.json", summary)
    return summary


def _reference(folder: Path, store: Store) -> tuple[tuple[float, ...] | None, float | None, float | None]:
    """Rewards of the reference samples, NaN where there is none, the judge's accuracy on them, and their seconds.

    Version 0.1 kept them in a file of their own.
    """
    known, frame = store.reference_round(), store.frame(REFERENCE)
    if known is not None and len(frame):
        measured = read_json(folder / "reference" / "summary.json", {})
        values = tuple(frame["value"].where(frame["state"] == "answered").tolist())
        return values, measured.get("fidelity"), known.ask_seconds + known.answer_seconds
    old = read_json(folder / "reference" / "values.json", {})
    found = tuple(float("nan") if v is None else float(v) for v in old.get("values") or ())
    return found or None, old.get("fidelity"), None


def without_summary(folder: Path, store: Store, records: Sequence[RoundRecord] | None = None) -> list[int]:
    """Rounds of which no readable `summary.json` is there.

    Args:
        records: every round, when the caller has them.
    """
    every = [known.round for known in (store.rounds() if records is None else records)]
    written, _ = read_summaries(folder, every)
    return [round_ for round_ in every if round_ not in written]


def ended(folder: Path, store: Store) -> tuple[Mapping[str, Any], ...]:
    """The summaries of the rounds that have ended, which is when a summary is written."""
    rounds = load_run(folder, store).rounds
    written, _ = read_summaries(folder, [summary["round"] for summary in rounds])
    return tuple(summary for summary in rounds if summary["round"] in written)


def judged_record(record: RunRecord) -> RunRecord:
    """The same run with every round looked at by the judge, and damaged summaries written again."""
    if record.evaluation or record.direct:
        return record
    judge: Judge | None = None
    rounds = []
    for summary in record.rounds:
        number = int(summary["round"])
        if "unrecognised" not in summary:
            judge = judge or judge_of(str(record.settings["prior"]["path"]))
            rows = record.queries[record.queries["round"] == number]
            kept = rows[[record.image(number).is_file() for number in rows["id"]]]
            images = [read_image(record.image(number)) for number in kept["id"]]
            measured = judged(judge, list(kept["id"]), images, list(kept["prompt"]))
            summary = {**summary, **measured}
            if number in record.damaged:
                write_json(round_folder(record.folder, number) / "summary.json", summary)
        rounds.append(summary)
    return replace(record, rounds=tuple(rounds), damaged={})


def summarise(
    record: RunRecord,
    *,
    unit: str | None = None,
    seconds: float | None = None,
    peak_memory_mb: float | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`: the run as it is now. What this process cannot know stays as it was written.

    Args:
        record: the run.
        unit: of the reward; as in the summary that is there when None.
        seconds: wall-clock time of the whole run; likewise.
        peak_memory_mb: see `tiltopt.online.report.numbers.peak_memory_mb`; likewise.
    """
    told, states = record.summary, record.queries["state"].astype(str)
    values, fidelity = record.plain
    plain = [value for value in values if np.isfinite(value)]
    answered = int((states == "answered").sum())
    found = {
        "seconds": told.get("seconds") if seconds is None else seconds,
        "peak_memory_mb": told.get("peak_memory_mb") if peak_memory_mb is None else peak_memory_mb,
        "prior": prior_statistics(plain, fidelity) | {"samples": len(plain), "seconds": record.reference_seconds},
        "rounds": [
            {key: summary.get(key) for key in (*TABLE, *(("hypervolume",) if record.objectives else ()))}
            for summary in record.rounds
        ],
        "best_of_n": best_of_n(plain, answered, int(record.settings.get("batch_size", 1))),
        "answered": answered,
        "failed": int((states == "failed").sum()),
        "abandoned": int((states == "abandoned").sum()),
        "reward": _answered_by(record),
        "unit": _unit(record, unit),
        "complete": record.complete,
        "calibration": [{"round": summary["round"], **summary.get("calibration", {})} for summary in record.rounds],
        "versions": dict(told.get("versions") or software_versions()),
        "settings": dict(record.settings),
    }
    seen = None if record.objectives or len(record.comparisons) else _sight(record)
    if seen is not None:
        best = told.get("sight", {}).get("best_kind")  # which is looked for at a run's end
        found["sight"] = asdict(seen) | {"blind": seen.blind, "told": str(seen), "best_kind": best}
    if record.objectives:
        found["pareto"] = dict(record.front) | {"values": _front_values(record)}
    return dict(told) | jsonable(found)


def _sight(record: RunRecord) -> Sight | None:
    """What the answers say of the features."""
    if "operator" not in record.queries:  # a table of version 0.1
        return None
    answered = record.queries[record.queries["state"] == "answered"].dropna(subset=["value"])
    return sight(answered, record.kinds)


def _answers(queries: pd.DataFrame, round_: int) -> list[float]:
    """What was answered in a round."""
    rows = queries[(queries["round"] == round_) & (queries["state"] == "answered")]
    return rows["value"].astype(float).tolist()


def _first_plain(queries: pd.DataFrame, records: Sequence[RoundRecord]) -> list[float]:
    """The answers of the first plain round."""
    return next((_answers(queries, known.round) for known in records if known.kind == "plain"), [])


def _unit(record: RunRecord, unit: str | None) -> str:
    """Of the numbers in the summary: of comparisons and several objectives one of their own."""
    if len(record.comparisons):
        return UNIT
    if len(maximised(record.objectives)) > 1:
        return MERIT
    if unit is not None:
        return unit
    return str(next((told["unit"] for told in (record.summary, *record.rounds) if told.get("unit")), ""))


def _front_values(record: RunRecord) -> list[dict[str, Any]]:
    """Of each query of the front its number and the value of every objective."""
    names = [objective.name for objective in record.objectives]
    rows = record.queries[record.queries["id"].isin(record.front["front"])]
    return [{"id": int(row["id"]), **{name: float(row[name]) for name in names}} for _, row in rows.iterrows()]


def _answered_by(record: RunRecord) -> str:
    """The reward's name, or who answers in its place."""
    if record.source is None:
        return str(record.summary.get("reward") or record.settings["reward"]["name"])
    return record.source.name or ("a person" if record.source == PERSON else record.source.kind)


def _table(store: Store, round_: int | None = None) -> pd.DataFrame:
    """Every query, or those of one round, with what the engine said of them."""
    more = store.diagnostics(round_)[["id", "acquired", "ess", "log_z"]]
    return store.frame(round_).merge(more, on="id", how="left")


def _evaluated(folder: Path) -> bool:
    """Whether the folder holds the table that evaluations left before they had a store."""
    return (folder / "queries.csv").exists() and not any(
        (folder / name).exists() for name in ("queries.sqlite", "store.json")
    )


def _load_evaluation(folder: Path) -> RunRecord:
    table = folder / "queries.csv"
    try:
        types: dict[str, Any] = {"prompt": str, "state": str, "error": object}
        queries = pd.read_csv(table, dtype=types, keep_default_na=True)
    except ValueError as error:
        raise StoreError(f"{table}: expected a table of queries, got {error}. Run the evaluation again.") from error
    config = translated(read_json(folder / "config.json"))
    return evaluation_record(folder, config, queries, read_json(folder / "summary.json", {}))


def direct_record(folder: Path, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> RunRecord:
    """Direct sampling as its files tell it: round 1 holds its pictures, round 0 the plain ones, if any."""
    rows = []
    for number, name in ((0, BESIDE), (1, DIRECT)):
        lines = (folder / name).read_text(encoding="utf-8").splitlines() if (folder / name).exists() else []
        rows += [json.loads(line) | {"round": number} for line in lines]
    table = pd.DataFrame(rows).rename(columns={"image": "id", "reward": "value"})
    table["state"] = table["value"].notna().map({True: "answered", False: "failed"})
    queries = table.reindex(columns=[*COLUMNS[:10], "acquired", "ess", "log_z"]).astype({"value": float})
    queries["error"] = queries["error"].astype(object)
    record = evaluation_record(folder, settings, queries, {"kind": "direct"} | dict(summary))
    if (queries["round"] == 0).any():
        return record
    return replace(record, rounds=record.rounds[1:], reference=None)


def evaluation_record(
    folder: Path, settings: Mapping[str, Any], queries: pd.DataFrame, summary: Mapping[str, Any]
) -> RunRecord:
    """An evaluation from its table: the plain samples of round 0 are the reference."""
    rounds = []
    written = {row["round"]: row for row in summary.get("rounds", ())}
    plain = _answers(queries, 0)
    for number, kind in enumerate(("plain", "tilted")):
        batch = queries[queries["round"] == number]
        known = RoundRecord(number, kind, len(batch))
        own = {key: written.get(number, {}).get(key) for key in ("fidelity", "ess_mean")}
        asked = int((queries["round"] <= number).sum())
        rounds.append(round_summary(known, batch, asked, pd.DataFrame(), plain) | own)
    fidelity = rounds[0]["fidelity"]
    return RunRecord(folder, settings, queries, tuple(rounds), summary, tuple(plain), fidelity)
