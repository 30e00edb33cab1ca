"""Arithmetic of importance weights, in nats. Nothing here changes its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log of the mean weight over the last axis, log((1/P) sum_p exp(log_w_p)).

    Args:
        log_w: (..., P), nats; -inf is a weight of zero.

    Returns:
        (...), nats.
    """
    return torch.logsumexp(log_w, dim=-1) - math.log(log_w.shape[-1])


def normalise(log_w: Tensor) -> Tensor:
    """Log-weights that sum to one: log_w - logsumexp(log_w), (..., P) nats -> (..., P) nats."""
    return log_w - torch.logsumexp(log_w, dim=-1, keepdim=True)


def ess(log_w: Tensor) -> Tensor:
    """Effective sample size, (sum w)^2 / sum w^2, between 1 and P.

    Args:
        log_w: (..., P), nats, any constant offset; at least one entry of the last axis is finite.

    Returns:
        (...), particles. Source: Kong, Liu and Wong (1994).
    """
    return torch.exp(2 * torch.logsumexp(log_w, dim=-1) - torch.logsumexp(2 * log_w, dim=-1))


def add_log_increment(log_w: Tensor, increment: Tensor) -> Tensor:
    """log_w + increment, where a particle of weight zero keeps weight zero whatever its increment is."""
    return torch.where(log_w == -math.inf, log_w, log_w + increment)
