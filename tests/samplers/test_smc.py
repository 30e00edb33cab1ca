"""The SMC loop: exact moments, no field left behind at resampling, many prompts, and memory."""

from __future__ import annotations

import itertools
import math
import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.contracts.samplers import COV, MEAN, POTENTIAL, generators, linear_gaussian, prompts, z_scores
from tiltopt.errors import ConfigError, PotentialError, PriorError
from tiltopt.samplers import DAS, BestOfN, Demon, FKSteering, PriorOnly, Samples, smc
from tiltopt.samplers.analytic import LinearGaussianPrior, MixturePrior, Quadratic, grid_mixture
from tiltopt.samplers.feynman_kac import Particles
from tiltopt.samplers.micro_batch import RowLimit
from tiltopt.samplers.prior import Reverse
from tiltopt.samplers.resampling import (
    EssRule,
    add_log_increment,
    ess,
    log_mean_exp,
    needs_resampling,
    normalise,
    resample,
)
from tiltopt.types import Conditioning


def test_weights_against_plain_sums() -> None:
    log_w = torch.tensor([[0.0, 1.0, -2.0], [-math.inf, 3.0, 3.0]], dtype=torch.float64)
    w = log_w.exp()
    assert torch.allclose(ess(log_w), w.sum(-1) ** 2 / (w**2).sum(-1))
    assert torch.allclose(log_mean_exp(log_w), w.mean(-1).log())
    assert torch.allclose(normalise(log_w).exp(), w / w.sum(-1, keepdim=True))
    shifted = log_w + 5000
    assert torch.allclose(ess(shifted), ess(log_w))
    assert add_log_increment(log_w, torch.full_like(log_w, math.inf))[1, 0] == -math.inf


def test_select_gathers_every_field() -> None:
    """Each field holds its particle's own number; after `select` each must hold its ancestor's."""
    number = torch.arange(10.0).view(2, 5)
    fields = [number.view(2, 5, *(1,) * extra).expand(2, 5, *(3,) * extra) for extra in (2, 2, 2, 0, 0, 0, 0, 0)]
    ancestors = torch.tensor([[4, 4, 0, 1, 1], [2, 3, 3, 3, 0]])
    expected = number.gather(1, ancestors)
    for name, field in smc.select(Particles(*fields), ancestors)._asdict().items():
        assert torch.equal(field.flatten(2)[..., 0] if field.ndim > 2 else field, expected), name


class Sums(NamedTuple):
    """Particles of `Coins`."""

    total: Tensor


class Coins:
    """s_k = s_{k-1} + a fair coin, log G_k = a_k s_k, on given coins.

    Args:
        coins: (K + 1, B, P), 0 or 1.
    """

    SLOPES = (3.0, -2.0, 0.9, 0.4)

    def __init__(self, coins: Tensor) -> None:
        self.coins, self.num_steps, self.k = coins.double(), len(coins) - 1, 0

    def _step(self, k: int, before: Tensor) -> smc.Step:
        self.k, total = k, before + self.coins[k]
        row = torch.zeros(len(total), dtype=torch.float64)
        return smc.Step(Sums(total), self.SLOPES[k] * total, row, row)

    def initial(self, generators: object) -> smc.Step:
        return self._step(0, torch.zeros_like(self.coins[0]))

    def propagate(self, k: int, parents: Sums, log_w: Tensor, before: smc.Step, generators: object) -> smc.Step:
        return self._step(k, parents.total)


@pytest.mark.parametrize("rule", ["excess", "share"])
@pytest.mark.parametrize(("num_particles", "num_steps"), [(2, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_every_rule_is_exact_summed_over_all_outcomes(
    rule: EssRule, num_particles: int, num_steps: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[Z-hat] = Z and E[Z-hat weighted mean] = Z mean, no Monte Carlo: each prompt is one outcome of all coins and all
    resamplings, and carries its probability."""
    tosses, scripts = num_particles * (num_steps + 1), num_particles**num_particles
    index = torch.arange(2**tosses * scripts**num_steps)
    bits = index[None] // 2 ** torch.arange(tosses)[:, None] % 2
    coins = bits.view(num_steps + 1, num_particles, -1).transpose(1, 2)
    flow, drawn = Coins(coins), index // 2**tosses
    log_p = torch.full(index.shape, -tosses * math.log(2.0), dtype=torch.float64)
    met = torch.zeros(num_steps, len(index), dtype=torch.bool)

    def scripted(name: str, log_w: Tensor, rows: list[int]) -> Tensor:
        digits = drawn[rows] // scripts**flow.k % scripts
        ancestors = digits[:, None] // num_particles ** torch.arange(num_particles) % num_particles
        log_p[rows] += log_w.log_softmax(-1).gather(1, ancestors).sum(-1)
        met[flow.k, rows] = True
        return ancestors

    monkeypatch.setattr(smc, "resample", scripted)
    last = smc.run_smc(
        flow, prompts=[""] * len(index), num_particles=num_particles, generators=range(len(index)),  # type: ignore[arg-type]
        ess_threshold=threshold, resampling="multinomial", ess_rule=rule,
    )  # fmt: skip
    log_p -= math.log(scripts) * (~met).double().sum(0)  # where nothing was resampled, the script is not read
    one = torch.arange(2 ** (num_steps + 1))[None] // 2 ** torch.arange(num_steps + 1)[:, None] % 2
    sums = one.cumsum(0).double()
    g = (torch.tensor(Coins.SLOPES[: num_steps + 1], dtype=torch.float64)[:, None] * sums).sum(0).exp() / one.shape[1]
    z_hat = (log_p + last.log_z).exp()
    mean = (normalise(last.log_w).exp() * last.step.particles.total).sum(-1)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, rel=1e-12)
    assert float(z_hat.sum()) == pytest.approx(float(g.sum()), rel=1e-12)
    assert float((z_hat * mean).sum()) == pytest.approx(float((g * sums[-1]).sum()), rel=1e-12)
    acts = threshold > (0 if rule == "excess" else 1 / num_particles)
    assert bool(met.any()) == acts


def test_the_rule_for_resampling_against_plain_loops() -> None:
    g = torch.Generator().manual_seed(0)
    for num_particles in (1, 2, 3, 4, 16, 64):
        log_w = 3 * torch.randn(200, num_particles, generator=g, dtype=torch.float64)
        log_w[0] = 0.0
        log_w[1, 1:] = -math.inf
        for threshold in (0.0, 0.01, 0.5, 0.7, 1.0):
            excess, share = (needs_resampling(log_w, threshold, rule) for rule in ("excess", "share"))
            for row in range(200):
                w = [math.exp(v) for v in log_w[row].tolist()]
                size = sum(w) ** 2 / sum(v * v for v in w)
                assert bool(excess[row]) == (threshold == 1 or round(size - 1, 12) < threshold * (num_particles - 1))
                assert bool(share[row]) == (threshold == 1 or round(size, 12) < threshold * num_particles)
            if 0 < threshold < 1:
                assert not excess[0]
                assert bool(excess[1]) == (num_particles > 1)


@pytest.mark.parametrize("resampled", itertools.product([False, True], repeat=3))
def test_a_prompt_resamples_from_its_own_generator(resampled: tuple[bool, ...]) -> None:
    """Whichever prompts of a batch are resampled: each from its own generator, and the others' are not touched."""

    class Uneven(Coins):
        def _step(self, k: int, before: Tensor) -> smc.Step:
            increments = torch.tensor([[0.0, 1.0, 2.0, 9.0] if hit else [0.0] * 4 for hit in resampled])
            return super()._step(k, before)._replace(log_increment=increments.double())

    seeds, fresh = generators(3), generators(3)
    flow = Uneven(torch.zeros(3, 3, 4))
    steps = smc.smc_steps(
        flow, prompts=["", "", ""], num_particles=4, generators=seeds, ess_threshold=0.5, resampling="multinomial"
    )
    for state, info in steps:
        for b, hit in enumerate(resampled):
            expected = torch.arange(4)
            if hit and state.k < flow.num_steps:
                expected = resample("multinomial", state.log_w[b : b + 1], [fresh[b]])[0]
            assert torch.equal(info.ancestors[b], expected)
            assert torch.equal(seeds[b].get_state(), fresh[b].get_state())


def test_steps_can_be_looked_at_left_and_started_from_again() -> None:
    prior, cond = linear_gaussian(), prompts(2)
    sampler = DAS(tempering="exp", ess_threshold=0.9, potential_every=2, gradient="full")
    call: dict[str, Any] = {"num_particles": 6}
    whole = sampler.sample(prior, POTENTIAL, cond, generators=generators(2), **call)
    seeds = generators(2)
    middle, kept, seen = None, [], []
    for state, info in sampler.steps(prior, POTENTIAL, cond, generators=seeds, **call):
        seen.append(info.k)
        assert torch.equal(info.log_z, state.log_z)
        if info.k == 5:
            middle, there = state, [s.get_state() for s in seeds]
            kept = [t.clone() for t in (*state.step.particles, state.log_w, state.log_z, state.ancestors)]
        if info.k > 5 and info.k < prior.num_steps:
            with pytest.raises(ConfigError, match="last step"):
                sampler.samples(state)
    assert seen == list(range(13))
    assert torch.equal(sampler.samples(state).x0, whole.x0)
    assert torch.equal(sampler.samples(state).log_z, whole.log_z)
    assert middle is not None
    for same in (True, False):
        branch = generators(2, seed=1)
        if same:
            for s, was in zip(branch, there, strict=True):
                s.set_state(was)
        path = list(sampler.steps(prior, POTENTIAL, cond, generators=branch, start=middle, **call))
        assert [info.k for _, info in path] == list(range(6, 13))
        assert torch.equal(sampler.samples(path[-1][0]).x0, whole.x0) == same
        now = (*middle.step.particles, middle.log_w, middle.log_z, middle.ancestors)
        assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


TUG = Quadratic(2.0 * torch.eye(2), torch.zeros(2))  # pulls every mode of the grid but one a long way
ALWAYS: dict[str, Any] = {"ess_threshold": 1.0, "resampling": "multinomial"}
EVERY: dict[str, Any] = {"gradient": "full", "gradient_every": 1, "potential_every": 1}
UNBOUND: dict[str, Any] = {"tempering": "exp", "max_shift": None, **EVERY, **ALWAYS}
LEFT_BEHIND = [
    ("mean", DAS(**UNBOUND)),
    ("drift", DAS(**UNBOUND)),
    ("log_psi", DAS(**UNBOUND)),
    ("grad", DAS(**(UNBOUND | {"gradient_every": 4}))),
    ("log_g", DAS(**(UNBOUND | {"gradient_every": 4, "potential_every": 4}))),
    ("owed", DAS(**(UNBOUND | {"gradient_every": 4, "potential_every": 4}))),
    ("memory", FKSteering("sum", potential_every=2, tempering=lambda k, n: 0.1 * k / n, **ALWAYS)),
]


@pytest.mark.parametrize(("field", "sampler"), LEFT_BEHIND, ids=[name for name, _ in LEFT_BEHIND])
def test_a_field_left_behind_is_seen_in_log_z(
    field: str, sampler: smc.Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ancestor project forgot two fields at resampling. Forgetting any of ours must move log Z.

    A wrong mean or psi biases Z-hat; a wrong drift, gradient or held value only spoils proposals and weights on the
    way, so mean log Z-hat falls. Either way the paired difference to the correct run is many standard errors.
    """
    assert {name for name, _ in LEFT_BEHIND} == set(Particles._fields) - {"nats"}  # which nothing but people reads
    prior = MixturePrior(grid_mixture(), num_steps=20)
    correct_select = smc.select

    def run() -> Tensor:
        out = sampler.sample(prior, TUG, prompts(600), num_particles=16, generators=generators(600))
        return out.log_z.double()

    def forgetful(particles: Particles, ancestors: Tensor) -> Particles:
        return correct_select(particles, ancestors)._replace(**{field: getattr(particles, field)})

    correct = run()
    assert torch.equal(correct, run())
    monkeypatch.setattr(smc, "select", forgetful)
    difference = run() - correct
    assert abs(float(difference.mean())) > 6 * float(difference.std()) / math.sqrt(600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_truth_with_resampling_never_and_always(threshold: float, dtype: torch.dtype) -> None:
    prior = linear_gaussian(dtype=dtype)
    for sampler in (DAS(ess_threshold=threshold), FKSteering(ess_threshold=threshold)):
        out = sampler.sample(prior, POTENTIAL, prompts(1500), num_particles=16, generators=generators(1500, seed=3))
        for name, score in z_scores(out, prior).items():
            assert score.abs().max() < 4, name


def test_nine_modes() -> None:
    """log Z of the tilted chain of `GMM`, from 4e5 weighted prior chains, and the probability of each row of modes."""
    prior = MixturePrior(grid_mixture(), num_steps=20)
    potential = Quadratic(torch.diag(torch.tensor([0.02, 2.0])), torch.zeros(2))
    many = BestOfN().sample(prior, potential, prompts(20), num_particles=5000, generators=generators(20, seed=7))
    truth = many.log_z.double().exp()
    out = DAS().sample(prior, potential, prompts(300), num_particles=32, generators=generators(300))
    z = out.log_z.double().exp()

    def left(samples: Samples) -> Tensor:
        return (samples.log_w.double().exp() * (samples.x0[..., 0] < -2)).sum(-1) * samples.log_z.double().exp()

    for mine, exact in ((z, truth), (left(out), left(many))):
        error = math.hypot(float(mine.std()) / math.sqrt(len(mine)), float(exact.std()) / math.sqrt(len(exact)))
        assert abs(float(mine.mean() - exact.mean())) < 4 * error


class _Small:
    """A prior that runs out of memory above so many rows, and counts its calls."""

    def __init__(self, limit: int) -> None:
        self.inner, self.limit, self.rows = linear_gaussian(num_steps=5), limit, []
        self.event_shape, self.num_steps = self.inner.event_shape, self.inner.num_steps
        self.encode, self.initial, self.std, self.decode = (
            self.inner.encode, self.inner.initial, self.inner.std, self.inner.decode,
        )  # fmt: skip

    def reverse(self, k: int, x: Tensor, cond: Conditioning) -> Reverse:
        if len(x) > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        assert len(cond.prompts) == len(x)
        self.rows.append((len(x), cond.prompts))
        return self.inner.reverse(k, x, cond)


@pytest.mark.parametrize("limit", [9, 4, 3, 1])
def test_out_of_memory_halves_the_micro_batch(limit: int) -> None:
    sampler = DAS(tempering="exp", **EVERY)
    whole, small = _Small(10**6), _Small(limit)
    runs = {}
    for name, prior in (("whole", whole), ("small", small)):
        args = (prior, POTENTIAL, prompts(3))
        if name == "small":
            with pytest.warns(ResourceWarning, match="Out of memory"):
                runs[name] = sampler.sample(*args, num_particles=4, generators=generators(3))
        else:
            runs[name] = sampler.sample(*args, num_particles=4, generators=generators(3))
    for field in ("x0", "log_w", "log_z"):
        assert torch.allclose(getattr(runs["whole"], field), getattr(runs["small"], field), atol=1e-5)
    assert max(n for n, _ in small.rows) <= limit
    size = max(n for n, _ in small.rows)
    assert [n for n, _ in small.rows[-math.ceil(12 / size) :]] == [size] * (12 // size) + [12 % size] * (12 % size > 0)


def test_rows_are_cut_wherever_prompts_end_and_what_did_not_fit_is_remembered() -> None:
    shared, small = RowLimit(5), _Small(3)
    sampler = DAS(tempering="exp", micro_batch=shared, **EVERY)
    alone = DAS(tempering="exp", micro_batch=1, **EVERY)
    for query in range(3):
        args = (prompts(3),)
        expected = pytest.warns(ResourceWarning, match="5 rows.*going on with 2") if query == 0 else nullcontext()
        with expected, warnings.catch_warnings():
            warnings.simplefilter("error" if query else "default")
            out = sampler.sample(small, POTENTIAL, *args, num_particles=4, generators=generators(3))
        single = alone.sample(small, POTENTIAL, *args, num_particles=4, generators=generators(3))
        torch.testing.assert_close(out.x0, single.x0, rtol=1e-5, atol=1e-5)
    assert shared.size == 2
    assert {n for n, _ in small.rows} == {1, 2}


def test_out_of_memory_on_one_row_says_what_helps_and_other_errors_pass_through() -> None:
    with (
        pytest.raises(PriorError, match=r"single row.*checkpointing"),
        pytest.warns(ResourceWarning, match="Out of memory"),
    ):
        DAS(tempering="exp").sample(_Small(0), POTENTIAL, prompts(2), num_particles=2, generators=generators(2))

    def broken(x: Tensor, cond: Conditioning) -> Tensor:
        raise RuntimeError("some other failure")

    with pytest.raises(RuntimeError, match="some other failure"):
        DAS(tempering="exp").sample(linear_gaussian(), broken, prompts(2), num_particles=2, generators=generators(2))


@pytest.mark.parametrize(
    ("broken", "said"),
    [(lambda x: x * math.nan, "finite designs"), (lambda x: x[:-1], "one design per event"), (str, "got str")],
)
def test_a_decoder_that_breaks_designs_is_named(broken: Any, said: str) -> None:
    sampler = DAS(tempering="exp", gradient="none", guidance_decoder=broken)
    with pytest.raises(PriorError, match=rf"decoder must return.*{said}"):
        sampler.sample(linear_gaussian(), POTENTIAL, prompts(2), num_particles=2, generators=generators(2))


@pytest.mark.parametrize("broken", [lambda x: x[:, :1], lambda x: x.unsqueeze(-1)])
def test_a_guidance_decoder_makes_designs_of_the_priors_shape(broken: Any) -> None:
    sampler = DAS(tempering="exp", gradient="none", guidance_decoder=broken)
    with pytest.raises(PriorError, match=r"designs like the prior's, \(2,\) each, got"):
        sampler.sample(linear_gaussian(), lambda x, c: x.flatten(1).sum(1), prompts(2), num_particles=2,
                       generators=generators(2))  # fmt: skip


def _nan_right(x: Tensor, cond: Conditioning) -> Tensor:
    return torch.where(x[:, 0] > 1.4, math.nan, 1.0) * (1.0 + 0.0 * x[:, 0])


def test_nan_is_named_or_killed() -> None:
    args = (linear_gaussian(), _nan_right, prompts(2))
    with pytest.raises(PotentialError, match=r"step \d+ of 12, prompt [01] \('prompt [01]'\), particle \d"):
        BestOfN().sample(*args, num_particles=32, generators=generators(2))
    for sampler in (BestOfN(nan="kill"), DAS(nan="kill", tempering="none"), FKSteering(nan="kill")):
        out = sampler.sample(*args, num_particles=32, generators=generators(2))
        assert torch.isfinite(out.log_z).all()
        assert (out.log_w[out.designs[..., 0] > 1.4] == -math.inf).all()
        assert (out.designs[..., 0] > 1.4).any() or not isinstance(sampler, BestOfN)
    with pytest.raises(PotentialError, match="Every particle of prompt 0"):
        BestOfN(nan="kill").sample(
            linear_gaussian(), lambda x, c: x[:, 0] * math.nan, prompts(1), num_particles=3, generators=generators(1)
        )


def test_hard_constraint_is_exact() -> None:
    """log G = 0 in a half-plane and -inf outside: Z is a probability of the chain, whatever the look-aheads say."""
    prior = linear_gaussian()

    def half_plane(x: Tensor, cond: Conditioning) -> Tensor:
        return torch.where(x[:, 0] > 1.0, 0.0, -math.inf)

    law = prior.chain_law()
    truth = 0.5 * math.erfc((1.0 - float(law.mean[0])) / math.sqrt(2 * float(law.cov[0, 0])))
    out = FKSteering().sample(prior, half_plane, prompts(400), num_particles=64, generators=generators(400))
    z = out.log_z.double().exp()
    assert abs(float(z.mean()) - truth) < 4 * float(z.std()) / math.sqrt(400)
    samplers = (FKSteering(), FKSteering("max"), FKSteering("sum"), DAS(gradient="none"), BestOfN())
    for sampler in samplers:  # the last look is not softened as those before it are
        out = sampler.sample(prior, half_plane, prompts(50), num_particles=16, generators=generators(50))
        assert torch.equal(out.log_w > -math.inf, out.designs[..., 0] > 1.0)
    inside = (out.designs[..., 0] > 1.0).double().mean(-1)
    assert torch.allclose(out.log_z.double().exp(), inside)


def test_prompts_of_one_batch_keep_their_own_tilt() -> None:
    """The potential reads the prompt; each prompt's particles must follow its own target."""
    prior = linear_gaussian()

    def potential(x: Tensor, cond: Conditioning) -> Tensor:
        sign = torch.tensor([1.0 if p == "up" else -1.0 for p in cond.prompts])
        return 2.0 * sign * x[:, 0]

    cond = Conditioning(("up", "down", "up"))
    out = DAS(tempering="exp", micro_batch=64).sample(
        prior, potential, cond, num_particles=400, generators=generators(3)
    )
    law = prior.chain_law()
    for b, sign in enumerate((1.0, -1.0, 1.0)):
        expected = float(law.mean[0] + 2 * sign * law.cov[0, 0])
        log_z = 2 * sign * float(law.mean[0]) + 2 * float(law.cov[0, 0])
        weights = out.log_w[b].double().exp()
        got = float((weights * out.x0[b, :, 0]).sum())
        error = math.sqrt(float(law.cov[0, 0]) / float(out.ess[b]))
        assert abs(got - expected) < 5 * error
        assert abs(float(out.log_z[b]) - log_z) < 0.5


def test_pick() -> None:
    log_w = torch.tensor([[0.7, 0.1, 0.2], [0.0, 1.0, 0.0]]).log().repeat(2000, 1)
    samples = Samples(torch.zeros(4000, 3, 2), torch.zeros(4000, 3, 2), log_w, torch.zeros(4000))
    drawn = samples.pick("draw", generators(4000))
    share = torch.bincount(drawn[::2, 0], minlength=3) / 2000
    assert ((share - log_w[0].exp()).abs() < 4 * math.sqrt(0.25 / 2000)).all()
    assert (drawn[1::2] == 1).all()
    assert torch.equal(samples.pick("argmax", [])[:2, 0], torch.tensor([0, 1]))
    assert torch.equal(samples.pick("all", [])[0], torch.arange(3))


def test_half_precision_prior_is_sampled_in_float32() -> None:
    class Half(LinearGaussianPrior):
        def initial(self, n: int, generator: torch.Generator) -> Tensor:
            return super().initial(n, generator).half()

    out = DAS(tempering="exp").sample(
        Half(MEAN, COV, num_steps=5), POTENTIAL, prompts(1), num_particles=3, generators=generators(1)
    )
    assert out.x0.dtype == torch.float32


@pytest.mark.parametrize("sampler", [FKSteering(ess_threshold=1.0), BestOfN(select="draw")])
def test_what_choosing_costs_is_log_g_less_log_z(sampler: Any) -> None:
    """Without a drift, log G - log Z-hat is the sum of log(P w) over the choices that led to a particle, exactly; and
    on average over what is kept it is the divergence of the tilted law from the prior, as log Z-hat is of log Z."""
    prior, n = linear_gaussian(), 800
    samples = sampler.sample(prior, POTENTIAL, prompts(n), num_particles=64, generators=generators(n))
    every = samples.pick("all", generators(n))
    log_g = POTENTIAL(samples.x0.flatten(0, 1), prompts(1)).view(n, 64)
    assert torch.allclose(samples.cost(every).float(), log_g - samples.log_z[:, None], atol=1e-4)
    law = prior.chain_law()
    target, _ = law.tilt(POTENTIAL)
    p, q = (torch.distributions.MultivariateNormal(m.means[0], m.covs[0]) for m in (law, target))
    truth = float(torch.distributions.kl_divergence(q, p))
    cost = samples.cost(samples.pick("draw", generators(n, 1)))[:, 0]
    assert abs(float(cost.mean()) - truth) < 4 * float(cost.std()) / n**0.5


@pytest.mark.parametrize("sampler", [DAS(), DAS(gradient="full", gradient_every=1, potential_every=1, max_shift=None)])
def test_what_a_drift_costs_is_the_divergence_of_the_proposals(sampler: DAS) -> None:
    """Of one particle, log G - log Z-hat is log q - log p of its path, whose mean is sum |shift|^2 / 2 and whose
    variance beyond that is sum |shift|^2."""
    potential = Quadratic(torch.diag(torch.tensor([8.0, 8.0])), torch.tensor([-0.5, 0.5]))
    n = 2000
    samples = sampler.sample(linear_gaussian(), potential, prompts(n), num_particles=1, generators=generators(n))
    cost = samples.cost(samples.pick("all", generators(n)))[:, 0]
    log_g = potential(samples.x0[:, 0], prompts(1))
    luck = log_g - samples.log_z - cost
    assert abs(float(luck.mean())) < 4 * float(luck.std()) / n**0.5
    assert float(luck.var() / (2 * cost.mean())) == pytest.approx(1.0, abs=4 * (2 / n) ** 0.5)
    assert float(cost.mean()) > 0.5


def test_plain_draws_cost_nothing_and_a_demon_does_not_count() -> None:
    calls = {"num_particles": 2, "generators": generators(3)}
    plain = PriorOnly().sample(linear_gaussian(), None, prompts(3), **calls)
    assert torch.allclose(plain.cost(plain.pick("draw", generators(3))), torch.zeros(3, 1, dtype=torch.float64))
    chosen = Demon(num_noises=2).sample(linear_gaussian(), POTENTIAL, prompts(3), **calls)
    assert chosen.cost(chosen.pick("draw", generators(3))) is None
