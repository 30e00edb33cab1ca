"""Reading what a black box returned: one `Answer` per image, and in plain words what could not be read."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tiltopt.errors import RewardError
from tiltopt.rewards.base import Answer, BlackBox, FunctionReward

log = logging.getLogger(__name__)

SHAPE = "return a list with one float (or Answer) per image, in order, float('nan') for a failed evaluation."


class ReplyError(RewardError):
    """A black box within another one gave a reply that cannot be read: no answer, as if the outer one had given it."""


def read_reply(name: str, reply: Any, count: int) -> tuple[list[Answer | None], list[str]]:
    """What `count` images were answered.

    Args:
        name: of the reward, for messages.
        reply: whatever the black box returned: a sequence of `count` numbers or `Answer`s, or a 1-D array of numbers.
        count: images that were handed over.

    Returns:
        One entry per image, None where nothing usable came, and one message per problem (empty if all is well). NaN
        and -inf are answers (see `Answer.infeasible`); +inf is a problem.
    """
    values = _as_list(reply)
    if values is None:
        shown = f"{type(reply).__name__} {str(reply)[:60]!r}"
        return [None] * count, [f"reward `{name}`: expected {count} values, got {shown}; {SHAPE}"]
    if len(values) != count:
        return [None] * count, [f"reward `{name}`: expected {count} values, got {len(values)}; {SHAPE}"]
    answers = [_answer(value) for value in values]
    problems = [
        f"reward `{name}`: expected a number below infinity for image {i + 1} of {count}, got {type(value).__name__} "
        f"{str(value)[:60]!r}; {SHAPE}"
        for i, (value, answer) in enumerate(zip(values, answers, strict=True))
        if answer is None
    ]
    return answers, problems


def by_name(box: BlackBox) -> BlackBox:
    """The same black box, whose entries may also be mappings of numbers by name: answers of several objectives.

    Such an entry becomes an `Answer` that has the mapping beside it (`raw`) and the first of its numbers as its value.
    """

    def ask(images: Sequence[Any], prompts: Sequence[str]) -> Any:
        reply = box(images, prompts)
        return [_named(entry) for entry in reply] if isinstance(reply, Sequence) else reply

    return FunctionReward(box.name, box.unit, box.batch_size, ask)


def _named(entry: Any) -> Any:
    if not isinstance(entry, Mapping) or not entry:
        return entry
    return Answer(next(iter(entry.values())), raw=dict(entry))


def _as_list(reply: Any) -> list[Any] | None:
    """A list of the reply's entries; None for what is not a sequence of values (text, numbers, mappings, matrices)."""
    if isinstance(reply, (str, bytes, bytearray)):
        return None
    if isinstance(reply, Sequence):
        return list(reply)
    if hasattr(reply, "tolist") and getattr(reply, "ndim", None) == 1:
        return list(reply.tolist())
    return None


def _answer(value: Any) -> Answer | None:
    """The entry as an `Answer`; None unless it is a number below infinity or an `Answer` around one."""
    if isinstance(value, Answer):
        number = _number(value.value)
        if number is None or (number == math.inf and value.error is None):
            return None
        return replace(value, value=number, sem=known_spread(value.sem))
    number = _number(value)
    return None if number is None or number == math.inf else Answer(number)


def known_spread(sem: Any) -> float | None:
    """A standard error as float; None, and a warning, for what is none: it costs no value that it came with."""
    number = None if sem is None else _number(sem)
    if sem is None or (number is not None and 0 <= number < math.inf):
        return number
    got = type(sem).__name__ if number is None else number
    log.warning("a value is kept without its standard error: expected a number >= 0, got %s", got)
    return None


def _number(value: Any) -> float | None:
    """A real number, or a 0-dimensional array of one, as float; else None."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
