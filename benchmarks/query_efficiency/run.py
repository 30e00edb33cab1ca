"""One cell: run a method on a reward within a budget, and say how each round went."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.query_efficiency.cells import Cell
from benchmarks.query_efficiency.fast_direct import MeanField, follow, guided, paths
from benchmarks.query_efficiency.finetuned import FineTuned, training_evaluations
from benchmarks.query_efficiency.measure import Measures
from benchmarks.query_efficiency.methods import (
    ALPHA_PER_SD,
    FIXED_PRICE,
    METHODS,
    Rivals,
    evaluations_of,
    settings_of,
)
from benchmarks.query_efficiency.noise import CMAES, Search, TurboNoise, denoise
from benchmarks.query_efficiency.plain import CachedPlain, plain_asks
from tiltopt.designs import to_images
from tiltopt.online.engine.diffusion import DiffusionEngine
from tiltopt.online.loop import run
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.seeds import derive, generator
from tiltopt.online.settings.run import Settings
from tiltopt.rewards import make_reward
from tiltopt.rewards.base import BlackBox


@dataclass(frozen=True)
class Round:
    """What a round counts: its images (for best-of-N, the best so far), and the best answer up to it."""

    queries: int
    images: list[Image.Image]
    prompts: list[str]
    values: list[float]
    best: float


@dataclass(frozen=True)
class Workshop:
    """Where cells are worked on.

    Args:
        folder: for runs under way and for the plain samples that methods share.
        overrides: changes of the settings of every method, as `key=value`.
        rivals: settings of the rivals.
        measures: of images.
    """

    folder: Path
    overrides: tuple[str, ...] = ()
    rivals: Rivals = field(default_factory=Rivals)
    measures: Measures = field(default_factory=Measures)


def run_cell(cell: Cell, shop: Workshop) -> dict[str, Any]:
    """Run a cell, or finish one that was interrupted, and return its line for the results file."""
    folder = shop.folder / "runs" / cell.folder
    settings = settings_of(cell, folder, 1.0, shop.overrides, shop.rivals)
    black_box = make_reward(settings.reward.name, **settings.reward.options)
    alpha: float | None = None
    if METHODS[cell.method].config is not None:
        if cell.method in FIXED_PRICE:
            alpha = price(cell, settings, black_box, shop)
            settings = settings_of(cell, folder, alpha, shop.overrides, shop.rivals)
        rounds, seconds = run_loop(cell, settings, black_box, shop)
    elif cell.method in ("cma_es", "turbo"):
        rounds, seconds = run_noise(cell, settings, black_box, shop.rivals.subspace)
    elif cell.method == "fast_direct":
        rounds, seconds = run_fast_direct(cell, settings, black_box, shop.rivals.step)
    else:
        rounds, seconds = run_plain(cell, settings, black_box, shop)
    return line(cell, settings, rounds, seconds, alpha, shop.measures)


def line(
    cell: Cell, settings: Settings, rounds: Sequence[Round], seconds: float, alpha: float | None, measures: Measures
) -> dict[str, Any]:
    """A finished cell as plain JSON."""
    table = [
        {
            "queries": r.queries,
            "mean": statistics.fmean(r.values),
            "best": r.best,
            "kept": kept(cell, rounds[: i + 1]),
            "fidelity": measures.fidelity(r.images, r.prompts),
            "diversity": measures.diversity(r.images),
        }
        for i, r in enumerate(rounds)
    ]
    return {
        "reward": cell.reward,
        "method": cell.method,
        "seed": cell.seed,
        "budget": str(cell.budget),
        "prior": cell.prior,
        "rounds": table,
        "evaluations": evaluations_of(cell, settings),
        "of_training": cell.budget.rounds * training_evaluations(settings) if cell.method == "seiko_finetune" else 0,
        "seconds": round(seconds, 2),
        "alpha": alpha,
        "particles": settings.sampler.num_particles if METHODS[cell.method].config is not None else 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def kept(cell: Cell, rounds: Sequence[Round]) -> float:
    """Mean of the `batch` best answers of these rounds, whichever one they came from: what one would keep."""
    values = rounds[-1].values if cell.method == "best_of_n" else [v for r in rounds for v in r.values]
    return statistics.fmean(sorted(values, reverse=True)[: cell.budget.batch])


def scored(black_box: BlackBox, images: list[Image.Image], prompts: list[str]) -> list[float]:
    """The black box's answers."""
    return [float(value) for value in black_box(images, prompts)]


def price(cell: Cell, settings: Settings, black_box: BlackBox, shop: Workshop) -> float:
    """alpha: ALPHA_PER_SD standard deviations of the answers of round 0, reward units per nat."""
    engine = CachedPlain(settings, shop.folder / "plain", cell.prior)
    asks = plain_asks(settings, 0, cell.budget.sizes)
    drawn = engine.draw_plain(asks)
    sd = statistics.stdev(scored(black_box, [d.image for d in drawn], [a.prompt for a in asks]))
    return ALPHA_PER_SD * (sd if sd > 0 else 1.0)


def run_loop(cell: Cell, settings: Settings, black_box: BlackBox, shop: Workshop) -> tuple[list[Round], float]:
    """A method that is a configuration of the loop; an interrupted run is opened and continued."""
    folder = Path(settings.run_dir)
    engine = (FineTuned if cell.method == "seiko_finetune" else CachedPlain)(
        settings, shop.folder / "plain", cell.prior
    )
    exists = Optimizer.exists(folder)
    with (
        Optimizer.open(folder, config=settings, engine=engine)
        if exists
        else Optimizer.create(folder, settings, engine=engine)
    ) as optimizer:
        run(optimizer, black_box)
        frame = optimizer.queries()
        rounds = []
        for number in range(cell.budget.rounds + 1):
            rows = frame[(frame["round"] == number) & (frame["state"] == "answered")]
            images = [optimizer.image(i) for i in rows["id"]]
            so_far = frame[frame["round"] <= number]
            best = float(so_far["value"].max())
            rounds.append(Round(len(so_far), images, list(rows["prompt"]), [float(v) for v in rows["value"]], best))
        records = optimizer.store.rounds()
    seconds = sum(r.answer_seconds for r in records) + sum(r.ask_seconds for r in records[1:])
    return rounds, seconds + engine.plain_seconds(plain_asks(settings, 0, cell.budget.sizes))


def run_plain(cell: Cell, settings: Settings, black_box: BlackBox, shop: Workshop) -> tuple[list[Round], float]:
    """Prior samples; for best-of-N, each round counts the `batch` best of all the samples so far."""
    engine = CachedPlain(settings, shop.folder / "plain", cell.prior)
    images: list[Image.Image] = []
    prompts: list[str] = []
    values: list[float] = []
    rounds, seconds = [], 0.0
    for number, size in enumerate(cell.budget.sizes):
        asks = plain_asks(settings, number, cell.budget.sizes)
        images += [d.image for d in engine.draw_plain(asks)]
        prompts += [a.prompt for a in asks]
        seconds += engine.plain_seconds(asks)
        values += scored(black_box, images[-size:], prompts[-size:])
        if cell.method == "best_of_n":
            keep = sorted(range(len(values)), key=values.__getitem__, reverse=True)[: cell.budget.batch]
        else:
            keep = list(range(len(values) - size, len(values)))
        chosen = ([column[i] for i in keep] for column in (images, prompts, values))
        rounds.append(Round(len(values), *chosen, max(values)))
    return rounds, seconds


def run_noise(cell: Cell, settings: Settings, black_box: BlackBox, subspace: int) -> tuple[list[Round], float]:
    """CMA-ES or TuRBO over the initial noise of the prior at eta = 0, on the prompts that every method is asked."""
    started = time.monotonic()
    prior = DiffusionEngine(dataclasses.replace(settings, prior=dataclasses.replace(settings.prior, eta=0.0))).prior
    dim, seed = prior.event_shape.numel(), derive(cell.seed, cell.method) % 2**32
    search: Search = CMAES(dim, cell.budget.batch, seed) if cell.method == "cma_es" else TurboNoise(dim, seed, subspace)
    rounds: list[Round] = []
    for number, size in enumerate(cell.budget.sizes):
        prompts = [ask.prompt for ask in plain_asks(settings, number, cell.budget.sizes)]
        images = denoise(prior, search.ask(size), prompts, settings.micro_batch)
        values = scored(black_box, images, prompts)
        search.tell(torch.tensor(values, dtype=torch.float64))
        best = max([*values, *(r.best for r in rounds)])
        rounds.append(Round(sum(cell.budget.sizes[: number + 1]), images, prompts, values, best))
    return rounds, time.monotonic() - started


def run_fast_direct(cell: Cell, settings: Settings, black_box: BlackBox, step: float) -> tuple[list[Round], float]:
    """Fast Direct over the noise paths of the prior, on the prompts that every method is asked."""
    started = time.monotonic()
    prior, rows = DiffusionEngine(settings).prior, settings.micro_batch
    X, y = torch.empty(0, prior.event_shape.numel()), torch.empty(0, dtype=torch.float64)
    rounds: list[Round] = []
    for number, size in enumerate(cell.budget.sizes):
        asks = plain_asks(settings, number, cell.budget.sizes)
        field = MeanField.fit(X, y) if number else None
        found = []
        for start in range(0, size, rows):
            here = asks[start : start + rows]
            cond = prior.encode([ask.prompt for ask in here])
            path = paths(prior, [generator(ask.seed, "path") for ask in here])
            found.append(follow(prior, path, cond) if field is None else guided(prior, path, cond, field, number, step))
        latents = torch.cat(found)
        with torch.no_grad():
            images = [image for part in latents.split(rows) for image in to_images(prior.decode(part))]
        prompts = [ask.prompt for ask in asks]
        values = scored(black_box, images, prompts)
        X = torch.cat([X, latents.flatten(1).float().cpu()])
        y = torch.cat([y, torch.tensor(values, dtype=torch.float64)])
        best = max([*values, *(r.best for r in rounds)])
        rounds.append(Round(len(y), images, prompts, values, best))
    return rounds, time.monotonic() - started
