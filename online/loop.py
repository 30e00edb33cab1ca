"""The run: ask, have the black box answer, checkpoint, again; from wherever the store says that it was left.

    result = run(optimizer, make_reward("jpeg_compressibility"), hooks=progress)

When every round is answered, the reference samples that the settings want are drawn and scored, from what is left of
the budget.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tiltopt.designs import design_type
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online import rounds
from tiltopt.online.answering import WAIT_S, Answering, trouble_of
from tiltopt.online.hooks import Hook
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.pairs import Comparing
from tiltopt.online.queries import EXTRA_KINDS
from tiltopt.online.report.record import ended, without_summary, write_reference_summary, write_round_summary
from tiltopt.online.runner import CallPolicy, Stop
from tiltopt.online.settings.source import Source
from tiltopt.online.settings.validation import reference_samples
from tiltopt.online.signals import terminated_as_interrupted
from tiltopt.online.store.rows import REFERENCE
from tiltopt.online.store.run_folder import is_shared
from tiltopt.online.team import Kept, on_main
from tiltopt.rewards.base import BlackBox

Measure = Callable[[Optimizer, int], Mapping[str, Any]]
"""Further numbers of a finished round, such as its fidelity, for its summary; called on rank 0."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        complete: every round of the settings is answered.
        stop: what ended it before, or None.
        rounds: the summaries of all rounds, as in their `summary.json`.
        trouble: why the run went wrong, for people: the black box is dead, or answered nothing. Empty when it did not.
    """

    complete: bool
    stop: Stop | None
    rounds: tuple[Mapping[str, Any], ...]
    trouble: str = ""


def run(
    optimizer: Optimizer,
    black_box: BlackBox | None,
    *,
    policy: CallPolicy | None = None,
    hooks: Hook | None = None,
    measure: Measure | None = None,
) -> Result:
    """Carry a run to its end, or until something stops it; run it again to go on. Collective.

    What was asked before and has no answer is handed to the black box first; what is answered never again.

    Args:
        optimizer: a new or reopened run.
        black_box: what answers; needed on rank 0 only.
        policy: how it is called; that of `settings.reward` when None.
        hooks: who is told; see `tiltopt.online.hooks.Hook`.
        measure: further numbers for the rounds' summaries.

    Raises:
        ConfigError: the run's answers come from somebody else.
        RewardError: the black box cannot be used. What was answered is stored. On the other ranks: `PeerError`.
        KeyboardInterrupt: after SIGINT or SIGTERM, when calls in flight have had their grace.
    """
    team = optimizer.team
    told = hooks if team.is_main and hooks is not None else Hook()
    work = on_main(team, lambda: Kept(_Work(optimizer, black_box, policy, told, measure)))
    pulse = work.value.answering.pulse() if team.is_main else contextlib.nullcontext()
    with terminated_as_interrupted() as wish, pulse:

        def next_step() -> _Step:
            wish.check()
            return work.value.next_step()

        stop: Stop | None = None
        while stop is None:
            step = on_main(team, next_step)
            if step.what == "done":
                stop = step.stop
                break
            if step.what == "wait":
                continue
            told.on_round_start(step.round, step.size)
            if step.what == "ask":
                optimizer.ask(step.size, told.on_progress)
            elif step.what == "ask reference":
                _ask_reference(optimizer, told)
            here = step.round
            stop = on_main(team, lambda here=here: work.value.answer(here))  # type: ignore[misc]
        return on_main(team, lambda: work.value.result(stop))


def ask_again(optimizer: Optimizer) -> int:
    """Ask everything again that failed for another reason than that it cannot be measured; `run` then goes on with it.

    Returns:
        How many queries (or comparisons) that are. Rank 0 only.
    """
    store = optimizer.store
    failed = [row.number for row in (*store.in_state("failed"), *store.in_state("failed", REFERENCE))
              if row.failure != "infeasible"]  # fmt: skip
    for number in failed:
        store.retry(number)
    newest, lacking = store.next()[0] - 1, set(failed)
    without = [row for row in store.comparisons.rows() if row.outcome == "failed"]
    open_again = [row for row in without if row.round == newest or lacking & {row.winner, row.loser}]
    skipped = {row.id if row.choice is None else row.choice for row in open_again}
    for id in skipped:
        store.comparisons.undo(id)
    return len(skipped) if optimizer.settings.pairwise else len(failed)


def work(optimizer: Optimizer, black_box: BlackBox, *, hooks: Hook | None = None) -> Stop | None:
    """Answer what others ask, until the run is complete or a budget is used up; draw nothing.

    For machines without the models: they need the shared database and the folder with the images.

    Returns:
        The budget that ended it, or None when every round is answered.

    Raises:
        ConfigError: the queries are not in a shared database, are pairs, or are answered by somebody else.
        RewardError, KeyboardInterrupt: see `run`.
    """
    settings, store = optimizer.settings, optimizer.store
    if not is_shared(optimizer.folder) or settings.pairwise:
        what = "hands out pairs, which one process has compared" if settings.pairwise else "has a store of its own"
        raise ConfigError(
            f"{optimizer.folder} {what}; workers help where values are asked and the queries are in a shared database "
            "(store_url, docs/loop.md). Carry this one on with `tiltopt resume`."
        )
    optimizer.answers_from(Source.of_box(black_box.name, settings.reward))
    answering = Answering(store, optimizer.folder, settings, black_box, hooks)
    with terminated_as_interrupted() as wish, answering.pulse():
        while True:
            wish.check()
            stop = answering.answer() or answering.answer(REFERENCE)
            if stop is not None or _complete(optimizer):
                return stop
            time.sleep(WAIT_S)


def _complete(optimizer: Optimizer) -> bool:
    """Whether every round and every reference sample was asked, and none of them waits."""
    settings, store = optimizer.settings, optimizer.store
    asked = sum(record.kind != "imported" for record in store.rounds())
    reference = store.counts(REFERENCE)
    waiting = store.counts()["asked"] + reference["asked"]
    return asked > settings.rounds and not waiting and sum(reference.values()) >= reference_samples(settings)


def _ask_reference(optimizer: Optimizer, told: Hook) -> None:
    """Draw and store the reference samples that are missing. Collective."""
    started = time.monotonic()
    engine, folder = optimizer.engine, optimizer.folder
    job = on_main(optimizer.team, lambda: rounds.prepare_reference(optimizer.store, optimizer.settings))
    if job is not None:
        drawn, _ = rounds.draw(engine, job, None, told.on_progress)
        kind = design_type(optimizer.settings.design)
        on_main(optimizer.team, lambda: rounds.commit(optimizer.store, engine, folder, kind, job, drawn, None, started))


@dataclass(frozen=True)
class _Step:
    """What comes next."""

    what: Literal["ask", "ask reference", "answer", "wait", "done"]
    round: int = 0
    size: int = 0
    stop: Stop | None = None


class _Work:
    """Rank 0's part of a run."""

    def __init__(
        self,
        optimizer: Optimizer,
        black_box: BlackBox | None,
        policy: CallPolicy | None,
        hooks: Hook,
        measure: Measure | None,
    ) -> None:
        if black_box is None:
            raise RewardError("expected a black box on rank 0, got None; make one with tiltopt.rewards.make_reward.")
        optimizer.answers_from(Source.of_box(black_box.name, optimizer.settings.reward))
        self.optimizer = optimizer
        self.hooks = hooks
        self.measure = measure
        kind = Comparing if optimizer.settings.pairwise else Answering
        self.answering = kind(optimizer.store, optimizer.folder, optimizer.settings, black_box, hooks, policy)

    def next_step(self) -> _Step:
        """From the store alone, so that a resumed run goes on where it was left."""
        settings, store = self.optimizer.settings, self.optimizer.store
        records, outstanding = store.rounds(), store.counts()["asked"]
        last = records[-1].round if records else -1
        if outstanding and not settings.pairwise:
            return _Step("answer", last, outstanding)
        if not self.optimizer.leads():  # one process at a time asks rounds, and has pairs compared
            time.sleep(WAIT_S)
            return self._ended() or _Step("wait")
        if outstanding or without_summary(self.optimizer.folder, store, records):
            return _Step("answer", last, outstanding)
        asked = sum(record.kind not in EXTRA_KINDS for record in records)
        reference = store.counts(REFERENCE)
        missing = reference_samples(settings) - sum(reference.values()) if not self._old_reference() else 0
        if asked > settings.rounds and (reference["asked"] or self._reference_untold(reference)):
            return _Step("answer", REFERENCE, reference["asked"])
        if asked > settings.rounds and missing <= 0:
            return _Step("done")
        over = self._ended(f" after {asked} of {settings.rounds + 1} rounds")
        if over is not None:
            return over
        if asked > settings.rounds:
            return _Step("ask reference", REFERENCE, missing)
        return _Step("ask", last + 1, settings.batch_size if asked else settings.initial_batch_size)

    def _ended(self, when: str = "") -> _Step | None:
        """The end by a budget that is used up."""
        budget = self.answering.runner.used_up()
        if budget is None:
            return None
        limit = getattr(self.answering.runner.policy, budget)
        return _Step("done", stop=Stop(budget, (), f"the budget `{budget}` = {limit:g} is used up{when}"))

    def answer(self, round_: int) -> Stop | None:
        """Have everything outstanding answered, and checkpoint the round when nothing is left."""
        optimizer, started = self.optimizer, time.monotonic()
        reference = round_ == REFERENCE
        touched = {row.round for row in optimizer.store.in_state("asked")}
        try:
            stop = self.answering.answer(REFERENCE if reference else None)
        finally:
            optimizer.store.add_answer_seconds(round_, time.monotonic() - started)
        optimizer.checkpoint()
        if stop is not None or not optimizer.leads():
            return stop
        unfinished = {REFERENCE} if reference else set(without_summary(optimizer.folder, optimizer.store))
        for finished in sorted(touched | unfinished):
            measured = self.measure(optimizer, finished) if self.measure else {}
            if finished == REFERENCE:
                summary = write_reference_summary(optimizer.folder, optimizer.store, measured)
            else:
                summary = write_round_summary(optimizer.folder, optimizer.store, finished, measured)
            if finished in unfinished:
                self.hooks.on_round_end(summary)
        return None

    def _reference_untold(self, counts: Mapping[str, int]) -> bool:
        """Whether the summary of reference samples that there are has not been written."""
        return sum(counts.values()) > 0 and not (self.optimizer.folder / "reference" / "summary.json").exists()

    def _old_reference(self) -> bool:
        """Whether the reference samples were scored by version 0.1, which kept them in a file of their own."""
        return (self.optimizer.folder / "reference" / "values.json").exists()

    def result(self, stop: Stop | None) -> Result:
        """Every round as it was summarised, and whether all of them are done."""
        folder, store = self.optimizer.folder, self.optimizer.store
        return Result(stop is None, stop, ended(folder, store), trouble_of(store, stop))
