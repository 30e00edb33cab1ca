"""The common end of every sampler built on the twisted flow: check the settings, run it, pack what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Generator

from tiltopt.errors import ConfigError
from tiltopt.samplers.feynman_kac import Twisted
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.resampling import check_scheme
from tiltopt.samplers.smc import Samples, StepInfo, check_call, run_smc
from tiltopt.samplers.tempering import Adaptive, Schedule
from tiltopt.samplers.twist_options import TwistOptions
from tiltopt.samplers.weights import log_mean_exp
from tiltopt.types import Conditioning, Potential


def check_settings(ess_threshold: float, resampling: str, select: str, micro_batch: int | None) -> None:
    """Refuse settings that no sampler can run with. Raises ConfigError."""
    if not 0 <= ess_threshold <= 1:
        raise ConfigError(f"`ess_threshold` must lie in [0, 1], got {ess_threshold}.")
    if select not in ("draw", "argmax", "all"):
        raise ConfigError(f"`select` must be 'draw', 'argmax' or 'all', got {select!r}.")
    if micro_batch is not None and micro_batch < 1:
        raise ConfigError(f"`micro_batch` must be at least 1 or None, got {micro_batch}.")
    check_scheme(resampling)


def sample_twisted(
    prior: Prior,
    potential: Potential | None,
    cond: Conditioning,
    schedule: Schedule | Adaptive,
    options: TwistOptions,
    *,
    num_particles: int,
    generators: Sequence[Generator],
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    micro_batch: int | None = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Samples:
    """Run the twisted flow of `prior` and `potential` under `schedule`, and pack the weighted particles.

    Args are those of `Sampler.sample`, `Twisted` and `run_smc`.
    """
    check_call(cond, num_particles, generators)
    flow = Twisted(prior, potential, cond, num_particles, schedule, options, micro_batch)
    step, log_w, log_z = run_smc(
        flow, prompts=cond.prompts, num_particles=num_particles, generators=generators,
        ess_threshold=ess_threshold, resampling=resampling, callback=callback,
    )  # fmt: skip
    x0, designs = step.particles.mean, step.designs
    assert designs is not None  # the last look always decodes
    if not options.weighted and potential is not None:
        log_z = log_mean_exp(step.particles.log_g.nan_to_num(nan=-math.inf, neginf=-math.inf))
    return Samples(x0, designs, log_w.to(x0.device, x0.dtype), log_z.to(x0.device, x0.dtype))
