"""The one table of rewards: name -> options, unit, and how it is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tiltopt.errors import ConfigError
from tiltopt.options import check_name
from tiltopt.rewards import aesthetic, clip_score, composition, custom, hps, http_endpoint, image_reward, images, vlm
from tiltopt.rewards.base import BlackBox, Options, RewardOptionError, Score, parse_options


@dataclass(frozen=True)
class Entry:
    """How one named reward is made.

    Args:
        options: the frozen dataclass of its options; building it checks them and costs nothing.
        build: options -> black box.
        score: options -> differentiable score of designs, or None where there is no gradient.
        free: whether an answer costs nothing but computing time on this machine.
        combine: of a reward that is made of others: its weighted terms -> its value.
    """

    options: type[Options]
    build: Callable[[Any], BlackBox]
    score: Callable[[Any], Score] | None = None
    free: bool = False
    combine: composition.Combine | None = None


def _differentiable(
    name: str, unit: str, options: type[Options], score: Callable[[Any], Score], dtype: torch.dtype = torch.float32
) -> Entry:
    """An entry whose black box is its differentiable score, applied to 8-bit images."""
    return Entry(options, lambda o: images.from_tensors(name, unit, o.batch_size, score(o), dtype), score, free=True)


def _composed(name: str, options: type[composition.CompositionOptions], combine: composition.Combine) -> Entry:
    """An entry made of others: its black box asks theirs."""

    def build(given: composition.CompositionOptions) -> composition.Composition:
        boxes = [(part, make_reward(part.name, **part.options)) for part in given.others]
        return composition.Composition(name, boxes, combine, given.batch_size, given.standardise)

    return Entry(options, build, combine=combine)


REWARDS: dict[str, Entry] = {
    "jpeg_compressibility": Entry(images.JpegOptions, images.build_compressibility, free=True),
    "jpeg_incompressibility": Entry(images.JpegOptions, images.build_incompressibility, free=True),
    "colorfulness": _differentiable(
        "colorfulness", "Hasler-Süsstrunk M", Options, lambda o: lambda x, _: images.colorfulness(x), torch.float64
    ),
    "symmetry": _differentiable(
        "symmetry", "correlation", Options, lambda o: lambda x, _: images.symmetry(x), torch.float64
    ),
    "aesthetic": _differentiable("aesthetic", "points", aesthetic.AestheticOptions, aesthetic.build_score),
    "clip": _differentiable(
        "clip", "scaled cosine", clip_score.ClipOptions, lambda o: clip_score.build_score("clip", o)
    ),
    "pick": _differentiable(
        "pick", "scaled cosine", clip_score.PickOptions, lambda o: clip_score.build_score("pick", o)
    ),
    "hps": _differentiable("hps", "cosine", hps.HpsOptions, hps.build_score),
    "image_reward": _differentiable(
        "image_reward", "standard deviations", image_reward.ImageRewardOptions, image_reward.build_score
    ),
    "http": Entry(http_endpoint.HttpOptions, http_endpoint.HttpReward),
    "vlm": Entry(vlm.VlmOptions, vlm.VlmReward),
    "weighted": _composed("weighted", composition.WeightedOptions, sum),
    "product": _composed("product", composition.CompositionOptions, math.prod),
    "threshold": _composed("threshold", composition.ThresholdOptions, sum),
}
RENAMED = {"multi": "weighted"}
"""What rewards were called in version 0.1."""


def lookup(name: str) -> Entry:
    """The table's entry.

    Raises:
        RewardOptionError: unknown name; lists the known ones and near matches.
    """
    try:
        if name in RENAMED:
            raise ConfigError(f"`reward.name`: {name!r} is called {RENAMED[name]!r} now; write that.")
        return REWARDS[check_name("reward.name", name, REWARDS)]
    except ConfigError as error:
        raise RewardOptionError(f"{error} Your own is named module:function or path/to/file.py:function.") from None


def validate(name: str, options: Mapping[str, Any]) -> None:
    """Checks a reward's name and options without loading a model, importing user code or asking anything.

    Raises:
        RewardOptionError: the reward could not be built from these.
    """
    if isinstance(name, str) and ":" in name:
        custom.validate(name, options)
        return
    parse_options(name, lookup(name).options, options)
    for part in _parts(name, options):
        validate(part.name, part.options)


def _parts(name: str, options: Mapping[str, Any]) -> tuple[composition.Part, ...]:
    """What a reward of the table is made of; () for one that is made of no others."""
    entry = lookup(name)
    if entry.combine is None:
        return ()
    parsed = parse_options(name, entry.options, options)
    assert isinstance(parsed, composition.CompositionOptions)
    return parsed.others


def is_free(name: str, options: Mapping[str, Any]) -> bool:
    """Whether answers of this reward cost nothing but computing time here: a built-in, or made of such.

    Raises:
        RewardOptionError: unknown name, or impossible options.
    """
    if ":" in name:
        return False
    parts = _parts(name, options)
    return all(is_free(part.name, part.options) for part in parts) if parts else lookup(name).free


def own_code(name: str, options: Mapping[str, Any]) -> list[str]:
    """The rewards of a user's own that a reward names, itself or among its parts: to make it is to execute them.

    Raises:
        RewardOptionError: unknown name, or impossible options.
    """
    if ":" in name:
        return [name]
    return [code for part in _parts(name, options) for code in own_code(part.name, part.options)]


def parts_of(name: str, options: Mapping[str, Any]) -> list[str] | None:
    """What the numbers beside an answer are called; [] where it is one number, None where only asking can tell.

    Raises:
        RewardOptionError: unknown name, or impossible options.
    """
    if ":" in name:
        return None
    parts = _parts(name, options)
    return composition.keys(parts) if parts else [] if lookup(name).free else None


def make_reward(name: str, **options: Any) -> BlackBox:
    """The black box called `name`, for instance `make_reward("jpeg_compressibility", quality=95)`.

    Args:
        name: a key of `REWARDS`, or a user's own as `module:function` or `path/to/file.py:function`.
        options: of that reward; see docs/rewards.md.

    Raises:
        RewardOptionError: unknown name or option, or an impossible value; before any model is loaded.
        RewardError: the reward cannot be built (a model that does not load, user code that does not import).
    """
    validate(name, options)
    if ":" in name:
        return custom.load(name, options)
    entry = lookup(name)
    return entry.build(parse_options(name, entry.options, options))
