"""One run that meets faults, process after process, until it is done; and what it did wrong, by the black box's book.

Every process of a run is a fork of one interpreter that has everything loaded.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.faults.book import Book, Line
from tests.fakes.faults.faults import NO_FAULT, SIGNALS, Fault, Injector
from tests.fakes.faults.runs import CONCURRENCY, Plain, Seen
from tiltopt.errors import TiltoptError
from tiltopt.online.signals import terminated_as_interrupted
from tiltopt.online.store.database import Database

HUNG_S = 60.0
PATIENCE_S = 0.3
"""How long the store tries again before an answer goes to the spool; less than most faults last."""
CLEAN_ATTEMPTS = 4
ENDINGS = {0: "complete", 3: "stopped", 4: "refused", 5: "wrong", 130: "interrupted"}
"""Exit codes of a process of a run; a signal is "killed"."""


@dataclass
class Attempt:
    """One process of a run.

    Args:
        number: from 0, in the order of their starts.
        fault: what it met.
        ending: how it ended: a value of `ENDINGS`, "killed" or "hung".
        kept: keys of what the run had kept when the process had opened it; None if it did not come so far.
        spent: the run's own book at that moment.
        boundaries, hits: write boundaries that it passed, and how often its fault struck; 0 if it was killed.
        words: what it said at its end.
        seconds: from that moment to its end.
    """

    number: int
    fault: Fault
    ending: str = ""
    kept: set[str] | None = None
    spent: Mapping[str, float] | None = None
    boundaries: int = 0
    hits: int = 0
    words: str = ""
    seconds: float = 0.0

    @property
    def struck(self) -> bool:
        """Whether it met its fault."""
        return self.ending == "killed" or self.hits > 0 or (self.fault.from_outside and self.ending == "interrupted")

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do, or no use in trying."""
        return self.ending in ("complete", "stopped", "wrong", "hung")


@dataclass
class Trial:
    """A run that is carried on by process after process, or by several at once.

    Args:
        kind: of run.
        folder: of the run; the book and notes of the processes are beside it.
        terms: settings for the reward, such as budgets.
        flaky: the black box raises now and then.
    """

    kind: Plain
    folder: Path
    terms: Mapping[str, Any] = field(default_factory=dict)
    flaky: bool = False
    generations: list[list[Attempt]] = field(default_factory=list)
    end: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        self.book = Book(self.folder.with_suffix(".book"))
        self.notes = self.folder.with_suffix(".notes")

    @property
    def attempts(self) -> list[Attempt]:
        return [made for generation in self.generations for made in generation]

    # ---- processes

    def attempt(self, fault: Fault = NO_FAULT, *, beside: int = 0, retry: bool = False) -> Attempt:
        """Carry the run on in a process that meets `fault`, with so many others at work beside it.

        Args:
            retry: what failed is asked again first.
        """
        first = len(self.attempts)
        made = [Attempt(first + i, fault if i == 0 else NO_FAULT) for i in range(1 + beside)]
        self.generations.append(made)
        running: dict[int, Attempt] = {}
        for one in made:
            self._notes_of(one).mkdir(parents=True)
            pid = os.fork()
            if pid == 0:
                self._work(one, retry)
            running[pid] = one
        _wait(running)
        for one in made:
            self._read_notes(one)
        return made[0]

    def _work(self, made: Attempt, retry: bool) -> None:
        """The process of a run; does not return."""
        code = 5
        injector = Injector(made.fault)
        stacks = open(self._notes_of(made) / "stacks.txt", "w")  # noqa: SIM115
        faulthandler.dump_traceback_later(HUNG_S - 2, file=stacks)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with terminated_as_interrupted():
                Database.__init__.__kwdefaults__["patience_s"] = PATIENCE_S  # type: ignore[index]
                injector.install()
                code = self._carry_on(made, injector, retry)
        except KeyboardInterrupt:
            code = 130
        except TiltoptError as error:
            code = 4
            self._note(made, "words", f"{type(error).__name__}: {error}")
        except BaseException:
            self._note(made, "words", traceback.format_exc())
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._note(made, "boundaries", injector.count)
            self._note(made, "hits", injector.hits)
            sys.stdout.flush()
            os._exit(code)

    def _carry_on(self, made: Attempt, injector: Injector, retry: bool) -> int:
        seen = self.kind.look(self.folder, retry)
        self._note(made, "kept", sorted(seen.kept))
        self._note(made, "spent", None if seen.spent is None else dataclasses.asdict(seen.spent))
        box = self.kind.box(self.book, made.number, injector.tick, flaky=self.flaky)
        return 0 if self.kind.carry_on(self.folder, self.terms, box) else 3

    def _notes_of(self, made: Attempt) -> Path:
        return self.notes / str(made.number)

    def _note(self, made: Attempt, name: str, value: Any) -> None:
        (self._notes_of(made) / f"{name}.json").write_text(json.dumps(value))

    def _read_notes(self, made: Attempt) -> None:
        folder = self._notes_of(made)
        for path in folder.glob("*.json"):
            text = path.read_text()
            setattr(made, path.stem, json.loads(text) if text else None)  # it may have been killed here
        if made.kept is not None:
            made.kept = set(made.kept)
            made.seconds -= (folder / "kept.json").stat().st_mtime
        if made.ending == "hung":
            made.words = (folder / "stacks.txt").read_text()

    def finish(self) -> None:
        """Carry the run on without faults until it says that it is done, then look at it."""
        for _ in range(CLEAN_ATTEMPTS):
            if self.attempt().over:
                break
        if self.terms.get("on_unknown") == "leave":
            self.attempt(retry=True)
        self.end = self.kind.look(self.folder)

    # ---- what it did wrong

    def wrong(self, reference: Mapping[str, Any] | None) -> list[str]:
        """What this run did that it must not, in words.

        Args:
            reference: the digest of the run that met no fault; None where what is kept may differ.
        """
        found = [*self._endings(), *self._money(), *self._budgets()]
        if reference is not None:
            found += [f"{what}, unlike the uninterrupted run" for what in _differences(self._digest(), reference)]
        return found

    def history(self) -> str:
        """What it met, in words."""
        met = ["; ".join(f"{made.fault} -> {made.ending}" for made in beside) for beside in self.generations]
        return f"{self.folder.name} {met} {dict(self.terms)} flaky={self.flaky}"

    def _digest(self) -> Mapping[str, Any]:
        return self.kind.digest(self.folder)

    def _endings(self) -> Iterator[str]:
        for made in self.attempts:
            if made.ending in ("wrong", "hung"):
                yield f"process {made.number} ended {made.ending}: {made.words}"
            if made.ending == "refused" and made.fault.what not in ("refuse", "full", "doubt"):
                yield f"process {made.number} was refused without a reason: {made.words}"
            if made.ending == "killed" and made.fault.what != "kill":
                yield f"process {made.number} was killed by nobody"
        last = self.attempts[-1]
        if last.ending not in ("complete", "stopped"):
            yield f"it never ended: {last.words}"
        if last.ending == "complete" and "on_unknown" in self.terms:
            left = [row for row in self._digest()["queries"] if row[4] != "answered"]
            if left:
                yield f"{len(left)} queries are left after a retry: {left}"

    def _money(self) -> Iterator[str]:
        """No answer is lost or asked again but those in flight at a SIGKILL, and they are few."""
        lines = self.book.lines()
        for generation in self.generations:
            numbers = {made.number for made in generation}
            mine = [line for line in lines if line.attempt in numbers]
            killed = sum(made.ending == "killed" for made in generation)
            twice = [key for key, n in Counter(line.key for line in mine if line.event == "answered").items() if n > 1]
            if len(twice) > killed * CONCURRENCY:
                yield f"{len(twice)} queries were answered twice while processes {sorted(numbers)} were at work"
            kept = self._kept_after(generation)
            if kept is None:
                continue
            lost = {line.key for line in mine if line.event == "answered"} - kept
            if lost and not killed:
                yield f"processes {sorted(numbers)} lost {len(lost)} answers"
            unknown = _unknown(mine) | lost
            if killed and len(unknown) > killed * CONCURRENCY:
                yield f"{len(unknown)} calls were of unknown fate when process {min(numbers)} was killed"
            had = kept & {line.key for line in lines if line.attempt <= max(numbers)}  # not from those after it
            again = {line.key for line in lines if line.attempt > max(numbers) and line.event == "asked"} & had
            if again and self.terms.get("on_unknown") != "leave":
                yield f"{len(again)} queries that the next process had an answer of were asked again"

    def _kept_after(self, generation: list[Attempt]) -> set[str] | None:
        """What the next process that opened the run found kept; a neighbour of it may have been at work already."""
        last = generation[-1].number
        found = (made.kept for made in self.attempts if made.number > last and made.kept is not None)
        return next(found, set(self.end.kept) if self.end.spent is not None else None)

    def _budgets(self) -> Iterator[str]:
        lines = self.book.lines()
        calls = sum(line.event == "asked" for line in lines)
        raised = sum(line.event == "raised" for line in lines)
        last = self.attempts[-1]
        cut = sum(made.ending in ("killed", "refused") for made in self.attempts)
        book = {} if self.end.spent is None else dataclasses.asdict(self.end.spent)
        for name, counted in (("calls", calls), ("queries", calls - raised)):
            limit = self.terms.get(f"max_{name}")
            if limit is not None and counted > limit:
                yield f"{counted} {name} were made, {limit} allowed"
            if not book:
                continue
            slack = cut * CONCURRENCY  # entered, and cut off before the call was made or that it raised was entered
            if not counted <= book[name] <= counted + slack:
                yield f"the run's book says {book[name]} {name}, the black box's {counted}"
            if limit is not None and last.ending == "stopped" and book[name] != limit:
                yield f"it stopped at {book[name]} {name}, {limit} were allowed"

    def unbooked(self) -> list[float]:
        """Seconds that killed processes worked and the run's book does not have, of each that can be told."""
        found = []
        for (made, *beside), later in itertools.pairwise(self.generations):
            after = later[0].spent
            if made.ending == "killed" and not beside and made.kept is not None and after is not None:
                before = made.spent["seconds"] if made.spent is not None else 0.0
                found.append(made.seconds - (after["seconds"] - before))
        return found


def _differences(got: Any, expected: Any, where: str = "") -> list[str]:
    """Where two digests differ, and how."""
    if got == expected:
        return []
    if isinstance(got, dict) and isinstance(expected, dict):
        keys = sorted({*got, *expected})
        return [line for key in keys for line in _differences(got.get(key), expected.get(key), f"{where}/{key}")]
    if isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        pairs = enumerate(zip(got, expected, strict=True))
        return [line for i, (a, b) in pairs for line in _differences(a, b, f"{where}/{i}")]
    return [f"{where} is {str(got)[:200]} and not {str(expected)[:200]}"]


def _unknown(lines: Sequence[Line]) -> set[str]:
    """Keys whose last question has no outcome."""
    last = {line.key: line.event for line in lines}
    return {key for key, event in last.items() if event == "asked"}


def _wait(running: dict[int, Attempt]) -> None:
    """Until all these processes have ended, by themselves or by a signal when its time has come; says how each did."""
    started, sent = time.monotonic(), set[int]()
    while running:
        for pid, made in list(running.items()):
            elapsed, fault = time.monotonic() - started, made.fault
            hung = elapsed > HUNG_S
            if hung:
                os.kill(pid, signal.SIGKILL)
            elif fault.from_outside and elapsed >= fault.after_s and pid not in sent:
                os.kill(pid, SIGNALS[fault.what])  # one that has ended is not reaped yet: the number is still its own
                sent.add(pid)
            done, status = os.waitpid(pid, 0 if hung else os.WNOHANG)
            if done:
                made.ending = "hung" if hung else _ending(status)
                made.seconds = time.time()
                del running[pid]
        time.sleep(0.002)


def _ending(status: int) -> str:
    return "killed" if os.WIFSIGNALED(status) else ENDINGS.get(os.WEXITSTATUS(status), "wrong")
