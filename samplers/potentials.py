"""What a potential returns, checked, and its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltopt.errors import PotentialError

BELOW_WORST = 5.0  # nats


def finite_look_ahead(log_g: Tensor) -> Tensor:
    """A look-ahead of -inf says only "worse than the others": 5 nats below the worst finite one of its prompt.

    Only the true x_K can have weight zero, because a path may leave the forbidden region before its end.
    """
    finite = torch.isfinite(log_g)
    worst = torch.where(finite, log_g, math.inf).amin(-1, keepdim=True)
    return torch.where(log_g == -math.inf, torch.where(torch.isfinite(worst), worst - BELOW_WORST, 0.0), log_g)


def check_potential(log_g: Tensor, num_rows: int, potential: object) -> Tensor:
    """`log_g` if it has one value per row; PotentialError otherwise."""
    if not isinstance(log_g, Tensor) or log_g.shape != (num_rows,):
        got = tuple(log_g.shape) if isinstance(log_g, Tensor) else type(log_g).__name__
        raise PotentialError(
            f"The potential must return log G of shape ({num_rows},), one value per design, "
            f"got {got} from {potential!r}."
        )
    return log_g


def gradient_of(log_g: Tensor, leaf: Tensor, potential: object) -> Tensor:
    """d sum(log_g) / d leaf; PotentialError if there is no path from one to the other."""
    grad = torch.autograd.grad(log_g.sum(), leaf, allow_unused=True)[0] if log_g.requires_grad else None
    if grad is None:
        raise PotentialError(
            f"Guided sampling needs a potential with a gradient in its designs, but {potential!r} returned a tensor "
            "without one. Use gradient='none', FKSteering or BestOfN for a potential that cannot be differentiated."
        )
    return grad.detach()
