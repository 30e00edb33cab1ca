"""One cell: pictures made by one method at one strength for one reward, and what is said of them."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.frontier.finetune import Training, backpropagation, policy_gradient
from benchmarks.frontier.lora import LoRAPolicy
from benchmarks.frontier.methods import EVALUATIONS, METHODS, RANK, evaluations, learning, particles, sampler_of
from benchmarks.query_efficiency.measure import spread
from benchmarks.query_efficiency.planted import Planted
from tiltopt.designs import to_images
from tiltopt.online.evaluation.judge import Judge, fidelity
from tiltopt.online.seeds import generator, query_seed
from tiltopt.online.settings.prompts import fill, load_prompts
from tiltopt.rewards.differentiable import make_differentiable
from tiltopt.samplers import PriorOnly, Sampler
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior
from tiltopt.samplers.twisted import Tempered
from tiltopt.surrogates.features import FeatureMap, make_features
from tiltopt.types import Conditioning

REWARDS = ("planted", "colorfulness", "clip")
"""What is reported: a nonlinear function of a random network, planted as an aesthetic predictor is; colours; CLIP."""
TUNING, TUNING_SEED = "planted_tuning", 100
"""What settings are chosen on: another planted function, on prompts and seeds of its own."""
PLAIN = 32
"""Plain samples whose deviation is the unit of a reward's price."""
ROWS = 32
"""Of a network call."""


class Cell(NamedTuple):
    """Where a number belongs. `prior` names the weights."""

    reward: str
    method: str
    seed: int
    strength: float
    variant: str
    prior: str

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        """As `benchmarks.query_efficiency.cells.key_of` reads it from a line."""
        return self.reward, self.method, self.seed, f"{self.strength:g}/{self.variant}", self.prior

    @property
    def job(self) -> tuple[Any, ...]:
        """Cells of one job are made together."""
        return self._replace(strength=0.0) if METHODS[self.method].together else self


@dataclass(frozen=True)
class Workshop:
    """Models and measures.

    Args:
        path: of the prior. clip: of the CLIP model.
        num_steps: of the chain. dtype: of the network.
        prompts: of a cell; pictures: of each prompt.
        folder: remembers the units of rewards.
    """

    folder: Path
    path: str = "embedded"
    clip: str = "embedded"
    num_steps: int = 12
    dtype: str = "bfloat16"
    prompts: int = 4
    pictures: int = 3

    def fresh_prior(self) -> DiffusersPrior:
        """A prior that nobody else holds."""
        return load_prior(self.path, num_steps=self.num_steps, guidance_scale=4.0, dtype=self.dtype)

    @cached_property
    def prior(self) -> DiffusersPrior:
        return self.fresh_prior()

    @cached_property
    def judge(self) -> Judge:
        return Judge.load()

    @cached_property
    def features(self) -> FeatureMap:
        return make_features(path=self.clip, kind="projection")

    @cached_property
    def rewards(self) -> Mapping[str, Callable[[Tensor, Sequence[str]], Tensor]]:
        """Designs and prompts -> (n,), differentiable."""
        return {
            "planted": Planted(seed=2).score,
            "colorfulness": make_differentiable("colorfulness"),
            "clip": make_differentiable("clip", clip=self.clip),
            TUNING: Planted(seed=1).score,
        }

    @property
    def size(self) -> int:
        """Pictures of a cell."""
        return self.prompts * self.pictures

    def words(self, seed: int) -> list[str]:
        """The prompt of each picture: other animals for every seed."""
        nouns = load_prompts("simple_animals")
        first = seed * self.prompts
        chosen = [fill("a {}", nouns[(first + i) % len(nouns)]) for i in range(self.prompts)]
        return [word for word in chosen for _ in range(self.pictures)]

    def unit(self, reward: str) -> float:
        """Standard deviation of the reward over plain samples of animals and seeds that no cell uses."""
        place = self.folder / f"units_{self.num_steps}.json"
        known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        if reward not in known:
            nouns = load_prompts("simple_animals")
            prompts = [fill("a {}", nouns[i % len(nouns)]) for i in range(PLAIN)]
            made = _sample(PriorOnly(micro_batch=ROWS), self.prior, None, prompts, 1, seed=10**6)
            designs = made.designs[:, 0]
            with torch.no_grad():
                known = {name: float(score(designs, prompts).double().std()) for name, score in self.rewards.items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(known), encoding="utf-8")
        return float(known[reward])


def run_job(cells: Sequence[Cell], shop: Workshop) -> Iterator[dict[str, Any]]:
    """The lines of the cells of one job, each as soon as it is known, weakest first."""
    cells = sorted(cells, key=lambda cell: cell.strength)
    kind = METHODS[cells[0].method].kind
    if kind == "train":
        yield from _train(cells, shop)
    elif kind == "chains":
        yield from _best(cells, shop)
    else:
        for cell in cells:
            yield _draw(cell, shop)


def _draw(cell: Cell, shop: Workshop) -> dict[str, Any]:
    """A sampler's cell."""
    started, prior, prompts = time.process_time(), shop.prior, shop.words(cell.seed)
    sampler = sampler_of(cell.method, cell.variant, cell.strength)
    potential, score = None, shop.rewards[cell.reward]
    if METHODS[cell.method].kind != "plain":
        price = cell.strength if METHODS[cell.method].kind == "price" else 1.0
        alpha = price * shop.unit(cell.reward)
        potential = lambda designs, cond: score(designs, cond.prompts) / alpha  # noqa: E731
    number = particles(cell.method, cell.strength, sampler, prior, shop.size)
    spent = learning(sampler, prior) / shop.size + number * evaluations(sampler.work(prior), prior)  # type: ignore[attr-defined]
    sampler = dataclasses.replace(sampler, micro_batch=ROWS)  # type: ignore[type-var]
    if isinstance(sampler, Tempered) and sampler.needs_pilot and potential is not None:
        pilot = sampler.run_pilot(prior, prior.encode(list(dict.fromkeys(prompts))))
        sampler = sampler.calibrate(prior, potential, pilot)
    made = _sample(sampler, prior, potential, prompts, number, cell.seed)
    if cell.method == "guidance":  # at equal evaluations it may make several chains, of which the best is kept
        with torch.no_grad():
            values = torch.stack([score(made.designs[:, p], prompts) for p in range(number)], dim=1)
        picked = values.argmax(1)
    else:
        chosen = [generator(query_seed(cell.seed, 0, i), "select") for i in range(len(prompts))]
        rule = getattr(sampler, "select", "draw")
        picked = made.pick(rule, chosen)[:, 0]
    designs = made.designs[torch.arange(len(prompts)), picked]
    ess = float(made.ess.mean()) if cell.method not in ("prior", "guidance", "demon") else None
    return _line(cell, shop, designs, prompts, spent, time.process_time() - started, {"particles": number, "ess": ess})


def _best(cells: Sequence[Cell], shop: Workshop) -> Iterator[dict[str, Any]]:
    """The best by reward of the first so many of the same plain chains."""
    first, started = cells[0], time.process_time()
    prior, prompts, score = shop.prior, shop.words(first.seed), shop.rewards[first.reward]
    sampler = dataclasses.replace(sampler_of(first.method, first.variant, first.strength), micro_batch=ROWS)  # type: ignore[type-var]
    most = int(max(METHODS[first.method].strengths))
    made = _sample(sampler, prior, lambda x, cond: score(x, cond.prompts), prompts, most, first.seed)
    for cell in cells:
        number = int(cell.strength)
        designs = made.designs[torch.arange(len(prompts)), made.log_w[:, :number].argmax(1)]
        spent = number * evaluations(sampler.work(prior), prior)  # type: ignore[attr-defined]
        more = {"particles": number, "ess": None}
        yield _line(cell, shop, designs, prompts, spent, time.process_time() - started, more)


def _sample(
    sampler: Sampler, prior: DiffusersPrior, potential: Any, prompts: Sequence[str], number: int, seed: int
) -> Any:
    generators = [generator(query_seed(seed, 0, i), "sample") for i in range(len(prompts))]
    return sampler.sample(prior, potential, prior.encode(prompts), num_particles=number, generators=generators)


def _train(cells: Sequence[Cell], shop: Workshop) -> Iterator[dict[str, Any]]:
    """A training of which every strength is a checkpoint: it draws the cell's pictures, and goes on."""
    first, started = cells[0], time.process_time()
    source = generator(query_seed(first.seed, 0, 0), "train")
    policy = LoRAPolicy(shop.fresh_prior(), RANK, source)
    prior, score, unit = policy.prior, shop.rewards[first.reward], shop.unit(first.reward)
    prompts = shop.words(first.seed)
    training = Training(**METHODS[first.method].variants[first.variant])
    method = policy_gradient if first.method == "policy_gradient" else backpropagation
    conds = _batches(prior, list(dict.fromkeys(prompts)), training.batch)

    def reward(x: Tensor, cond: Conditioning) -> Tensor:
        return score(prior.decode(x), cond.prompts) / unit

    spent, updates = 0, method(policy, reward, conds, training, source)
    for cell in cells:
        own = cell.strength * EVALUATIONS * shop.size - prior.num_steps * shop.size  # less what drawing will cost
        while spent < own:
            spent = next(updates)
        with torch.no_grad():
            made = _sample(PriorOnly(micro_batch=ROWS), prior, None, prompts, 1, cell.seed)
        each = spent / shop.size + prior.num_steps
        yield _line(cell, shop, made.designs[:, 0], prompts, each, time.process_time() - started, {"ess": None})


def _batches(prior: DiffusersPrior, prompts: Sequence[str], batch: int) -> Iterator[Conditioning]:
    """The prompts of the cell in turn."""
    cond, turn = prior.encode(prompts), itertools.count()
    while True:
        yield cond.select([next(turn) % len(prompts) for _ in range(batch)])


def _line(
    cell: Cell,
    shop: Workshop,
    designs: Tensor,
    prompts: Sequence[str],
    spent: float,
    seconds: float,
    more: dict[str, Any],
) -> dict[str, Any]:
    with torch.no_grad():
        values = {name: float(shop.rewards[name](designs, prompts).mean()) for name in {*REWARDS, cell.reward}}
        z = shop.features(designs)
    groups = [z[i : i + shop.pictures] for i in range(0, len(z), shop.pictures)]
    reward, method, seed, budget, weights = cell.key
    return {
        "reward": reward, "method": method, "seed": seed, "budget": budget, "prior": weights,
        "strength": cell.strength, "variant": cell.variant,
        "rewards": values,
        "fidelity": fidelity(shop.judge, to_images(designs), list(prompts)),
        "diversity": sum(map(spread, groups)) / len(groups),
        "evaluations": round(spent, 2),
        "pictures": len(prompts),
        "seconds": round(seconds, 2),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    } | more  # fmt: skip
