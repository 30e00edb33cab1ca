"""Which two queries are compared next: a plan that follows from the store alone, so that a stopped run goes on with it.

The plan of a round, for k = `comparisons_per_query`:

1. The queries of the round, shuffled from the run's seed and gathered by prompt, stand in a ring; each meets the next
   one, then (for larger k) the one after it, and so on. So every query takes part, neighbours share a prompt where
   prompts repeat, and the comparisons of a round hang together.
2. From the second round on, each query also meets one earlier query, which ties the rounds to each other: the one that
   the newest surrogate thinks best among the earlier ones of its prompt, or among all of them when it has none.

A ring step gives a query two partners; in round 0 there are ceil(k / 2) steps, later ceil((k - 1) / 2). Which of the
two is shown first is drawn from the run's seed too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from botorch.models.model import Model

from tiltopt.online.optimizer import Optimizer
from tiltopt.online.rounds import newest_surrogate
from tiltopt.online.seeds import generator


@dataclass(frozen=True)
class Pair:
    """Two queries to be compared, in the order in which they are shown."""

    first: int
    second: int

    @property
    def key(self) -> frozenset[int]:
        """The pair, whatever its order."""
        return frozenset((self.first, self.second))


class Pairs:
    """The plan of a run, read from its store at every look.

    Args:
        optimizer: the run, on rank 0.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._champions: dict[int, Mapping[str | None, int]] = {}

    def left(self) -> list[Pair]:
        """The pairs that were not tried yet, oldest round first; rounds that are settled have none."""
        store = self.optimizer.store
        records = store.rounds()
        if not records:
            return []
        open_rounds = {row.round for row in store.in_state("asked")} | {records[-1].round}
        tried = {frozenset((row.winner, row.loser)) for row in store.comparisons.rows()}
        frame = store.frame()
        usable = set(frame.loc[frame["state"].isin(("asked", "answered")), "id"])
        planned = [pair for record in records if record.round in open_rounds for pair in self.plan(record.round, frame)]
        return [p for p in planned if p.key not in tried and p.key <= usable]

    def plan(self, round_: int, frame: Any = None) -> list[Pair]:
        """Every pair of a round, whatever became of its queries."""
        settings, store = self.optimizer.settings, self.optimizer.store
        frame = store.frame() if frame is None else frame
        here = frame[frame["round"] == round_]
        prompts = dict(zip(here["id"].tolist(), here["prompt"].tolist(), strict=True))
        champions = self._champions_of(round_, frame)
        rest = settings.comparisons_per_query - (1 if champions else 0)
        found = [
            (number, champions.get(prompt, champions[None])) for number, prompt in prompts.items() if champions
        ] + ring(prompts, (rest + 1) // 2, settings.seed, round_)
        unique = list(dict.fromkeys(frozenset(pair) for pair in found))
        return [_shown(settings.seed, min(key), max(key)) for key in unique]

    def stuck(self) -> list[int]:
        """Queries that are asked and have no pair left to try: they can get no answer."""
        waiting = {number for pair in self.left() for number in pair.key}
        return [row.number for row in self.optimizer.store.in_state("asked") if row.number not in waiting]

    def _champions_of(self, round_: int, frame: Any) -> Mapping[str | None, int]:
        """The best earlier query of each prompt, and of all under None, by the surrogate that the round was drawn with.

        Without a readable one (a plain round, a damaged file): by the share of comparisons won.
        """
        if round_ not in self._champions:
            earlier = frame[(frame["round"] < round_) & (frame["state"] == "answered")]
            worth = self._worth(round_, earlier["id"].tolist())
            best: dict[str | None, int] = {}
            for number, prompt in zip(earlier["id"].tolist(), earlier["prompt"].tolist(), strict=True):
                for key in (prompt, None):
                    if key not in best or worth[number] > worth[best[key]]:
                        best[key] = number
            self._champions[round_] = best
        return self._champions[round_]

    def _worth(self, round_: int, numbers: Sequence[int]) -> Mapping[int, float]:
        optimizer, store = self.optimizer, self.optimizer.store
        feature_id = store.feature_id()
        records = [record for record in store.rounds() if record.round <= round_]
        model: Model | None = None
        if feature_id is not None and numbers:
            model = newest_surrogate(optimizer.folder, records, feature_id)[1]
        if model is None:
            return _shares([row for row in store.comparisons.rows() if row.round < round_], numbers)
        with torch.no_grad():
            posterior: Any = model.posterior(store.vectors_of(numbers).unsqueeze(-2))
        return dict(zip(numbers, posterior.mean.flatten().tolist(), strict=True))


def ring(prompts: Mapping[int, str], steps: int, seed: int, round_: int) -> list[tuple[int, int]]:
    """Each of n queries with the next 1, 2, ... `steps` ones in a seeded ring; fewer when n is small."""
    numbers = list(prompts)
    order = torch.randperm(len(numbers), generator=generator(seed, "pairs", round_)).tolist()
    shuffled = [numbers[i] for i in order]
    seen = list(dict.fromkeys(prompts[number] for number in shuffled))
    place = {prompt: i for i, prompt in enumerate(seen)}
    standing = sorted(shuffled, key=lambda number: place[prompts[number]])  # stable: shuffled within a prompt
    n = len(standing)
    return [
        (standing[i], standing[(i + step) % n])
        for step in range(1, min(steps, n // 2) + 1)
        for i in range(n)
        if standing[i] != standing[(i + step) % n]
    ]


def _shown(seed: int, low: int, high: int) -> Pair:
    """The pair in a seeded order, so that no place is favoured."""
    turned = bool(torch.randint(2, (), generator=generator(seed, "order", low, high)))
    return Pair(high, low) if turned else Pair(low, high)


def _shares(rows: Sequence[Any], numbers: Sequence[int]) -> Mapping[int, float]:
    """The share of its comparisons that a query won, (w + 1/2) / (n + 1), so that few count less; a tie is half."""
    won, met = dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0)
    for row in rows:
        if row.outcome == "failed":
            continue
        for number, worth in ((row.winner, 1.0), (row.loser, 0.0)):
            if number in met:
                met[number] += 1
                won[number] += 0.5 if row.outcome == "tie" else worth
    return {number: (won[number] + 0.5) / (met[number] + 1) for number in numbers}
