"""Fast Direct: the noise path of a sample is moved toward a pseudo-target; Tan et al., ICLR 2025, arXiv 2502.01692.

A Gaussian process over clean latents is fitted to every answer. A new sample has a path: the initial noise and that of
every step. From its latent x the pseudo-target lies in the direction in which the posterior mean rises, and each noise
of the path takes a step in that one direction and is scaled back to its own length. Round r does so r times, with the
path run again each time. The kernel is the published one: RBF of length sqrt(D), noise variance 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from tiltopt.samplers.prior import Prior
from tiltopt.types import Conditioning

NOISE = 1e-4
"""Variance of the answers' noise, of standardised answers."""


@dataclass(frozen=True)
class MeanField:
    """Posterior mean of a Gaussian process with an RBF kernel of length sqrt(D), on standardised answers.

    Args:
        X: (n, D) float64, latents.
        weights: (n,) float64, (K + noise I)^-1 of the standardised answers.
    """

    X: Tensor
    weights: Tensor

    @classmethod
    def fit(cls, X: Tensor, y: Tensor) -> MeanField:
        """From latents (n, D) and answers (n,), n >= 2."""
        X, y = X.double(), y.double()
        spread = y.std()
        z = (y - y.mean()) / (spread if spread > 0 else 1.0)
        K = _kernel(X, X) + NOISE * torch.eye(len(X), dtype=X.dtype)
        return cls(X, torch.cholesky_solve(z[:, None], torch.linalg.cholesky(K)).flatten())

    def __call__(self, x: Tensor) -> Tensor:
        """(m,), the mean at (m, D)."""
        return _kernel(x.double(), self.X) @ self.weights

    def gradient(self, x: Tensor) -> Tensor:
        """(m, D), of the mean at (m, D): sum_i w_i k(x, x_i) (x_i - x) / D."""
        x = x.double()
        k = _kernel(x, self.X) * self.weights
        return (k @ self.X - k.sum(dim=1, keepdim=True) * x) / x.shape[1]


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(a, b).square() / (2 * a.shape[1]))


def paths(prior: Prior, generators: Sequence[Generator]) -> Tensor:
    """(n, K + 1, *event) float32: the initial noise and that of every step, each sample's from its own generator."""
    shape = (prior.num_steps + 1, *prior.event_shape)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def follow(prior: Prior, path: Tensor, cond: Conditioning) -> Tensor:
    """(n, *event): the clean latents at which the chain arrives with these noises."""
    x = path[:, 0].to(getattr(prior, "device", "cpu"))
    for k in range(prior.num_steps):
        step = prior.reverse(k, x, cond).mean
        x = step + prior.std(k) * path[:, k + 1].to(step)
    return x


def moved(path: Tensor, direction: Tensor, step: float) -> Tensor:
    """The path with every noise a step further in one direction, at its old length.

    Args:
        path: (n, K + 1, *event). direction: (n, D), of any length.
        step: in lengths sqrt(D).
    """
    flat = path.flatten(2)
    size = flat.shape[2] ** 0.5
    unit = direction.double() / direction.double().norm(dim=1, keepdim=True).clamp_min(1e-300)  # 0 where it is flat
    shifted = flat + (step * size * unit).to(flat)[:, None]
    scaled = shifted * flat.norm(dim=2, keepdim=True) / shifted.norm(dim=2, keepdim=True).clamp_min(1e-30)
    return scaled.view_as(path)


def guided(prior: Prior, path: Tensor, cond: Conditioning, field: MeanField, passes: int, step: float) -> Tensor:
    """(n, *event): clean latents after so many moves of the path toward their pseudo-targets."""
    x = follow(prior, path, cond)
    for _ in range(passes):
        path = moved(path, field.gradient(x.flatten(1).cpu()), step)
        x = follow(prior, path, cond)
    return x
