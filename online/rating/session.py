"""A person as the black box: what is shown next, and what becomes of each answer. No web in here.

`Rating` shows one image and takes a number, `PairRating` shows two or more and takes a choice; `Session` is what they
share.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from tiltopt.errors import StoreError, TiltoptError
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.pairs import Pair, Pairs, gathered, shown_together, shuffled
from tiltopt.online.queries import EXTRA_KINDS, query_number
from tiltopt.online.report.pages import write_report
from tiltopt.online.report.record import load_run, summarise, without_summary, write_round_summary
from tiltopt.online.report.thurstone import UNIT
from tiltopt.online.runner import CallPolicy
from tiltopt.online.settings.source import PERSON
from tiltopt.online.signals import Pulse
from tiltopt.online.store import files

RATER = "a person"
SKIPPED = "skipped by the rater"
REFINED = 2
"""How many new queries are drawn near one that the rater points at."""

BEST = 8
"""How many of the best answers a rater is offered to refine."""

MOST = 9
"""How many pictures a rater can be shown at a time: there is a key for each."""

PATIENCE = 60.0
"""Seconds without a sign of life after which what a page shows may be shown by another."""


@dataclass(frozen=True)
class Scale:
    """The numbers a person may give, `low` (worst) to `high` (best)."""

    low: float = 0.0
    high: float = 9.0

    def check(self, value: Any) -> float:
        """`value` as a number on the scale.

        Raises:
            StoreError: it is not.
        """
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if not self.low <= number <= self.high:
            raise StoreError(
                f"expected a number from {self.low:g} to {self.high:g}, got {value!r}. Nothing was stored."
            )
        return float(number)


class Session(ABC):
    """Hands out the queries of a run to a person, stores each answer when it comes, draws rounds when asked to.

    Safe to call from several threads. All state that matters is in the store: a page that is reloaded or a restarted
    server see the same. Two pages that are open at once are shown different queries, and neither takes back what the
    other has answered.

    Args:
        optimizer: the run, open for writing, in a team of one.
        scale: of the answers.
    """

    unit: str
    pairs: bool  # whether images are held against each other

    def __init__(self, optimizer: Optimizer, scale: Scale | None = None) -> None:
        self.optimizer = optimizer
        self.scale = scale or Scale()
        self.pulse = Pulse(optimizer.store.tick)  # to be entered while the run can be rated: its seconds are counted
        self._lock = threading.RLock()
        self._drawing: threading.Thread | None = None
        self._work_done = ("", 0, 0)
        self._trouble = ""
        self._shown: dict[str, tuple[Hashable, float]] = {}  # page -> what it shows, and when it was last heard of
        self._given: dict[int, str] = {}  # number of an answer -> the page that gave it

    # ---- what a page shows

    @abstractmethod
    def state(self, page: str = "") -> dict[str, Any]:
        """What a page needs to know.

        Args:
            page: which one asks.

        Returns:
            What to show (`query` or `shown`, None when there is nothing), `waiting` (what is left of the round),
            `asked` (of the round), `answered` (of the run), `round`, `rounds` (planned), `undo` (number of the answer
            that this page can take back, or None), `drawing` (a round is being drawn), `progress` [kind, done, total],
            `complete`, `trouble`.
        """

    def _state(self, shown: dict[str, Any], waiting: int, done: int, answered: int, page: str) -> dict[str, Any]:
        busy = self._busy()
        undo = self._newest(page)
        return shown | {
            "waiting": waiting,
            "asked": done + waiting,
            "answered": answered,
            "round": self._last_round(),
            "rounds": self.optimizer.settings.rounds + 1,
            "undo": undo,
            "drawing": busy,
            "progress": list(self._work_done),
            "complete": not waiting and not busy and self._drawn() > self.optimizer.settings.rounds,
            "trouble": self._trouble,
        }

    def _pick(self, page: str, keys: Sequence[Hashable]) -> int | None:
        """Which of the things that wait this page shows: what it showed, or the first that no other page shows."""
        now = time.monotonic()
        taken = self._taken(page)
        own = self._shown.pop(page, (None, now))[0]
        if not keys:
            return None
        free = [i for i, key in enumerate(keys) if key not in taken]
        chosen = keys.index(own) if own in keys and own not in taken else free[0] if free else 0
        self._shown[page] = (keys[chosen], now)
        return chosen

    def _taken(self, page: str) -> set[Hashable]:
        """What other pages show that gave a sign of life."""
        now = time.monotonic()
        self._shown = {p: shown for p, shown in self._shown.items() if p == page or now - shown[1] < PATIENCE}
        return {key for p, (key, _) in self._shown.items() if p != page}

    # ---- taking back

    def undo(self, page: str = "") -> int:
        """Take the newest answer back, skips included, as long as no later round was drawn; returns its number.

        Args:
            page: which one asks; answers of other pages stay.

        Raises:
            StoreError: there is none.
        """
        with self._lock:
            if self._busy():
                raise StoreError("the next round is being drawn from these answers; they can no longer be taken back.")
            newest = self._newest(page)
            if newest is None:
                raise StoreError("there is no answer of this round to take back.")
            self._take_back(newest)
            self._given.pop(newest, None)
            self._shown.pop(page, None)
            return newest

    def _newest(self, page: str) -> int | None:
        """The number of the newest answer of the newest round that this page can take back."""
        last = self._last_round()
        if last < 0 or self._busy() or self.optimizer.store.rounds()[-1].kind == "imported":
            return None
        own = [number for number in self._stored(last) if self._given.get(number, page) == page]
        return own[-1] if own else None

    @abstractmethod
    def _stored(self, round_: int) -> list[int]:
        """The numbers of a round's answers and skips, the newest last."""

    @abstractmethod
    def _take_back(self, number: int) -> None: ...

    # ---- drawing

    def refine(self, id: Any, done: Callable[[], None] | None = None) -> None:
        """Draw a few queries near one, in the background; they wait for answers beside the others.

        Args:
            id: a query that is asked or answered.
            done: as in `draw`.

        Raises:
            StoreError: an unknown query, or a round is being drawn.
        """
        with self._lock:
            if self._busy():
                raise StoreError("a round is being drawn; refine when it is there.")
            number = query_number(id)
            if self.optimizer.store.get(number).state not in ("asked", "answered"):
                raise StoreError(f"query {number} was given up and cannot be refined; choose another one.")
            self._refuse_beyond_budget()
            self._begin(lambda: self.optimizer.refine(number, n=REFINED, progress=self._on_progress), done)

    def best(self) -> list[dict[str, Any]]:
        """The best answers so far, `id` and `prompt`, for a rater who wants more like one of them."""
        with self._lock:
            return [{"id": query.id, "prompt": query.prompt} for query in self.optimizer.best(BEST)]

    def draw(self, done: Callable[[], None] | None = None) -> None:
        """Draw the next round in the background. Does nothing while one is being drawn.

        Args:
            done: called in the background when it is there, or has failed.

        Raises:
            StoreError: queries still wait for answers, or every planned round is drawn.
        """
        with self._lock:
            if self._busy():
                return
            self._settle()
            self._refuse_beyond_budget()
            settings, number = self.optimizer.settings, self._drawn()
            if number > settings.rounds:
                raise StoreError("every planned round is drawn and answered; the run is complete.")
            size = settings.batch_size if number else settings.initial_batch_size
            self._begin(lambda: self.optimizer.ask(size, self._on_progress), done)

    def _begin(self, asking: Callable[[], object], done: Callable[[], None] | None) -> None:
        """Ask in the background."""
        self._trouble = ""
        self._drawing = threading.Thread(target=self._work, args=(asking, done), daemon=True)
        self._drawing.start()

    def _refuse_beyond_budget(self) -> None:
        """A person is paid for, too: a StoreError when a budget of the settings is used up."""
        policy = CallPolicy.from_reward(self.optimizer.settings.reward)
        budget = policy.used_up(self.optimizer.store.spent())
        if budget is not None:
            limit = getattr(policy, budget)
            raise StoreError(f"the budget `reward.{budget}` = {limit:g} of this run is used up. Nothing was stored.")

    @abstractmethod
    def _settle(self) -> None:
        """See to it that nothing of the round waits for an answer; a StoreError while something does."""

    def _work(self, asking: Callable[[], object], done: Callable[[], None] | None) -> None:
        try:
            with self._lock:
                self._checkpoint()
            asking()
        except (TiltoptError, RuntimeError, OSError) as error:
            self._trouble = f"the round could not be drawn: {error}"
        finally:
            self._work_done = ("", 0, 0)
            if done is not None:
                done()

    def _on_progress(self, kind: str, done: int, total: int) -> None:
        self._work_done = (kind, done, total)

    def _busy(self) -> bool:
        return self._drawing is not None and self._drawing.is_alive()

    def _drawn(self) -> int:
        """Planned rounds that were drawn; imported measurements and refinements are none."""
        return sum(record.kind not in EXTRA_KINDS for record in self.optimizer.store.rounds())

    def _last_round(self) -> int:
        return self.optimizer.store.next()[0] - 1

    def join(self, timeout: float | None = None) -> None:
        """Wait for the round that is being drawn, if any."""
        if self._drawing is not None:
            self._drawing.join(timeout)

    # ---- what is left behind

    def finish(self) -> None:
        """Write what a run leaves behind: the rounds' summaries, `summary.json`, `report.html`."""
        with self._lock:
            self._checkpoint()
            folder = self.optimizer.folder
            if not self.optimizer.store.rounds():
                return
            record = load_run(folder, self.optimizer.store)
            summary = summarise(record, unit=self.unit)
            files.write_json(folder / "summary.json", summary)
            write_report(folder, dataclasses.replace(record, summary=summary))

    def _checkpoint(self) -> None:
        """Summaries of rounds that are answered in full; written again, because an undo may have changed one."""
        missing, last = without_summary(self.optimizer.folder, self.optimizer.store), self._last_round()
        for record in self.optimizer.store.rounds():
            if not self._waits(record.round) and (record.round == last or record.round in missing):
                write_round_summary(self.optimizer.folder, self.optimizer.store, record.round, {})

    def _waits(self, round_: int) -> bool:
        """Whether something of a round is still to be answered."""
        return self.optimizer.store.counts(round_)["asked"] > 0


class Rating(Session):
    """A number for each image, for a run of values."""

    unit = "points"
    pairs = False

    def state(self, page: str = "") -> dict[str, Any]:
        with self._lock:
            store, last = self.optimizer.store, self._last_round()
            pending = store.in_state("asked")
            place = self._pick(page, [row.number for row in pending])
            query = None if place is None else {"id": pending[place].number, "prompt": pending[place].prompt}
            done = sum(store.counts(last).values()) - store.counts(last)["asked"] if last >= 0 else 0
            return self._state({"query": query}, len(pending), done, store.counts()["answered"], page)

    def rate(self, id: Any, value: Any, page: str = "") -> None:
        """Store an answer.

        Raises:
            StoreError: not a number on the scale, unknown query, or one that has an answer already (another page).
        """
        with self._lock:
            number = self.scale.check(value)
            if self.optimizer.store.get(query_number(id)).spent == 0:  # one that was taken back is paid for
                self._refuse_beyond_budget()
            self.optimizer.tell(id, number, source=PERSON)
            self._given[id] = page

    def skip(self, id: Any, page: str = "") -> None:
        """The person cannot or will not rate this one; it is abandoned and teaches nothing."""
        with self._lock:
            self.optimizer.abandon(id, SKIPPED)
            self._given[id] = page

    def _stored(self, round_: int) -> list[int]:
        rows = self.optimizer.store.in_state("answered", round_)
        rows += [row for row in self.optimizer.store.in_state("abandoned", round_) if row.error == SKIPPED]
        return [row.number for row in sorted(rows, key=lambda row: (row.revision, row.number))]

    def _take_back(self, number: int) -> None:
        self.optimizer.undo(number)

    def _settle(self) -> None:
        if self.optimizer.store.counts()["asked"]:
            raise StoreError("queries of this round still wait for an answer; rate or skip them first.")


class PairRating(Session):
    """The better of two images or the best of several, for a run of comparisons: the pairs of `tiltopt.online.pairs`,
    one after the other, or sets in which they meet.

    Args:
        optimizer: the run, with `model.name = "pairwise"`, open for writing, in a team of one.

    Raises:
        StoreError: a run of values.
    """

    unit = UNIT
    pairs = True

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        optimizer.takes_comparisons()
        self._plan = Pairs(optimizer.store, optimizer.settings, optimizer.folder)
        self._of: dict[str, int] = {}  # page -> how many images it shows at a time

    def show(self, of: Any, page: str = "") -> None:
        """From now on this page shows `of` images at a time, 2 to `MOST`; fewer where fewer are left.

        Raises:
            StoreError: another number.
        """
        if not isinstance(of, int) or isinstance(of, bool) or not 2 <= of <= MOST:
            raise StoreError(f"expected 2 to {MOST} pictures at a time, got {of!r}.")
        with self._lock:
            self._of[page] = of
            self._shown.pop(page, None)

    def state(self, page: str = "") -> dict[str, Any]:
        """As `Session.state`; `shown` is [{`id`, `prompt`}, ...] or None, and `of` how many it holds at most.

        `waiting` and `asked` count what is shown together in this round, `answered` that in the run, and `undo` is the
        number of a comparison or choice.
        """
        with self._lock:
            store, last, of = self.optimizer.store, self._last_round(), self._of.get(page, 2)
            left = [] if self._busy() else self._plan.left()
            sets = self._sets(left, of, page)
            place = self._pick(page, [frozenset(numbers) for numbers in sets])
            shown = None
            if place is not None:
                numbers = shuffled(sets[place], self.optimizer.settings.seed)
                shown = [{"id": number, "prompt": store.get(number).prompt} for number in numbers]
            rows = store.comparisons.rows()
            done = len(shown_together([row for row in rows if row.round == last]))
            answered = len(shown_together([row for row in rows if row.outcome != "failed"]))
            told = {"shown": shown, "of": of}
            return self._state(told, len(gathered(left, of)), done, answered, page)

    def _sets(self, left: list[Pair], of: int, page: str) -> list[list[int]]:
        """What this page may show: what it shows as long as a pair of it is left, then sets without the pairs that
        others show, where there are such."""
        taken = [key for key in self._taken(page) if isinstance(key, frozenset)]
        free = [pair for pair in left if not any(pair.key <= key for key in taken)]
        own = self._shown.get(page, (None, 0.0))[0]
        stays = isinstance(own, frozenset) and any(pair.key <= own for pair in left)
        return [*([sorted(own)] if stays and isinstance(own, frozenset) else []), *gathered(free or left, of)]

    def compare(self, first: Any, second: Any, better: Any, page: str = "") -> None:
        """Store a choice between two.

        Args:
            first, second: the queries that were shown.
            better: "first", "second" or "tie".

        Raises:
            StoreError: another choice, or a pair that is not to be compared (any more: another page may have done so).
        """
        with self._lock:
            self._check_waits([first, second])
            if better not in ("first", "second", "tie"):
                raise StoreError(f'expected "first", "second" or "tie", got {better!r}. Nothing was stored.')
            self._refuse_beyond_budget()
            winner, loser = (second, first) if better == "second" else (first, second)
            self._given[self.optimizer.compare(winner, loser, tie=better == "tie", rater=RATER, source=PERSON)] = page

    def choose(self, shown: Any, best: Any, page: str = "") -> None:
        """Store which of the queries that were shown is the best.

        Raises:
            StoreError: it is none of them, or no pair among them is to be compared (any more).
        """
        with self._lock:
            numbers = self._check_waits(shown)
            if best not in numbers or isinstance(best, bool):
                raise StoreError(f"expected one of the queries {numbers}, got {best!r}. Nothing was stored.")
            self._refuse_beyond_budget()
            others = [number for number in numbers if number != best]
            self._given[self.optimizer.choose(best, others, rater=RATER, source=PERSON)] = page

    def skip(self, shown: Any, page: str = "") -> None:
        """The person cannot or will not choose among these: it teaches nothing, and they do not meet again."""
        with self._lock:
            first, *others = self._check_waits(shown)
            id = self.optimizer.store.comparisons.choose(first, others, "failed", rater=RATER, error=SKIPPED)
            self._given[id] = page

    def _check_waits(self, shown: Any) -> list[int]:
        """The numbers, of which at least one pair is to be compared."""
        numbers = list(shown) if isinstance(shown, list) else [shown]
        known = all(isinstance(id, int) and not isinstance(id, bool) for id in numbers)
        distinct = known and len(set(numbers)) == len(numbers)
        if distinct and len(numbers) <= MOST and any(pair.key <= set(numbers) for pair in self._plan.left()):
            return numbers
        named = ", ".join(map(repr, numbers))
        raise StoreError(
            f"queries {named} are not to be compared now; another page may have done so. Nothing was stored."
        )

    def _stored(self, round_: int) -> list[int]:
        rows = [row for row in self.optimizer.store.comparisons.rows() if row.round == round_]
        return list(dict.fromkeys(row.id if row.choice is None else row.choice for row in rows))

    def _take_back(self, number: int) -> None:
        self.optimizer.undo_comparison(number)

    def _waits(self, round_: int) -> bool:
        newest = round_ == self._last_round()
        return super()._waits(round_) or (newest and bool(self._plan.left()))

    def _settle(self) -> None:
        """Queries of which every pair was skipped will get no answer."""
        if self._plan.left():
            raise StoreError("pairs of this round still wait to be compared; compare or skip them first.")
        for number in self._plan.stuck():
            self.optimizer.abandon(number, SKIPPED)
