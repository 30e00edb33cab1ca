"""What the samplers built on the twisted flow share, and those that are nothing but settings of it.

A sampler says with which schedule lambda_k and with which `TwistOptions` the flow runs, and when it resamples; how it
is run and what comes out is said once, in `TwistedSampler`. `Tempered` ones choose their schedule, or learn it from
plain prior chains.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from torch import Generator

from tiltopt.errors import ConfigError
from tiltopt.samplers.feynman_kac import Accumulate, Twisted, TwistOptions, plan_looks
from tiltopt.samplers.micro_batch import MicroBatch
from tiltopt.samplers.pilot import Pilot, choose_chains, kept_steps, run_pilot
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.resampling import EssRule, Scheme, log_mean_exp, normalise
from tiltopt.samplers.smc import (
    OnNaN,
    Samples,
    Select,
    SMCState,
    StepInfo,
    check_call,
    check_settings,
    run_smc,
    smc_steps,
)
from tiltopt.samplers.tempering import (
    Adaptive,
    Calibration,
    Factors,
    ScheduleFn,
    Tempering,
    exponential,
    polynomial,
    tabulate,
)
from tiltopt.samplers.work import Steps, Work, branches_of
from tiltopt.types import Conditioning, Potential

PILOT_ROWS = 16


class Resampling(NamedTuple):
    """When and how the loop resamples; the defaults never do."""

    ess_threshold: float = 0.0
    resampling: Scheme = "systematic"
    ess_rule: EssRule = "excess"


@dataclass(frozen=True, kw_only=True)
class TwistedSampler(ABC):
    """A sampler that runs the twisted flow.

    Args:
        select: what a loop takes of the particles: one `draw` by weight, the `argmax`, or `all`.
        micro_batch: rows (prompts x particles) per network call; None: all. Halved when memory runs out; a `RowLimit`
            remembers that over calls.
        nan: what a NaN or +inf potential does: `raise`, or `kill` the particle.
    """

    select: Select = "draw"
    micro_batch: MicroBatch = None
    nan: OnNaN = "raise"

    def __post_init__(self) -> None:
        check_settings(self)

    @abstractmethod
    def schedule(self, num_steps: int) -> Factors | Adaptive:
        """lambda_0 .. lambda_K."""

    @abstractmethod
    def options(self, num_steps: int) -> TwistOptions:
        """How the potential is looked at along a chain of K steps."""

    @property
    def when(self) -> Resampling:
        """When and how particles are resampled."""
        return Resampling()

    @property
    def guided(self) -> bool:
        """Whether it follows the potential's gradient, and so needs one, and a chain with noise (eta > 0)."""
        return self.options(1).gradient != "none"

    @property
    def needs_noise(self) -> bool:
        """Whether it can do nothing on a chain whose every step is deterministic (eta = 0)."""
        return self.guided

    def work(self, prior: Prior | Steps) -> Work:
        """What one particle costs; what is learnt from plain chains first is not in it."""
        options, stds = self.options(prior.num_steps), [prior.std(k) for k in range(prior.num_steps)]
        plan = plan_looks(self._planned(prior.num_steps), options, stds)
        branches, guided = branches_of(prior), sum(gradient for _, gradient in plan)
        return Work(
            network=branches * prior.num_steps,
            network_backward=branches * guided if options.gradient == "full" else 0,
            looks=sum(look for look, _ in plan) + 1,
            looks_backward=guided,
        )

    def _planned(self, num_steps: int) -> Factors | Adaptive:
        """The schedule as far as it says which steps are looked at."""
        return self.schedule(num_steps)

    def flow(self, prior: Prior, potential: Potential | None, cond: Conditioning, num_particles: int) -> Twisted:
        """What is sampled; a sampler that has to learn its schedule first does so here."""
        schedule, options = self.schedule(prior.num_steps), self.options(prior.num_steps)
        return Twisted(prior, potential, cond, num_particles, schedule, options, self.micro_batch)

    def samples(self, state: SMCState) -> Samples:
        """The weighted particles of the last state, k = K. Raises ConfigError for an earlier one."""
        x0, designs = state.step.particles.mean, state.step.designs
        if designs is None:
            raise ConfigError(f"expected the state of the last step, which has designs, got the one of step {state.k}.")
        log_w, log_z = normalise(state.log_w), state.log_z
        nats = state.step.particles.nats + state.chosen
        return Samples(x0, designs, *(t.to(x0.device, x0.dtype) for t in (log_w, log_z, nats)))

    def sample(
        self,
        prior: Prior,
        potential: Potential | None,
        cond: Conditioning,
        *,
        num_particles: int,
        generators: Sequence[Generator],
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Samples:
        """See `tiltopt.samplers.smc.Sampler.sample`."""
        check_call(cond, num_particles, generators)
        flow = self.flow(prior, potential, cond, num_particles)
        return self.samples(run_smc(flow, **self._loop(cond, num_particles, generators), callback=callback))

    def steps(
        self,
        prior: Prior,
        potential: Potential | None,
        cond: Conditioning,
        *,
        num_particles: int,
        generators: Sequence[Generator],
        start: SMCState | None = None,
    ) -> Iterator[tuple[SMCState, StepInfo]]:
        """`sample` one step at a time: (state, info) at k = 0 .. K, to look at, to leave, or to `start` from again.

        `samples(state)` of the last state is what `sample` returns.
        """
        check_call(cond, num_particles, generators)
        flow = self.flow(prior, potential, cond, num_particles)
        return smc_steps(flow, **self._loop(cond, num_particles, generators), start=start)

    def _loop(self, cond: Conditioning, num_particles: int, generators: Sequence[Generator]) -> dict[str, Any]:
        """Arguments of `smc_steps`."""
        settings = {"prompts": cond.prompts, "num_particles": num_particles, "generators": generators}
        return settings | self.when._asdict()


@dataclass(frozen=True, kw_only=True)
class Resampled(TwistedSampler):
    """One that resamples.

    Args:
        ess_threshold: resample a prompt when its effective sample size (ESS) is below this share, see `ess_rule`. 0:
            never; 1: at every step.
        ess_rule: share of what: `excess`, ESS - 1 < ess_threshold (P - 1), acts at every number of particles P >= 2;
            `share`, ESS < ess_threshold P, is the published one, which at .5 never resamples two particles.
        resampling: `systematic`, `ssp`, `stratified`, `residual` or `multinomial`.
    """

    ess_threshold: float = 0.5
    ess_rule: EssRule = "excess"
    resampling: Scheme = "systematic"

    @property
    def when(self) -> Resampling:
        return Resampling(self.ess_threshold, self.resampling, self.ess_rule)


@dataclass(frozen=True, kw_only=True)
class Tempered(TwistedSampler):
    """One whose look-aheads are tempered by lambda_k.

    Args:
        tempering: `calibrated` learns lambda_k from `pilot_chains` plain prior chains; `exp` is the published schedule
            of DAS; `polynomial` is (k/K)^degree; `adaptive` bisects on the ESS; `none` is lambda = 1; or a
            `Calibration`, or any function (k, K) -> lambda.
        kappa: strength of the `calibrated` tempering, lambda_k = 1 / (1 + kappa c_k), with c_k still learnt from plain
            chains; None fits it too. The fit imitates what plain chains can show of the tilt, which is careful where
            log G spreads over hundreds of nats; a smaller kappa then guides earlier.
        gamma: rate of `exp`; None reaches 1 after 88 % of the steps, as published.
        degree: exponent of `polynomial`.
        pilot_chains: M, chains of the pilot, run 16 (or `micro_batch`) at a time.
        pilot_seed: seed of the pilot's noise.
    """

    tempering: Tempering | Calibration | ScheduleFn = "none"
    kappa: float | None = None
    gamma: float | None = None
    degree: float = 2.0
    pilot_chains: int = 64
    pilot_seed: int = 0

    @property
    def needs_pilot(self) -> bool:
        """Whether something is still to be learnt from plain chains: what `calibrate` takes care of."""
        return self.tempering == "calibrated"

    def pilot_work(self, prior: Prior | Steps) -> Work:
        """What `run_pilot` costs: plain chains and their decoded ends."""
        return Work(branches_of(prior) * prior.num_steps, looks=1) * self.pilot_chains

    def learning_work(self, prior: Prior | Steps) -> Work:
        """What `calibrate` costs for one potential."""
        return Work(looks=len(kept_steps(prior.num_steps)) * self.pilot_chains) * (self.tempering == "calibrated")

    def _planned(self, num_steps: int) -> Factors | Adaptive:
        return [1.0] * (num_steps + 1) if self.tempering == "calibrated" else self.schedule(num_steps)

    def run_pilot(self, prior: Prior, cond: Conditioning) -> Pilot:
        """The plain chains that `calibrate` learns from, `pilot_chains` on at most eight of `cond`'s prompts."""
        rows, generators = choose_chains(cond.prompts, self.pilot_chains, self.pilot_seed)
        return run_pilot(prior, cond.select(rows), generators=generators, micro_batch=self._pilot_rows)

    def calibrate(self, prior: Prior, potential: Potential, pilot: Pilot) -> Self:
        """The same sampler with all that it has to learn about a potential, learnt from plain chains of the prior.

        `sample` does this by itself, with a pilot on the prompts of the call. Where several calls are to share a pilot,
        or a query is to give the same design in every batch, run it once and calibrate once per potential:

            pilot = DAS().run_pilot(prior, cond)
            sampler = DAS().calibrate(prior, potential, pilot)
        """
        if self.tempering != "calibrated":
            return self
        return self.with_calibration(pilot.calibrate(prior, potential, micro_batch=self._pilot_rows))

    def with_calibration(self, calibration: Calibration) -> Self:
        """The same sampler with a schedule that was learnt elsewhere; a given `kappa` takes the place of the fitted."""
        given = calibration if self.kappa is None else replace(calibration, kappa=self.kappa)
        return replace(self, tempering=given)

    def entered_at(self, start: int, num_steps: int) -> Self:
        """The same sampler for a chain of `num_steps` steps of which those from `start` on are left.

        Whatever depends on the step stays what it is on the whole chain: lambda_k of the rest is lambda_{start+k}.
        A schedule that is still to be learnt is learnt of the rest itself.
        """
        if self.tempering in ("calibrated", "adaptive", "none"):
            return self
        whole = self.schedule(num_steps)
        assert not isinstance(whole, Adaptive)
        return replace(self, tempering=lambda k, _: whole[start + k])

    def flow(self, prior: Prior, potential: Potential | None, cond: Conditioning, num_particles: int) -> Twisted:
        if self.needs_pilot and potential is not None:
            return self.calibrate(prior, potential, self.run_pilot(prior, cond)).flow(
                prior, potential, cond, num_particles
            )
        return super().flow(prior, potential, cond, num_particles)

    def schedule(self, num_steps: int) -> Factors | Adaptive:
        if not isinstance(self.tempering, str):
            return tabulate(self.tempering, num_steps)
        if self.tempering == "exp":
            return tabulate(lambda k, n: exponential(k, n, self.gamma), num_steps)
        if self.tempering == "polynomial":
            return tabulate(lambda k, n: polynomial(k, n, self.degree), num_steps)
        if self.tempering == "adaptive":
            return Adaptive(target=min(max(self.when.ess_threshold or 0.5, 0.05), 0.95))
        if self.tempering == "none":
            return [1.0] * (num_steps + 1)
        raise ConfigError("tempering='calibrated' has no schedule before `calibrate`; call that first.")

    @property
    def _pilot_rows(self) -> MicroBatch:
        """Chains per network call of the pilot: not all at once, and never dependent on the batch."""
        return PILOT_ROWS if self.micro_batch is None else self.micro_batch


def _only_at_the_end(num_steps: int) -> list[float]:
    return [0.0] * num_steps + [1.0]


@dataclass(frozen=True)
class PriorOnly(TwistedSampler):
    """Plain draws of the prior. The potential is ignored and never called (None will do).

    `log_w` is uniform, -log P, and `log_z` is 0, the log normalising constant of G = 1.
    """

    def schedule(self, num_steps: int) -> Factors:
        return _only_at_the_end(num_steps)

    def options(self, num_steps: int) -> TwistOptions:
        return TwistOptions(gradient="none", nan=self.nan)

    def flow(self, prior: Prior, potential: Potential | None, cond: Conditioning, num_particles: int) -> Twisted:
        return super().flow(prior, None, cond, num_particles)


@dataclass(frozen=True)
class BestOfN(TwistedSampler):
    """N plain draws of the prior, weighted by G of the finished design: self-normalised importance sampling.

        log w_p = log G(design_p) - logsumexp,   log Z-hat = log mean G

    Exact, and needs one potential call per particle and no gradient. `select="argmax"`, the default here, is best-of-N
    as everyone knows it; `draw` gives a sample of the tilted distribution.
    """

    select: Select = "argmax"

    def schedule(self, num_steps: int) -> Factors:
        return _only_at_the_end(num_steps)

    def options(self, num_steps: int) -> TwistOptions:
        return TwistOptions(gradient="none", nan=self.nan)


@dataclass(frozen=True)
class TDS(Resampled):
    """The Twisted Diffusion Sampler, Wu et al., arXiv 2306.17775, algorithm 1: DAS without tempering.

    Every step is twisted by the full look-ahead potential, psi_k = log G(decode(x0_hat_k)). Exact. Good where x0_hat
    already tells the reward early, wasteful where it does not.
    """

    def schedule(self, num_steps: int) -> Factors:
        return [1.0] * (num_steps + 1)

    def options(self, num_steps: int) -> TwistOptions:
        return TwistOptions(nan=self.nan)


@dataclass(frozen=True)
class FKSteering(Resampled, Tempered):
    """FK steering, Singhal et al., arXiv 2501.06848: proposals from the prior, weights from intermediate potentials.

    The potential needs no gradient. With r_k = lambda_k log G(decode(x0_hat_k)), the potential of step k is

        difference   exp(r_k - r_{k-1})
        max          exp(max of r_0 .. r_k)
        sum          exp(r_0 + ... + r_k)

    The first telescopes to G. The others are divided out at the last step, as in the paper, so that all three are
    exact; `max` and `sum` only choose more greedily on the way, and pay for it in the last weights: their exp(log_z)
    has the right mean and a tail so heavy that few runs ever see it (docs/benchmarks.md has numbers).

    Args:
        accumulate: `difference`, `max` or `sum`.
        potential_every: evaluate (and weight by) the potential every so many steps; the paper uses a fifth of the
            chain. None: a fifth of the chain for `max` and `sum`, every step for `difference`.
        tempering: as in `Tempered`; the paper has none.
    """

    accumulate: Accumulate = "difference"
    potential_every: int | None = None

    def options(self, num_steps: int) -> TwistOptions:
        default = 1 if self.accumulate == "difference" else max(1, num_steps // 5)
        every = default if self.potential_every is None else self.potential_every
        return TwistOptions(gradient="none", potential_every=every, accumulate=self.accumulate, nan=self.nan)


@dataclass(frozen=True)
class Guidance(Tempered):
    """Reward guidance without weights (in the manner of DPS, arXiv 2209.14687): the drift of DAS alone. Biased.

        x_{k+1} ~ N(m_k + s_k^2 lambda_k grad log G(decode(x0_hat_k)), s_k^2),  every draw of weight 1 / P

    These are draws of the guided chain, not of the tilted prior. `log_w` is uniform, and `log_z` is the log mean of G
    over the guided draws, which lies above log E_prior[G] where guidance raises G. For comparison only.
    """

    def options(self, num_steps: int) -> TwistOptions:
        return TwistOptions(nan=self.nan, weighted=False)

    def samples(self, state: SMCState) -> Samples:
        out = super().samples(state)
        log_g = state.step.particles.log_g.nan_to_num(nan=-math.inf, neginf=-math.inf)
        return replace(out, log_z=log_mean_exp(log_g).to(out.log_z))
