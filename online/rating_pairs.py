"""A person as the judge of pairs: which two images are shown next, and what becomes of each choice. No web in here."""

from __future__ import annotations

from typing import Any

from tiltopt.errors import StoreError
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.pairs import Pair, Pairs
from tiltopt.online.rating import Rating
from tiltopt.online.utilities import UNIT

RATER = "a person"


class PairRating(Rating):
    """`Rating` for a run of comparisons: the pairs of the plan (see `tiltopt.online.pairs`), one after the other.

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
        self._plan = Pairs(optimizer)

    def state(self) -> dict[str, Any]:
        """As `Rating.state`, with `pair` in place of `query`: [{`id`, `prompt`}, {`id`, `prompt`}] or None.

        `waiting` and `asked` count the pairs of the round, `answered` the comparisons of the run, and `undo` is the
        number of the comparison that can be taken back.
        """
        with self._lock:
            store, drawing = self.optimizer.store, self._busy()
            left = [] if drawing else self._plan.left()
            rows, last = store.comparisons.rows(), store.next()[0] - 1
            done = sum(row.round == last for row in rows)
            shown = None
            if left:
                shown = [{"id": n, "prompt": store.get(n).prompt} for n in (left[0].first, left[0].second)]
            return self._common() | {
                "pair": shown,
                "waiting": len(left),
                "asked": done + len(left),
                "answered": sum(row.outcome != "failed" for row in rows),
                "undo": rows[-1].id if self._can_undo() else None,
                "complete": not left and not drawing and self._drawn() > self.optimizer.settings.rounds,
            }

    def compare(self, first: Any, second: Any, better: Any) -> None:
        """Store a choice.

        Args:
            first, second: the queries that were shown.
            better: "first", "second" or "tie".

        Raises:
            StoreError: another choice, or a pair that is not to be judged (any more: another tab may have done so).
        """
        with self._lock:
            pair = self._shown(first, second)
            if better not in ("first", "second", "tie"):
                raise StoreError(f'expected "first", "second" or "tie", got {better!r}. Nothing was stored.')
            winner, loser = (pair.second, pair.first) if better == "second" else (pair.first, pair.second)
            self.optimizer.compare(winner, loser, tie=better == "tie", rater=RATER)

    def skip_pair(self, first: Any, second: Any) -> None:
        """The person cannot or will not judge these two: it teaches nothing, and they are not shown again."""
        with self._lock:
            pair = self._shown(first, second)
            self.optimizer.fail_comparison(pair.first, pair.second, "skipped by the rater", rater=RATER)

    def undo(self) -> int:
        """Take the newest choice back, skips included, as long as no later round was drawn; returns its number.

        Raises:
            StoreError: there is none.
        """
        with self._lock:
            if self._busy():
                raise StoreError("the next round is being drawn from these answers; they can no longer be taken back.")
            if not self._can_undo():
                raise StoreError("there is no comparison of this round to take back.")
            return self.optimizer.undo_comparison()

    def _shown(self, first: Any, second: Any) -> Pair:
        ids = (first, second)
        numbers = all(isinstance(id, int) and not isinstance(id, bool) for id in ids)
        if numbers and any(pair.key == frozenset(ids) for pair in self._plan.left()):
            return Pair(first, second)
        raise StoreError(
            f"queries {first!r} and {second!r} are not a pair to be judged now; it may have been judged in another "
            "tab. Nothing was stored."
        )

    def _can_undo(self) -> bool:
        store = self.optimizer.store
        rows = store.comparisons.rows()
        return bool(rows) and not self._busy() and rows[-1].round == store.next()[0] - 1

    def _waits(self, round_: int) -> bool:
        newest = round_ == self.optimizer.store.next()[0] - 1
        return super()._waits(round_) or (newest and bool(self._plan.left()))

    def _refuse_early(self) -> None:
        if self._plan.left():
            raise StoreError("pairs of this round still wait to be judged; judge or skip them first.")

    def _before_drawing(self) -> None:
        """Queries of which every pair was skipped will get no answer."""
        for number in self._plan.stuck():
            self.optimizer.abandon(number, "skipped by the rater")
