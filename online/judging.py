"""The black box in a run of comparisons: the planned pairs are judged, verdict by verdict into the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from tiltopt.online.optimizer import Optimizer
from tiltopt.online.pairs import Pair, Pairs
from tiltopt.online.seeds import generator
from tiltopt.online.summary import jsonable
from tiltopt.rewards.base import Answer

Item = tuple[Pair, "Pictures", tuple[str, str]]


class Pictures:
    """Two images of a run, read when they are needed, so that memory does not grow with the number of pairs."""

    def __init__(self, optimizer: Optimizer, pair: Pair) -> None:
        self.optimizer, self.pair = optimizer, pair

    def __iter__(self) -> Iterator[Image.Image]:
        return iter((self.optimizer.image(self.pair.first), self.optimizer.image(self.pair.second)))


def items(optimizer: Optimizer) -> list[Item]:
    """The pairs that are planned and were not tried, for a `Runner` around a `tiltopt.rewards.pairs.PairBox`."""
    left = Pairs(optimizer).left()
    prompts = {number: optimizer.store.get(number).prompt for number in {n for pair in left for n in pair.key}}
    return [(pair, Pictures(optimizer, pair), (prompts[pair.first], prompts[pair.second])) for pair in left]


def record(optimizer: Optimizer, pair: Pair, answer: Answer, rater: str) -> None:
    """Commit one verdict: above 0 the first is better, below 0 the second, 0 is a tie.

    The settings' `answer_noise` is the standard deviation of noise on each of the two: sqrt 2 times as much is added to
    the difference, from the pair's own generator.
    """
    raw = answer.raw if answer.raw is None or isinstance(answer.raw, str) else json.dumps(jsonable(answer.raw))
    if answer.failed:
        reason = answer.error or f"the black box answered {answer.value}"
        optimizer.fail_comparison(pair.first, pair.second, reason, rater=rater, raw=raw)
        return
    value, noise = float(answer.value), optimizer.settings.answer_noise
    if noise > 0:
        source = generator(optimizer.settings.seed, "noise", pair.first, pair.second)
        value += noise * 2**0.5 * torch.randn((), generator=source, dtype=torch.float64).item()
    winner, loser = (pair.first, pair.second) if value >= 0 else (pair.second, pair.first)
    optimizer.compare(winner, loser, tie=value == 0, rater=rater, raw=raw)


def settle(optimizer: Optimizer) -> Sequence[int]:
    """Queries that no comparison could place have failed, with the last reason known."""
    reasons: dict[int, Any] = {}
    for row in optimizer.store.comparisons.rows():
        if row.outcome == "failed":
            reasons |= {row.winner: row.error, row.loser: row.error}
    stuck = Pairs(optimizer).stuck()
    for number in stuck:
        optimizer.fail(number, f"no comparison of it succeeded: {reasons.get(number, 'it has no partner')}")
    return stuck
