"""One round of queries: prepare it and fit (rank 0), draw it (every rank), write it down (rank 0)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from botorch.models.model import Model

from tiltopt.errors import StoreError, SurrogateError
from tiltopt.online import files, rounds
from tiltopt.online.engine import Ask, Data, Drawn, Engine, Plan
from tiltopt.online.prompts import load_prompts, prompt_of
from tiltopt.online.rows import NewQuery, RoundRecord, pack
from tiltopt.online.seeds import query_seed
from tiltopt.online.settings import Settings
from tiltopt.online.store import Store
from tiltopt.surrogates.data import fingerprint

Progress = Callable[[str, int, int], None]
"""(kind, done, total); kinds: "fit", "denoise"."""


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
    data: Data | None


def prepare(
    store: Store, engine: Engine, settings: Settings, folder: Path, n: int, tell: Progress
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
    return _tilt(plain, store, engine, settings, folder, tell)


def _tilt(
    plain: Job, store: Store, engine: Engine, settings: Settings, folder: Path, tell: Progress
) -> tuple[Job, Model | None]:
    """The round with a surrogate, or plain with the reason why there is none."""
    before = store.rounds()
    score, notes = rounds.score_previous(store, folder, before, engine.feature_id)
    plan = rounds.plan_of(settings, [s for s in (*(r.score for r in before), score) if s is not None])
    notes = [*notes, *plan.notes]
    data = store.comparisons.data() if settings.pairwise else store.data()
    try:
        _check_enough(data)
        tell("fit", 0, 1)
        model = engine.fit(data, plain.record.round)
        tell("fit", 1, 1)
    except SurrogateError as error:
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
        fingerprint=fingerprint(data.X, data.Y if data.comparisons is None else data.comparisons, data.sem),
    )
    return Job(record, plain.asks, plan, data), model


def _check_enough(data: Data) -> None:
    """A SurrogateError where there is nothing to learn from."""
    if data.comparisons is not None and not len(data.comparisons):
        raise SurrogateError("a surrogate of comparisons needs at least 1 of them, got none")
    if data.comparisons is None and len(torch.unique(data.Y)) < 2:
        raise SurrogateError(f"a surrogate needs 2 different answers, got {len(data.Y)} answers")


def _price(record: RoundRecord, drawn: Sequence[Drawn]) -> RoundRecord:
    """The round with the price that was used, where the engine tells; their mean where queries had their own."""
    used = [d.alpha for d in drawn if d.alpha is not None]
    if not used:
        return record
    if min(used) == max(used):
        return replace(record, alpha=used[0])
    note = f"each query had its own alpha, {min(used):.3g} to {max(used):.3g}; their mean is recorded."
    return replace(record, alpha=sum(used) / len(used), notes=(*record.notes, note))


def draw(engine: Engine, job: Job, model: Model | None, tell: Progress) -> tuple[list[Drawn], Model | None]:
    """The designs of a round and the surrogate they followed. Collective; `model` is needed on rank 0 only."""

    def steps(done: int, total: int) -> None:
        tell("denoise", done, total)

    if job.data is None:
        return engine.draw_plain(job.asks, steps), None
    model = engine.share_model(model)
    return engine.draw(model, job.data, job.asks, job.plan, steps), model


def commit(
    store: Store, engine: Engine, folder: Path, job: Job, drawn: Sequence[Drawn], model: Model | None, started: float
) -> None:
    """Surrogate and images first, each whole on the disk; then every row in one transaction.

    Args:
        started: `time.monotonic()` when the round was begun.
    """
    if model is not None:
        rounds.save_surrogate(folder, job.record, model, engine.feature_id)
    files.write_images({files.image_path(folder, a.number): d.image for a, d in zip(job.asks, drawn, strict=True)})
    new = []
    for a, d in zip(job.asks, drawn, strict=True):
        values = (d.predicted, d.predicted_sd, d.acquired, d.ess, d.log_z)
        new.append(NewQuery(a.number, a.index, a.prompt, a.seed, pack(d.features), *values))
    record = replace(_price(job.record, drawn), ask_seconds=time.monotonic() - started)
    store.add_round(record, new, engine.feature_id)
