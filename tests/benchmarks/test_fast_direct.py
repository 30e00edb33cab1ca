"""Fast Direct's parts against autograd, a closed form, and a problem whose best answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.query_efficiency.fast_direct import NOISE, MeanField, follow, guided, moved, paths
from tiltopt.samplers.analytic import LinearGaussianPrior


def test_the_mean_is_that_of_a_gaussian_process_and_its_gradient_autograds() -> None:
    rng = torch.Generator().manual_seed(0)
    X, y = torch.randn(7, 5, generator=rng, dtype=torch.float64), torch.randn(7, generator=rng, dtype=torch.float64)
    field, x = MeanField.fit(X, y), torch.randn(3, 5, generator=rng, dtype=torch.float64, requires_grad=True)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * ((a[:, None] - b[None]) / math.sqrt(5)).square().sum(-1))

    z = (y - y.mean()) / y.std()
    mean = kernel(x, X) @ torch.linalg.solve(kernel(X, X) + NOISE * torch.eye(7), z)
    assert torch.allclose(field(x), mean, atol=1e-9)
    (expected,) = torch.autograd.grad(mean.sum(), x)
    assert torch.allclose(field.gradient(x.detach()), expected, atol=1e-9)


def test_a_moved_path_keeps_the_length_of_every_noise() -> None:
    path = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    after = moved(path, direction, 0.3)
    assert torch.allclose(after.flatten(2).norm(dim=2), path.flatten(2).norm(dim=2), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity
    to = direction.float()[:, None].expand(-1, 4, -1)
    assert (cosine(after.flatten(2), to, dim=2) > cosine(path.flatten(2), to, dim=2)).all()
    assert torch.equal(moved(path, torch.zeros(2, 6), 0.1), moved(path, torch.zeros(2, 6), 9.0))


def test_a_path_that_is_followed_is_the_chain_itself_and_guidance_climbs() -> None:
    """N(0, I) in four dimensions, whose reward is the first coordinate."""
    prior = LinearGaussianPrior(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), num_steps=12)
    n = 256
    cond = prior.encode(["x"] * n)
    path = paths(prior, [torch.Generator().manual_seed(i) for i in range(n)])
    x = follow(prior, path, cond)
    assert float(x.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(4 * n))
    law = prior.chain_law()
    assert float(x.var()) == pytest.approx(float(law.cov[0, 0]), abs=4 * math.sqrt(2 / (4 * n)))
    field = MeanField.fit(x[:64], x[:64, 0])
    after = guided(prior, path[64:], cond.select(slice(64, n)), field, passes=4, step=0.1)
    gain = after[:, 0] - x[64:, 0]
    assert float(gain.mean()) > 0.5
    assert float((gain > 0).float().mean()) > 0.95
    again = guided(prior, path[64:], cond.select(slice(64, n)), field, passes=0, step=0.1)
    assert torch.equal(again, x[64:])
