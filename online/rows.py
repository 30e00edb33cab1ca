"""What the store's rows are to the rest of the program: states, new queries, rounds, packed features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sqlalchemy import Row
from torch import Tensor

from tiltopt.errors import StoreError

TRANSITIONS = {
    "asked": ("answered", "failed", "abandoned"),
    "failed": ("asked", "abandoned"),
    "answered": ("asked",),
    "abandoned": (),
}
"""From each state, the states that may follow."""

COLUMNS = ["id", "round", "prompt", "seed", "state", "value", "sem", "predicted", "predicted_sd", "error"]
"""Columns of `Store.frame`."""

_ADVICE = {
    "asked": "tell its answer, fail it, or abandon it",
    "failed": "retry it, or abandon it",
    "answered": "undo it, as long as no later round has been asked",
    "abandoned": "nothing; ask for new queries instead",
}


@dataclass(frozen=True)
class NewQuery:
    """A drawn query, on its way into the store. Units as in `tiltopt.online.engine.Drawn`."""

    number: int
    place: int
    prompt: str
    seed: int
    vector: bytes
    predicted: float | None = None
    predicted_sd: float | None = None
    acquired: float | None = None
    ess: float | None = None
    log_z: float | None = None


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a round.

    Args:
        round: 0, 1, ...
        kind: "plain" (samples of the prior), "tilted", or "imported" (measurements from elsewhere).
        size: number of queries.
        alpha: price of leaving the prior, reward units per nat; None for plain rounds.
        beta: optimism of the acquisition; None for plain rounds.
        notes: what a person should know, in sentences.
        score: how the previous surrogate had predicted the answers that came since; None when there was none.
        fingerprint: SHA-256 of the data behind the round's surrogate; None when the round has none.
        ask_seconds: fitting, drawing and writing.
        answer_seconds: waiting for the black box.
        asked_at: seconds since the epoch.
    """

    round: int
    kind: str
    size: int
    alpha: float | None = None
    beta: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    score: Mapping[str, Any] | None = None
    fingerprint: str | None = None
    ask_seconds: float = 0.0
    answer_seconds: float = 0.0
    asked_at: float = 0.0


def round_record(row: Row[Any]) -> RoundRecord:
    """A row of the rounds' table, decoded."""
    values = dict(row._mapping)
    values["notes"] = tuple(json.loads(values["notes"]))
    values["score"] = None if values["score"] is None else json.loads(values["score"])
    return RoundRecord(**values)


def refusal(row: Row[Any], to: str) -> StoreError:
    """Why a query cannot go to the state `to`, and where it can."""
    stored = f" ({row.error})" if row.error else ""
    if row.state == "answered":
        stored = f" (its answer is {row.value!r})" if row.value is not None else " (by comparisons)"
    return StoreError(
        f"query {row.number} is {row.state}{stored} and cannot become {to}. Allowed: {_ADVICE[row.state]}."
    )


def matrix(vectors: Sequence[bytes], width: int = 0) -> Tensor:
    """float32 little-endian blobs -> (n, d) float64."""
    if not vectors:
        return torch.zeros(0, width, dtype=torch.float64)
    return torch.from_numpy(unpack(vectors).astype(np.float64))


def unpack(vectors: Sequence[bytes]) -> np.ndarray:
    """At least one stored vector -> (n, d) float32."""
    if any(len(v) != len(vectors[0]) for v in vectors):
        raise StoreError(
            "stored features have different lengths; the database was written with different feature maps."
        )
    return np.frombuffer(b"".join(vectors), dtype="<f4").reshape(len(vectors), -1)


def pack(vector: Tensor) -> bytes:
    """(d,) float32 on the CPU -> its stored form."""
    return np.ascontiguousarray(vector.detach().cpu().numpy(), dtype="<f4").tobytes()
