"""DAS: Diffusion Alignment as Sampling, arXiv 2501.05803, corrected and with a learnt tempering."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Generator, Tensor

from tiltopt.errors import ConfigError
from tiltopt.samplers.pilot import Pilot, PilotCache
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.run_twisted import check_settings, sample_twisted
from tiltopt.samplers.smc import Samples, Select, StepInfo, check_call
from tiltopt.samplers.tempering import (
    NAMES,
    Adaptive,
    Calibration,
    Schedule,
    ScheduleFn,
    exponential,
    polynomial,
    tabulate,
)
from tiltopt.samplers.twist_options import Gradient, TwistOptions
from tiltopt.types import Conditioning, Potential

PILOT_ROWS = 16


@dataclass(frozen=True)
class DAS:
    """Sequential Monte Carlo along the denoising chain, guided by the gradient of a tempered potential.

        target    p(x0) G(x0),  psi_k(x) = lambda_k log G(decode(x0_hat(x, k))),  lambda_K = 1
        proposal  N(m_k + s_k d, s_k^2),  d = s_k grad psi_k / sqrt(1 + |s_k grad psi_k|^2 / max_shift^2)

    Exact for every choice of the arguments below: the weights repair whatever the guidance approximates. `DAS()` is
    what we recommend.

    Args:
        tempering: `calibrated` learns lambda_k from `pilot_chains` plain prior chains, run at the first call on at most
            eight of its prompts, and kept in `cache`; `exp` is the published schedule; `polynomial` is (k/K)^degree;
            `adaptive` bisects on the ESS; `none` is lambda = 1; or a `Calibration`, or any function (k, K) -> lambda.
            What `calibrated` learns, and the factors of gradient="x0", depend on the first call's prompts: use
            `with_calibration` where a query must give the same design in every batch.
        kappa: strength of the `calibrated` tempering, lambda_k = 1 / (1 + kappa c_k), with c_k still learnt from plain
            chains; None fits it too. The fit imitates what plain chains can show of the tilt, which is careful where
            log G spreads over hundreds of nats; a smaller kappa then guides earlier.
        gamma: rate of `exp`; None reaches 1 after 88 % of the steps, as published.
        degree: exponent of `polynomial`.
        ess_threshold: resample a prompt when its ESS < ess_threshold * P. 0: never; 1: at every step; .5 is published.
            Looks four steps apart come with larger changes of the weights, and are better answered a little earlier.
        resampling: `systematic`, `ssp`, `stratified`, `residual` or `multinomial`.
        gradient: `x0` at x0_hat, times a factor fitted on the pilot; `full` through the denoiser, which costs about as
            much as a denoiser call more per look, and leads further where the tilt is strong; `none`.
        gradient_every: a new gradient every so many steps, held in between.
        potential_every: a new potential every so many steps, held in between. As published: gradient="full" and 1, 1.
        max_shift: soft bound on the drift, in standard deviations of the kernel's noise; None: none, as published.
            Gradients through the denoiser are huge between modes; on toys with known log Z the bound takes away half to
            nine tenths of the bias of log_z.
        select: what a loop takes of the particles: one `draw` by weight, the `argmax`, or `all`.
        micro_batch: rows (prompts x particles) per network call; None: all. Halved when memory runs out.
        nan: what a NaN or +inf potential does: `raise`, or `kill` the particle.
        guidance_decoder: a cheaper events -> designs for every step but the last; None: the prior's.
        x0_factor: (k, K) -> factor for gradient="x0"; None: fitted on the pilot.
        pilot_chains: M, chains of the pilot, run 16 (or `micro_batch`) at a time.
        pilot_seed: seed of the pilot's noise.
        cache: the pilots of this sampler; give two samplers the same one to share them.

    Example:
        samples = DAS().sample(prior, potential, prior.encode(["cat"]), num_particles=4,
                               generators=[torch.Generator().manual_seed(0)])
    """

    tempering: str | Calibration | ScheduleFn = "calibrated"
    kappa: float | None = None
    gamma: float | None = None
    degree: float = 2.0
    ess_threshold: float = 0.7
    resampling: str = "systematic"
    gradient: Gradient = "x0"
    gradient_every: int = 4
    potential_every: int = 4
    max_shift: float | None = 1.0
    select: Select = "draw"
    micro_batch: int | None = None
    nan: Literal["raise", "kill"] = "raise"
    guidance_decoder: Callable[[Tensor], Tensor] | None = None
    x0_factor: ScheduleFn | None = None
    pilot_chains: int = 64
    pilot_seed: int = 0
    cache: PilotCache = field(default_factory=PilotCache, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.tempering, str) and self.tempering not in NAMES:
            raise ConfigError(
                f"`tempering` must be one of {', '.join(NAMES)} or a function (k, K) -> lambda, got {self.tempering!r}."
            )
        if self.kappa is not None and not 0 <= self.kappa < math.inf:
            raise ConfigError(f"`kappa` must be finite and >= 0, or None, got {self.kappa}.")
        if self.gamma is not None and not self.gamma > 0:
            raise ConfigError(f"`gamma` must be positive or None, got {self.gamma}.")
        if self.pilot_chains < 8:
            raise ConfigError(f"`pilot_chains` must be at least 8, got {self.pilot_chains}.")
        check_settings(self.ess_threshold, self.resampling, self.select, self.micro_batch)
        self._options(None)

    def with_calibration(self, calibration: Calibration, x0_factor: ScheduleFn | None = None) -> DAS:
        """The same sampler with a schedule, and where given factors for gradient="x0", learnt elsewhere."""
        calibration = self.strength(calibration)
        return replace(self, tempering=calibration, x0_factor=self.x0_factor if x0_factor is None else x0_factor)

    def sample(
        self,
        prior: Prior,
        potential: Potential,
        cond: Conditioning,
        *,
        num_particles: int,
        generators: Sequence[Generator],
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Samples:
        """See `tiltopt.samplers.smc.Sampler.sample`."""
        check_call(cond, num_particles, generators)
        factor = self.x0_factor
        if self.gradient == "x0" and factor is None:
            factor = self.cache.x0_factors(prior, potential, self._pilot(prior, cond), self._pilot_rows)
        schedule = self._schedule(prior, potential, cond)
        return sample_twisted(
            prior, potential, cond, schedule, self._options(factor), num_particles=num_particles,
            generators=generators, ess_threshold=self.ess_threshold, resampling=self.resampling,
            micro_batch=self.micro_batch, callback=callback,
        )  # fmt: skip

    def _options(self, factor: ScheduleFn | None) -> TwistOptions:
        return TwistOptions(
            gradient=self.gradient,
            gradient_every=self.gradient_every,
            potential_every=self.potential_every,
            max_shift=self.max_shift,
            nan=self.nan,
            guidance_decoder=self.guidance_decoder,
            x0_factor=factor,
        )

    @property
    def _pilot_rows(self) -> int:
        """Chains per network call of the pilot: not all at once, and never dependent on the batch."""
        return PILOT_ROWS if self.micro_batch is None else self.micro_batch

    def _pilot(self, prior: Prior, cond: Conditioning) -> Pilot:
        return self.cache.pilot(prior, cond, self.pilot_chains, self.pilot_seed, self._pilot_rows)

    def _schedule(self, prior: Prior, potential: Potential, cond: Conditioning) -> Schedule | Adaptive:
        num_steps = prior.num_steps
        if not isinstance(self.tempering, str):
            return tabulate(self.tempering, num_steps)
        if self.tempering == "adaptive":
            return Adaptive(target=min(max(self.ess_threshold, 0.05), 0.95))
        if self.tempering == "exp":
            return tabulate(lambda k, n: exponential(k, n, self.gamma), num_steps)
        if self.tempering == "polynomial":
            return tabulate(lambda k, n: polynomial(k, n, self.degree), num_steps)
        if self.tempering == "none":
            return [1.0] * (num_steps + 1)
        pilot = self._pilot(prior, cond)
        calibration = self.cache.calibration(prior, potential, pilot, self._pilot_rows)
        return tabulate(self.strength(calibration), num_steps)

    def strength(self, calibration: Calibration) -> Calibration:
        """The calibration with `kappa` in place of the fitted one, where it is given."""
        return calibration if self.kappa is None else replace(calibration, kappa=self.kappa)
