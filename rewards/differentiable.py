"""Rewards with a gradient, for sampling a tilted prior directly, without a loop or a surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tiltopt.rewards.base import RewardOptionError, Score, parse_options
from tiltopt.rewards.multi import MultiOptions, read_part, weighted_score
from tiltopt.rewards.registry import REWARDS, lookup

__all__ = ["differentiable_names", "make_differentiable"]


def differentiable_names() -> list[str]:
    """The rewards that `make_differentiable` can build."""
    return sorted(name for name, entry in REWARDS.items() if entry.score is not None or name == "multi")


def make_differentiable(name: str, **options: Any) -> Score:
    """The reward called `name` as a differentiable function of the designs.

    Args:
        name: one of `differentiable_names()`.
        options: as for `make_reward`.

    Returns:
        score(designs, prompts) -> (n,): designs (n, 3, H, W) float in [0, 1], n prompts; values in the reward's unit,
        in the designs' dtype, on their device.

    Raises:
        RewardOptionError: unknown name or option, or a reward without a gradient.
        RewardError: a model does not load.
    """
    entry = lookup(name)
    parsed = parse_options(name, entry.options, options)
    if isinstance(parsed, MultiOptions):
        parts = [read_part(part) for part in parsed.parts]
        score = weighted_score([(part.weight, make_differentiable(part.name, **part.options)) for part in parts])
    elif entry.score is not None:
        score = entry.score(parsed)
    else:
        raise RewardOptionError(
            f"reward `{name}` has no gradient; expected one of {', '.join(differentiable_names())}. Use it as a black "
            "box, through a surrogate or a gradient-free sampler."
        )

    def checked(designs: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(prompts) != len(designs):
            raise ValueError(f"expected one prompt per design, got {len(designs)} designs, {len(prompts)} prompts.")
        return score(designs, prompts).to(dtype=designs.dtype, device=designs.device)

    return checked
