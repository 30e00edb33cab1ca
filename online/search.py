"""Where the queries of a round start from: from noise, or from the re-noised latents of designs that were answered.

Which operator a query takes is decided by a Thompson bandit on what the operators have brought so far, and which
designs it starts from by their answers. Everything follows from the store, the settings and the query's own generator,
so that a round that is prepared again is the same round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from botorch.models.model import Model
from torch import Generator, Tensor

from tiltopt.designs import DesignType, design_type
from tiltopt.errors import PriorError, StoreError
from tiltopt.online.engine.base import Engine
from tiltopt.online.queries import Ask, Start
from tiltopt.online.report.sight import Sight, in_spreads
from tiltopt.online.seeds import generator
from tiltopt.online.settings.run import Settings
from tiltopt.online.store import files
from tiltopt.online.store.latents import read_latents
from tiltopt.online.store.store import Store
from tiltopt.surrogates.acquisition import make_acquisition

MOST_PARENTS = 32
"""Answered designs of a prompt, the best of them, that a query may start from: the 33rd would have e^-11 of the weight
of the first."""
BLIND = (
    "the features do not show what is rewarded, or too few answers have come to see it. Queries of this round start "
    "from the best answers and from noise, unguided (search.fallback); `tiltopt features` ranks what features there are"
)
"""What to tell people of a round that was not guided."""


def start_queries(
    store: Store,
    engine: Engine,
    settings: Settings,
    folder: Path,
    model: Model,
    asks: Sequence[Ask],
    seen: Sight | None = None,
) -> tuple[tuple[Ask, ...], list[str]]:
    """The asks of a tilted round, each with what it starts from, and notes for people.

    A query starts from answered designs of its own prompt; where there is none, it starts from noise. Where guidance
    turned out to be blind, queries take turns: re-noised from answered designs, from noise, either way the best of a
    few and unguided.

    Args:
        seen: what the answers so far say of the features.
    """
    enterable = settings.prior.num_steps > 1  # half-way, as designs of earlier ones are started from
    blind = settings.search.fallback and enterable and seen is not None and seen.blind
    operators = settings.search.operators.split("+")
    if operators == ["global"] and not blind:
        return tuple(asks), []
    answered = store.frame().query("state == 'answered'").dropna(subset=["value"])
    arms = tally(answered, {record.round: record.kind for record in store.rounds()}, operators)
    families = _Families(store, answered, model, settings.search.parents)
    drafts: list[tuple[Ask, Start | None]] = []
    for ask in asks:
        rng = generator(settings.seed, "search", ask.round, ask.index)
        operator = "pool" if blind else choose(arms, settings.search.floor, rng)
        pool = settings.sampler.num_particles if blind else settings.search.pool  # at no higher cost
        strength = _uniform(settings.search.low_strength, settings.search.high_strength, rng)
        k0 = engine.level_of(strength)
        parents, weights = families.of(ask.prompt, rng)
        begins = operator != "global" and k0 > 0 and len(parents) > 0 and not (blind and ask.index % 2)
        start = Start(operator, parents, weights, torch.empty(0), k0, pool) if begins else None
        if blind and not begins:
            start = Start("pool", (), (), torch.empty(0), 0, pool)
        drafts.append((ask, start))
    wanted = sorted({number for _, start in drafts if start for number in start.parents})
    latents, notes = latents_of(store, engine, folder, design_type(settings.design), wanted)
    if blind:
        notes = [f"{seen}: {BLIND}", *notes]
    return tuple(replace(ask, start=_with_latents(start, latents)) for ask, start in drafts), notes


def _with_latents(start: Start | None, latents: Mapping[int, Tensor]) -> Start | None:
    """The start with the latents of those of its parents that have some; None where none of them has."""
    if start is None or not start.parents:
        return start
    kept = [i for i, number in enumerate(start.parents) if number in latents]
    if not kept:
        return None
    parents, weights = tuple(start.parents[i] for i in kept), tuple(start.weights[i] for i in kept)
    return replace(
        start, parents=parents, weights=weights, latents=torch.stack([latents[number] for number in parents])
    )


def latents_of(
    store: Store, engine: Engine, folder: Path, kind: DesignType, numbers: Sequence[int]
) -> tuple[dict[int, Tensor], list[str]]:
    """Clean latents (*event) float32 of queries: those that were kept, else their designs encoded again.

    Returns:
        The latents of those that have any, and a note that names the others.
    """
    by_round: dict[int, list[int]] = {}
    for number in numbers:
        by_round.setdefault(store.get(number).round, []).append(number)
    found: dict[int, Tensor] = {}
    for round_, members in by_round.items():
        found |= read_latents(folder, round_, members)
    gone = []
    for number in numbers:
        if number not in found:
            try:
                found[number] = engine.latents([files.query_design(folder, number, kind)])[0]
            except (StoreError, PriorError):
                gone.append(number)
    if not gone:
        return found, []
    named = ", ".join(map(str, gone[:8])) + (", ..." if len(gone) > 8 else "")
    return found, [f"neither latents nor designs are left of {len(gone)} queries ({named}); nothing started from them."]


# ---- which operator


@dataclass(frozen=True)
class Arm:
    """What an operator has brought: the mean of (answer - prompt mean) / sd over its queries, and their number.

    Args:
        name: of the operator.
        mean: what the next of its queries is expected to bring, standard deviations of the prior's answers.
        count: its answered queries.
    """

    name: str
    mean: float
    count: int


def tally(answered: pd.DataFrame, kinds: Mapping[int, str], operators: Sequence[str]) -> list[Arm]:
    """What each operator has brought in the tilted rounds, by `tiltopt.online.report.sight.in_spreads`.

    The mean of an operator is shrunk to that of all tilted answers by one answer's worth, so that one that was hardly
    tried counts for no better and no worse than the rest.

    Args:
        answered: queries with values: columns `round prompt value operator`.
        kinds: of the rounds.
        operators: names.
    """
    scores, of = in_spreads(answered, kinds), answered["round"].map(kinds)
    tilted = answered[of == "tilted"]
    scores = scores[of == "tilted"].to_numpy()
    middle = float(scores.mean()) if len(scores) else 0.0
    arms = []
    for name in operators:
        own = scores[(tilted["operator"] == name).to_numpy()]
        arms.append(Arm(name, (float(own.sum()) + middle) / (len(own) + 1), len(own)))
    return arms


def choose(arms: Sequence[Arm], floor: float, rng: Generator) -> str:
    """The operator of one query: with probability `floor` for each any of them, else the best of a Thompson draw.

    What the next query of an operator brings on average is N(mean, 1 / (count + 1)): the posterior under unit noise.
    """
    u = float(torch.rand(1, generator=rng, dtype=torch.float64))
    at_random = int(torch.randint(len(arms), (1,), generator=rng))
    z = torch.randn(len(arms), generator=rng, dtype=torch.float64).tolist()
    if u < floor * len(arms):
        return arms[at_random].name
    promised = [arm.mean + draw / math.sqrt(arm.count + 1) for arm, draw in zip(arms, z, strict=True)]
    return arms[promised.index(max(promised))].name


def _uniform(low: float, high: float, rng: Generator) -> float:
    return low + (high - low) * float(torch.rand(1, generator=rng, dtype=torch.float64))


# ---- which parents


def rank_weights(values: Tensor, scale: float = 3.0) -> Tensor:
    """Weights of parents by the rank of their answers, exp(-rank / scale), best first; ties share the better rank.

    Args:
        values: (m,) answers, higher is better.

    Returns:
        (m,) float64, of sum 1.
    """
    rank = (values[None] > values[:, None]).sum(dim=1).double()
    return torch.softmax(-rank / scale, dim=0)


class _Families:
    """The answered designs of each prompt, and how much each of them is wanted as a parent.

    Args:
        store: of the run.
        answered: queries with values: columns `id prompt value`.
        model: the round's surrogate.
        rule: "rank" or "thompson".
    """

    def __init__(self, store: Store, answered: pd.DataFrame, model: Model, rule: str) -> None:
        self._store, self._model, self._rule = store, model, rule
        self._by_prompt = {str(prompt): rows for prompt, rows in answered.groupby("prompt")}

    def of(self, prompt: str, rng: Generator) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Parents and their weights for one query; none where the prompt has no answered design."""
        rows = self._by_prompt.get(prompt)
        if rows is None:
            return (), ()
        numbers = rows["id"].tolist()
        if self._rule == "thompson":
            draw = make_acquisition("thompson", self._model, generator=rng)
            with torch.no_grad():
                best = int(draw(self._store.vectors_of(numbers).unsqueeze(-2)).argmax())
            return (numbers[best],), (1.0,)
        weights = rank_weights(torch.tensor(rows["value"].to_numpy(dtype=float)))
        order = weights.argsort(descending=True, stable=True)[:MOST_PARENTS].tolist()
        return tuple(numbers[i] for i in order), tuple(float(weights[i]) for i in order)
