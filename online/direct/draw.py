"""Draw from a prior tilted by a reward, in one call: `tiltopt.draw`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiltopt.designs import to_images
from tiltopt.errors import ConfigError, PotentialError
from tiltopt.online.seeds import generator
from tiltopt.samplers import DAS, FKSteering, Sampler, Samples
from tiltopt.samplers.diffusers_prior import as_prior
from tiltopt.types import Conditioning, Potential


def draw(
    prior: Any,
    reward: Callable[[Any, Sequence[str]], Any],
    prompts: Sequence[str],
    *,
    alpha: float,
    num_particles: int = 4,
    seed: int = 0,
    gradient: str | None = None,
    black_box: bool = False,
    sampler: Sampler | None = None,
) -> Samples:
    """Weighted particles of p(x) exp(reward(x) / alpha), for each prompt.

    Args:
        prior: a `Prior`, a pipeline of diffusers, or a path; see `as_prior`.
        reward: reward(designs (n, ...), prompts of length n) -> (n,) in any unit, higher is better.
            `tiltopt.rewards.make_differentiable` makes some.
        prompts: B texts; for an unconditional prior their number is what counts.
        alpha: reward units per nat, > 0: the price of leaving the prior.
        num_particles: P per prompt.
        seed: of everything random.
        gradient: how DAS uses the reward's gradient: "x0" (its default), "full" through the prior too, "none" for a
            reward or a prior that has none.
        black_box: the reward takes PIL images, `reward(images, prompts)`, as `tiltopt.rewards.make_reward` gives them;
            FK steering asks it about every particle at five steps on the way and at the end, and NaN gives a particle
            weight zero. For one question per design pass sampler=BestOfN().
        sampler: another sampler; `gradient` is then its own business.

    Returns:
        Samples: `designs` (B, P, ...), `log_w` (B, P), `log_z` (B,) ...; `pick("draw", generators)` takes one of each.
    Raises:
        ConfigError: an impossible argument.
    """
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"`alpha` must be a price > 0 in reward units per nat, got {alpha!r}")
    if not callable(reward):
        raise ConfigError(
            f"`reward` must be a function of designs and prompts, got {reward!r}; one of ours is made by "
            "tiltopt.rewards.make_differentiable(name)"
        )
    if sampler is not None and gradient is not None:
        raise ConfigError("`gradient` belongs to the default sampler; give it to yours instead")
    if black_box and gradient not in (None, "none"):
        raise ConfigError(f"a black box has no gradient, got gradient={gradient!r}; leave it out")
    chain = as_prior(prior)
    if sampler is None and black_box:
        sampler = FKSteering(potential_every=max(1, chain.num_steps // 5), nan="kill")
    elif sampler is None:
        sampler = DAS() if gradient is None else DAS(gradient=gradient)  # type: ignore[arg-type]
    cond = chain.encode([prompts] if isinstance(prompts, str) else prompts)
    generators = [generator(seed, "draw", i) for i in range(len(cond))]
    potential = _potential(reward, float(alpha), black_box)
    return sampler.sample(chain, potential, cond, num_particles=num_particles, generators=generators)


def _potential(reward: Callable[[Any, Sequence[str]], Any], alpha: float, black_box: bool) -> Potential:
    """log G = reward / alpha."""

    def log_g(designs: Tensor, cond: Conditioning) -> Tensor:
        values = reward(to_images(designs) if black_box else designs, cond.prompts)
        if isinstance(values, Tensor):
            return values.to(designs.device) / alpha
        try:
            return torch.as_tensor(values, device=designs.device) / alpha
        except (TypeError, ValueError, RuntimeError) as error:
            raise PotentialError(
                f"`reward` must return one number per design, {len(designs)} of them, got {values!r}"
            ) from error

    return log_g
