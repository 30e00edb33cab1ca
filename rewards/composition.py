"""Rewards made of others: a weighted sum, a product, and conditions that a design must meet to count at all.

    make_reward("weighted", parts="aesthetic, 0.5 clip")
    make_reward("product", parts="symmetry, colorfulness")
    make_reward("threshold", parts="aesthetic, clip > 5")        # as aesthetic as can be, where it fits its prompt
    make_reward("weighted", parts="aesthetic, 10 clip", standardise=True)    # each in standard deviations of round 0

A part is a text `[weight] name [> limit]`, or a mapping with `name`, `weight` or `above`, and that reward's options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from tiltopt.errors import RewardError
from tiltopt.rewards.base import Answer, BlackBox, Options, RewardOptionError, Score, require
from tiltopt.rewards.replies import ReplyError, read_reply

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
TEXT = re.compile(rf"(?:({NUMBER})(?:\s*\*\s*|\s+))?([^\s*<>]+)(?:\s*>=?\s*({NUMBER}))?")
FORM = "a text `[weight] name [> limit]` or a mapping with a `name`, its options, and a finite `weight` or `above`"

Scale = Mapping[str, tuple[float, float]]
"""Mean and standard deviation of each term, by its key, in its own unit."""


@dataclass(frozen=True)
class Part:
    """A term, `weight` times the reward `name` with its `options`; or, with `above`, a condition: at least so much."""

    name: str
    weight: float = 1.0
    above: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CompositionOptions(Options):
    """Args:
    parts: terms and conditions: a text with commas, or a list of texts and mappings; see the module.
    """

    parts: tuple | str
    standardise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        terms = [part for part in self.others if part.above is None]
        require(bool(terms), "`parts` must hold at least one reward that is no condition, got none; name one.")

    @property
    def others(self) -> tuple[Part, ...]:
        """The parts, read."""
        return tuple(map(read_part, self.parts.split(",") if isinstance(self.parts, str) else self.parts))


@dataclass(frozen=True, kw_only=True)
class WeightedOptions(CompositionOptions):
    """Args:
    standardise: take each term less its mean over its standard deviation, both over round 0 of the run.
    """

    standardise: bool = False  # type: ignore[misc]  # an option here, and fixed in the others


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions(CompositionOptions):
    """One reward, and at least one condition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        conditions = sum(part.above is not None for part in self.others)
        terms = len(self.others) - conditions
        require(
            terms == 1 and conditions > 0,
            f"`parts` must be one reward and at least one condition such as 'clip > 5', got {terms} and {conditions}; "
            "for more rewards take `weighted`.",
        )


def read_part(part: Any) -> Part:
    """A `Part` from its text or mapping.

    Raises:
        RewardOptionError: it is neither, or a number is missing or not finite.
    """
    if isinstance(part, str):
        match = TEXT.fullmatch(part.strip())
        given = {} if match is None else {"name": match[2], "weight": match[1], "above": match[3]}
        given = {key: value if key == "name" else float(value) for key, value in given.items() if value is not None}
    else:
        given = dict(part.items()) if hasattr(part, "items") else {}
    name, above, weight = given.pop("name", None), given.pop("above", None), given.pop("weight", 1.0)
    numbers = [number for number in (above, weight) if number is not None]
    fine = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not isinstance(name, str) or not fine or weight is None:
        raise RewardOptionError(f"each of `parts` must be {FORM}, got {part!r}; for instance '0.5 clip'.")
    if above is not None and weight != 1.0:
        raise RewardOptionError(f"each of `parts` must be {FORM}, not both, got {part!r}; a condition has no weight.")
    return Part(name, float(weight), None if above is None else float(above), given)


Combine = Callable[[Sequence[Any]], Any]


class Composition:
    """A black box of others. Fails where one of them fails; infeasible where one of them is or a condition is not met.

    The value of every part is kept in `Answer.raw`, by its key: its name, with a number from the second of a name on;
    their standard errors, where there are some, as a mapping under "sem". `restated` makes the answer again from these.

    Args:
        name: of the reward.
        parts: with their black boxes.
        combine: weighted terms -> value, `sum` or `math.prod`.
        batch_size: images per call.
        standardise: whether the terms are to be standardised by a `scale`; without one they are taken as they are.
        scale: mean and standard deviation of every term, from `scale_of`.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[tuple[Part, BlackBox]],
        combine: Combine,
        batch_size: int,
        standardise: bool = False,
        scale: Scale | None = None,
    ) -> None:
        self.name, self.parts, self.combine, self.batch_size = name, tuple(parts), combine, batch_size
        self.standardise, self.scale = standardise, scale
        self.keys = keys([part for part, _ in self.parts])
        terms = [f"{part.weight:g} {part.name}" for part, _ in self.parts if part.above is None]
        unit = (" x " if combine is math.prod else " + ").join(terms)
        self.unit = f"{unit}, in standard deviations of round 0" if standardise else unit

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        if len(images) != len(prompts):
            raise RewardError(
                f"reward `{self.name}`: expected one prompt per image, got {len(images)} images and {len(prompts)} "
                "prompts; pass lists of equal length."
            )
        columns = [self._ask(box, images, prompts) for _, box in self.parts]
        return [self._answer(row) for row in zip(*columns, strict=True)]

    def with_scale(self, scale: Scale) -> Composition:
        """The same with its terms standardised."""
        return Composition(self.name, self.parts, self.combine, self.batch_size, True, scale)

    def value(self, raw: Mapping[str, float]) -> float:
        """The value of a design whose parts have these values; -inf where a condition is not met."""
        if any(raw[key] < part.above for key, part in self._of(True)):
            return -math.inf
        return float(self.combine([part.weight * self._standard(key, raw[key]) for key, part in self._of(False)]))

    def restated(self, raw: Mapping[str, Any]) -> Answer:
        """The answer whose parts are those of an earlier one, with the scale that is known now."""
        value, errors = self.value(raw), []
        for key, sem in raw.get("sem", {}).items():  # to first order
            up, down = (self.value({**raw, key: raw[key] + sign * sem}) for sign in (1, -1))
            errors.append((up - down) / 2 if math.isfinite(up - down) else 0.0)
        return Answer(value, sem=math.hypot(*errors) if errors and math.isfinite(value) else None, raw=raw)

    def scale_of(self, raws: Sequence[Mapping[str, float]]) -> Scale:
        """Mean and standard deviation (n - 1) of each term over designs; 1 where it does not vary or there is one."""
        out = {}
        for key, _ in self._of(False):
            known = torch.tensor([raw[key] for raw in raws if math.isfinite(raw[key])], dtype=torch.float64)
            spread = float(known.std()) if len(known) > 1 else 0.0
            out[key] = (float(known.mean()) if len(known) else 0.0, spread if spread > 0 else 1.0)
        return out

    def _of(self, conditions: bool) -> list[tuple[str, Any]]:
        """Key and part of the conditions, or of the terms."""
        pairs = zip(self.keys, self.parts, strict=True)
        return [(key, part) for key, (part, _) in pairs if (part.above is not None) == conditions]

    def _standard(self, key: str, value: float) -> float:
        if self.scale is None:
            return value
        mean, spread = self.scale[key]
        return (value - mean) / spread

    def _ask(self, box: BlackBox, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        """A part's answers, in calls no larger than it asks for."""
        out: list[Answer] = []
        size = max(1, box.batch_size)
        for start in range(0, len(images), size):
            some = images[start : start + size]
            answers, problems = read_reply(box.name, box(some, prompts[start : start + size]), len(some))
            if problems:
                raise ReplyError(problems[0])
            out += [answer for answer in answers if answer is not None]
        return out

    def _answer(self, row: Sequence[Answer]) -> Answer:
        answers = dict(zip(self.keys, row, strict=True))
        raw: dict[str, Any] = {key: answer.value for key, answer in answers.items()}
        if errors := {key: answer.sem for key, answer in answers.items() if answer.sem is not None}:
            raw["sem"] = errors
        for (_, box), answer in zip(self.parts, row, strict=True):
            if answer.failed and not answer.infeasible:
                return Answer.failure(f"{box.name}: {answer.reason}", raw)
        for answer in row:
            if answer.infeasible:
                return Answer(answer.value, raw=raw)
        return self.restated(raw)


def keys(parts: Sequence[Part]) -> list[str]:
    """What each part is called in `Answer.raw`: its name, and name#2, name#3, ... where that is taken."""
    names = [part.name for part in parts]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}#{count}" for name, count in zip(names, counts, strict=True)]


def composed_score(parts: Sequence[tuple[Part, Score]], combine: Combine) -> Score:
    """The same value, differentiable where every condition is met; -inf, without a gradient, elsewhere."""

    def score(designs: Tensor, prompts: Sequence[str]) -> Tensor:
        values = [(part, of(designs, prompts).double()) for part, of in parts]
        value = combine([part.weight * v for part, v in values if part.above is None])
        for part, v in values:
            if part.above is not None:
                value = torch.where(v >= part.above, value, -math.inf)
        return value

    return score
