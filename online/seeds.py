"""Every random number of a run comes from a generator named by what it is for, never by rank or order of execution."""

from __future__ import annotations

import hashlib

from torch import Generator


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for the thing named by `path` in the run with `seed`.

    SHA-256 of the written path, so that neighbouring names give unrelated streams on every platform.
    """
    text = "/".join(str(p) for p in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: int | str) -> Generator:
    """A CPU generator seeded with `derive(seed, *path)`."""
    return Generator().manual_seed(derive(seed, *path))


def query_seed(seed: int, round_: int, index: int) -> int:
    """The seed of query `index` (0, 1, ...) of a round: its noise, its resampling and its final draw."""
    return derive(seed, "query", round_, index)
