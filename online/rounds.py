"""One round of queries: prepared and fitted (rank 0), drawn (every rank), written down (rank 0).

Its checkpoint is its surrogate, how the one before had predicted, and the plan drawn from that.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from botorch.models.model import Model
from torch import Tensor

from tiltopt.designs import DesignType, design_type
from tiltopt.errors import NotEnoughDataError, StoreError, SurrogateError
from tiltopt.online.engine.base import Engine
from tiltopt.online.engine.price import next_price
from tiltopt.online.hooks import OnProgress
from tiltopt.online.queries import Ask, Drawn, NewQuery, Objective, Observations, Plan, RoundRecord, Start
from tiltopt.online.report.front import reference_of
from tiltopt.online.report.sight import Sight, sight
from tiltopt.online.search import latents_of, start_queries
from tiltopt.online.seeds import derive, query_seed
from tiltopt.online.settings.objectives import objectives_of
from tiltopt.online.settings.prompts import load_prompts, prompt_of
from tiltopt.online.settings.run import Settings
from tiltopt.online.store import files
from tiltopt.online.store.features import pack
from tiltopt.online.store.latents import FILE, write_latents
from tiltopt.online.store.rows import REFERENCE
from tiltopt.online.store.store import Store
from tiltopt.surrogates import io
from tiltopt.surrogates.calibration import adjust, score
from tiltopt.surrogates.data import fingerprint
from tiltopt.surrogates.preference import PairwiseModel
from tiltopt.surrogates.several import SeveralModel


def save_surrogate(folder: Path, record: RoundRecord, model: Model, feature_id: str) -> None:
    """Write `round_NNN/surrogate.{safetensors,json}`: whole files or none.

    Raises:
        StoreError: the disk refuses.
    """
    target, mark = files.round_folder(folder, record.round), record.fingerprint or ""
    packed = io.packed(model, feature_id=feature_id, data_fingerprint=mark, extra={"round": record.round})
    for name, content in packed.items():
        files.write_atomic(target / name, lambda file, content=content: file.write(content))  # type: ignore[misc]


def newest_surrogate(
    folder: Path, rounds: Sequence[RoundRecord], feature_id: str
) -> tuple[int | None, Model | None, list[str]]:
    """The newest whole surrogate of a run: its round, the model, and a note for each damaged one that was passed over.

    Damaged files are left as they are; the next fit does not need them, because it uses all answers.
    """
    notes: list[str] = []
    for record in reversed(rounds):
        if record.fingerprint is None:
            continue
        place = files.round_folder(folder, record.round)
        try:
            return record.round, io.load(place, feature_id=feature_id), notes
        except (SurrogateError, OSError) as error:
            notes.append(f"the surrogate of round {record.round} cannot be read ({error}); the one before it was used.")
    return None, None, notes


def score_previous(
    store: Store,
    folder: Path,
    rounds: Sequence[RoundRecord],
    feature_id: str,
    objectives: Sequence[Objective] = (),
) -> tuple[dict[str, Any] | None, list[str]]:
    """How the newest surrogate predicted the answers that came after it, before they teach the next one.

    Returns:
        The scores (see `tiltopt.surrogates.calibration.score`; of comparisons `score_comparisons`; of several
        objectives, those of each by its name in `objectives`) and the `round` of that surrogate; None without a
        surrogate or new answers. And notes for people.
    """
    round_, model, notes = newest_surrogate(folder, rounds, feature_id)
    if round_ is None or model is None:
        return None, notes
    if isinstance(model, SeveralModel):
        X, Y, sem = store.outcomes_since(round_, objectives)
        if not len(X):
            return None, notes
        each = zip(objectives, model.models, Y.split(1, 1), sem.split(1, 1), strict=True)
        scores = {objective.name: score(part, X, y, sem=s) for objective, part, y, s in each}
        return {"objectives": scores, "round": round_}, notes
    if isinstance(model, PairwiseModel):
        newer = [row for row in store.comparisons.rows() if row.round >= round_]
        found = score_comparisons(store, model, newer)
        return (None if found is None else {**found, "round": round_}), notes
    X, Y, sem, acquired = store.promises_since(round_)
    if not len(X):
        return None, notes
    return {**score(model, X, Y, sem=sem, acquired=acquired), "round": round_}, notes


def score_comparisons(store: Store, model: PairwiseModel, rows: Sequence[Any]) -> dict[str, Any] | None:
    """How a surrogate predicts comparisons that it has not seen; ties have no right answer and are left out. Of a
    choice among several, the winner counts against each of the others.

    Args:
        rows: of the store's comparisons.

    Returns:
        `comparisons`, `agreement` (share of the winners that it thought the better ones) and `nll` (mean of -log of the
        probability it gave to what came, nats; log 2 = knows nothing); None without a win among the rows.
    """
    wins = [row for row in rows if row.outcome == "win"]
    if not wins:
        return None
    winners, losers = (store.vectors_of([getattr(row, side) for row in wins]) for side in ("winner", "loser"))
    p = model.preference(winners, losers).clamp_min(1e-300)
    right = float((p > 0.5).double().mean())
    return {"comparisons": len(wins), "agreement": right, "nll": float(-p.log().mean())}


def plan_of(settings: Settings, scores: Sequence[Mapping[str, Any]], before: Sequence[RoundRecord] = ()) -> Plan:
    """Price and optimism of the next round: the settings, made more careful by every score so far, oldest first.

    Where the settings name a budget in place of a price, the price follows from what the latest tilted round cost; it
    is left to the engine where there is none.
    """
    budget, beta = settings.sampler.budget_nats, settings.acquisition.beta
    alpha = settings.sampler.alpha if budget is None else 1 / budget
    assert alpha is not None
    price, optimism, note = alpha, beta, ""
    for report in scores if settings.acquisition.adapt else ():
        if "comparisons" not in report:  # where the run learnt from comparisons, no reward was predicted
            price, optimism, note = adjust(
                price, optimism, report, alpha_floor=alpha, beta_ceiling=beta, budget=budget is not None
            )
    notes = (note,) if note else ()
    if budget is None:
        return Plan(price, optimism, notes)
    tilted = [r for r in before if r.kind == "tilted"]
    known = [next_price(r.alpha, r.nats, 1 / price) for r in tilted if r.alpha is not None and r.nats is not None]
    return Plan(known[-1] if known else None, optimism, notes, 1 / price)


@dataclass(frozen=True)
class Job:
    """A round about to be drawn, as every rank needs it.

    Args:
        record: what will be stored of the round.
        asks: its queries.
        plan: how they are tilted.
        data: every answer so far; None for plain samples of the prior.
    """

    record: RoundRecord
    asks: tuple[Ask, ...]
    plan: Plan
    data: Observations | None


def prepare(
    store: Store, engine: Engine, settings: Settings, folder: Path, n: int, on_progress: OnProgress
) -> tuple[Job, Model | None]:
    """Decide what the next round of `n` queries is, and fit its surrogate.

    Everything follows from the store and the settings, so that a round prepared again after a crash is the same round.
    """
    round_, first = store.next()
    prompts = load_prompts(settings.prompts)
    asks = tuple(
        Ask(first + i, round_, i, prompt_of(settings, first + i, prompts), query_seed(settings.seed, round_, i))
        for i in range(n)
    )
    known = store.feature_id()
    if known is not None and known != engine.feature_id:
        raise StoreError(
            f"the run's features come from {known!r}, but the engine's are {engine.feature_id!r}; open the run with "
            "the feature settings it was made with, or start a new one."
        )
    plain = Job(RoundRecord(round_, "plain", n), asks, Plan(None, 0.0), None)
    if first <= settings.initial_batch_size:
        return plain, None
    job, model = _tilt(plain, store, engine, settings, folder, on_progress)
    if model is None:
        return job, None
    begun, notes = start_queries(store, engine, settings, folder, model, job.asks, _seen(store, settings))
    return replace(job, asks=begun, record=replace(job.record, notes=(*job.record.notes, *notes))), model


def prepare_refined(
    store: Store,
    engine: Engine,
    settings: Settings,
    folder: Path,
    number: int,
    strength: float,
    n: int,
    on_progress: OnProgress,
) -> tuple[Job, Model | None]:
    """A round of `n` queries that start from the re-noised latents of one query, with its prompt.

    They follow the surrogate of every answer where one can be fitted, else the prior.

    Raises:
        StoreError: unknown query, one that is failed or abandoned, or neither its latents nor its design are left.
        PriorError: the chain has no step at which it could be entered.
    """
    row = store.get(number)
    if row.state not in ("asked", "answered"):
        raise StoreError(f"query {number} is {row.state}; expected one that is asked or answered. Nothing was asked.")
    k0 = engine.level_of(strength)
    kind = design_type(settings.design)
    latents, _ = latents_of(store, engine, folder, kind, [number])
    if number not in latents:
        places = files.round_folder(folder, row.round) / FILE, files.design_path(folder, number, kind)
        raise StoreError(
            f"query {number} cannot be started from: neither {places[0]} nor {places[1]} can be read. Put one of them "
            "back, or choose another query. Nothing was asked."
        )
    round_, first = store.next()
    start = Start("restart", (number,), (1.0,), latents[number].unsqueeze(0), k0)
    asks = tuple(Ask(first + i, round_, i, row.prompt, query_seed(settings.seed, round_, i), start) for i in range(n))
    job, model = _tilt(
        Job(RoundRecord(round_, "plain", n), asks, Plan(None, 0.0), None), store, engine, settings, folder, on_progress
    )
    note = f"{n} queries near query {number}, strength {strength:g}"
    return replace(job, record=replace(job.record, kind="refined", notes=(note, *job.record.notes))), model


def _tilt(
    plain: Job, store: Store, engine: Engine, settings: Settings, folder: Path, on_progress: OnProgress
) -> tuple[Job, Model | None]:
    """The round with a surrogate, or plain with the reason why there is none."""
    before = store.rounds()
    objectives = objectives_of(settings)
    score, notes = score_previous(store, folder, before, engine.feature_id, objectives)
    plan = plan_of(settings, [s for s in (*(r.score for r in before), score) if s is not None], before)
    notes = [*notes, *plan.notes]
    data = store.comparisons.data() if settings.pairwise else store.data(objectives)
    if objectives:
        first = store.first_outcomes(objectives)
        point = reference_of(objectives, settings.reference_point, first)
        data = replace(data, reference=point, first=first if len(first) > 1 else None)
    try:
        _check_enough(data)
        on_progress("fit", 0, 1)
        model = engine.fit(data, plain.record.round)
        on_progress("fit", 1, 1)
    except NotEnoughDataError as error:  # anything else is a mistake or a trouble to be mended, at no answer's cost
        notes.append(f"round {plain.record.round} was drawn without a surrogate: {error}")
        warnings.warn(notes[-1], stacklevel=2)
        return replace(plain, record=replace(plain.record, notes=tuple(notes), score=score)), None
    record = replace(
        plain.record,
        kind="tilted",
        alpha=plan.alpha,
        beta=plan.beta,
        notes=tuple(notes),
        score=score,
        fingerprint=fingerprint(data.X, _learnt(data), data.sem),
    )
    return Job(record, plain.asks, plan, data), model


def _seen(store: Store, settings: Settings) -> Sight | None:
    """What the answers say of the features; None where an answer is not one number."""
    if settings.pairwise or settings.objectives:
        return None
    answered = store.frame().query("state == 'answered'").dropna(subset=["value"])
    return sight(answered, {record.round: record.kind for record in store.rounds()})


def prepare_reference(store: Store, settings: Settings) -> Job | None:
    """The reference samples that are still to be drawn: plain samples over the run's prompts, with seeds of their own,
    scored for the report alone. None when there are as many as the settings want."""
    from tiltopt.online.settings.validation import reference_samples  # whose tables load the samplers

    known = sum(store.counts(REFERENCE).values())
    prompts = load_prompts(settings.prompts)
    asks = tuple(
        Ask(-i - 1, REFERENCE, i, prompt_of(settings, i + 1, prompts), derive(settings.seed, "reference", i))
        for i in range(known, reference_samples(settings))
    )
    return Job(RoundRecord(REFERENCE, "reference", len(asks)), asks, Plan(None, 0.0), None) if asks else None


def _learnt(data: Observations) -> Tensor:
    """The answers beside the features."""
    if data.comparisons is None:
        return data.Y
    return data.comparisons if data.choices is None else torch.column_stack([data.comparisons, data.choices])


def _check_enough(data: Observations) -> None:
    """A NotEnoughDataError where there is nothing to learn from."""
    if data.comparisons is not None and not len(data.comparisons):
        raise NotEnoughDataError("a surrogate of comparisons needs at least 1 of them, got none")
    if data.comparisons is None and any(len(torch.unique(column)) < 2 for column in data.Y.T):
        each = " of each objective" if data.objectives else ""
        raise NotEnoughDataError(f"a surrogate needs 2 different answers{each}, got {len(data.Y)} answers")


def _price(record: RoundRecord, drawn: Sequence[Drawn]) -> RoundRecord:
    """The round with the price that was used and what a query cost that began at noise (else any), where the engine
    tells."""
    used = [d.alpha for d in drawn if d.alpha is not None]
    counted = [d for d in drawn if d.nats is not None]
    guided = [d for d in counted if d.origin.operator != "pool"]
    cost = [d.nats for d in [d for d in guided if not d.origin.parents] or guided if d.nats is not None]
    alpha = sum(used) / len(used) if used else record.alpha
    return replace(record, alpha=alpha, nats=sum(cost) / len(cost) if cost else None)


def draw(engine: Engine, job: Job, model: Model | None, on_progress: OnProgress) -> tuple[list[Drawn], Model | None]:
    """The designs of a round and the surrogate they followed. Collective; `model` is needed on rank 0 only."""

    def steps(done: int, total: int) -> None:
        on_progress("denoise", done, total)

    if job.data is None:
        return engine.draw_plain(job.asks, steps), None
    model = engine.share_model(model)
    return engine.draw(model, job.data, job.asks, job.plan, steps), model


def commit(
    store: Store,
    engine: Engine,
    folder: Path,
    kind: DesignType,
    job: Job,
    drawn: Sequence[Drawn],
    model: Model | None,
    started: float,
) -> None:
    """Surrogate, designs and latents first, each whole on the disk; then every row in one transaction.

    Args:
        kind: what the designs are.
        started: `time.monotonic()` when the round was begun.
    """
    if model is not None and job.record.fingerprint is not None:  # one that was fitted for this round
        save_surrogate(folder, job.record, model, engine.feature_id)
    designs = {a.number: d.image if d.design is None else d.design for a, d in zip(job.asks, drawn, strict=True)}
    files.write_queries(folder, designs, kind)
    latents = {a.number: d.latents for a, d in zip(job.asks, drawn, strict=True) if d.latents is not None}
    if latents and job.record.kind != "reference":
        write_latents(folder, job.record.round, latents)
    new = []
    for a, d in zip(job.asks, drawn, strict=True):
        values = (d.predicted, d.predicted_sd, d.acquired, d.ess, d.log_z)
        new.append(NewQuery(a.number, a.index, a.prompt, a.seed, pack(d.features), *values, origin=d.origin))
    record = replace(_price(job.record, drawn), ask_seconds=time.monotonic() - started)
    store.add_round(record, new, engine.feature_id)
