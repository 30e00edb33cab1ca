"""The two samplers that every other has to beat: the prior itself, and best-of-N."""

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


def _only_at_the_end(num_steps: int) -> list[float]:
    return [0.0] * num_steps + [1.0]


@dataclass(frozen=True)
class PriorOnly:
    """Plain draws of the prior. The potential is ignored and never called (None will do).

    `log_w` is uniform, -log P, and `log_z` is 0, the log normalising constant of G = 1.

    Args:
        select, micro_batch: as in `DAS`.
    """

    select: Select = "draw"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        check_settings(0.0, "systematic", self.select, self.micro_batch)

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
        return sample_twisted(
            prior, None, cond, _only_at_the_end(prior.num_steps), TwistOptions(gradient="none"),
            num_particles=num_particles, generators=generators, ess_threshold=0.0,
            micro_batch=self.micro_batch, callback=callback,
        )  # fmt: skip


@dataclass(frozen=True)
class BestOfN:
    """N plain draws of the prior, weighted by G of the finished design: self-normalised importance sampling.

        log w_p = log G(design_p) - logsumexp,   log Z-hat = log mean G

    Exact, and needs one potential call per particle and no gradient. `select="argmax"`, the default here, is best-of-N
    as everyone knows it; `draw` gives a sample of the tilted distribution.

    Args:
        select, micro_batch, nan: as in `DAS`.
    """

    select: Select = "argmax"
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
        return sample_twisted(
            prior, potential, cond, _only_at_the_end(prior.num_steps), TwistOptions(gradient="none", nan=self.nan),
            num_particles=num_particles, generators=generators, ess_threshold=0.0,
            micro_batch=self.micro_batch, callback=callback,
        )  # fmt: skip
