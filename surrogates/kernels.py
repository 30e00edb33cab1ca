"""What the Gaussian processes share: the map of their inputs, their covariance, and draws of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from botorch.models.transforms.input import InputTransform
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import AdditiveKernel, Kernel, LinearKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior
from torch import Generator, Tensor, nn

from tiltopt.errors import SurrogateError


class Project(InputTransform, nn.Module):
    """x -> (x - shift) / scale, then, if there are axes, onto them: standardised features of mean square norm 1.

    The mean squared distance of two points comes out as about 2 whatever d is, which fixes the scale of the
    length-scale prior. Without axes no direction is lost, so that a point off the span of the answers stays uncertain.

    Args:
        shift, scale: (d,); axes: (d, k), orthonormal principal axes, or None to keep all directions.
    """

    shift: Tensor
    scale: Tensor
    axes: Tensor | None

    def __init__(self, shift: Tensor, scale: Tensor, axes: Tensor | None = None) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("scale", scale), ("axes", axes)):
            self.register_buffer(name, None if value is None else value.detach().contiguous().clone())
        self.transform_on_train, self.transform_on_eval, self.transform_on_fantasize = True, True, True
        self.is_one_to_many = False

    @classmethod
    def learn(cls, X: Tensor, max_dim: int | None, relevance: Tensor | None = None) -> Project:
        """From features (n, d), keeping at most `max_dim` principal axes (all directions if None or at least d).

        Args:
            relevance: (d,), factors on the standardised features, mean square 1; None: all alike.
        """
        shift, scale = X.mean(dim=0), X.std(dim=0)
        varies = scale > 1e-9 * X.abs().amax(dim=0)
        if not varies.any():
            raise SurrogateError("no feature varies between the answers: a GP has nothing to learn from; check them.")
        scale = torch.where(varies, scale, scale[varies].log().mean().exp()) * varies.sum().sqrt()
        scale = scale if relevance is None else scale / relevance
        if max_dim is None or max_dim >= X.shape[1]:
            return cls(shift, scale)
        z = (X - shift) / scale
        return cls(shift, scale, torch.linalg.eigh(z.T @ z)[1][:, -max_dim:])

    @property
    def dim(self) -> int:
        """k, the directions that are kept."""
        return len(self.shift) if self.axes is None else self.axes.shape[1]

    def transform(self, X: Tensor) -> Tensor:
        """(..., d) -> (..., k)."""
        z = (X - self.shift) / self.scale
        return z if self.axes is None else z @ self.axes

    def equals(self, other: InputTransform) -> bool:
        """Whether the other one is the same map."""
        if not isinstance(other, Project) or (self.axes is None) != (other.axes is None):
            return False
        pairs = [(self.shift, other.shift), (self.scale, other.scale), (self.axes, other.axes)]
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


def cross_covariance(kernel: Any, z: Tensor, train: Tensor) -> Tensor:
    """k(z, train), (b) x q x n, for points (b) x q x k and answers (n, k), without a copy of the answers per batch."""
    return kernel(z.reshape(-1, z.shape[-1]), train).to_dense().reshape(*z.shape[:-1], len(train))


def matern(z: Tensor, other: Tensor, lengthscale: Tensor, outputscale: Tensor) -> Tensor:
    """Matern-5/2 covariance of z (..., p, k) and other (..., r, k), (..., p, r), in plain matrix products.

    gpytorch's kernel gives the same numbers and costs several times as much for some tens of points.
    """
    z, other = z / lengthscale, other / lengthscale
    distance = z.square().sum(dim=-1, keepdim=True) + other.square().sum(dim=-1).unsqueeze(-2) - 2 * z @ other.mT
    scaled = (5 * distance.clamp_min(1e-15)).sqrt()
    return outputscale * (1 + scaled + scaled.square() / 3) * torch.exp(-scaled)


def draw_prior(
    kernel: AdditiveKernel, dim: int, generator: Generator, features: int, like: Tensor
) -> Callable[[Tensor], Tensor]:
    """One function from the zero-mean prior of `covariance`, z (..., k) -> (...), its linear part exactly."""
    linear, base = kernel.kernels
    bent = draw_matern(base, dim, generator, features, like)
    slope = torch.randn(dim, generator=generator, dtype=like.dtype).to(like.device) * linear.variance.squeeze().sqrt()
    return lambda z: bent(z) + z @ slope


def draw_matern(
    kernel: ScaleKernel, dim: int, generator: Generator, features: int, like: Tensor
) -> Callable[[Tensor], Tensor]:
    """The same for the Matern part alone, from `features` random Fourier features.

    Source: Rahimi and Recht 2007; the Matern-5/2 spectral density is a multivariate Student t with 5 degrees of
    freedom.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=like.dtype).to(like.device)

    radius = normal(features, 5).square().mean(dim=1).sqrt()
    frequency = normal(features, dim) / radius[:, None] / kernel.base_kernel.lengthscale
    phase = 2 * math.pi * torch.rand(features, generator=generator, dtype=like.dtype).to(like.device)
    amplitude = normal(features) * (2 * kernel.outputscale / features).sqrt()
    return lambda z: torch.cos(z @ frequency.T + phase) @ amplitude


def covariance(ard: int | None = None) -> Kernel:
    """Linear plus Matern-5/2, with weak priors at the scale of `Project`; `ard` length-scales, one for all if None."""
    linear = LinearKernel(variance_prior=GammaPrior(1.5, 1.0))
    base = MaternKernel(nu=2.5, ard_num_dims=ard, lengthscale_prior=LogNormalPrior(0.5, 1.0))
    return AdditiveKernel(linear, ScaleKernel(base, outputscale_prior=GammaPrior(1.5, 1.0)))


def noise_model() -> GaussianLikelihood:
    """Homoscedastic noise, standardised units: a prior around a tenth of the variance, wide enough to be overruled."""
    prior = LogNormalPrior(-2.0, 1.5)
    return GaussianLikelihood(noise_prior=prior, noise_constraint=GreaterThan(1e-6, initial_value=0.1))
