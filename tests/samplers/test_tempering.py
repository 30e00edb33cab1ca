"""Schedules, bisection, and calibration against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.contracts.samplers import POTENTIAL, generators, linear_gaussian, prompts
from tiltopt.errors import ConfigError, PotentialError
from tiltopt.samplers import DAS, Calibration, FKSteering, Guidance, PriorOnly, StepInfo, run_pilot
from tiltopt.samplers.analytic import LinearGaussianPrior
from tiltopt.samplers.resampling import ess
from tiltopt.samplers.tempering import (
    Adaptive,
    calibrate,
    exponential,
    polynomial,
    tabulate,
    usable_scale,
    within_prompts,
)
from tiltopt.samplers.twisted import Tempered


def temperatures(sampler: DAS, num_steps: int = 12) -> list[torch.Tensor]:
    seen: list[StepInfo] = []
    sampler.sample(
        linear_gaussian(num_steps), POTENTIAL, prompts(2), num_particles=8, generators=generators(2),
        callback=seen.append,
    )  # fmt: skip
    return [info.temperature for info in seen]


def test_published_schedule() -> None:
    assert exponential(0, 100) == 0
    assert exponential(87, 100) < 1 <= exponential(88, 100) + 1e-12
    assert exponential(40, 100, 0.008) == pytest.approx(1.008**40 - 1)
    assert pytest.approx(0.008, abs=2e-4) == 2 ** (1 / 88) - 1
    assert polynomial(5, 10, 2.0) == 0.25
    assert tabulate(lambda k, n: 0.5, 4) == [0.5, 0.5, 0.5, 0.5, 1.0]
    for bad in (math.nan, -0.1, math.inf):
        with pytest.raises(ConfigError, match="step 0"):
            tabulate(lambda k, n, bad=bad: bad, 4)


@pytest.mark.parametrize("tempering", ["calibrated", "exp", "polynomial", "adaptive", "none", lambda k, n: 0.3])
def test_last_temperature_is_one(tempering: object) -> None:
    values = temperatures(DAS(tempering=tempering))  # type: ignore[arg-type]
    assert len(values) == 13
    assert (values[-1] == 1).all()
    assert all(((v >= 0) & (v <= 1)).all() for v in values)
    if isinstance(tempering, str):
        assert all((a <= b + 1e-9).all() for a, b in itertools.pairwise(values))


def test_bisection_hits_the_target_for_every_prompt() -> None:
    g = torch.Generator().manual_seed(0)
    log_g = torch.randn(3, 50, generator=g, dtype=torch.float64) * torch.tensor([[0.01], [5.0], [50.0]])
    log_w = 0.1 * torch.randn(3, 50, generator=g, dtype=torch.float64)
    before = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64)
    found = Adaptive(0.5).temperature(log_w, log_g, before)
    assert found[0] == 1
    for b in (1, 2):
        assert float(ess(log_w + found[:, None] * log_g)[b]) == pytest.approx(25, abs=0.01)
    stuck = Adaptive(0.5).temperature(log_w, log_g, torch.full((3,), 0.9, dtype=torch.float64))
    assert (stuck[1:] == 0.9).all()


def test_usable_scale() -> None:
    u = torch.linspace(-1, 1, 64, dtype=torch.float64)
    assert usable_scale(u) == 1
    steep = 100 * u
    s = usable_scale(steep)
    assert 0 < s < 1
    assert float(ess(s * steep)) == pytest.approx(8, rel=1e-6)


def test_calibration_recovers_a_known_kappa() -> None:
    """u_K ~ N(0, v) and u_k = u_K / lambda-like noise: for jointly Gaussian (u_k, u_K) the best factor on u_k is the
    regression coefficient of u_K on u_k, so look-aheads built with coefficient 1 / (1 + kappa c) must give kappa.
    """
    g = torch.Generator().manual_seed(1)
    kappa, c, num_chains = 4.0, torch.linspace(1, 0.05, 12, dtype=torch.float64), 20_000
    final = 0.6 * torch.randn(num_chains, generator=g, dtype=torch.float64)
    looks = []
    for ck in c:
        factor = 1 / (1 + kappa * ck)  # cov(u_k, u_K) / var(u_k) for u_k = u_K + noise
        noise_var = 0.36 * (1 / factor - 1)
        looks.append(final + noise_var.sqrt() * torch.randn(num_chains, generator=g, dtype=torch.float64))
    found = calibrate(torch.stack(looks), final, c)
    grid_step = (500 / 0.02) ** (1 / 49)
    assert kappa / grid_step**1.01 < found < kappa * grid_step**1.01


def test_calibration_of_honest_looks_is_zero() -> None:
    final = torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert calibrate(final.expand(6, -1), final, torch.linspace(1, 0.1, 6)) == 0


def test_within_prompts_takes_means_out_and_keeps_the_spread() -> None:
    """Offsets vanish exactly; the variance of what is left is that of one prompt's chains, whatever their number."""
    g = torch.Generator().manual_seed(2)
    names = [j // 2 for j in range(40_000)]
    u = torch.randn(2, 40_000, generator=g, dtype=torch.float64)
    left = within_prompts(u, names)
    offset = 100 * torch.randn(20_000, generator=g, dtype=torch.float64).repeat_interleave(2)
    assert torch.allclose(within_prompts(u + offset, names), left, atol=1e-10)
    assert torch.allclose(left.view(2, -1, 2).sum(-1), torch.zeros(2, 20_000, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(left.square().mean(-1), torch.ones(2, dtype=torch.float64), atol=4 * math.sqrt(2 / 20_000))
    alone = torch.tensor([3.0, 5.0, 1.0, 2.0], dtype=torch.float64)  # two prompts of one chain each count as one
    root = math.sqrt(2)
    expected = torch.tensor([-root, root, -root / 2, root / 2], dtype=torch.float64)
    assert torch.allclose(within_prompts(alone, ["a", "b", "c", "c"]), expected)
    one = torch.tensor([7.0], dtype=torch.float64)
    assert float(within_prompts(one, ["a"])) == 0.0


def test_calibration_ignores_offsets_between_prompts() -> None:
    """Exactly: where prompts differ by hundreds of nats, kappa is that of the same chains without the difference."""
    g = torch.Generator().manual_seed(5)
    names = [j // 4 for j in range(64)]
    final = torch.randn(64, generator=g, dtype=torch.float64)
    c = torch.linspace(1, 0.1, 6, dtype=torch.float64)
    looks = final + c.sqrt()[:, None] * torch.randn(6, 64, generator=g, dtype=torch.float64)
    offset = 300 * torch.randn(16, generator=g, dtype=torch.float64).repeat_interleave(4)
    kappa = calibrate(looks, final, c, names)
    assert kappa > 0
    assert calibrate(looks + offset, final + offset, c, names) == kappa
    assert calibrate(looks + offset, final + offset, c) != kappa


def test_calibration_interpolates_and_carries_over_to_other_step_counts() -> None:
    schedule = Calibration(2.0, (0.0, 0.5, 1.0), (1.0, 0.4, 0.0))
    assert schedule(0, 10) == pytest.approx(1 / 3)
    assert schedule(5, 10) == schedule(50, 100) == pytest.approx(1 / 1.8)
    assert schedule(3, 10) == pytest.approx(1 / (1 + 2 * 0.64))
    assert schedule(10, 10) == 1
    with pytest.raises(ConfigError, match="kappa"):
        Calibration(-1.0, (0.0, 1.0), (1.0, 0.0))
    with pytest.raises(ConfigError, match="fractions"):
        Calibration(1.0, (0.0,), (1.0, 0.0))


def test_a_pilot_is_plain_sampling_remembered() -> None:
    prior = linear_gaussian(30)
    pilot = run_pilot(prior, prompts(4), generators=generators(4), chains_per_prompt=5)
    plain = PriorOnly().sample(prior, None, prompts(4), num_particles=5, generators=generators(4))
    assert torch.equal(pilot.x_final, plain.x0.flatten(0, 1))
    assert len(pilot.steps) == 12
    assert pilot.x0.shape == (12, 20, 2)
    assert len(pilot.cond) == 20
    k = pilot.steps[3]
    assert torch.allclose(prior.reverse(k, pilot.x[3], pilot.cond).x0, pilot.x0[3])
    assert pilot.c[0] == 1
    assert (pilot.c.diff() <= 0).all()


def test_c_is_the_posterior_variance_of_the_chain() -> None:
    """For data N(0, v) with one step left out of the noise, E|x_K - x0_hat|^2 follows abar in closed form."""
    variance, prior = 0.7, None
    prior = LinearGaussianPrior(torch.zeros(2), variance * torch.eye(2), num_steps=500)
    pilot = run_pilot(prior, prompts(1), generators=generators(1), chains_per_prompt=4000)
    abar = prior.a[list(pilot.steps)].square()
    expected = variance * (1 - abar) / (abar * variance + 1 - abar)
    assert torch.allclose(pilot.c, expected / expected[0], atol=0.05)


def test_prompts_are_centred_where_they_matter() -> None:
    prior = linear_gaussian(20)
    cond = prompts(4)
    pilot = run_pilot(prior, cond, generators=generators(4), chains_per_prompt=64)
    u, u_final = pilot.look(prior, POTENTIAL)
    offset = torch.tensor([0.0, 50.0, -30.0, 10.0], dtype=torch.float64).repeat_interleave(64)
    centred = pilot.calibrate_from(u + offset, u_final + offset)
    assert centred.kappa == pytest.approx(pilot.calibrate_from(u, u_final).kappa, rel=0.5, abs=0.1)


def test_one_pilot_serves_many_potentials_and_batches() -> None:
    """Nothing is remembered inside a sampler: a call runs its own pilot, unless it was calibrated before."""

    class Counting(LinearGaussianPrior):
        calls = 0

        def reverse(self, k: int, x: torch.Tensor, cond: object) -> object:  # type: ignore[override]
            Counting.calls += 1
            return super().reverse(k, x, cond)  # type: ignore[arg-type]

    prior = Counting(torch.zeros(2), torch.eye(2), num_steps=10)
    sampler = DAS(gradient="full")

    def cost(sampler: DAS, batch: int, potential: object) -> int:
        before = Counting.calls
        sampler.sample(prior, potential, prompts(batch), num_particles=2, generators=generators(batch))  # type: ignore[arg-type]
        return Counting.calls - before

    assert cost(sampler, 2, POTENTIAL) == 50  # 64 chains of the pilot, 16 at a time, then the run: one call per step
    assert cost(sampler, 2, POTENTIAL) == 50
    pilot = sampler.run_pilot(prior, prompts(2))
    known = sampler.calibrate(prior, POTENTIAL, pilot)
    assert not known.needs_pilot
    assert cost(known, 3, POTENTIAL) == 10
    assert cost(sampler.calibrate(prior, lambda x, c: -x.square().sum(-1), pilot), 1, POTENTIAL) == 10


@pytest.mark.parametrize("sampler", [DAS(), FKSteering(tempering="calibrated"), Guidance(tempering="calibrated")])
def test_calibrating_before_the_call_gives_what_the_call_would_learn(sampler: Tempered) -> None:
    prior, cond = linear_gaussian(), prompts(3)

    def draw(sampler: Tempered) -> torch.Tensor:
        return sampler.sample(prior, POTENTIAL, cond, num_particles=4, generators=generators(3)).x0

    known = sampler.calibrate(prior, POTENTIAL, sampler.run_pilot(prior, cond))
    assert sampler.needs_pilot
    assert not known.needs_pilot
    assert torch.equal(draw(sampler), draw(known))
    assert known.calibrate(prior, POTENTIAL, sampler.run_pilot(prior, cond)) == known


def test_one_network_call_per_step_and_backward_only_when_asked() -> None:
    class Watching(LinearGaussianPrior):
        calls: list[bool]

        def reverse(self, k: int, x: torch.Tensor, cond: object) -> object:  # type: ignore[override]
            self.calls.append(x.requires_grad)
            return super().reverse(k, x, cond)  # type: ignore[arg-type]

    prior = Watching(torch.zeros(2), torch.eye(2), num_steps=12)
    evaluated: list[int] = []

    def potential(x: torch.Tensor, cond: object) -> torch.Tensor:
        evaluated.append(len(x))
        return -x.square().sum(-1)

    def run(sampler: DAS) -> tuple[int, int, int]:
        prior.calls, evaluated[:] = [], []
        sampler.sample(prior, potential, prompts(1), num_particles=2, generators=generators(1))
        return len(prior.calls), sum(prior.calls), len(evaluated)

    # the last kernel of a DDIM chain is deterministic, so the look before it needs no gradient
    full: dict[str, Any] = {"gradient": "full", "potential_every": 1}
    assert run(DAS(tempering="none", gradient_every=1, **full)) == (12, 11, 13)
    assert run(DAS(tempering="none", gradient_every=4, **full)) == (12, 3, 13)
    assert run(DAS(tempering="none", gradient="full")) == (12, 3, 4)
    assert run(DAS(tempering="none", gradient="none", potential_every=1)) == (12, 0, 13)
    assert run(DAS(tempering="none", x0_factor=lambda k, n: 1.0)) == (12, 0, 4)
    assert run(DAS(tempering="none", x0_factor=lambda k, n: 1.0, gradient_every=1, potential_every=1)) == (12, 0, 13)
    assert run(DAS(tempering="exp", gradient_every=1, **full)) == (12, 10, 12)  # lambda_0 = 0 needs neither


def test_x0_factor_is_the_jacobian_of_a_linear_denoiser() -> None:
    """One Gaussian with covariance v I: J = sqrt(abar) v / (abar v + 1 - abar) I, whatever the potential."""
    variance = 0.4
    prior = LinearGaussianPrior(torch.ones(2), variance * torch.eye(2), num_steps=24)
    pilot = run_pilot(prior, prompts(1), generators=generators(1), chains_per_prompt=16)
    factors = pilot.x0_factors(prior, POTENTIAL)
    abar = prior.a[list(pilot.steps)].square()
    expected = abar.sqrt() * variance / (abar * variance + 1 - abar)
    assert torch.allclose(torch.tensor(factors.factors[:-1], dtype=torch.float64), expected, rtol=1e-4)
    every: dict[str, Any] = {"tempering": "exp", "gradient_every": 1, "potential_every": 1}
    full = DAS(gradient="full", **every).sample(prior, POTENTIAL, prompts(2), num_particles=4, generators=generators(2))
    exact = lambda k, n: float(prior.a[k] * variance / (prior.a[k] ** 2 * variance + prior.b[k] ** 2))  # noqa: E731
    cheap = DAS(gradient="x0", x0_factor=exact, **every).sample(
        prior, POTENTIAL, prompts(2), num_particles=4, generators=generators(2)
    )
    assert torch.allclose(full.x0, cheap.x0, atol=1e-4)
    assert torch.allclose(full.log_z, cheap.log_z, atol=1e-4)


def test_pilot_refuses_nan() -> None:
    with pytest.raises(PotentialError, match="plain prior chains"):
        DAS().sample(
            linear_gaussian(), lambda x, c: x[:, 0] * math.nan, prompts(1), num_particles=2, generators=generators(1)
        )


@pytest.mark.parametrize("num_chains", [8, 12, 64])
def test_rounding_does_not_choose_kappa(num_chains: int) -> None:
    """Networks that see other rows at once answer with other last bits."""
    g = torch.Generator().manual_seed(0)
    final = 3 * torch.randn(num_chains, generator=g, dtype=torch.float64)
    noise = torch.randn(6, num_chains, generator=g, dtype=torch.float64)
    c = torch.linspace(1, 0.05, 6, dtype=torch.float64)
    u = final + 4 * c[:, None] * noise
    found = {
        calibrate(u * (1 + 1e-7 * torch.randn(u.shape, generator=g, dtype=torch.float64)), final, c) for _ in range(20)
    }
    assert len(found) == 1
    assert found != {0.0}
