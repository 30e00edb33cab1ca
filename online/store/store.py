"""The query store: what was asked, what was answered, what each round was; every change is one durable transaction.

A query is asked, then answered, failed or abandoned. A failed one may be asked again (another attempt) or abandoned.
An answer may be taken back as long as no later round was drawn. Every other transition is refused, and the refusal
says what the query's state is and what it allows.

Reference samples are queries like any other, with the numbers -1, -2, ... in the round -1 of the kind "reference": they
are answered and paid for, and seen by those who ask for them by number, round or kind, and by nobody else.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, insert, or_, select, update

from tiltopt.errors import StoreError
from tiltopt.online.queries import NewQuery, RoundRecord
from tiltopt.online.store import books
from tiltopt.online.store.books import Budget, parts
from tiltopt.online.store.comparisons import Comparisons
from tiltopt.online.store.database import Change, Database, DatabaseError, RefusedError, UnavailableError
from tiltopt.online.store.features import check_vectors
from tiltopt.online.store.rows import REFERENCE, Outcomes, Rows, StateError, refusal, row_key, worker_name, written
from tiltopt.online.store.schema import clean, features, now, queries, rounds, runs
from tiltopt.online.store.spool import Entry, Spool

log = logging.getLogger(__name__)


class Store(Rows):
    """The queries of one run in a database that may hold many.

    Args:
        database: an open database.
        run_id: which run.
        spool: where answers wait that the database does not take.
    """

    def __init__(self, database: Database, run_id: int, spool: Spool | None = None) -> None:
        super().__init__(database, run_id)
        self.spool = spool if spool is not None else Spool(None)
        self.comparisons = Comparisons(database, run_id, self._deliver)
        self._asker: str | None = None
        self._seconds = 0.0  # worked, and not in the book yet

    @classmethod
    def create(cls, database: Database, name: str, config: Mapping[str, Any], spool: Spool | None = None) -> Store:
        """Enter a new run.

        Raises:
            StoreError: the database already holds a run of that name.
        """
        row = {"name": name, "config": json.dumps(config), "changes": "[]", "created_at": time.time()}
        try:
            with database.writing() as c:
                c.execute(insert(runs).values(row))
                return cls(database, c.execute(select(runs.c.id).where(runs.c.name == name)).scalar_one(), spool)
        except RefusedError as error:
            if cls.find(database, name) is None:
                raise
            raise StoreError(
                f"{database.where} already holds this run; open it to continue, or choose another folder."
            ) from error

    @classmethod
    def open(cls, database: Database, name: str, spool: Spool | None = None) -> Store:
        """An existing run; unless the database was opened read-only, answers that wait in the spool are taken in.

        Raises:
            StoreError: the database holds no run of that name.
        """
        run_id = cls.find(database, name)
        if run_id is None:
            raise StoreError(f"{database.where} holds no run of this folder; create one first.")
        store = cls(database, run_id, spool)
        if not database.read_only:
            store.settle()
        return store

    @staticmethod
    def find(database: Database, name: str) -> int | None:
        """The key of a run, or None."""
        return database.read(lambda c: c.execute(select(runs.c.id).where(runs.c.name == name)).scalar())

    # ---- the run

    def change_config(self, config: Mapping[str, Any], changes: Sequence[str]) -> None:
        """Put new settings in force and remember what changed."""
        listed = [*self.changes(), *map(clean, changes)]
        self._change_run(config=json.dumps(config), changes=json.dumps(listed))

    def set_source(self, source: Any) -> None:
        """Record who answers the run, as plain JSON values."""
        self._change_run(source=json.dumps(source))

    def _change_run(self, **values: Any) -> None:
        changed = update(runs).where(runs.c.id == self.run_id).values(values)
        self.database.change(self.run_id, lambda c, change: c.execute(changed).rowcount)

    # ---- rounds

    def take_over(self, asker: str) -> None:
        """From now on this store alone enters rounds; one that had the right before is refused.

        To be called by who holds the writer's lock, which tells processes apart only where its file system does.

        Args:
            asker: a name that nobody else has.
        """
        self._change_run(asker=asker)
        self._asker = asker

    def reserve(self, record: RoundRecord, numbers: Sequence[int]) -> None:
        """Make sure, before anything of a round is written, that the round and its numbers are this store's to enter.

        Raises:
            StoreError: another writer has been here.
        """
        self.database.read(lambda c: self._check_next(c, record, numbers))

    def add_round(
        self,
        record: RoundRecord,
        new: Sequence[NewQuery],
        feature_id: str,
        answers: Mapping[int, tuple[float, float | None]] | None = None,
        outcomes: Mapping[int, Outcomes] | None = None,
        num_features: int | None = None,
    ) -> None:
        """Enter a round, its queries and their features in one transaction.

        Args:
            record: the round; its number must be the next one. The round of the kind "reference" may grow: entered
                again, it takes further queries.
            new: its queries, numbered from the next number on; reference samples downwards from -1.
            feature_id: which feature map made the vectors; one per run.
            answers: value and standard error by number, for measurements that come with their answers.
            outcomes: of several objectives, beside these.
            num_features: of the feature map, where the vectors are not its own work; None takes the first ones' length.

        Raises:
            StoreError: another writer has been here; features of another map, of another length, or not finite.
        """
        moment = time.time()

        def act(c: Connection, change: Change) -> None:
            self._check_next(c, record, [q.number for q in new])
            self._check_features(c, new, feature_id, num_features)
            self._enter_round(c, record, moment)
            if new:
                rows = [self._query_row(record.round, q, moment, change.revision, answers or {}) for q in new]
                rows = [row | {"outcomes": written((outcomes or {}).get(row["number"]))} for row in rows]
                c.execute(insert(queries), rows)
                c.execute(
                    insert(features), [{"run_id": self.run_id, "number": q.number, "vector": q.vector} for q in new]
                )

        self.database.change(self.run_id, act)

    def _check_next(self, c: Connection, record: RoundRecord, numbers: Sequence[int]) -> None:
        next_round, next_number = self._next(c)
        expected, step = (next_round, next_number), 1
        if record.kind == "reference":
            last = c.execute(select(func.min(queries.c.number)).where(queries.c.run_id == self.run_id)).scalar() or 0
            expected, step = (REFERENCE, min(last, 0) - 1), -1
        asker = c.execute(select(runs.c.asker).where(runs.c.id == self.run_id)).scalar()
        right = [expected[1] + step * i for i in range(len(numbers))]
        if record.round != expected[0] or list(numbers) != right or self._asker not in (None, asker):
            raise StoreError(
                f"expected round {expected[0]} with queries from {expected[1]} on, got round {record.round}; another "
                "writer has been here. Open the run again."
            )

    def _check_features(self, c: Connection, new: Sequence[NewQuery], feature_id: str, width: int | None) -> None:
        known = c.execute(select(runs.c.feature_id).where(runs.c.id == self.run_id)).scalar()
        if known is None:
            c.execute(update(runs).where(runs.c.id == self.run_id).values(feature_id=feature_id))
        elif known != feature_id:
            raise StoreError(
                f"the run's features come from {known!r}, got {feature_id!r}; open it with the same features."
            )
        stored = select(func.length(features.c.vector)).where(features.c.run_id == self.run_id).limit(1)
        check_vectors(new, c.execute(stored).scalar() or (None if width is None else 4 * width))

    def _enter_round(self, c: Connection, record: RoundRecord, moment: float) -> None:
        values = asdict(record) | {"run_id": self.run_id, "asked_at": moment}
        values["notes"] = json.dumps([clean(note) for note in record.notes])
        values["score"] = None if record.score is None else json.dumps(record.score)
        this = and_(rounds.c.run_id == self.run_id, rounds.c.round == record.round)
        grown = {"size": rounds.c.size + record.size, "ask_seconds": rounds.c.ask_seconds + record.ask_seconds}
        if record.kind == "reference" and c.execute(update(rounds).where(this).values(grown)).rowcount:
            return
        c.execute(insert(rounds).values(values))

    def _query_row(
        self,
        round_: int,
        q: NewQuery,
        moment: float,
        revision: int,
        answers: Mapping[int, tuple[float, float | None]],
    ) -> dict[str, Any]:
        row = {name: value for name, value in vars(q).items() if name not in ("vector", "origin")}
        row |= {"operator": q.origin.operator, "parents": " ".join(map(str, q.origin.parents)), "k0": q.origin.k0}
        value, sem = answers.get(q.number, (None, None))
        state = "asked" if value is None else "answered"
        known = {"run_id": self.run_id, "round": round_, "state": state, "attempt": 1, "changed_at": moment}
        return row | known | {"value": value, "sem": sem, "revision": revision}

    def add_answer_seconds(self, round_: int, seconds: float) -> None:
        """Time spent waiting for the answers of a round, added to what was there."""
        where = and_(rounds.c.run_id == self.run_id, rounds.c.round == round_)
        added = update(rounds).where(where).values(answer_seconds=rounds.c.answer_seconds + seconds)
        self.database.write(lambda c: c.execute(added).rowcount)

    # ---- transitions

    def answer(
        self,
        number: int,
        value: float,
        sem: float | None = None,
        raw: str | None = None,
        outcomes: Outcomes | None = None,
    ) -> None:
        """asked -> answered. An answer that came without `hand_out` was paid for as well.

        Args:
            outcomes: value and standard error of each objective, where there are several; `value` is then the first.
        """
        self._answer(number, value, sem, raw, written(outcomes))

    def fail(self, number: int, reason: str, raw: str | None = None, failure: str | None = None) -> None:
        """asked -> failed; `failure` as in `deliver`."""
        self._move(number, "failed", ("asked",), error=reason, raw=raw, failure=failure, handed_at=None)

    def abandon(self, number: int, reason: str) -> None:
        """asked or failed -> abandoned."""
        self._move(number, "abandoned", ("asked", "failed"), error=reason, handed_at=None)

    def retry(self, number: int) -> None:
        """failed -> asked, as another attempt."""
        fresh = {"error": None, "failure": None, "raw": None, "outcomes": None, "worker": None}
        self._move(number, "asked", ("failed",), attempt=queries.c.attempt + 1, **fresh)

    def restate(self, answers: Mapping[int, tuple[float, float | None]]) -> None:
        """Replace values and standard errors of answered queries by the same answers in another unit, all or none."""
        moment = time.time()

        def act(c: Connection, change: Change) -> None:
            for number, (value, sem) in answers.items():
                this = [queries.c.run_id == self.run_id, queries.c.number == number, queries.c.state == "answered"]
                stated = {"value": value, "sem": sem, "changed_at": moment, "revision": change.revision}
                c.execute(update(queries).where(*this).values(stated))

        self.database.change(self.run_id, act)

    def undo(self, number: int) -> None:
        """answered or abandoned -> asked, while no later round has been drawn."""
        later = select(func.max(rounds.c.round)).where(rounds.c.run_id == self.run_id).scalar_subquery()
        fresh = {"value": None, "sem": None, "raw": None, "outcomes": None}
        fresh |= {"error": None, "failure": None, "worker": None}
        self._move(number, "asked", ("answered", "abandoned"), queries.c.round == later, **fresh)

    def _answer(
        self,
        number: int,
        value: float,
        sem: float | None,
        raw: str | None,
        outcomes: str | None = None,
        sources: Sequence[str] = ("asked",),
        patience_s: float | None = None,
    ) -> None:
        paid = {name: case((queries.c.spent == 0, 1), else_=queries.c[name]) for name in ("spent", "calls")}
        answer = {"value": value, "sem": sem, "raw": raw, "outcomes": outcomes}
        answer |= {"error": None, "failure": None, "handed_at": None}
        self._move(number, "answered", sources, patience_s=patience_s, **answer, **paid)

    def _move(
        self,
        number: int,
        to: str,
        sources: Sequence[str],
        extra: Any = None,
        patience_s: float | None = None,
        **values: Any,
    ) -> None:
        where = [queries.c.run_id == self.run_id, queries.c.number == row_key(number), queries.c.state.in_(sources)]
        if extra is not None:
            where.append(extra)
        values |= {"state": to, "changed_at": time.time()}

        def act(c: Connection, change: Change) -> None:
            done = c.execute(update(queries).where(*where).values(values | {"revision": change.revision})).rowcount
            if done == 1:
                return
            row = self._get(c, number)
            if change.again and row.changed_at == values["changed_at"]:
                return  # it was committed, the confirmation lost
            raise refusal(row, to)

        self.database.change(self.run_id, act, patience_s)

    # ---- money

    def hand_out(
        self,
        numbers: Sequence[int],
        *,
        max_queries: int | None = None,
        max_calls: int | None = None,
    ) -> list[int]:
        """Enter that queries are about to be handed to a black box; to be called before it is.

        Args:
            numbers: queries; those that are not in the state asked are passed over.
            max_queries, max_calls: budgets of the whole run, kept whoever else hands out at the same time.

        Returns:
            The numbers that were handed out: the first ones of `numbers` that the budgets allow.
        """
        asked = and_(queries.c.run_id == self.run_id, queries.c.state == "asked")

        def act(c: Connection, change: Change) -> list[int]:
            known = {
                number
                for part in parts(list(numbers))
                for number in c.execute(select(queries.c.number).where(asked, queries.c.number.in_(part))).scalars()
            }
            room = Budget(max_queries, max_calls).room(books.spent(c, self.run_id))
            chosen = [number for number in numbers if number in known]
            chosen = chosen[: int(min(room, len(chosen)))]
            books.hand_out(c, queries, queries.c.number, asked, chosen, change.revision)
            return chosen

        return self.database.change(self.run_id, act)

    def came_back(self, numbers: Sequence[int]) -> None:
        """Enter that a call about these ended without an answer; until they are handed out again it was no query."""
        mine = queries.c.run_id == self.run_id

        def act(c: Connection, change: Change) -> None:
            books.came_back(c, queries, queries.c.number, mine, numbers, change.revision)

        self.database.change(self.run_id, act)

    def tick(self, seconds: float) -> None:
        """Add to the seconds that the run has worked. While the database is away they are added by a later call."""
        self._seconds += seconds
        added = update(runs).where(runs.c.id == self.run_id).values(seconds=runs.c.seconds + self._seconds)
        try:
            self.database.write(lambda c: c.execute(added).rowcount, patience_s=0.0)
        except UnavailableError as error:
            log.debug("the seconds worked are added later: %s", error)
        else:
            self._seconds = 0.0

    def deliver(
        self,
        number: int,
        value: float | None,
        sem: float | None = None,
        raw: str | None = None,
        error: str | None = None,
        failure: str | None = None,
        outcomes: Outcomes | None = None,
    ) -> None:
        """Take an answer that was paid for, and keep it whatever the database says.

        While the database refuses for reasons that pass, it is tried for its `patience_s`; then the answer waits in
        the spool until `settle`, a later delivery or the next opening of the run takes it in.

        Args:
            value: the answer; None when there is none, and the query has failed with `error`.
            failure: what kind of failure that is: "infeasible" if the answer was that the design has no value, "fault"
                if the black box gave none, None where that is not known.
            outcomes: as in `answer`.

        Raises:
            StoreError: the query is unknown, or cannot be answered in its state.
        """
        entry = {"query": number, "value": value, "sem": sem, "raw": raw, "error": error, "failure": failure}
        self._deliver(entry if outcomes is None else entry | {"outcomes": written(outcomes)})

    def _deliver(self, entry: Entry) -> None:
        try:
            self._commit(entry, 0.0 if self.spool else None)  # while others wait, the database is known to be away
        except DatabaseError as error:
            log.error("an answer waits in %s until the database takes it: %s", self.spool.path or "memory", error)
            self.spool.put(entry)
        else:
            self.settle()

    def _commit(self, entry: Entry, patience_s: float | None = None) -> None:
        """Commit an answer as `deliver` takes it; without what goes with it when the database refuses that."""
        try:
            self._take(entry, patience_s)
        except RefusedError as error:
            log.warning("kept without what was said beside it, which the database refused: %s", error)
            self._take({**entry, "sem": None, "raw": None, "error": "(what was said cannot be stored)"}, patience_s)

    def _take(self, entry: Entry, patience_s: float | None) -> None:
        if "comparison" in entry:
            self.comparisons.take(entry, patience_s)
            return
        number, value = entry["query"], entry["value"]
        try:
            if value is None:
                told = {
                    "error": entry["error"],
                    "raw": entry["raw"],
                    "failure": entry.get("failure"),
                    "handed_at": None,
                }
                self._move(number, "failed", ("asked",), patience_s=patience_s, **told)
            else:
                said = entry["sem"], entry["raw"], entry.get("outcomes")
                self._answer(number, value, *said, ("asked", "failed"), patience_s)
        except StateError:
            row = self.get(number)
            if (row.state, row.value) != ("failed" if value is None else "answered", value):
                raise

    def settle(self, patience_s: float = 0.0) -> int:
        """Commit answers that wait.

        Args:
            patience_s: for how long it is tried while the database refuses.

        Returns:
            How many answers are nowhere but in memory, because neither the database nor the disk takes them.
        """
        deadline = time.monotonic() + patience_s
        while self.spool:
            try:
                self.spool.take_in(lambda entry: self._commit(entry, 0.0))
            except DatabaseError:
                self.spool.save()
                if time.monotonic() >= deadline:
                    break
                time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
        return len(self.spool.kept)

    # ---- handing out to workers

    def claim(self, worker: str, n: int, patience_s: float = 300.0, round_: int | None = None) -> list[Row[Any]]:
        """Hand up to `n` asked queries to `worker`, each to exactly one. Time is the database's.

        A query whose worker gave no sign of life (`claim` or `heartbeat`) for `patience_s` seconds is handed out again.

        Args:
            worker: a name that no other worker has, such as host and process.
            round_: of this round, such as `REFERENCE`; None for any but the reference samples.

        Raises:
            StoreError: no name.
        """
        worker = worker_name(worker)
        silent = or_(queries.c.heard_at < now() - patience_s, queries.c.heard_at > now() + patience_s)
        where = and_(self._mine(round_), queries.c.state == "asked")
        pick = select(queries.c.number).where(where, or_(queries.c.worker.is_(None), silent))
        pick = pick.order_by(func.abs(queries.c.number)).limit(n).with_for_update(skip_locked=True)

        def act(c: Connection, change: Change) -> list[Row[Any]]:
            rows: list[Row[Any]] = []
            for part in parts(list(c.execute(pick).scalars())):
                mine = and_(where, queries.c.number.in_(part))
                c.execute(update(queries).where(mine).values(worker=worker, heard_at=now()))
                rows += c.execute(select(queries).where(mine)).all()
            return rows

        return sorted(self.database.change(self.run_id, act), key=lambda row: abs(row.number))

    def heartbeat(self, worker: str) -> int:
        """Sign of life for everything `worker` holds; returns how many queries that is."""
        return self._of_worker(worker, heard_at=now())

    def release(self, worker: str) -> int:
        """Give back everything that `worker` holds, for others to claim; returns how many queries that is."""
        return self._of_worker(worker, worker=None, heard_at=None)

    def _of_worker(self, name: str, **values: Any) -> int:
        mine = and_(queries.c.run_id == self.run_id, queries.c.worker == worker_name(name))
        changed = update(queries).where(mine, queries.c.state == "asked").values(values)
        return self.database.write(lambda c: c.execute(changed).rowcount)

    def close(self) -> None:
        """Release the database.

        Raises:
            StoreError: answers are lost, because neither the database nor the disk took them; it names them.
        """
        lost = self.settle()
        entries = "; ".join(json.dumps(entry) for entry in self.spool.kept)
        self.database.close()
        if lost:
            raise StoreError(f"{lost} answers could be written nowhere and are lost with this process: {entries}")
