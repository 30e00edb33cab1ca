"""Several objectives: their acquisitions and measures against closed forms, brute force and Monte Carlo."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tiltopt.errors import SurrogateError
from tiltopt.surrogates.acquisition import AUGMENTATION, SMOOTHING, Chebyshev, direction, make_acquisition
from tiltopt.surrogates.io import load, save
from tiltopt.surrogates.preference import fit_pairwise
from tiltopt.surrogates.several import SeveralModel, hypervolume, log_feasible, reference_point


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    X = torch.randn(40, 3, generator=generator(), dtype=torch.float64)
    noise = 0.3 * torch.randn(40, 2, generator=generator(1), dtype=torch.float64)
    return X, torch.stack([X[:, 0] + X[:, 1], 10 * (X[:, 0] - X[:, 1])], 1) + noise


@pytest.fixture(scope="module")
def model(data: tuple[Tensor, Tensor]) -> SeveralModel:
    return SeveralModel.fit("linear", *data, sem=None, generator=generator())


def moments(model: SeveralModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, m) of the points (n, d)."""
    posteriors = [part.posterior(x.unsqueeze(-2)) for part in model.models]
    mean, variance = (torch.cat([getattr(p, name)[..., 0, :] for p in posteriors], 1) for name in ("mean", "variance"))
    return mean, variance.sqrt()


def test_each_objective_has_a_surrogate_of_its_own_answers(model: SeveralModel, data: tuple[Tensor, Tensor]) -> None:
    from tiltopt.surrogates import fit

    X, Y = data
    for i in range(2):
        alone = fit("linear", X, Y[:, i : i + 1]).posterior(X[:5].unsqueeze(-2))
        torch.testing.assert_close(moments(model, X[:5])[0][:, i], alone.mean.flatten())


def test_chebyshev_is_the_distance_in_a_random_direction_and_some_of_the_sum(
    model: SeveralModel, data: tuple[Tensor, Tensor]
) -> None:
    X, Y = data
    reference = torch.tensor([-2.0, -30.0], dtype=torch.float64)
    given = {"beta": 4.0, "Y": Y, "reference": reference}
    found = make_acquisition("chebyshev", model, **given, generator=generator(5), turn=3)(X[:6].unsqueeze(-2))
    w = direction(2, 3, generator(5))
    mean, sd = moments(model, X[:6])

    def scalar(u: Tensor) -> Tensor:
        shares = (u - reference) / (Y.amax(0) - Y.amin(0))
        reach = torch.stack([torch.where(s > 0, s / v, s) for s, v in zip(shares.T, w, strict=True)])
        return -SMOOTHING * (-reach / SMOOTHING).exp().sum(0).log() + AUGMENTATION * shares.sum(1)

    torch.testing.assert_close(found, scalar(mean + 2 * sd) / scalar(Y).std())
    shares = (Y - reference) / (Y.amax(0) - Y.amin(0))
    assert bool((shares > 0).any()), "on both sides of the reference point"
    assert bool((shares < 0).any()), "on both sides of the reference point"


@pytest.mark.parametrize("m", [2, 3, 4])
def test_directions_are_uniform_and_lie_evenly(m: int) -> None:
    """Against directions of normal draws: each coordinate's law; and nearer to it than as many random ones could be."""
    normal = torch.randn(40000, m, generator=generator(), dtype=torch.float64).abs()
    reference = (normal / normal.norm(dim=1, keepdim=True)).numpy()
    drawn = torch.stack([direction(m, 0, generator(seed)) for seed in range(800)]).numpy()
    even = torch.stack([direction(m, turn, generator(1)) for turn in range(60, 100)]).numpy()
    for i in range(m):
        assert stats.ks_2samp(drawn[:, i], reference[:, i]).statistic < 1.95 * math.sqrt(1 / 800 + 1 / 40000)
    usual = 0.87 / math.sqrt(40)  # the mean statistic of as many random ones
    assert stats.ks_2samp(even[:, 0], reference[:, 0]).statistic < 0.5 * usual
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1.0)
    for start in range(12):  # of the queries for one prompt of twelve
        own = np.sort([direction(2, turn, generator(2))[0].acos() for turn in range(61 + start, 106, 12)])
        assert own[0] < 0.62 * math.pi / 2
        assert own[-1] > 0.38 * math.pi / 2
        assert np.diff(own).max() < 0.6 * math.pi / 2


def test_a_smooth_minimum_is_at_most_the_minimum_and_leads_towards_both(
    model: SeveralModel, data: tuple[Tensor, Tensor]
) -> None:
    """Near the kink both objectives have a gradient; far from it, and below the reference point, the worse one alone,
    and there in its own range, however little of it the direction asks for."""
    _, Y = data
    reference = torch.tensor([-2.0, -30.0], dtype=torch.float64)
    made = make_acquisition("chebyshev", model, beta=0.0, Y=Y, reference=reference, generator=generator(5)).inner
    width = Y.amax(0) - Y.amin(0)
    kink = 0.8 * made.weights
    for share, balance in ((kink, (0.5, 0.5)), (torch.tensor([0.9, -0.5]).double(), (0.0, 1.0))):
        u = (reference + share * width).requires_grad_()
        (slope,) = torch.autograd.grad(made._scalar(u), u)
        own = slope * width - AUGMENTATION
        ratio = own * torch.where(share > 0, made.weights, 1.0)
        assert ratio.tolist() == pytest.approx(balance, abs=0.01)
        assert float(made._scalar(u.detach())) <= float(torch.where(share > 0, share / made.weights, share).min()) + (
            AUGMENTATION * float(share.sum())
        )


def test_the_mean_over_random_directions_is_the_hypervolume() -> None:
    """Of m objectives it is that mean of max_y min_i (y_i / w_i)^m times the ball's share of the positive orthant."""
    Y = torch.tensor([[1.0, 0.2], [0.7, 0.7], [0.1, 0.9]], dtype=torch.float64)
    normal = torch.randn(20000, 2, generator=generator(), dtype=torch.float64).abs()
    w = normal / normal.norm(dim=1, keepdim=True)
    draws = math.pi / 4 * (Y[None] / w[:, None]).amin(-1).amax(-1).square()
    error = 4 * float(draws.std()) / math.sqrt(len(draws))
    assert float(draws.mean()) == pytest.approx(hypervolume(Y, torch.zeros(2, dtype=torch.float64)), abs=error)


def test_random_directions_find_a_dented_front_of_which_weighted_sums_find_the_ends(model: SeveralModel) -> None:
    angle = torch.linspace(0, math.pi / 2, 1001, dtype=torch.float64)
    Y = torch.stack([angle.cos() ** 3, angle.sin() ** 3], 1)  # between its ends below the line that joins them
    reference, width = torch.full((2,), -0.1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    normal = torch.randn(60, 2, generator=generator(), dtype=torch.float64).abs()
    found, sums = [], []
    for w in normal / normal.norm(dim=1, keepdim=True):
        found.append(int(Chebyshev(model, 0.0, w, reference, width, Y)._scalar(Y).argmax()))
        sums.append(int((Y * w).sum(1).argmax()))
    whole = hypervolume(Y, reference)
    assert hypervolume(Y[found], reference) > 0.95 * whole
    assert hypervolume(Y[sums], reference) < 0.6 * whole


def test_the_expected_gain_of_hypervolume_against_joint_draws(model: SeveralModel, data: tuple[Tensor, Tensor]) -> None:
    X, _ = data
    base, new = X[:2], X[moments(model, X)[0][:, 0].argsort()[-4:]]  # which gain something
    reference = torch.tensor([-6.0, -60.0], dtype=torch.float64)
    acquisition = make_acquisition("qlog_nehvi", model, X_baseline=base, reference=reference, generator=generator(3))
    found = acquisition(new.unsqueeze(-2)).exp()
    for point, value in zip(new, found, strict=True):
        joint = torch.cat([base, point[None]])
        draws = []
        for i, part in enumerate(model.models):
            law = part.posterior(joint).distribution
            root = torch.linalg.cholesky(law.covariance_matrix + 1e-10 * torch.eye(3, dtype=torch.float64))
            normal = torch.randn(4000, 3, generator=generator(7 + i), dtype=torch.float64)
            draws.append(law.mean + normal @ root.T)
        both = torch.stack(draws, -1)
        gains = torch.tensor([area(f, reference) - area(f[:2], reference) for f in both])
        error = 1e-9 + 4 * float(gains.std()) / math.sqrt(len(gains)) + 0.1 * float(gains.mean())
        assert float(value) == pytest.approx(float(gains.mean()), abs=error)


def area(Y: Tensor, reference: Tensor) -> float:
    """Hypervolume of two objectives by sweeping from the right."""
    total, height = 0.0, float(reference[1])
    for x, y in sorted(((float(a), float(b)) for a, b in Y if a > reference[0]), reverse=True):
        total += max(0.0, y - height) * (x - float(reference[0]))
        height = max(height, y)
    return total


def test_hypervolume_by_inclusion_and_exclusion() -> None:
    Y = torch.rand(6, 3, generator=generator(), dtype=torch.float64)
    reference = torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64)
    expected = 0.0
    for count in range(1, 7):
        for rows in itertools.combinations(range(6), count):
            expected -= (-1) ** count * float((Y[list(rows)].amin(0) - reference).clamp_min(0).prod())
    assert hypervolume(Y, reference) == pytest.approx(expected)
    assert hypervolume(Y - 5, reference) == 0.0


def test_the_reference_point_is_below_the_front_by_a_tenth_of_its_range() -> None:
    Y = torch.tensor([[0.0, 3.0], [1.0, 2.0], [2.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(reference_point(Y), torch.tensor([-0.2, -0.3], dtype=torch.float64))


def test_the_probability_that_limits_are_kept(model: SeveralModel, data: tuple[Tensor, Tensor]) -> None:
    X, _ = data
    mean, sd = moments(model, X[:5])
    limits = [0.5, -3.0]
    expected = torch.from_numpy(stats.norm.logcdf(((mean - torch.tensor(limits)) / sd).detach().numpy())).sum(1)
    points = X[:5].clone().requires_grad_()
    found = log_feasible(list(model.models), limits)(points)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert bool(points.grad.isfinite().all())
    far = log_feasible(list(model.models), [1e4, 0.0])(points)
    assert bool(torch.isfinite(far).all()), "so that a gradient still leads back"


@pytest.mark.parametrize("name", ["linear", "last_layer", "ensemble", "gp"])
def test_what_is_saved_comes_back(name: str, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    X, Y = data
    model = SeveralModel.fit(name, X, Y, sem=None, generator=generator())
    save(model, tmp_path, feature_id="toy", data_fingerprint="")
    again = load(tmp_path, feature_id="toy")
    assert isinstance(again, SeveralModel)
    for part, other in zip(model.models, again.models, strict=True):
        a, b = (m.posterior(X[:4].unsqueeze(-2)) for m in (part, other))
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.variance, b.variance, rtol=1e-8, atol=1e-10)


def test_a_surrogate_that_cannot_be_a_part_is_not_saved(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    pairs = fit_pairwise(data[0][:4], torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(SurrogateError, match="cannot save a PairwiseModel as one of several"):
        save(SeveralModel(pairs, pairs), tmp_path, feature_id="toy", data_fingerprint="")
