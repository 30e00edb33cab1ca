"""Answers of the kind "this one is better than that one": how they are stored, taken back, and handed to a surrogate.

In a run of comparisons (`model.name = "pairwise"`) a query is answered, without a value, as soon as it has won, lost or
tied one comparison. Every comparison is one durable transaction together with the states that it changes.

The best of several is a row of its winner over each of the others; they share a `choice`, come and go together, and are
one answer in the books.

A comparison that is handed to a comparator is entered before that is called, with the outcome "asked"; until its
verdict comes, it is seen by `unknown` and in the books alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from sqlalchemy import Connection, Row, and_, func, insert, or_, select, union, update

from tiltopt.errors import StoreError
from tiltopt.online.queries import Observations
from tiltopt.online.store import books
from tiltopt.online.store.books import Budget
from tiltopt.online.store.database import Change, Database
from tiltopt.online.store.features import matrix
from tiltopt.online.store.rows import FAILED_DESIGN, row_key
from tiltopt.online.store.schema import comparisons, features, queries, rounds
from tiltopt.online.store.spool import Entry

OUTCOMES = ("win", "tie", "failed")
"""A failed comparison teaches nothing and answers no query; it is kept, so that the pair is not asked for ever."""

COLUMNS = ["id", "round", "winner", "loser", "outcome", "rater", "raw", "error", "created_at", "choice"]
"""Columns of `Comparisons.frame`."""


class Comparisons:
    """The comparisons of one run.

    Args:
        database: an open database.
        run_id: which run.
        keep: takes the verdict of a comparison that was handed out, as `take` wants it, and loses it on no account.
    """

    def __init__(self, database: Database, run_id: int, keep: Callable[[Entry], None]) -> None:
        self.database = database
        self.run_id = run_id
        self._keep = keep

    # ---- writing

    def add(
        self,
        winner: int,
        loser: int,
        outcome: str = "win",
        *,
        rater: str | None = None,
        raw: str | None = None,
        error: str | None = None,
    ) -> int:
        """`choose` among two: of a tie or a failure, in the order in which they were shown."""
        return self.choose(winner, [loser], outcome, rater=rater, raw=raw, error=error)

    def choose(
        self,
        first: int,
        others: Sequence[int],
        outcome: str = "win",
        *,
        rater: str | None = None,
        raw: str | None = None,
        error: str | None = None,
    ) -> int:
        """Enter that a query is the best of two or several, or that no choice among them could be had; those that were
        asked are answered by it, unless it failed.

        Args:
            first: number of the winner; of a failure, of any that was shown.
            others: numbers of the rest.
            outcome: "win" or "failed"; with one other, "tie" too.
            rater: who compared.
            raw: what the rater said beyond the outcome.
            error: why it failed.

        Returns:
            The number of the first of the comparisons, by which the whole choice is known.

        Raises:
            StoreError: an unknown outcome, an unknown query, one twice, or one that is failed or abandoned.
        """
        _check_outcome(outcome)
        shown = [first, *others]
        if len(others) > 1 and (outcome == "tie" or len(set(shown)) < len(shown)):
            raise StoreError(f"expected different queries and a best one of them, got {shown} and {outcome!r}.")
        moment = time.time()

        def act(c: Connection, change: Change) -> int:
            told: dict[str, Any] = {"rater": rater, "raw": raw, "error": error, "spent": 1, "calls": 1}
            ids = []
            for other in others:
                self._check(c, first, other)
                ids.append(self._enter(c, first, other, outcome, moment, change, told))
                if len(others) > 1:
                    told = told | {"choice": ids[0], "spent": 0, "calls": 0}
            if len(others) > 1:
                c.execute(update(comparisons).where(self._mine, comparisons.c.id == ids[0]).values(choice=ids[0]))
            self._answer(c, shown, outcome, moment, change)
            return ids[0]

        if not others:
            raise StoreError(f"expected two queries or more to compare, got {first} alone. Nothing was stored.")
        return self.database.change(self.run_id, act)

    def hand_out(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        max_queries: int | None = None,
        max_calls: int | None = None,
    ) -> list[int]:
        """Enter that pairs are about to be handed to a comparator; to be called before it is.

        Args:
            pairs: numbers of two queries each, in the order in which they are shown.
            max_queries, max_calls: budgets of the whole run, kept whoever else hands out at the same time.

        Returns:
            Numbers of comparisons, for `deliver`: of the first ones of `pairs` that the budgets allow.

        Raises:
            StoreError: an unknown query, a query with itself, or one that is failed or abandoned.
        """
        moment = time.time()

        def act(c: Connection, change: Change) -> list[int]:
            room = Budget(max_queries, max_calls).room(books.spent(c, self.run_id))
            ids = []
            for first, second in pairs[: int(min(room, len(pairs)))]:
                self._check(c, first, second)
                id = self._open(c, first, second)
                ids.append(self._enter(c, first, second, "asked", moment, change, {}) if id is None else id)
            books.hand_out(c, comparisons, comparisons.c.id, self._mine, ids, change.revision)
            return ids

        return self.database.change(self.run_id, act)

    def came_back(self, ids: Sequence[int]) -> None:
        """Enter that a call about these ended without a verdict; until handed out again it was none."""

        def act(c: Connection, change: Change) -> None:
            books.came_back(c, comparisons, comparisons.c.id, self._mine, ids, change.revision)

        self.database.change(self.run_id, act)

    def deliver(
        self,
        id: int,
        outcome: str,
        *,
        first_wins: bool = True,
        rater: str | None = None,
        raw: str | None = None,
        error: str | None = None,
    ) -> None:
        """Take the verdict of a comparison that was handed out, and keep it whatever the database says.

        Args:
            id: as `hand_out` gave it.
            outcome: "win", "tie" or "failed".
            first_wins: of a win, whether the first that was shown is better.

        Raises:
            StoreError: no such comparison, or one that has another verdict.
        """
        _check_outcome(outcome)
        told = {"first_wins": first_wins, "rater": rater, "raw": raw, "error": error}
        self._keep({"comparison": id, "outcome": outcome, **told})

    def take(self, entry: Entry, patience_s: float | None) -> None:
        """Commit what `deliver` was given, whether or not it was committed before."""
        moment, this = time.time(), and_(self._mine, comparisons.c.id == entry["comparison"])

        def act(c: Connection, change: Change) -> None:
            row = c.execute(select(comparisons).where(this)).first()
            if row is None:
                raise StoreError(f"unknown comparison {entry['comparison']}.")
            pair = (row.winner, row.loser)
            if row.outcome != "asked":
                if row.outcome == entry["outcome"]:
                    return
                raise StoreError(f"comparison {row.id} of {pair} has the outcome {row.outcome} already.")
            winner, loser = pair if entry["first_wins"] else pair[::-1]
            told = {name: entry[name] for name in ("outcome", "rater", "raw", "error")}
            values = told | {"winner": winner, "loser": loser, "handed_at": None, "changed_at": moment}
            c.execute(update(comparisons).where(this).values(values | {"revision": change.revision}))
            self._answer(c, pair, entry["outcome"], moment, change)

        self.database.change(self.run_id, act, patience_s)

    def _enter(
        self, c: Connection, first: int, second: int, outcome: str, moment: float, change: Change, told: dict[str, Any]
    ) -> int:
        id = (c.execute(select(func.max(comparisons.c.id)).where(self._mine)).scalar() or 0) + 1
        row = {"run_id": self.run_id, "id": id, "round": self._newest_round(c), "winner": first, "loser": second}
        row |= {"outcome": outcome, "undone": 0, "created_at": moment, "changed_at": moment}
        c.execute(insert(comparisons).values(row | told | {"revision": change.revision}))
        return id

    def _open(self, c: Connection, first: int, second: int) -> int | None:
        """The comparison of two queries that was handed out and has no verdict."""
        pair = (first, second)
        same = and_(comparisons.c.winner.in_(pair), comparisons.c.loser.in_(pair), comparisons.c.outcome == "asked")
        return c.execute(select(comparisons.c.id).where(self._mine, same)).scalar()

    def _answer(self, c: Connection, shown: Sequence[int], outcome: str, moment: float, change: Change) -> None:
        if outcome == "failed":
            return
        asked = and_(queries.c.run_id == self.run_id, queries.c.number.in_(shown), queries.c.state == "asked")
        values = {"state": "answered", "error": None, "changed_at": moment, "revision": change.revision}
        c.execute(update(queries).where(asked).values(values))

    def undo(self, id: int | None = None) -> Row[Any]:
        """Take a comparison back, with all of the choice that it belongs to, as long as no later round has been drawn
        from it, which one that failed never is; queries that it alone had answered are asked again.

        Args:
            id: which one; the newest when None.

        Returns:
            The row that was taken back.

        Raises:
            StoreError: no such comparison, one that was taken back already, or one that a later round has used.
        """
        moment = time.time()

        def act(c: Connection, change: Change) -> Row[Any]:
            row = self._find(c, id)
            if row.undone:
                raise StoreError(f"comparison {row.id} was taken back already.")
            newest = self._newest_round(c)
            if row.round != newest and row.outcome != "failed":
                raise StoreError(
                    f"comparison {row.id} was made in round {row.round} and round {newest} was drawn from it; it can "
                    "no longer be taken back."
                )
            same = comparisons.c.id == row.id if row.choice is None else comparisons.c.choice == row.choice
            together = list(c.execute(select(comparisons).where(self._mine, same)))
            values = {"undone": 1, "changed_at": moment, "revision": change.revision}
            c.execute(update(comparisons).where(self._mine, same).values(values))
            for number in {number for each in together for number in (each.winner, each.loser)}:
                self._ask_again(c, number, moment, change)
            return row

        return self.database.change(self.run_id, act)

    def _ask_again(self, c: Connection, number: int, moment: float, change: Change) -> None:
        took_part = or_(comparisons.c.winner == number, comparisons.c.loser == number)
        left = c.execute(select(func.count()).select_from(comparisons).where(self._valid, took_part)).scalar()
        if not left:
            where = and_(queries.c.run_id == self.run_id, queries.c.number == number)
            only = and_(where, queries.c.state == "answered", queries.c.value.is_(None))
            values = {"state": "asked", "worker": None, "changed_at": moment, "revision": change.revision}
            c.execute(update(queries).where(only).values(values))

    def _check(self, c: Connection, winner: int, loser: int) -> None:
        if winner == loser:
            raise StoreError(f"query {winner} cannot be compared with itself; name two queries.")
        mine = queries.c.run_id == self.run_id
        last = max(c.execute(select(func.max(queries.c.number)).where(mine)).scalar() or 0, 0)
        for number in (winner, loser):
            if not 1 <= number <= last:
                has = f"the run has queries 1 to {last}" if last else "nothing has been asked yet"
                raise StoreError(f"unknown query {number}: {has}. Nothing was stored.")
            row = c.execute(select(queries).where(mine, queries.c.number == number)).one()
            if row.state in ("failed", "abandoned"):
                advice = "retry it first" if row.state == "failed" else "compare another one"
                raise StoreError(f"query {number} is {row.state} ({row.error}) and cannot be compared; {advice}.")

    def _find(self, c: Connection, id: int | None) -> Row[Any]:
        query = select(comparisons).where(self._mine, comparisons.c.outcome != "asked")
        query = query.where(comparisons.c.undone == 0) if id is None else query.where(comparisons.c.id == row_key(id))
        row = c.execute(query.order_by(comparisons.c.revision.desc(), comparisons.c.id.desc()).limit(1)).first()
        if row is None:
            raise StoreError("there is no comparison to take back." if id is None else f"unknown comparison {id}.")
        return row

    def _newest_round(self, c: Connection) -> int:
        newest = c.execute(select(func.max(rounds.c.round)).where(rounds.c.run_id == self.run_id)).scalar()
        return -1 if newest is None else int(newest)

    # ---- reading

    @property
    def _mine(self) -> Any:
        return comparisons.c.run_id == self.run_id

    @property
    def _valid(self) -> Any:
        """Comparisons that stand and have an outcome."""
        return and_(self._mine, comparisons.c.undone == 0, comparisons.c.outcome.in_(("win", "tie")))

    def unknown(self) -> list[Row[Any]]:
        """Comparisons that were handed out and have no verdict: under way, or of unknown fate after a kill."""
        out = and_(comparisons.c.outcome == "asked", comparisons.c.handed_at.is_not(None))
        chosen = select(comparisons).where(self._mine, out).order_by(comparisons.c.id)
        return self.database.read(lambda c: list(c.execute(chosen)))

    def rows(self) -> list[Row[Any]]:
        """Every comparison that has an outcome and was not taken back, in order of their numbers."""
        return self.database.read(self._rows)

    def _rows(self, c: Connection) -> list[Row[Any]]:
        chosen = select(comparisons).where(self._mine, comparisons.c.undone == 0, comparisons.c.outcome != "asked")
        return list(c.execute(chosen.order_by(comparisons.c.id)))

    def frame(self) -> pd.DataFrame:
        """Every comparison that was not taken back, with the columns of `COLUMNS`."""
        rows = [[getattr(row, name) for name in COLUMNS] for row in self.rows()]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        return frame.astype(dict.fromkeys(("id", "round", "winner", "loser"), "int64") | {"choice": "Int64"})

    def data(self) -> Observations:
        """What the pairwise surrogate is fitted to: features of the queries compared, and rows (preferred, other).

        Rows stand in the order of the queries' numbers, whatever the order of arrival. A tie is one row in each
        direction: it pulls the two utilities together. Where there are choices of the best of several, `choices` says
        which rows are one.
        """
        took_part = union(
            select(comparisons.c.winner).where(self._valid), select(comparisons.c.loser).where(self._valid)
        ).subquery()

        def act(c: Connection) -> tuple[list[Any], ...]:
            conditions = (queries.c.number.in_(select(took_part)), queries.c.state == "asked", FAILED_DESIGN)
            found = (list(c.execute(self._vectors(condition))) for condition in conditions)
            return ([row for row in self._rows(c) if row.outcome != "failed"], *found)

        rows, compared, pending, failed = self.database.read(act)
        place = {number: i for i, (number, _) in enumerate(compared)}
        found: list[tuple[int, int]] = []
        together: list[tuple[str, int]] = []
        for row in sorted(rows, key=lambda row: (min(row.winner, row.loser), max(row.winner, row.loser), row.id)):
            pair = (place[row.winner], place[row.loser])
            new = [pair] if row.outcome == "win" else [(min(pair), max(pair)), (max(pair), min(pair))]
            own = [("row", i) for i in range(len(found), len(found) + len(new))]
            together += own if row.choice is None else [("choice", row.choice)]
            found += new
        X = matrix([vector for _, vector in compared])
        pairs = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
        numbered = {key: i for i, key in enumerate(dict.fromkeys(together))}
        choices = torch.tensor([numbered[key] for key in together]) if len(numbered) < len(together) else None
        rest = (matrix([vector for _, vector in rows], X.shape[1]) for rows in (pending, failed))
        asked, lost = rest
        return Observations(X, X.new_zeros(0, 1), None, asked, comparisons=pairs, choices=choices, failed=lost)

    def _vectors(self, condition: Any) -> Any:
        same = and_(features.c.run_id == queries.c.run_id, features.c.number == queries.c.number)
        joined = select(queries.c.number, features.c.vector).select_from(queries.join(features, same))
        mine = and_(queries.c.run_id == self.run_id, queries.c.number > 0)
        return joined.where(mine, condition).order_by(queries.c.number)


def _check_outcome(outcome: str) -> None:
    if outcome not in OUTCOMES:
        raise StoreError(f"expected the outcome to be one of {', '.join(OUTCOMES)}, got {outcome!r}.")
