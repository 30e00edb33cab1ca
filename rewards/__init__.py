"""Black boxes: what scores the designs. `make_reward(name, **options)` builds one; docs/rewards.md lists them."""

from tiltopt.rewards.base import Answer, BlackBox, Retry, RewardOptionError
from tiltopt.rewards.registry import REWARDS, is_free, make_reward, own_code, parts_of, validate

__all__ = [
    "REWARDS",
    "Answer",
    "BlackBox",
    "Retry",
    "RewardOptionError",
    "is_free",
    "make_reward",
    "own_code",
    "parts_of",
    "validate",
]
