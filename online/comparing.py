"""The part of an `Optimizer` that takes comparisons: which of two queries is better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from tiltopt.errors import StoreError
from tiltopt.online.answers import query_number
from tiltopt.online.settings import Settings

if TYPE_CHECKING:
    from tiltopt.online.optimizer import Query
    from tiltopt.online.store import Store


class Comparing:
    """For runs with `model.name = "pairwise"`. A query is answered once it has won, lost or tied a comparison.

    for first, second in opt.pairs():
        opt.compare(first.id, second.id)      # the first is better; any two queries may be compared, in any order
    """

    settings: Settings

    if TYPE_CHECKING:

        @property
        def store(self) -> Store:
            """The query store."""

    def compare(
        self, winner_id: int, loser_id: int, *, tie: bool = False, rater: str | None = None, raw: str | None = None
    ) -> int:
        """Store that one query is better than another, durable when this returns.

        Args:
            winner_id, loser_id: two different queries, new or old; neither failed nor abandoned.
            tie: neither is better.
            rater: who says so.
            raw: what was said, kept for people.

        Returns:
            The number of the comparison, for `undo_comparison`.

        Raises:
            StoreError: unknown queries, one with itself, one that is failed or abandoned, or a run of values.
        """
        self.takes_comparisons()
        winner, loser = query_number(winner_id), query_number(loser_id)
        return self.store.comparisons.add(winner, loser, "tie" if tie else "win", rater=rater, raw=raw)

    def fail_comparison(
        self, first_id: int, second_id: int, reason: str, *, rater: str | None = None, raw: str | None = None
    ) -> int:
        """No verdict could be had of two queries. It teaches nothing, and the pair is not offered again."""
        self.takes_comparisons()
        pair = query_number(first_id), query_number(second_id)
        return self.store.comparisons.add(*pair, "failed", rater=rater, raw=raw, error=str(reason))

    def undo_comparison(self, id: int | None = None) -> int:
        """Take a comparison back, the newest by default, as long as no later round has been asked.

        Returns:
            Its number.
        """
        self.takes_comparisons()
        return int(self.store.comparisons.undo(None if id is None else query_number(id)).id)

    def comparisons(self) -> pd.DataFrame:
        """Every comparison that stands: columns id, round, winner, loser, outcome, rater, raw, error, created_at.

        `outcome` is win, tie or failed; of the latter two, winner and loser are merely the first and the second shown.
        """
        return self.store.comparisons.frame()

    def pairs(self) -> list[tuple[Query, Query]]:
        """The pairs that the plan of `tiltopt.online.pairs` wants compared and that were not, with their images."""
        from tiltopt.online.pairs import Pairs

        self.takes_comparisons()
        me: Any = self
        found: dict[int, Query] = {}
        left = Pairs(me).left()
        for number in sorted({number for pair in left for number in pair.key}):
            found[number] = me._query(self.store.get(number))
        return [(found[pair.first], found[pair.second]) for pair in left]

    def takes_values(self) -> None:
        """Refuse values in a run of comparisons.

        Raises:
            StoreError: saying what to call instead.
        """
        if self.settings.pairwise:
            raise StoreError(
                "this run learns from comparisons (model.name = 'pairwise'), not from values; use pairs(), "
                "compare(winner, loser) and undo_comparison(id). Nothing was stored."
            )

    def takes_comparisons(self) -> None:
        """Refuse comparisons in a run of values.

        Raises:
            StoreError: naming the setting.
        """
        if not self.settings.pairwise:
            raise StoreError(
                f"this run learns from values (model.name = {self.settings.model.name!r}), not from comparisons; use "
                "tell(id, value), or a run with model.name = 'pairwise' (config/preference.py). Nothing is stored."
            )
