"""What may be told: a query's number, a finite value, a standard error; anything else is refused."""

from __future__ import annotations

import math
import numbers
from typing import Any

from tiltopt.errors import ConfigError, RewardError, StoreError


def batch_size(n: Any) -> int:
    """`n` as a number of queries."""
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1:
        raise ConfigError(f"expected a number of queries, an integer >= 1, got {n!r}.")
    return int(n)


def query_number(id: Any) -> int:
    """`id` as a query's number."""
    if isinstance(id, bool) or not isinstance(id, numbers.Integral):
        raise StoreError(f"unknown query {id!r}: expected the integer `id` of a query.")
    return int(id)


def finite(value: Any, name: str = "value") -> float:
    """`value` as a finite float.

    Raises:
        RewardError: an array, text, a boolean, None, NaN or an infinity.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        hint = "; pass one number, for instance with .item()" if hasattr(value, "shape") else ""
        raise RewardError(
            f"expected `{name}` to be one finite number, got {kind} {_short(value)}{hint}. Nothing was stored."
        )
    number = float(value)
    if not math.isfinite(number):
        raise RewardError(
            f"expected `{name}` to be a finite number, got {number}. A measurement without a result is told with "
            "fail(id, reason). Nothing was stored."
        )
    return number


def spread(sem: Any) -> float:
    """`sem` as a finite standard error >= 0."""
    number = finite(sem, "sem")
    if number < 0:
        raise RewardError(f"expected `sem`, a standard error, to be >= 0, got {number}. Nothing was stored.")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
