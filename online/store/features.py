"""Feature vectors: their stored form (float32, little-endian), and those of a run in memory, each read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sqlalchemy import Connection, func, select
from torch import Tensor

from tiltopt.errors import StoreError
from tiltopt.online.queries import NewQuery
from tiltopt.online.store.schema import features

_ROOM = 1.25  # a table that is full grows by this factor, so that adding rows costs a constant each
_PART = 4096  # rows read at a time


class FeatureCache:
    """Features by query number, (n, d) float64; a stored vector never changes, so each is read once.

    Args:
        run_id: which run of the database.
    """

    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        self._numbers = np.zeros(0, dtype=np.int64)
        self._table = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, c: Connection) -> None:
        """Read the vectors that are not here yet: those of larger numbers, because numbers only ever grow."""
        last = int(self._numbers[-1]) if len(self._numbers) else 0
        new = (features.c.run_id == self.run_id) & (features.c.number > last)
        count, newest = c.execute(select(func.count(), func.max(features.c.number)).where(new)).one()
        if not count:
            return
        query = select(features.c.number, features.c.vector).where(new, features.c.number <= newest)
        result = c.execute(query.order_by(features.c.number))
        numbers, start = [self._numbers], len(self._numbers)
        while result.cursor is not None and (part := result.cursor.fetchmany(_PART)):
            self._put(start + sum(map(len, numbers[1:])), unpack([row[1] for row in part]), start + count)
            numbers.append(np.array([row[0] for row in part], dtype=np.int64))
        result.close()
        self._numbers = np.concatenate(numbers)

    def _put(self, start: int, rows: np.ndarray, total: int) -> None:
        """Rows from `start` on, in a table with room for `total`."""
        if start and rows.shape[1] != self._table.shape[1]:
            raise StoreError(
                "stored features have different lengths; the database was written with different feature maps."
            )
        if not start or total > len(self._table):
            table = torch.empty(max(total, int(_ROOM * start)), rows.shape[1], dtype=torch.float64)
            if start:
                table[:start] = self._table[:start]
            self._table = table
        self._table.numpy()[start : start + len(rows)] = rows

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """(m, d) float64, the features of these queries in their order; not to be written to.

        A run of neighbours, such as all queries of a run, is a view and costs nothing.

        Raises:
            StoreError: a query has no features.
        """
        wanted = np.array(numbers, dtype=np.int64)
        at = np.searchsorted(self._numbers, wanted)
        found = at < len(self._numbers)
        found[found] = self._numbers[at[found]] == wanted[found]
        if not found.all():
            raise StoreError(f"query {wanted[~found][0]} has no features; restore the database from a backup.")
        if len(at) and np.array_equal(at, np.arange(at[0], at[0] + len(at))):
            return self._table[at[0] : at[0] + len(at)]
        return self._table[torch.from_numpy(at)]


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


def check_vectors(new: Sequence[NewQuery], stored_bytes: int | None) -> None:
    """Refuse features that would make a run unusable.

    Args:
        new: queries about to be entered.
        stored_bytes: length that the run's vectors have; None when that is not known.

    Raises:
        StoreError: vectors of another length, or with a number that is not finite; it names the query.
    """
    width = len(new[0].vector) if stored_bytes is None and new else stored_bytes
    for query in new:
        if len(query.vector) != width:
            raise StoreError(
                f"query {query.number} has {len(query.vector) // 4} features, expected {(width or 0) // 4} as the "
                "run's own feature map gives; measure with that. Nothing was stored."
            )
    if not new:
        return
    bad = np.flatnonzero(~np.isfinite(unpack([query.vector for query in new])).all(axis=1))
    if len(bad):
        raise StoreError(
            f"query {new[bad[0]].number} has a feature that is not a finite number; correct or leave it out. Nothing "
            "was stored."
        )
