"""What is stored of a run, read: its rounds, its queries and their states, what it has learnt and what it has cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sqlalchemy import Connection, CursorResult, Row, and_, case, func, select
from torch import Tensor

from tiltopt.errors import StoreError
from tiltopt.online.queries import Objective, Observations, Origin, RoundRecord, Spent
from tiltopt.online.store import books
from tiltopt.online.store.books import parts
from tiltopt.online.store.database import Database
from tiltopt.online.store.features import FeatureCache, matrix
from tiltopt.online.store.schema import WORKER, features, queries, rounds, runs

REFERENCE = -1
"""The round of the reference samples."""

TRANSITIONS = {
    "asked": ("answered", "failed", "abandoned"),
    "failed": ("asked", "abandoned"),
    "answered": ("asked",),
    "abandoned": ("asked",),
}
"""From each state, the states that may follow."""

COLUMNS = [
    *("id", "round", "prompt", "seed", "state", "value", "sem", "predicted", "predicted_sd", "error"),
    *("operator", "parents", "k0"),
]
"""Columns of `Store.frame`."""

FAILED_DESIGN = and_(queries.c.state == "failed", func.coalesce(queries.c.failure, "") != "fault")
"""Queries whose failure says something about the design."""

Outcomes = Mapping[str, tuple[float, float | None]]
"""Value and standard error of each objective, by name."""

_ADVICE = {
    "asked": "tell its answer, fail it, or abandon it",
    "failed": "retry it, or abandon it",
    "answered": "undo it, as long as no later round has been asked",
    "abandoned": "undo it, as long as no later round has been asked, or ask for new queries",
}


class StateError(StoreError):
    """The state of a query does not allow what is wanted of it."""


class Rows:
    """The rows of one run, to be read.

    Args:
        database: an open database.
        run_id: which run.
    """

    def __init__(self, database: Database, run_id: int) -> None:
        self.database = database
        self.run_id = run_id
        self._features = FeatureCache(run_id)

    # ---- the run

    def config(self) -> dict[str, Any]:
        """The settings in force, as a plain dict."""
        return json.loads(self._of_run(runs.c.config))

    def changes(self) -> list[str]:
        """Settings changed since the run was created, in words."""
        return json.loads(self._of_run(runs.c.changes))

    def source(self) -> Any:
        """Who answers the run, as plain JSON values; None when that is unknown."""
        stored = self._of_run(runs.c.source)
        return None if stored is None else json.loads(stored)

    def feature_id(self) -> str | None:
        """Which feature map made the stored features; None before the first round."""
        return self._of_run(runs.c.feature_id)

    def revision(self) -> int:
        """A number that grows with every change of the run, whatever a clock says."""
        return self._of_run(runs.c.revision)

    def _of_run(self, column: Any) -> Any:
        return self.database.read(lambda c: c.execute(select(column).where(runs.c.id == self.run_id)).scalar_one())

    # ---- rounds

    def _next(self, c: Connection) -> tuple[int, int]:
        last_round = c.execute(
            select(func.max(rounds.c.round)).where(rounds.c.run_id == self.run_id, rounds.c.round >= 0)
        ).scalar()
        last_number = c.execute(select(func.max(queries.c.number)).where(self._mine())).scalar()
        return (0 if last_round is None else last_round + 1), (last_number or 0) + 1

    def next(self) -> tuple[int, int]:
        """The next round and the next query number."""
        return self.database.read(self._next)

    def rounds(self) -> list[RoundRecord]:
        """Every round, in order; that of the reference samples is none of them."""
        return self._rounds(rounds.c.round >= 0)

    def reference_round(self) -> RoundRecord | None:
        """The round of the reference samples, once some have been drawn."""
        return next(iter(self._rounds(rounds.c.round == REFERENCE)), None)

    def _rounds(self, which: Any) -> list[RoundRecord]:
        names = list(RoundRecord.__dataclass_fields__)
        mine = and_(rounds.c.run_id == self.run_id, which)
        query = select(*(rounds.c[name] for name in names)).where(mine).order_by(rounds.c.round)
        return self.database.read(lambda c: [round_record(row) for row in c.execute(query)])

    # ---- queries

    def _mine(self, round_: int | None = None) -> Any:
        """The queries of a round, or all but the reference samples."""
        chosen = queries.c.number > 0 if round_ is None else queries.c.round == round_
        return and_(queries.c.run_id == self.run_id, chosen)

    def counts(self, round_: int | None = None) -> dict[str, int]:
        """Number of queries in each state, of one round or of all but the reference samples."""
        query = select(queries.c.state, func.count()).where(self._mine(round_)).group_by(queries.c.state)
        found = self.database.read(lambda c: {row[0]: row[1] for row in c.execute(query)})
        return {state: found.get(state, 0) for state in TRANSITIONS}

    def in_state(self, state: str, round_: int | None = None) -> list[Row[Any]]:
        """The queries in a state, of one round or of all but the reference samples, in order of their numbers."""
        query = select(queries).where(self._mine(round_), queries.c.state == state)
        return self.database.read(lambda c: list(c.execute(query.order_by(func.abs(queries.c.number)))))

    def get(self, number: int) -> Row[Any]:
        """One query.

        Raises:
            StoreError: there is no such query.
        """
        return self.database.read(lambda c: self._get(c, number))

    def _get(self, c: Connection, number: int) -> Row[Any]:
        this = and_(queries.c.run_id == self.run_id, queries.c.number == row_key(number))
        row = c.execute(select(queries).where(this)).first()
        if row is None:
            last = self._next(c)[1] - 1
            has = f"the run has queries 1 to {last}" if last else "nothing has been asked yet"
            raise StoreError(f"unknown query {number}: {has}.")
        return row

    def frame(self, round_: int | None = None, kind: str | None = None) -> pd.DataFrame:
        """Queries with the columns of `COLUMNS`, in order.

        Args:
            round_: of this round; None for every one but the reference samples.
            kind: of rounds of this kind instead, such as "reference", or of "all".
        """
        names = (queries.c[name] for name in ("number", *COLUMNS[1:]))
        if kind is None:
            chosen = select(*names).where(self._mine(round_))
        else:
            same = and_(rounds.c.run_id == queries.c.run_id, rounds.c.round == queries.c.round)
            chosen = select(*names).select_from(queries.join(rounds, same)).where(queries.c.run_id == self.run_id)
            chosen = chosen if kind == "all" else chosen.where(rounds.c.kind == kind)
        ordered = chosen.order_by(case((queries.c.number > 0, 1), else_=0), func.abs(queries.c.number))
        frame = pd.DataFrame(self.database.read(lambda c: c.execute(ordered).all()), columns=COLUMNS)
        for name in ("id", "round", "seed"):
            frame[name] = frame[name].astype("int64")
        for name in ("value", "sem", "predicted", "predicted_sd"):
            frame[name] = frame[name].astype("float64")
        frame["k0"] = frame["k0"].astype("Int64")
        return frame

    def asked_through(self, round_: int) -> int:
        """How many queries were asked up to the end of a round."""
        last = select(func.max(queries.c.number)).where(self._mine(round_))
        return self.database.read(lambda c: c.execute(last).scalar() or 0)

    def diagnostics(self, round_: int | None = None) -> pd.DataFrame:
        """What was drawn and came of it, of every query or one round's: id, state, value, predicted, predicted_sd,
        acquired, ess, log_z."""
        names = ["number", "state", "value", "predicted", "predicted_sd", "acquired", "ess", "log_z"]
        query = select(*(queries.c[n] for n in names)).where(self._mine(round_)).order_by(func.abs(queries.c.number))
        rows = self.database.read(lambda c: c.execute(query).all())
        return pd.DataFrame(rows, columns=["id", *names[1:]]).astype(dict.fromkeys(names[2:], "float64"))

    def outcomes(self) -> dict[int, dict[str, list[Any]]]:
        """[value, standard error] of each objective by name, of every answered query that has several."""
        query = select(queries.c.number, queries.c.outcomes).where(
            queries.c.run_id == self.run_id, queries.c.state == "answered", queries.c.outcomes.is_not(None)
        )
        return self.database.read(lambda c: {row[0]: json.loads(row[1]) for row in c.execute(query)})

    def data(self, objectives: Sequence[Objective] = ()) -> Observations:
        """Every answer, and the features of what is pending and of what failed, in order of query numbers.

        A failure of the call, not of the design, is no lesson and left out.

        Args:
            objectives: of a run of several; what the columns of the answers then are.
        """
        numbers = select(queries.c.number).where(self._mine()).order_by(queries.c.number)
        answered = numbers.add_columns(queries.c.value, queries.c.sem).where(
            queries.c.state == "answered",
            queries.c.value.is_not(None),  # answers to comparisons have none
        )

        def act(c: Connection) -> list[list[Sequence[Any]]]:
            found = [_columns(c.execute(answered), 3)]
            found += [_columns(c.execute(numbers.where(queries.c.state == "asked")), 1)]
            found += [_columns(c.execute(numbers.where(FAILED_DESIGN)), 1)]
            self._features.update(c)
            return found

        (known, values, sems), (pending,), (failed,) = self.database.read(act)
        rows = self._features.rows
        if objectives:
            Y, errors = _matrices(self.outcomes(), known, objectives)
        else:
            Y, errors = (torch.from_numpy(np.array(column, dtype=np.float64))[:, None] for column in (values, sems))
        sem = (
            None if bool(errors.isnan().all()) else errors.nan_to_num()
        )  # beside known ones an unknown one adds nothing
        return Observations(rows(known), Y, sem, rows(pending), failed=rows(failed), objectives=tuple(objectives))

    def vectors_of(self, numbers: Sequence[int]) -> Tensor:
        """Features (n, d) float64 of the queries with these numbers, in their order."""

        def act(c: Connection) -> dict[int, bytes]:
            found: dict[int, bytes] = {}
            for part in parts(list(numbers)):
                where = and_(features.c.run_id == self.run_id, features.c.number.in_(part))
                rows = c.execute(select(features.c.number, features.c.vector).where(where))
                found |= {row.number: row.vector for row in rows}
            return found

        vectors = self.database.read(act)
        return matrix([vectors[number] for number in numbers])

    def answers_since(self, round_: int) -> tuple[Tensor, Tensor]:
        """Features (n, d) and answers (n, 1), float64, of the answered queries of `round_` and later ones."""
        return self.promises_since(round_)[:2]

    def outcomes_since(self, round_: int, objectives: Sequence[Objective]) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, d), answers (n, m) and their standard errors, 0 for unknown, of `round_` and later ones."""
        where = and_(self._mine(), queries.c.state == "answered", queries.c.round >= round_)
        query = select(queries.c.number).where(where, queries.c.outcomes.is_not(None)).order_by(queries.c.number)
        numbers = self.database.read(lambda c: list(c.execute(query).scalars()))
        Y, errors = _matrices(self.outcomes(), numbers, objectives)
        return self.vectors_of(numbers), Y, errors.nan_to_num()

    def first_outcomes(self, objectives: Sequence[Objective]) -> Tensor:
        """(n, m) answers of the rounds before the first tilted one."""
        tilted = select(func.min(rounds.c.round)).where(rounds.c.run_id == self.run_id, rounds.c.kind == "tilted")
        where = and_(self._mine(), queries.c.state == "answered", queries.c.outcomes.is_not(None))
        query = select(queries.c.number).where(where).order_by(queries.c.number)

        def act(c: Connection) -> list[int]:
            end = c.execute(tilted).scalar()
            return list(c.execute(query if end is None else query.where(queries.c.round < end)).scalars())

        return _matrices(self.outcomes(), self.database.read(act), objectives)[0]

    def promises_since(self, round_: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What was promised of the answers of `round_` and later ones, and what came.

        Returns:
            Features (n, d), answers (n, 1), their known standard errors (n, 1) with 0 for unknown, and the acquisition
            values they were drawn for (n,), NaN for plain samples; float64, in order of query numbers.
        """
        same = and_(features.c.run_id == queries.c.run_id, features.c.number == queries.c.number)
        chosen = select(features.c.vector, queries.c.value, queries.c.sem, queries.c.acquired)
        query = chosen.select_from(queries.join(features, same)).where(
            self._mine(), queries.c.state == "answered", queries.c.value.is_not(None), queries.c.round >= round_
        )
        vectors, *numbers = self.database.read(lambda c: _columns(c.execute(query.order_by(queries.c.number)), 4))
        value, sem, acquired = (torch.from_numpy(np.array(column, dtype=np.float64)) for column in numbers)
        return matrix(vectors), value[:, None], sem.nan_to_num()[:, None], acquired

    # ---- money

    def spent(self) -> Spent:
        """What the whole run has cost so far, reference samples and comparisons included."""
        return self.database.read(lambda c: books.spent(c, self.run_id))

    def unknown(self, worker: str | None = None) -> list[int]:
        """Queries that were handed to a black box and have no answer: under way, or of unknown fate after a kill.

        Args:
            worker: only those that it holds; see `claim`.
        """
        where = [queries.c.run_id == self.run_id, queries.c.state == "asked", queries.c.handed_at.is_not(None)]
        if worker is not None:
            where.append(queries.c.worker == worker)
        query = select(queries.c.number).where(*where).order_by(func.abs(queries.c.number))
        return self.database.read(lambda c: list(c.execute(query).scalars()))


def _matrices(
    outcomes: Mapping[int, Mapping[str, Sequence[Any]]], numbers: Sequence[int], objectives: Sequence[Objective]
) -> tuple[Tensor, Tensor]:
    """Answers and standard errors (n, m) of several objectives, NaN for unknown."""
    table = [[outcomes[number][objective.name] for objective in objectives] for number in numbers]
    both = np.array(table, dtype=np.float64).reshape(len(numbers), len(objectives), 2)
    return torch.from_numpy(both[..., 0].copy()), torch.from_numpy(both[..., 1].copy())


def _columns(result: CursorResult[Any], n: int) -> list[Sequence[Any]]:
    """Rows of `n` values -> `n` columns, past SQLAlchemy's rows, which take longer to make than to read."""
    rows = [] if result.cursor is None else result.cursor.fetchall()
    result.close()
    return [[row[i] for row in rows] for i in range(n)]


def row_key(number: int) -> int:
    """A number that every database can compare; 0, which no query has, for one beyond their integers."""
    return number if abs(number) < 2**31 else 0


def origin_of(row: Row[Any]) -> Origin:
    """Where the query of a row started from."""
    return Origin(row.operator, tuple(map(int, row.parents.split())), row.k0)


def round_record(row: Row[Any]) -> RoundRecord:
    """A row of the rounds' table, decoded."""
    values = dict(row._mapping)
    values["notes"] = tuple(json.loads(values["notes"]))
    values["score"] = None if values["score"] is None else json.loads(values["score"])
    return RoundRecord(**values)


def refusal(row: Row[Any], to: str) -> StateError:
    """Why a query cannot go to the state `to`, and where it can."""
    stored = f" ({row.error})" if row.error else ""
    if row.state == "answered":
        stored = f" (its answer is {row.value!r})" if row.value is not None else " (by comparisons)"
    return StateError(
        f"query {row.number} is {row.state}{stored} and cannot become {to}. Allowed: {_ADVICE[row.state]}."
    )


def written(outcomes: Outcomes | None) -> str | None:
    """Outcomes as they are stored."""
    return None if outcomes is None else json.dumps({name: list(known) for name, known in outcomes.items()})


def worker_name(worker: Any) -> str:
    """The name of a worker.

    Raises:
        StoreError: it is empty, no text, or longer than what is stored of it, so that two could be taken for one.
    """
    if not isinstance(worker, str) or not worker.strip() or len(worker) > WORKER:
        raise StoreError(
            f"expected the name of a worker, which nobody else has, in at most {WORKER} characters, got {worker!r}."
        )
    return worker
