"""What is asked of a run and has no answer yet goes to its black box; what comes back goes into its store."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
import reprlib
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltopt.designs import design_type
from tiltopt.errors import ConfigError, RewardError, StoreError
from tiltopt.online.hooks import Hook
from tiltopt.online.runner import CallPolicy, Fault, Ledger, Runner, Stop
from tiltopt.online.seeds import generator
from tiltopt.online.settings.objectives import objectives_of, outcomes_of
from tiltopt.online.settings.run import Settings
from tiltopt.online.signals import Pulse
from tiltopt.online.store import files, run_folder
from tiltopt.online.store.database import UnavailableError
from tiltopt.online.store.files import jsonable
from tiltopt.online.store.rows import StateError
from tiltopt.online.store.spool import NAME as SPOOL
from tiltopt.online.store.store import Store
from tiltopt.rewards.base import Answer, BlackBox
from tiltopt.rewards.composition import Composition
from tiltopt.rewards.replies import by_name, known_spread

log = logging.getLogger(__name__)

RUN = "run@"
"""How the names of workers begin that are runs; a person or a script of its own has another name."""
HEARTBEAT_S = 10.0
WAIT_S = 0.5  # between two looks at what others are doing
SCALE = "scale.json"
"""In a run's folder: mean and standard deviation of each part of a reward that is standardised on round 0."""
UNKNOWN = "its fate is unknown: the process that asked about it died; ask again with `tiltopt retry`"
ALL = 1_000_000  # queries claimed at once where nobody else may work


class Answering:
    """Has a black box answer what is asked of a run. Rank 0 only.

    It claims what it asks about, as any worker does, and leaves alone what others hold.

    Args:
        store, folder, settings: of the run.
        black_box: what answers.
        hooks: who is told.
        policy: how the black box is called; that of the settings when None.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        settings: Settings,
        black_box: BlackBox,
        hooks: Hook | None = None,
        policy: CallPolicy | None = None,
    ) -> None:
        self.store, self.folder, self.settings = store, folder, settings
        self.objectives, self.kind = objectives_of(settings), design_type(settings.design)
        self.hooks = hooks if hooks is not None else Hook()
        policy = policy if policy is not None else CallPolicy.from_reward(settings.reward)
        self.runner = Runner(self._box(black_box), policy, self._ledger())
        self.worker = f"{_here()}{os.getpid()}-{secrets.token_hex(4)}"
        self.alone = not run_folder.is_shared(folder)

    def pulse(self) -> Pulse:
        """To be entered while the run works: its seconds go into the book, and its claims stay alive."""
        heard = time.monotonic()

        def beat(seconds: float) -> None:
            nonlocal heard
            self.store.tick(seconds)
            if time.monotonic() - heard > HEARTBEAT_S:
                self.store.heartbeat(self.worker)
                heard = time.monotonic()

        return Pulse(beat)

    def answer(self, round_: int | None = None) -> Stop | None:
        """Everything that is asked of the run.

        Args:
            round_: of this round, such as that of the reference samples; None for any other.

        Returns:
            The budget that ended it, or None when nothing is left.

        Raises:
            RewardError, StoreError, KeyboardInterrupt: see `Runner.run`; what was answered is stored before.
        """
        self._bury(round_)
        stop = None
        try:
            while stop is None:
                self._take_in()
                self._standardise()
                items = self._items(round_)
                if items:
                    stop = self.runner.run(items, self._take, lambda n, m: self.hooks.on_progress("black box", n, m))
                elif self._held_by_others(round_):
                    self._bury(round_)
                    time.sleep(WAIT_S)
                    stop = self._out_of_time()
                else:
                    return None
        finally:
            self._store_rest()
            self.store.release(self.worker)
        return stop

    def _box(self, black_box: BlackBox) -> Any:
        return by_name(black_box) if self.objectives else black_box

    def _standardise(self) -> None:
        """Once round 0 is answered: keep the scale of a reward that is to be standardised on it, and take the scale.

        The answers of round 0, which came before it, are put in that scale. Cut short anywhere, it is done again from
        the parts that each answer keeps.
        """
        box, path = self.runner.black_box, self.folder / SCALE
        if not isinstance(box, Composition) or not box.standardise or box.scale is not None:
            return
        rows = {row.number: row for row in self.store.in_state("answered", 0) if row.raw}
        parts = {number: json.loads(row.raw) for number, row in rows.items()}
        if not path.is_file():
            counts = self.store.counts(0)
            if counts["asked"] or not counts["answered"]:
                return
            if len(parts) < counts["answered"]:
                raise ConfigError(
                    "`reward.standardise` needs the parts of every answer of round 0, and some of these answers were "
                    "not given by this reward; weigh the parts in their own units."
                )
            files.write_json(path, box.scale_of(list(parts.values())))
        box = box.with_scale({key: (mean, spread) for key, (mean, spread) in files.read_json(path).items()})
        restated = {number: box.restated(raw) for number, raw in parts.items()}
        self.store.restate(
            {number: (said.value + noise(self.settings, number), said.sem) for number, said in restated.items()}
        )
        self.runner.black_box = box

    def _ledger(self) -> Ledger:
        return self.store

    def _bury(self, round_: int | None) -> None:
        """Give back what workers hold that are known to be gone.

        Those of this machine are looked for among its processes. In a folder of its own a run is worked by one process
        at a time, so that any other is gone, on whatever machine it was.
        """
        for name in {row.worker for row in self.store.in_state("asked", round_) if row.worker} - {self.worker}:
            process = name.removeprefix(_here()).split("-")[0] if name.startswith(_here()) else ""
            if name.startswith(RUN) and (self.alone or (process.isdigit() and not _lives(int(process)))):
                self.store.release(name)

    def _items(self, round_: int | None) -> list[Any]:
        """What is free and was claimed: all of it, or a few at a time where others work too.

        A query whose image is gone fails, and keeps nobody else waiting; so does one of unknown fate, if that is the
        policy.
        """
        few = 2 * self.runner.policy.concurrency * self.runner.black_box.batch_size
        found = []
        for row in self.store.claim(self.worker, ALL if self.alone else few, round_=round_):
            if row.handed_at is not None and self.runner.policy.on_unknown == "leave":
                self.store.deliver(row.number, None, error=UNKNOWN, failure="fault")
                continue
            try:
                found.append((row.number, files.query_design(self.folder, row.number, self.kind), row.prompt))
            except StoreError as error:
                self.store.fail(row.number, str(error), failure="fault")
        return found

    def _held_by_others(self, round_: int | None) -> bool:
        return self.store.counts(round_)["asked"] > 0

    def _out_of_time(self) -> Stop | None:
        if self.runner.used_up() != "max_seconds":
            return None
        return Stop("max_seconds", (), "the budget `max_seconds` is used up while others hold what is asked")

    def _take(self, number: Any, answer: Answer) -> None:
        """Keep one answer, with the noise that the settings ask for."""
        value, sem, outcomes = None, answer.sem, None
        if self.objectives and not answer.failed and self._unmeasured(answer):
            answer = replace(answer, value=math.nan)
        if not answer.failed and self.objectives:
            try:
                outcomes = self._outcomes(number, answer)
            except RewardError as error:
                answer = Answer.failure(f"`{self.runner.black_box.name}`: {error}", answer.raw)
            else:
                value, sem = outcomes[self.objectives[0].name]
        elif not answer.failed:
            value = float(answer.value) + (noise(self.settings, number) if number > 0 else 0.0)
        kind = "infeasible" if answer.infeasible else "fault" if isinstance(answer, Fault) else None
        failure = {} if value is not None else {"error": str(answer.reason), "failure": kind}
        try:
            self.store.deliver(number, value, sem, said(answer), **failure, outcomes=outcomes)
        except StateError as error:  # another worker was faster
            log.warning("an answer came too late: %s", error)
        if number > 0:
            self.hooks.on_answer(number, value)

    def _unmeasured(self, answer: Answer) -> bool:
        """Whether the answer is that one of the objectives has no value: NaN or -inf."""
        raw = answer.raw if isinstance(answer.raw, Mapping) else {}
        values = [raw.get(objective.name) for objective in self.objectives]
        known = [v for v in values if isinstance(v, numbers.Real) and not isinstance(v, int)]
        return any(math.isnan(v) or v == -math.inf for v in known)

    def _outcomes(self, number: Any, answer: Answer) -> dict[str, tuple[float, float | None]]:
        """Of an answer of several numbers those that are objectives, each with its noise. Raises RewardError."""
        raw = answer.raw if isinstance(answer.raw, Mapping) else {}
        told = raw.get("sem")
        sems = {name: known_spread(sem) for name, sem in told.items()} if isinstance(told, Mapping) else None
        found = outcomes_of(self.objectives, raw, sems)
        return {
            name: (value + (noise(self.settings, number, i) if number > 0 else 0.0), sem)
            for i, (name, (value, sem)) in enumerate(found.items())
        }

    def _take_in(self) -> None:
        """Answers that wait for the database go first: until it has them, their queries look as if nobody had answered.

        Raises:
            UnavailableError: it does not take them; they wait for the next opening of the run.
        """
        self.store.settle(self.runner.policy.grace_s)
        if self.store.spool:
            raise UnavailableError(
                f"the database takes no answers; those that came are kept in {self.folder / SPOOL}, and are taken in "
                "when the run goes on.",
                passing=True,
            )

    def _store_rest(self) -> None:
        """Answers that are in memory alone are tried again for as long as calls in flight are awaited."""
        if self.store.settle():
            log.warning("answers are kept in memory and tried again for %g s", self.runner.policy.grace_s)
            self.store.settle(self.runner.policy.grace_s)


def trouble_of(store: Store, stop: Stop | None) -> str:
    """What went wrong with the asking, for people: the black box is dead, or answered nothing; "" where nothing did.

    Args:
        stop: why the asking ended.
    """
    if stop is not None and stop.failed:
        return stop.message
    failed = store.in_state("failed")
    if store.counts()["answered"] or not failed:
        return ""
    first = failed[0]
    told = f"\n{first.raw}" if first.failure == "fault" and first.raw else ""
    return f"nothing was answered: {len(failed)} queries failed, the first with: {first.error}{told}"


def in_trouble(trouble: str, folder: Path) -> RewardError:
    """The error of a run that went wrong so."""
    return RewardError(f"{trouble}\nMend it, then ask again with `tiltopt retry {folder}`.")


def _here() -> str:
    """How the names of this machine's working runs begin."""
    return f"{RUN}{socket.gethostname()}-"


def _lives(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def said(answer: Answer) -> str | None:
    """What the black box said beyond the number, as text; shortened where it is no plain values."""
    if answer.raw is None or isinstance(answer.raw, str):
        return answer.raw
    for write in (lambda raw: json.dumps(jsonable(raw)), reprlib.repr):
        with contextlib.suppress(Exception):  # of whatever object: what is said beside a value keeps no value out
            return write(answer.raw)
    return type(answer.raw).__name__


def noise(settings: Settings, *path: int) -> float:
    """What the settings add to an answer: drawn from the generator of what it is an answer to."""
    if settings.answer_noise == 0:
        return 0.0
    source = generator(settings.seed, "noise", *path)
    return settings.answer_noise * torch.randn((), generator=source, dtype=torch.float64).item()
