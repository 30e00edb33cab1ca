"""Which two queries are compared next: a plan that follows from the store alone, so that a stopped run goes on with it.

The plan of a round, for k = `comparisons_per_query`:

1. The queries of the round, shuffled from the run's seed and gathered by prompt, stand in a ring; each meets the next
   one, then (for larger k) the one after it, and so on. So every query takes part, neighbours share a prompt where
   prompts repeat, and the comparisons of a round hang together.
2. From the second round on, each query also meets one earlier query, which ties the rounds to each other: the one that
   the newest surrogate thinks best among the earlier ones of its prompt, or among all of them when it has none.

A ring step gives a query two partners; in round 0 there are ceil(k / 2) steps, later ceil((k - 1) / 2). Which of the
two is shown first is drawn from the run's seed too. A rater who picks the best of several at a time is shown sets in
which all these pairs meet (`gathered`): fewer answers, each worth more than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from botorch.models.model import Model

from tiltopt.designs import DesignType
from tiltopt.online.answering import UNKNOWN, Answering, noise, said
from tiltopt.online.queries import Spent
from tiltopt.online.rounds import newest_surrogate
from tiltopt.online.runner import Ledger
from tiltopt.online.seeds import generator
from tiltopt.online.settings.run import Settings
from tiltopt.online.store import files
from tiltopt.online.store.store import Store
from tiltopt.rewards.base import Answer, BlackBox
from tiltopt.rewards.pairs import PairBox


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
        store: of the run.
        settings: of the run.
        folder: of the run, with the surrogates of its rounds.
    """

    def __init__(self, store: Store, settings: Settings, folder: Path) -> None:
        self.store, self.settings, self.folder = store, settings, folder
        self._champions: dict[int, Mapping[str | None, int]] = {}

    def left(self) -> list[Pair]:
        """The pairs that were not tried yet, oldest round first; rounds that are settled have none."""
        store = self.store
        records = store.rounds()
        if not records:
            return []
        open_rounds = {row.round for row in store.in_state("asked")} | {records[-1].round}
        tried = {
            frozenset(pair) for shown in shown_together(store.comparisons.rows()) for pair in combinations(shown, 2)
        }
        frame = store.frame()
        usable = set(frame.loc[frame["state"].isin(("asked", "answered")), "id"])
        planned = [pair for record in records if record.round in open_rounds for pair in self.plan(record.round, frame)]
        return [p for p in planned if p.key not in tried and p.key <= usable]

    def plan(self, round_: int, frame: Any = None) -> list[Pair]:
        """Every pair of a round, whatever became of its queries."""
        settings, store = self.settings, self.store
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
        return [row.number for row in self.store.in_state("asked") if row.number not in waiting]

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
        store = self.store
        feature_id = store.feature_id()
        records = [record for record in store.rounds() if record.round <= round_]
        model: Model | None = None
        if feature_id is not None and numbers:
            model = newest_surrogate(self.folder, records, feature_id)[1]
        if model is None:
            return _shares([row for row in store.comparisons.rows() if row.round < round_], numbers)
        with torch.no_grad():
            posterior: Any = model.posterior(store.vectors_of(numbers).unsqueeze(-2))
        return dict(zip(numbers, posterior.mean.flatten().tolist(), strict=True))


def shown_together(rows: Sequence[Any]) -> list[set[int]]:
    """The queries of each comparison, or of each choice among several: the losers of a choice have met, too."""
    found: dict[tuple[bool, int], set[int]] = {}
    for row in rows:
        key = (True, row.id) if row.choice is None else (False, row.choice)
        found.setdefault(key, set()).update((row.winner, row.loser))
    return list(found.values())


def gathered(pairs: Sequence[Pair], size: int) -> list[list[int]]:
    """Sets of at most `size` queries in which every pair meets: as few as a greedy search finds, for a choice of the
    best of several. The first set holds the first pair, with whoever has most pairs with it; and so on."""
    left, found = list(pairs), []
    while left:
        chosen = [left[0].first, left[0].second]
        while len(chosen) < size:
            counts: dict[int, int] = {}
            for pair in left:
                new = [number for number in (pair.first, pair.second) if number not in chosen]
                if len(new) == 1:
                    counts[new[0]] = counts.get(new[0], 0) + 1
            if not counts:
                break
            chosen.append(max(counts, key=counts.__getitem__))
        left = [pair for pair in left if not pair.key <= set(chosen)]
        found.append(chosen)
    return found


def shuffled(numbers: Sequence[int], seed: int) -> list[int]:
    """Queries in the seeded order in which they are shown, so that no place is favoured."""
    if len(numbers) == 2:
        pair = _shown(seed, min(numbers), max(numbers))
        return [pair.first, pair.second]
    standing = sorted(numbers)
    order = torch.randperm(len(standing), generator=generator(seed, "order", *standing)).tolist()
    return [standing[i] for i in order]


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


# ---- having them compared


class Both:
    """Two designs of a run, read when they are needed, so that memory does not grow with the number of pairs."""

    def __init__(self, folder: Path, pair: Pair, kind: DesignType) -> None:
        self.folder, self.pair, self.kind = folder, pair, kind

    def __iter__(self) -> Iterator[Any]:
        return (files.query_design(self.folder, number, self.kind) for number in (self.pair.first, self.pair.second))


class PairLedger:
    """The book of a run for pairs: a comparison is entered before it is asked for, and found by its pair."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._ids: dict[Pair, int] = {}

    def spent(self) -> Spent:
        return self.store.spent()

    def hand_out(
        self, ids: Sequence[Pair], *, max_queries: int | None = None, max_calls: int | None = None
    ) -> Sequence[Pair]:
        keys = [(pair.first, pair.second) for pair in ids]
        entered = self.store.comparisons.hand_out(keys, max_queries=max_queries, max_calls=max_calls)
        out = list(ids)[: len(entered)]
        self._ids |= dict(zip(out, entered, strict=True))
        return out

    def came_back(self, ids: Sequence[Pair]) -> None:
        self.store.comparisons.came_back([self._ids[pair] for pair in ids])

    def id(self, pair: Pair) -> int:
        """The number of the comparison that was entered for a pair."""
        return self._ids[pair]


class Comparing(Answering):
    """`Answering` for a run of comparisons: the pairs of its plan are compared."""

    plan: Pairs
    ledger: PairLedger

    def _box(self, black_box: BlackBox) -> Any:
        return PairBox(black_box)

    def _ledger(self) -> Ledger:
        self.plan = Pairs(self.store, self.settings, self.folder)
        self.ledger = PairLedger(self.store)
        return self.ledger

    def answer(self, round_: int | None = None) -> Any:
        """The pairs that are planned and were not tried; then, queries that no comparison could place have failed."""
        stop = super().answer(round_)
        if stop is None:
            self._settle()
        return stop

    def _held_by_others(self, round_: int | None) -> bool:
        return False  # one process at a time has pairs compared

    def _items(self, round_: int | None) -> list[Any]:
        for row in self.store.comparisons.unknown() if self.runner.policy.on_unknown == "leave" else ():
            self.store.comparisons.deliver(row.id, "failed", error=UNKNOWN)
        left = self.plan.left()
        prompts = {number: self.store.get(number).prompt for number in {n for pair in left for n in pair.key}}
        return [(p, Both(self.folder, p, self.kind), (prompts[p.first], prompts[p.second])) for p in left]

    def _take(self, pair: Any, answer: Answer) -> None:
        """One verdict: above 0 the first is better, below 0 the second, 0 is a tie.

        The settings' `answer_noise` is the standard deviation of noise on each of the two: sqrt 2 times as much is
        added to the difference, from the pair's own generator.
        """
        told: dict[str, Any] = {"rater": self.runner.black_box.name, "raw": said(answer)}
        comparisons, id = self.store.comparisons, self.ledger.id(pair)
        if answer.failed:
            comparisons.deliver(id, "failed", error=answer.reason, **told)
            return
        value = float(answer.value) + 2**0.5 * noise(self.settings, pair.first, pair.second)
        comparisons.deliver(id, "tie" if value == 0 else "win", first_wins=value >= 0, **told)

    def _settle(self) -> None:
        reasons: dict[int, Any] = {}
        for row in self.store.comparisons.rows():
            if row.outcome == "failed":
                reasons |= {row.winner: row.error, row.loser: row.error}
        for number in self.plan.stuck():
            reason = reasons.get(number, "it has no partner")
            self.store.fail(number, f"no comparison of it succeeded: {reason}", failure="fault")
