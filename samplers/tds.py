"""TDS: the Twisted Diffusion Sampler, Wu et al., arXiv 2306.17775."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Generator

from tiltopt.samplers.prior import Prior
from tiltopt.samplers.run_twisted import check_settings, sample_twisted
from tiltopt.samplers.smc import Samples, Select, StepInfo
from tiltopt.samplers.twist_options import TwistOptions
from tiltopt.types import Conditioning, Potential


@dataclass(frozen=True)
class TDS:
    """DAS without tempering: every step is twisted by the full look-ahead potential, psi_k = log G(decode(x0_hat_k)).

    Exact (algorithm 1 of the paper). Good where x0_hat already tells the reward early, wasteful where it does not.

    Args:
        ess_threshold: resample a prompt when its ESS < ess_threshold * P.
        resampling: a scheme of `tiltopt.samplers.resampling`.
        select, micro_batch, nan: as in `DAS`.
    """

    ess_threshold: float = 0.5
    resampling: str = "systematic"
    select: Select = "draw"
    micro_batch: int | None = None
    nan: Literal["raise", "kill"] = "raise"

    def __post_init__(self) -> None:
        check_settings(self.ess_threshold, self.resampling, self.select, self.micro_batch)
        TwistOptions(nan=self.nan)

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
        return sample_twisted(
            prior, potential, cond, [1.0] * (prior.num_steps + 1), TwistOptions(nan=self.nan),
            num_particles=num_particles, generators=generators, ess_threshold=self.ess_threshold,
            resampling=self.resampling, micro_batch=self.micro_batch, callback=callback,
        )  # fmt: skip
