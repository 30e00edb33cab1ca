"""Which answers stand for all of them in a sparse Gaussian process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-6  # conditional variance, relative to the largest, below which a point adds nothing but rounding


def greedy(row: Callable[[int], Tensor], diagonal: Tensor, count: int) -> Tensor:
    """Each next point is the one least known from those before: the pivots of an incomplete Cholesky factor.

    O(n count^2) beside `count` rows of the covariance. Stops early where nothing is left to be known, so that the
    covariance of the chosen points has a Cholesky factor without jitter.

    Args:
        row: covariance of point i with all n points, (n,).
        diagonal: (n,), variances.
        count: points wanted.

    Returns:
        Indices of the points, at most `count`, long.

    Source: Burt, Rasmussen and van der Wilk 2020, "Convergence of sparse variational inference in Gaussian processes
    regression", section 4.
    """
    n, count = len(diagonal), min(count, len(diagonal))
    left, floor = diagonal.clone(), TOLERANCE * diagonal.max()
    factor = torch.zeros(count, n, dtype=diagonal.dtype, device=diagonal.device)
    chosen: list[int] = []
    for j in range(count):
        i = int(left.argmax())
        if not left[i] > floor:
            break
        factor[j] = (row(i) - factor[:j, i] @ factor[:j]) / left[i].sqrt()
        left -= factor[j].square()
        left[i] = 0.0
        chosen.append(i)
    return torch.tensor(chosen, dtype=torch.long, device=diagonal.device)
