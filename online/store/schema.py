"""Tables of the query store, what their columns hold, and how older layouts become this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    select,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateColumn
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

SCHEMA_VERSION = 6
"""Of the layout below. A newer database is refused, never touched; an older one is brought up to date when opened.

1: runs, rounds, queries, features. 2: comparisons. 3: what was paid (spent, calls, handed_at, seconds), the source of
the answers, revisions, the asker. 4: where a query was started from (operator, parents, k0), what those of a round
cost (nats). 5: answers of several numbers (outcomes). 6: the best of several (choice).
"""

WORKER = 128
"""Characters of a worker's name."""


class Words(TypeDecorator[str]):
    """Text that every database can encode; a length is a limit beyond which it is cut."""

    impl = Text
    cache_ok = True

    def __init__(self, length: int | None = None) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Any) -> Any:
        return dialect.type_descriptor(Text() if self.length is None else String(self.length))

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else clean(value)[: self.length]


def clean(words: Any) -> str:
    """Text without what some database cannot encode: halves of surrogate pairs and NUL become U+FFFD."""
    whole = str(words).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")


class now(FunctionElement[float]):
    """Seconds since the epoch by the clock of the database, the one clock that all workers share."""

    type = Float(53)
    inherit_cache = True


@compiles(now)
def _now(element: now, compiler: Any, **_: Any) -> str:
    return "unix_timestamp(current_timestamp(6))"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **_: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


# ---- tables

metadata = MetaData()

meta = Table(
    "tiltopt_meta",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

runs = Table(
    "tiltopt_runs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),  # "run" in its own file, else random
    Column("config", Words, nullable=False),  # JSON of Settings.to_dict(): what the run was made with
    Column("changes", Words, nullable=False),  # JSON list: settings changed on the way, in words
    Column("feature_id", Text),  # which feature map made the stored features; set by the first round
    Column("created_at", Float(53), nullable=False),  # seconds since the epoch
    # since version 3
    Column("source", Words),  # JSON: who answers; NULL = unknown
    Column("seconds", Float(53), nullable=False, server_default="0"),  # of wall clock that the run has worked
    Column("revision", Integer, nullable=False, server_default="0"),  # grows by one with every change
    Column("last_change", String(32)),  # a random name, by which the writer of the last change recognises it
    Column("asker", String(64)),  # who took the right to ask rounds last
)

rounds = Table(
    "tiltopt_rounds",
    metadata,
    Column("run_id", Integer, ForeignKey("tiltopt_runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),  # 0, 1, ...; -1 = the reference samples
    Column("kind", String(16), nullable=False),  # plain, tilted, imported, reference
    Column("size", Integer, nullable=False),
    Column("alpha", Float(53)),  # reward units per nat; NULL where nothing was tilted or the engine chose it
    Column("beta", Float(53)),
    Column("notes", Words, nullable=False),  # JSON list of sentences
    Column("score", Words),  # JSON: how the previous surrogate had predicted the answers that came since
    Column("fingerprint", String(64)),  # SHA-256 of the data behind the round's surrogate; NULL = no surrogate
    Column("ask_seconds", Float(53), nullable=False),
    Column("answer_seconds", Float(53), nullable=False),
    Column("asked_at", Float(53), nullable=False),
    Column("nats", Float(53)),  # what a query cost on average; NULL where it was not counted; since version 4
)


def _paid() -> tuple[Column[Any], ...]:
    """What is known of the calls for a row; since version 3."""
    return (
        Column("spent", Integer, nullable=False, server_default="0"),  # how often it was handed to a black box
        Column("calls", Integer, nullable=False, server_default="0"),  # the same, retries of a call included
        Column("handed_at", Float(53)),  # since when a call is under way or of unknown fate; NULL = there is none
        Column("revision", Integer, nullable=False, server_default="0"),  # the run's at the last change of the row
    )


queries = Table(
    "tiltopt_queries",
    metadata,
    Column("run_id", Integer, ForeignKey("tiltopt_runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # 1, 2, ...; -1, -2, ... of reference samples
    Column("round", Integer, nullable=False),
    Column("place", Integer, nullable=False),  # 0, 1, ... in the round
    Column("prompt", Words, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),  # 1, then one more with every retry
    Column("value", Float(53)),
    Column("sem", Float(53)),
    Column("predicted", Float(53)),
    Column("predicted_sd", Float(53)),
    Column("acquired", Float(53)),
    Column("ess", Float(53)),
    Column("log_z", Float(53)),
    Column("error", Words),
    Column("failure", String(16)),  # infeasible: the answer was NaN or -inf; fault: there was none; NULL: not known
    Column("raw", Words),  # what the black box said beyond the number, or its traceback
    Column("worker", Words(WORKER)),  # who was handed the query
    Column("heard_at", Float(53)),  # the worker's last sign of life, seconds since the epoch by the database's clock
    Column("changed_at", Float(53), nullable=False),  # of the last change of state; for people
    *_paid(),
    # since version 4
    Column("operator", String(16), nullable=False, server_default="global"),  # as in `tiltopt.online.queries.Origin`
    Column("parents", Words, nullable=False, server_default=""),  # numbers of queries, with spaces between
    Column("k0", Integer),  # the step at which the chain was entered; NULL = from noise
    # since version 5
    Column("outcomes", Words),  # JSON: [value, standard error or null] of each objective by name; NULL = one number
    ForeignKeyConstraint(["run_id", "round"], ["tiltopt_rounds.run_id", "tiltopt_rounds.round"]),
    Index("tiltopt_queries_by_state", "run_id", "state", "number"),
    Index("tiltopt_queries_by_round", "run_id", "round", "number"),
)

# Features stand apart from the queries, so that lists and counts never page through them.
features = Table(
    "tiltopt_features",
    metadata,
    Column("run_id", Integer, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("vector", LargeBinary, nullable=False),  # float32, little-endian
    ForeignKeyConstraint(["run_id", "number"], ["tiltopt_queries.run_id", "tiltopt_queries.number"]),
)

# Since version 2. Rows are never deleted: what was taken back is marked.
comparisons = Table(
    "tiltopt_comparisons",
    metadata,
    Column("run_id", Integer, primary_key=True),
    Column("id", Integer, primary_key=True, autoincrement=False),  # 1, 2, ... in the run
    Column("round", Integer, nullable=False),  # the newest round when the comparison was made or handed out
    Column("winner", Integer, nullable=False),  # query number; where there is no winner, the one that was shown first
    Column("loser", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),  # asked (handed out), win, tie, failed
    Column("rater", Words(128)),  # who compared
    Column("raw", Words),  # what the rater said beyond the outcome
    Column("error", Words),  # why there is no outcome
    Column("undone", Integer, nullable=False),  # 1 = taken back
    Column("created_at", Float(53), nullable=False),  # seconds since the epoch
    Column("changed_at", Float(53), nullable=False),
    *_paid(),
    Column("choice", Integer),  # of a choice of the best of several, its first row's id; NULL = a pair; since version 6
    ForeignKeyConstraint(["run_id", "winner"], ["tiltopt_queries.run_id", "tiltopt_queries.number"]),
    ForeignKeyConstraint(["run_id", "loser"], ["tiltopt_queries.run_id", "tiltopt_queries.number"]),
    Index("tiltopt_comparisons_by_round", "run_id", "round", "id"),
)


# ---- versions

_SINCE_3 = {
    runs: ("source", "seconds", "revision", "last_change", "asker"),
    queries: ("failure", "spent", "calls", "handed_at", "revision"),
    comparisons: ("spent", "calls", "handed_at", "revision"),
}
_SINCE_4 = {rounds: ("nats",), queries: ("operator", "parents", "k0")}
_SINCE_5 = {queries: ("outcomes",)}
_SINCE_6 = {comparisons: ("choice",)}
_BOOKS_OF_3 = (  # what earlier versions knew of the money: a call per attempt that ended, none for measured elsewhere
    "UPDATE tiltopt_queries SET spent = attempt - CASE WHEN state IN ('answered', 'failed') THEN 0 ELSE 1 END "
    "WHERE NOT EXISTS (SELECT 1 FROM tiltopt_rounds r WHERE r.run_id = tiltopt_queries.run_id "
    "AND r.round = tiltopt_queries.round AND r.kind = 'imported') "
    "AND NOT EXISTS (SELECT 1 FROM tiltopt_comparisons k WHERE k.run_id = tiltopt_queries.run_id)",
    "UPDATE tiltopt_queries SET calls = spent",
    "UPDATE tiltopt_comparisons SET spent = 1, calls = 1",
    "UPDATE tiltopt_runs SET seconds = coalesce((SELECT sum(r.ask_seconds + r.answer_seconds) FROM tiltopt_rounds r "
    "WHERE r.run_id = tiltopt_runs.id), 0)",
)


_ORIGINS_OF_4 = (  # earlier versions drew everything from noise
    "UPDATE tiltopt_queries SET operator = 'imported' WHERE EXISTS (SELECT 1 FROM tiltopt_rounds r "
    "WHERE r.run_id = tiltopt_queries.run_id AND r.round = tiltopt_queries.round AND r.kind = 'imported')"
)


def migrate(c: Connection) -> None:
    """Bring an older layout up to date: all of it in one transaction, or nothing. Two at once do it once."""
    version = version_of(c, lock=True)
    if version < 2:
        comparisons.create(c, checkfirst=True)
    if version < 3:
        _add_columns(c, _SINCE_3)
        for statement in _BOOKS_OF_3:
            c.execute(text(statement))
    if version < 4:
        _add_columns(c, _SINCE_4)
        c.execute(text(_ORIGINS_OF_4))
    if version < 5:
        _add_columns(c, _SINCE_5)
    if version < 6:
        _add_columns(c, _SINCE_6)
    if version < SCHEMA_VERSION:
        c.execute(meta.update().where(meta.c.name == "schema_version").values(value=str(SCHEMA_VERSION)))


def _add_columns(c: Connection, wanted: Mapping[Table, Sequence[str]]) -> None:
    for table, names in wanted.items():
        there = {column["name"] for column in inspect(c).get_columns(table.name)}
        for name in names:
            if name not in there:
                definition = CreateColumn(table.c[name]).compile(dialect=c.dialect)
                c.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))


def version_of(c: Connection, lock: bool = False) -> int:
    """The layout's version; with `lock`, other transactions wait to read it so until this one ends."""
    query = select(meta.c.value).where(meta.c.name == "schema_version")
    return int(c.execute(query.with_for_update() if lock else query).scalar_one())
