"""Acquisitions against closed forms computed from the posterior, with gradients, for every surrogate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from botorch.models.model import Model
from torch import Tensor

from tests.contracts.surrogates import generator, linear_data
from tiltopt.errors import SurrogateError
from tiltopt.surrogates import fit
from tiltopt.surrogates.acquisition import ACQUISITIONS, make_acquisition
from tiltopt.surrogates.several import SeveralModel

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "last_layer": {"name": "last_layer", "max_epochs": 20},
    "ensemble": {"name": "ensemble", "members": 6},
    "mlp": {"name": "ensemble", "member": "mlp", "members": 3, "max_epochs": 20},
    "gp": {"name": "gp", "max_iterations": 20},
}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    X, Y, _ = linear_data(40, 5, 0.3, seed=0)
    return {k: fit(X=X, Y=Y, generator=generator(0), **options) for k, options in KINDS.items()}


@pytest.fixture(scope="module")
def points() -> Tensor:
    return linear_data(30, 5, 0.3, seed=1)[0].unsqueeze(1)


def moments(model: Model, points: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.posterior(points)
    return posterior.mean[:, 0, 0], posterior.variance[:, 0, 0].sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms(models: dict[str, Model], points: Tensor, kind: str) -> None:
    model = models[kind]
    mean, sd = moments(model, points)
    torch.testing.assert_close(make_acquisition("mean", model)(points), mean)
    torch.testing.assert_close(make_acquisition("ucb", model, beta=4.0)(points), mean + 2 * sd)
    u = (mean - 0.3) / sd
    normal = torch.distributions.Normal(0.0, 1.0)
    ei = sd * (u * normal.cdf(u) + normal.log_prob(u).exp())
    keep = u > -4  # below, this textbook form of EI has no digits left
    log_ei = make_acquisition("log_ei", model, best_f=0.3)(points)
    torch.testing.assert_close(log_ei[keep].exp(), ei[keep], rtol=1e-5, atol=1e-12)
    assert torch.isfinite(log_ei).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mean", "ucb", "log_ei", "thompson", "qucb", "qlog_ei", "qlog_nei"])
def test_gradients_and_types(models: dict[str, Model], points: Tensor, kind: str, name: str) -> None:
    acquisition = make_acquisition(
        name, models[kind], beta=2.0, best_f=0.2, X_pending=points[:2, 0], X_baseline=points[10:19, 0],
        generator=generator(3),
    )  # fmt: skip
    x = points[5:9].clone().requires_grad_(True)
    value = acquisition(x)
    assert value.shape == (4,)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    step = torch.randn(x.shape, generator=generator(4), dtype=x.dtype)
    eps = 1e-6
    with torch.no_grad():
        numeric = (acquisition(x + eps * step) - acquisition(x - eps * step)).sum() / (2 * eps)
    torch.testing.assert_close((gradient * step).sum(), numeric, rtol=1e-3, atol=1e-5)
    single = acquisition(points[5:9].float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, value.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(acquisition(points[5:9]), value.detach(), rtol=1e-12, atol=1e-12)  # not cast for good


@pytest.mark.parametrize("kind", ["linear", "last_layer", "gp"])
def test_thompson_draws_have_the_posterior_moments(models: dict[str, Model], points: Tensor, kind: str) -> None:
    model, g, n = models[kind], generator(5), 400 if kind == "gp" else 1500
    with torch.no_grad():
        draws = torch.stack([make_acquisition("thompson", model, generator=g)(points) for _ in range(n)])
        mean, sd = moments(model, points)
    assert ((draws.mean(0) - mean).abs() < 4.5 * sd / math.sqrt(n)).all()
    # standard error of a standard deviation: sd / sqrt(2 n); the GP's Fourier features add under 3 %
    slack = 0.03 if kind == "gp" else 0.0
    assert ((draws.std(0) / sd - 1).abs() < 4.5 / math.sqrt(2 * n) + slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_thompson_is_one_function_per_draw(models: dict[str, Model], points: Tensor, kind: str) -> None:
    draws = [make_acquisition("thompson", models[kind], generator=generator(i)) for i in (1, 1, 2, 3, 4, 5)]
    values = [d(points) for d in draws]
    assert torch.equal(values[0], values[1])
    assert any(not torch.allclose(values[0], v) for v in values[2:])
    torch.testing.assert_close(draws[0](points[3:4]), values[0][3:4], rtol=1e-9, atol=1e-9)  # one function, any batch


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_an_entry_declares_what_its_acquisition_needs_and_nothing_else(
    models: dict[str, Model], points: Tensor, name: str
) -> None:
    entry = ACQUISITIONS[name]
    model = models["ensemble" if "members" in entry.needs else "linear"]
    if entry.several:
        model = SeveralModel(models["linear"], models["gp"])
    best = {"beta": (2.0, 8.0), "best_f": (0.2, 0.9), "X_pending": (points[:2, 0], points[3:5, 0])}
    best |= {"X_baseline": (points[10:19, 0], points[:3, 0])}
    best |= {"Y": (torch.eye(2).double(), 5 * torch.eye(2).double())}
    best |= {"turn": (1, 2)}
    best |= {"reference": (-3 * torch.ones(2).double(), -5 * torch.ones(2).double())}

    def value(**given: Any) -> Tensor:
        return make_acquisition(name, model, generator=generator(3), **given)(points)

    given = {key: pair[0] for key, pair in best.items()}
    base = value(**given)
    for key, (_, other) in best.items():
        assert torch.equal(value(**{**given, key: other}), base) == (key not in entry.needs), key
    seeded = torch.equal(make_acquisition(name, model, generator=generator(4), **given)(points), base)
    assert seeded == ("generator" not in entry.needs)
    required = entry.needs & {"best_f", "X_baseline", "generator", "Y", "reference"}
    for key in required:
        with pytest.raises(SurrogateError, match="several" if key in ("Y", "reference") else key):
            make_acquisition(name, model, **{**given, "generator": generator(3), key: None})
    assert entry.unit == ("nats" if "log" in name else "spread" if entry.several else "reward")


def test_max_member(models: dict[str, Model], points: Tensor) -> None:
    values = models["ensemble"].posterior(points).values
    torch.testing.assert_close(make_acquisition("max_member", models["ensemble"])(points), values.amax(1)[:, 0, 0])
    with pytest.raises(SurrogateError, match="needs an ensemble"):
        make_acquisition("max_member", models["linear"])


def test_pending_points_lower_the_worth_of_their_neighbours(models: dict[str, Model], points: Tensor) -> None:
    model = models["linear"]
    free = make_acquisition("qlog_ei", model, best_f=0.5, generator=generator(0))(points)
    exact = make_acquisition("log_ei", model, best_f=0.5)(points)
    best = int(exact.argmax())
    torch.testing.assert_close(free[best], exact[best], rtol=0, atol=0.3)  # 128 quasi-random samples of log EI
    pending = make_acquisition("qlog_ei", model, best_f=0.5, X_pending=points[best], generator=generator(0))
    none = make_acquisition("qlog_ei", model, best_f=0.5, X_pending=points[:0, 0], generator=generator(0))
    torch.testing.assert_close(none(points), free)
    gain = pending(points).exp() - exact[best].exp()  # what a point adds to the one already asked
    assert gain[best] < 0.1 * exact[best].exp()
    assert gain.max() > gain[best]


def test_noisy_improvement_against_joint_draws_of_the_posterior(models: dict[str, Model], points: Tensor) -> None:
    """E max(f(x) - max_i f(x_i), 0) over 20,000 exact joint draws; 128 quasi-random samples behind ours."""
    model, baseline = models["linear"], points[:6, 0]
    ours = make_acquisition("qlog_nei", model, X_baseline=baseline, generator=generator(0))(points[6:])
    with torch.no_grad():
        joint = model.posterior(torch.cat([baseline.expand(len(points) - 6, -1, -1), points[6:]], dim=1))
        root = torch.linalg.cholesky(joint.distribution.covariance_matrix + 1e-10 * torch.eye(7, dtype=torch.float64))
        z = torch.randn(20000, *root.shape[:-1], generator=generator(7), dtype=torch.float64)
        f = joint.mean[..., 0] + torch.einsum("nbq,bpq->nbp", z, root)
        gain = (f[..., -1] - f[..., :-1].amax(-1)).clamp_min(0)
    exact, error = gain.mean(0), gain.std(0) / 20000**0.5
    spread = gain.std(0) / 128**0.5
    assert ((ours.exp() - exact).abs() < 4 * (error + spread) + 1e-3).all()
    assert ours.argmax() == exact.argmax() or ours.exp()[exact.argmax()] > 0.8 * ours.exp().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pi"}, "expected one of mean"),
        ({"name": "log_ie"}, "Did you mean `log_ei`"),
        ({"name": "ucb", "beta": -1.0}, "`beta`"),
        ({"name": "ucb", "beta": math.nan}, "`beta`"),
        ({"name": "log_ei"}, "best_f"),
        ({"name": "thompson"}, "generator"),
    ],
)
def test_impossible_requests_are_named(models: dict[str, Model], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SurrogateError, match=message):
        make_acquisition(model=models["linear"], **arguments)


def test_wrong_shape_is_named(models: dict[str, Model], points: Tensor) -> None:
    with pytest.raises(SurrogateError, match=r"\(b, 1, d\)"):
        make_acquisition("ucb", models["linear"])(points.view(3, 10, 5))
