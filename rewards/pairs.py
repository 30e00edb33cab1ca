"""Which of two pictures is better: a black box over pairs, made from one that compares or from one that scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from tiltopt.rewards.base import Answer, BlackBox, RewardOptionError
from tiltopt.rewards.composition import Composition
from tiltopt.rewards.replies import ReplyError, read_reply


@runtime_checkable
class Comparator(Protocol):
    """A black box that compares two pictures side by side."""

    @property
    def compares(self) -> bool:
        """Whether it was set up to do so."""
        ...

    def compare(self, first: Image.Image, second: Image.Image, prompt: str, other_prompt: str | None = None) -> Answer:
        """1 if the first is better, 0 if the second is, 0.5 for a tie; in between when it wavers.

        Args:
            prompt: of the first picture, and of the second unless `other_prompt` is given.
        """
        ...


class PairBox:
    """A black box over pairs: (first, second) pictures and prompts -> how much better the first is, > 0 if it is.

    A comparator is asked about the pair, and its verdict v in [0, 1] becomes 2 v - 1. Any other black box scores both
    pictures, and the answer is the difference, in the reward's unit. A failed part is a failed comparison, never a
    guess.

    Args:
        black_box: what compares or scores.
    """

    batch_size = 1

    def __init__(self, black_box: BlackBox) -> None:
        if isinstance(black_box, Composition) and black_box.standardise:
            raise RewardOptionError(
                "`reward.standardise`: comparisons teach no scale that the parts could be put into; weigh them in "
                "their own units."
            )
        self.black_box = black_box
        self.name = black_box.name
        comparator = black_box if isinstance(black_box, Comparator) and black_box.compares else None
        self.comparator: Comparator | None = comparator
        self.unit = "verdict" if comparator else black_box.unit

    def __call__(self, images: Sequence[Iterable[Image.Image]], prompts: Sequence[tuple[str, str]]) -> list[Answer]:
        """One answer per pair."""
        one = self._scored if self.comparator is None else self._compared
        return [one(pair, texts) for pair, texts in zip(images, prompts, strict=True)]

    def _compared(self, pair: Iterable[Image.Image], prompts: tuple[str, str]) -> Answer:
        assert self.comparator is not None
        first, second = pair
        verdict = self.comparator.compare(first, second, *prompts)
        if verdict.failed:
            return verdict
        if not 0.0 <= verdict.value <= 1.0:
            raise ReplyError(
                f"reward `{self.name}`: expected a verdict from 0 (second) to 1 (first), got {verdict.value}."
            )
        return Answer(2 * verdict.value - 1, raw=verdict.raw)

    def _scored(self, pair: Iterable[Image.Image], prompts: tuple[str, str]) -> Answer:
        if self.black_box.batch_size >= 2:
            answers = self._read(self.black_box(list(pair), list(prompts)), 2)
        else:
            answers = [
                self._read(self.black_box([image], [prompt]), 1)[0] for image, prompt in zip(pair, prompts, strict=True)
            ]
        raw: list[Any] = [answer.value if answer.raw is None else answer.raw for answer in answers]
        for answer in answers:
            if answer.failed:
                return Answer.failure(answer.reason, raw=raw)
        return Answer(answers[0].value - answers[1].value, raw=raw)

    def _read(self, reply: Any, count: int) -> list[Answer]:
        answers, problems = read_reply(self.name, reply, count)
        if problems:
            raise ReplyError(problems[0])
        return [answer for answer in answers if answer is not None]
