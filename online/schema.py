"""Tables of the query store, and the version of their layout."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
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
)

SCHEMA_VERSION = 2
"""Of the layout below. A newer database is refused, never touched; an older one is brought up to date when opened.

1: runs, rounds, queries, features. 2: comparisons.
"""

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
    Column(
        "name", String(64), nullable=False, unique=True
    ),  # "run" in a run's own file, a random name in a shared database
    Column("config", Text, nullable=False),  # JSON of Settings.to_dict(): what the run was made with
    Column("changes", Text, nullable=False),  # JSON list: settings changed on the way, in words
    Column("feature_id", Text),  # which feature map made the stored features; set by the first round
    Column("created_at", Float, nullable=False),  # seconds since the epoch
)

rounds = Table(
    "tiltopt_rounds",
    metadata,
    Column("run_id", Integer, ForeignKey("tiltopt_runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),  # plain, tilted, imported
    Column("size", Integer, nullable=False),
    Column("alpha", Float),  # reward units per nat; NULL where nothing was tilted or the engine chose it
    Column("beta", Float),
    Column("notes", Text, nullable=False),  # JSON list of sentences
    Column("score", Text),  # JSON: how the previous surrogate had predicted the answers that came since
    Column("fingerprint", String(64)),  # SHA-256 of the data behind the round's surrogate; NULL = no surrogate
    Column("ask_seconds", Float, nullable=False),
    Column("answer_seconds", Float, nullable=False),
    Column("asked_at", Float, nullable=False),
)

queries = Table(
    "tiltopt_queries",
    metadata,
    Column("run_id", Integer, ForeignKey("tiltopt_runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # 1, 2, ... in the run
    Column("round", Integer, nullable=False),
    Column("place", Integer, nullable=False),  # 0, 1, ... in the round
    Column("prompt", Text, nullable=False),
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
    Column("error", Text),
    Column("raw", Text),  # what the black box said beyond the number
    Column("worker", String(128)),  # who was handed the query
    Column("heard_at", Float(53)),  # the worker's last sign of life, seconds since the epoch
    Column("changed_at", Float(53), nullable=False),  # of the last change of state
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
    Column("round", Integer, nullable=False),  # the newest round when the comparison was made
    Column("winner", Integer, nullable=False),  # query number; of a tie or a failure, the one that was shown first
    Column("loser", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),  # win, tie, failed
    Column("rater", String(128)),  # who compared
    Column("raw", Text),  # what the judge said beyond the outcome
    Column("error", Text),  # why there is no outcome
    Column("undone", Integer, nullable=False),  # 1 = taken back
    Column("created_at", Float(53), nullable=False),  # seconds since the epoch
    Column("changed_at", Float(53), nullable=False),
    ForeignKeyConstraint(["run_id", "winner"], ["tiltopt_queries.run_id", "tiltopt_queries.number"]),
    ForeignKeyConstraint(["run_id", "loser"], ["tiltopt_queries.run_id", "tiltopt_queries.number"]),
    Index("tiltopt_comparisons_by_round", "run_id", "round", "id"),
)
