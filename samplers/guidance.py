"""Reward guidance without weights (in the manner of DPS, arXiv 2209.14687): the drift of DAS alone. Biased."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Generator

from tiltopt.samplers.prior import Prior
from tiltopt.samplers.run_twisted import check_settings, sample_twisted
from tiltopt.samplers.smc import Samples, Select, StepInfo
from tiltopt.samplers.tempering import ScheduleFn, tabulate
from tiltopt.samplers.twist_options import TwistOptions
from tiltopt.types import Conditioning, Potential


@dataclass(frozen=True)
class Guidance:
    """x_{k+1} ~ N(m_k + s_k^2 lambda_k grad log G(decode(x0_hat_k)), s_k^2), every draw of weight 1 / P.

    Biased: these are draws of the guided chain, not of the tilted prior. `log_w` is uniform, and `log_z` is the log
    mean of G over the guided draws, which lies above log E_prior[G] where guidance raises G. For comparison only.

    Args:
        tempering: (k, K) -> lambda_k; None: 1.
        select, micro_batch, nan: as in `DAS`.
    """

    tempering: ScheduleFn | None = None
    select: Select = "draw"
    micro_batch: int | None = None
    nan: Literal["raise", "kill"] = "raise"

    def __post_init__(self) -> None:
        check_settings(0.0, "systematic", self.select, self.micro_batch)
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
        schedule = tabulate(self.tempering or (lambda k, num_steps: 1.0), prior.num_steps)
        return sample_twisted(
            prior, potential, cond, schedule, TwistOptions(nan=self.nan, weighted=False),
            num_particles=num_particles, generators=generators, ess_threshold=0.0,
            micro_batch=self.micro_batch, callback=callback,
        )  # fmt: skip
