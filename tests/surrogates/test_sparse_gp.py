"""The sparse GP against the exact one, against dense formulas, and against its own draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.contracts.surrogates import coverage, generator, linear_data
from tiltopt.errors import SurrogateError
from tiltopt.surrogates import fit, sparse_gp
from tiltopt.surrogates.data import check
from tiltopt.surrogates.selection import predictive
from tiltopt.surrogates.sparse_gp import QuadraticForm, greedy

FAST: dict[str, Any] = {"max_iterations": 15, "sparse_above": 10}


def bent_data(n: int, d: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    f = 1.5 * X[:, :1].sin() + 0.5 * X[:, 1:2].square() + X[:, 2:3]
    return X, f + noise * torch.randn(n, 1, generator=g, dtype=torch.float64)


def errors(n: int) -> Tensor:
    return torch.linspace(0.1, 0.6, n, dtype=torch.float64)[:, None]


def moments(model: Any, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, joint covariance and gradient of both at the batches X (b, q, d)."""
    x = X.clone().requires_grad_(True)
    posterior = model.posterior(x)
    joint = posterior.distribution.covariance_matrix
    weights = torch.linspace(0.5, 1.5, joint[0].numel(), dtype=torch.float64).view_as(joint[0])
    (slope,) = torch.autograd.grad(posterior.mean.sum() + (weights * joint).sum(), x)
    return posterior.mean.detach(), joint.detach(), slope


def dense(model: Any, X: Tensor, y: Tensor, variance: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance at the points (p, d) in function space: the prior v z'z' + Q + (k - Q at the points)."""
    linear, bent = model.kernel.kernels
    with torch.no_grad():
        z, t = model.project.transform(X), model.project.transform(points)
        K = bent(model.Z).to_dense()

        def prior(a: Tensor, b: Tensor) -> Tensor:
            left, right = bent(a, model.Z).to_dense(), bent(model.Z, b).to_dense()
            return linear(a, b).to_dense() + left @ torch.linalg.solve(K, right)

        residual = linear(t).to_dense() + bent(t).to_dense() - prior(t, t)
        gain = torch.linalg.solve(prior(z, z) + torch.diag(variance / model.y_scale**2), prior(z, t)).T
        target = (y - model.y_mean) / model.y_scale - model.constant
        mean = model.y_mean + model.y_scale * (model.constant + gain @ target)
        return mean, model.y_scale**2 * (residual + prior(t, t) - gain @ prior(z, t))


@pytest.mark.parametrize("sem", [None, "each"])
@pytest.mark.parametrize("d", [4, 40])
def test_with_all_answers_as_inducing_points_it_is_the_exact_gp(sem: str | None, d: int) -> None:
    X, Y = bent_data(75, d, 0.2, seed=6)
    known = None if sem is None else errors(60)
    exact = fit("gp", X[:60], Y[:60], sem=known, max_iterations=15)
    sparse: Any = fit("gp", X[:60], Y[:60], sem=known, **FAST)
    assert len(sparse.Z) == 60
    for batch in (X[60:, None], X[60:].view(3, 5, d)):
        for a, b in zip(moments(sparse, batch), moments(exact, batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(sparse.noise_variance, exact.noise_variance)


@pytest.mark.parametrize("sem", [None, "each"])
def test_with_few_inducing_points_it_is_the_dense_formula(sem: str | None) -> None:
    X, Y = bent_data(70, 5, 0.2, seed=7)
    known = None if sem is None else errors(60)
    model: Any = fit("gp", X[:60], Y[:60], sem=known, inducing=12, **FAST)
    assert model.Z.shape == (12, 5)
    variance = model.noise_variance.expand(60) if known is None else known[:, 0].square()
    mean, joint = dense(model, X[:60], Y[:60, 0], variance, X[60:])
    posterior = model.posterior(X[60:])
    torch.testing.assert_close(posterior.mean[:, 0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.distribution.covariance_matrix, joint, rtol=1e-7, atol=1e-8)
    noisy = model.posterior(X[60:], observation_noise=True).variance[:, 0]
    torch.testing.assert_close(noisy, joint.diagonal() + model.noise_variance, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sem", [None, "each"])
def test_leave_one_out_equals_conditioning_on_the_others(sem: str | None) -> None:
    X, Y = bent_data(25, 3, 0.3, seed=8)
    known = None if sem is None else errors(25)
    model: Any = fit("gp", X, Y, sem=known, inducing=8, **FAST)
    variance = model.noise_variance.expand(25) if known is None else known[:, 0].square()
    got = model.leave_one_out(check(X, Y, known))
    for i in range(25):
        o = torch.arange(25) != i
        mean, joint = dense(model, X[o], Y[o, 0], variance[o], X[i : i + 1])
        want = torch.distributions.Normal(mean[0], (joint[0, 0] + variance[i]).sqrt()).log_prob(Y[i, 0])
        assert got[i].item() == pytest.approx(want.item(), abs=1e-6)


def test_draws_have_the_mean_and_covariance_of_the_posterior() -> None:
    X, Y = bent_data(66, 4, 0.2, seed=9)
    model: Any = fit("gp", X[:60], Y[:60], inducing=20, **FAST)
    points = torch.cat([X[60:], 8.0 * X[60:62]])  # the last two far off, where the prior is drawn
    g, count = generator(0), 1500
    draws = torch.stack([model.sample_function(g, features=1024)(points).flatten() for _ in range(count)]).detach()
    posterior = model.posterior(points)
    joint = posterior.distribution.covariance_matrix.detach()
    sd = joint.diagonal().sqrt()
    assert ((draws.mean(0) - posterior.mean[:, 0]).abs() < 4.5 * sd / math.sqrt(count)).all()
    scale = sd[:, None] * sd
    error = (torch.cov(draws.T) - joint).abs() / scale
    assert (error < 4.5 * math.sqrt(2 / count) + 0.03).all()


@pytest.mark.parametrize("curved", [False, True])
def test_ninety_percent_intervals_cover_with_few_inducing_points(curved: bool) -> None:
    covered = []
    for seed in range(3):
        X, Y = bent_data(1100, 6, 0.4, seed) if curved else linear_data(1100, 30, 0.4, seed)[:2]
        model = fit("gp", X[:600], Y[:600], generator=generator(seed), inducing=64, fit_size=150, **FAST)
        covered.append(coverage(model, X[600:], Y[600:, 0]))
    assert 0.85 <= float(np.mean(covered)) <= 0.95


def test_a_linear_reward_needs_no_inducing_points() -> None:
    """What 16 points cannot carry of a linear function of 60 features: with them alone the error is near that of 0."""
    X, Y, f = linear_data(900, 60, 0.3, seed=3)
    model = fit("gp", X[:600], Y[:600], inducing=16, fit_size=200, **FAST)
    rival = fit("linear", X[:600], Y[:600])
    error = [(predictive(m, X[600:])[0] - f[600:, 0]).square().mean().sqrt().item() for m in (model, rival)]
    assert error[0] < 1.15 * error[1]


def test_cost_of_a_gradient_does_not_grow_with_the_answers() -> None:
    X, Y = bent_data(400, 5, 0.2, seed=1)

    def work(n: int) -> int:
        model = fit("gp", X[:n], Y[:n], inducing=20, fit_size=40, **FAST)
        moments(model, X[:8, None])  # what is computed once is computed now
        with FlopCounterMode(display=False) as counter:
            moments(model, X[:8, None])
        return counter.get_total_flops()

    assert work(400) == work(100) > 0


def test_quadratic_form_has_first_and_second_derivatives() -> None:
    g = generator(2)
    phi = torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    M = torch.randn(4, 4, generator=g, dtype=torch.float64)
    M = M + M.T
    torch.testing.assert_close(QuadraticForm.apply(phi, M), phi @ M @ phi.mT)
    assert torch.autograd.gradcheck(lambda p: QuadraticForm.apply(p, M), phi)
    assert torch.autograd.gradgradcheck(lambda p: QuadraticForm.apply(p, M), phi)


def test_inducing_points_are_each_the_least_known_and_never_twice_the_same() -> None:
    x = torch.rand(30, 1, generator=generator(0), dtype=torch.float64)
    x = torch.cat([x, x])  # every point twice
    K = torch.exp(-((x - x.T) ** 2) / 0.02)
    chosen = greedy(lambda i: K[i], K.diagonal().contiguous(), 8).tolist()
    for j in range(1, 8):
        known = chosen[:j]
        left = K.diagonal() - (K[:, known] * torch.linalg.solve(K[known][:, known], K[known]).T).sum(dim=1)
        assert left[chosen[j]] == pytest.approx(left.max().item(), rel=1e-6)
    everything = greedy(lambda i: K[i], K.diagonal().contiguous(), 60)
    assert len({float(x[i]) for i in everything.tolist()}) == len(everything) <= 30
    torch.linalg.cholesky(K[everything][:, everything])  # without jitter


def test_very_many_features_keep_their_principal_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_gp, "AXES", 6)
    X, Y, _ = linear_data(200, 3, 0.1, seed=5)
    mix = torch.randn(3, 12, generator=generator(0), dtype=torch.float64)
    X = X @ mix + 1e-3 * torch.randn(200, 12, generator=generator(1), dtype=torch.float64)
    model: Any = fit("gp", X[:150], Y[:150], inducing=20, **FAST)
    assert model.Z.shape == (20, 6)
    error = (predictive(model, X[150:])[0] - Y[150:, 0]).square().mean().sqrt()
    assert error < 0.3 * Y[150:].std()


def test_a_file_of_the_earlier_layout_is_refused() -> None:
    X, Y = bent_data(30, 3, 0.2, seed=2)
    model: Any = fit("gp", X, Y, inducing=8, **FAST)
    tensors = dict(model.state_dict())
    tensors["coefficients"] = tensors.pop("weights")
    with pytest.raises(SurrogateError, match="fit it anew"):
        model.restore({}, tensors)


def test_auto_scores_it_without_refits() -> None:
    X, Y = bent_data(330, 3, 0.2, seed=2)
    options = {"gp": {"inducing": 40, "fit_size": 100, "max_iterations": 20, "sparse_above": 100}}
    model: Any = fit("auto", X[:300], Y[:300], candidates=("linear", "gp"), options=options)
    assert model.kind == "sparse_gp"
    assert model.choice_report["scores"]["gp"]["how"] == "leave-one-out"
    score = model.choice_report["scores"]["gp"]["log_density"]
    mean, sd = predictive(model, X[300:])
    held_out = torch.distributions.Normal(mean, sd).log_prob(Y[300:, 0])
    assert abs(score - held_out.mean().item()) < 4 * held_out.std().item() / math.sqrt(30)
