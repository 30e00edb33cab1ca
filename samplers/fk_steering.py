"""FK steering: gradient-free Sequential Monte Carlo, Singhal et al., arXiv 2501.06848."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Generator

from tiltopt.samplers.prior import Prior
from tiltopt.samplers.run_twisted import check_settings, sample_twisted
from tiltopt.samplers.smc import Samples, Select, StepInfo
from tiltopt.samplers.tempering import ScheduleFn, tabulate
from tiltopt.samplers.twist_options import Accumulate, TwistOptions
from tiltopt.types import Conditioning, Potential


@dataclass(frozen=True)
class FKSteering:
    """Proposals from the prior, weights from intermediate potentials; the potential needs no gradient.

    With r_k = lambda_k log G(decode(x0_hat_k)), the potential of step k is

        difference   exp(r_k - r_{k-1})
        max          exp(max of r_0 .. r_k)
        sum          exp(r_0 + ... + r_k)

    The first telescopes to G. The others are divided out at the last step, as in the paper, so that all three are
    exact; `max` and `sum` only choose more greedily on the way, and pay for it in the last weights.

    Args:
        accumulate: `difference`, `max` or `sum`.
        potential_every: evaluate (and weight by) the potential every so many steps; the paper uses a fifth of the
            chain. None: a fifth of the chain for `max` and `sum`, every step for `difference`.
        tempering: (k, K) -> lambda_k; None: 1, as in the paper.
        ess_threshold: resample a prompt when its ESS < ess_threshold * P.
        resampling: a scheme of `tiltopt.samplers.resampling`.
        select, micro_batch, nan: as in `DAS`.
    """

    accumulate: Accumulate = "difference"
    potential_every: int | None = None
    tempering: ScheduleFn | None = None
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    select: Select = "draw"
    micro_batch: int | None = None
    nan: Literal["raise", "kill"] = "raise"

    def __post_init__(self) -> None:
        check_settings(self.ess_threshold, self.resampling, self.select, self.micro_batch)
        self._options(5)

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
        schedule = tabulate(self.tempering or (lambda k, num_steps: 1.0), prior.num_steps)
        return sample_twisted(
            prior, potential, cond, schedule, self._options(prior.num_steps), num_particles=num_particles,
            generators=generators, ess_threshold=self.ess_threshold, resampling=self.resampling,
            micro_batch=self.micro_batch, callback=callback,
        )  # fmt: skip

    def _options(self, num_steps: int) -> TwistOptions:
        default = 1 if self.accumulate == "difference" else max(1, num_steps // 5)
        every = default if self.potential_every is None else self.potential_every
        return TwistOptions(gradient="none", potential_every=every, accumulate=self.accumulate, nan=self.nan)
