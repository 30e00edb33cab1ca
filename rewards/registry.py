"""The one table of rewards: name -> options, how to build it, and how to differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tiltopt.rewards import custom, images
from tiltopt.rewards.base import BlackBox, Options, RewardOptionError, near, parse_options


@dataclass(frozen=True)
class Entry:
    """How one named reward is made.

    Args:
        options: the frozen dataclass of its options; building it checks them and costs nothing.
        build: options -> black box.
    """

    options: type[Options]
    build: Callable[[Any], BlackBox]


REWARDS: dict[str, Entry] = {
    "jpeg_compressibility": Entry(images.JpegOptions, images.build_compressibility),
    "jpeg_incompressibility": Entry(images.JpegOptions, images.build_incompressibility),
    "colorfulness": Entry(Options, images.build_colorfulness),
    "symmetry": Entry(Options, images.build_symmetry),
}


def lookup(name: str) -> Entry:
    """The table's entry.

    Raises:
        RewardOptionError: unknown name; lists the known ones and near matches.
    """
    if name in REWARDS:
        return REWARDS[name]
    raise RewardOptionError(
        f"unknown reward {name!r}; known: {', '.join(sorted(REWARDS))}, or your own as module:function"
        f"{near(str(name), list(REWARDS))}"
    )


def validate(name: str, options: Mapping[str, Any]) -> None:
    """Checks a reward's name and options without loading a model, importing user code or asking anything.

    Raises:
        RewardOptionError: the reward could not be built from these.
    """
    if isinstance(name, str) and ":" in name:
        custom.validate(name, options)
    else:
        parse_options(name, lookup(name).options, options)


def make_reward(name: str, **options: Any) -> BlackBox:
    """The black box called `name`, for instance `make_reward("jpeg_compressibility", quality=95)`.

    Args:
        name: a key of `REWARDS`, or a user's own as `module:function` or `path/to/file.py:function`.
        options: of that reward; see docs/rewards.md.

    Raises:
        RewardOptionError: unknown name or option, or an impossible value; before any model is loaded.
        RewardError: the reward cannot be built (a model that does not load, user code that does not import).
    """
    if isinstance(name, str) and ":" in name:
        return custom.load(name, options)
    entry = lookup(name)
    return entry.build(parse_options(name, entry.options, options))
