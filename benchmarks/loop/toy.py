"""An engine whose drawing costs next to nothing, and runs with many answers: what is left is the loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from botorch.models.model import Model
from PIL import Image
from torch import Tensor

from benchmarks.loop.stopwatch import Stopwatch
from tiltopt import surrogates
from tiltopt.designs import to_images
from tiltopt.online.hooks import OnStep
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import Ask, Drawn, NewQuery, Observations, Plan, RoundRecord
from tiltopt.online.seeds import generator, query_seed
from tiltopt.online.store import files
from tiltopt.online.store.features import pack
from tiltopt.online.team import Team

SIDE = 64
"""Pixels of a made image."""


class ToyEngine:
    """Designs are noise, features a vector drawn from the query's seed; the surrogate is the real linear one, on two
    blocks of features, as in the demo.

    Args:
        width: d, numbers per feature vector.
        clock: where the seconds of drawing ("draw") and fitting ("fit") go.
    """

    feature_id = "toy"

    def __init__(self, width: int, clock: Stopwatch) -> None:
        self.width = self.num_features = width
        first = max(1, width // 6)
        self.blocks = (first, width - first)
        self.clock = clock
        self.team = Team()

    def draw_plain(self, asks: Sequence[Ask], on_step: OnStep | None = None) -> list[Drawn]:
        with self.clock.over("draw"):
            return [Drawn(made_image(ask.seed), made_features(ask.seed, self.width)) for ask in asks]

    def fit(self, data: Observations, round_: int) -> Model:
        with self.clock.over("fit"):
            source = generator(0, "fit", round_)
            return surrogates.fit("linear", data.X, data.Y, sem=data.sem, generator=source, blocks=self.blocks)

    def draw(
        self,
        model: Model,
        data: Observations,
        asks: Sequence[Ask],
        plan: Plan,
        on_step: OnStep | None = None,
    ) -> list[Drawn]:
        with self.clock.over("draw"), torch.no_grad():
            X = torch.stack([made_features(ask.seed, self.width) for ask in asks])
            posterior: Any = model.posterior(X.double().unsqueeze(-2))
            mean, sd = posterior.mean.flatten().tolist(), posterior.variance.flatten().sqrt().tolist()
            return [
                Drawn(made_image(ask.seed), X[i], mean[i], sd[i], mean[i] + plan.beta * sd[i], 1.0, 0.0)
                for i, ask in enumerate(asks)
            ]

    def features(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.stack([made_features(i, self.width) for i in range(len(images))])

    def share_model(self, model: Model | None) -> Model:
        assert model is not None
        return model

    def describe(self) -> dict[str, Any]:
        return {"engine": "toy", "width": self.width}


def made_image(seed: int) -> Image.Image:
    """Grey noise of `SIDE` x `SIDE` pixels."""
    levels = torch.rand(1, 1, SIDE, SIDE, generator=generator(seed, "image"))
    return to_images(levels.expand(1, 3, SIDE, SIDE))[0]


def made_features(seed: int, width: int) -> Tensor:
    """(width,) float32."""
    return torch.randn(width, generator=generator(seed, "features"))


def answer(features: Tensor) -> float:
    """The reward: the mean of the first half of the features, with a little curvature."""
    x = features.double()
    return float(x[: len(x) // 2 + 1].mean() + 0.1 * x[-1].square())


def settings(folder: Path, batch: int) -> dict[str, Any]:
    """Settings of a run that tilts from its second round on, and adapts its price to every score so far."""
    return {
        "run_dir": str(folder),
        "batch_size": batch,
        "initial_batch_size": 2,
        "sampler": {"alpha": 0.1},
        "acquisition": {"adapt": True},
        "search": {"fallback": False},  # its designs follow no guidance, as a run would notice
    }


def fill(folder: Path, count: int, batch: int, width: int) -> None:
    """A run with `count` answered queries in rounds of `batch`, as its own loop would have left it.

    Rows go in through the store, round by round; the newest has the copy. Images are not written.
    """
    engine = ToyEngine(width, Stopwatch())
    score = {"n": batch, "nll": 1.0, "coverage90": 0.9, "kendall_tau": 0.3, "mean_gap": 0.0, "mean_gap_se": 0.1}
    source = generator(0, "fill")
    with Optimizer.create(folder, settings(folder, batch), engine=engine) as run:
        for round_, first in enumerate(range(1, count + 1, batch)):
            size = min(batch, count + 1 - first)
            X = torch.randn(size, width, generator=source)
            new = [
                NewQuery(first + i, i, "a cat", query_seed(0, round_, i), pack(X[i]), 0.0, 1.0, 0.5, 1.0, 0.0)
                for i in range(size)
            ]
            answers = {first + i: (answer(X[i]), None) for i in range(size)}
            known = {"alpha": 0.1, "beta": 2.0, "score": score} if round_ else {}
            record = RoundRecord(round_, "tilted" if round_ else "plain", size, **known)  # type: ignore[arg-type]
            run.store.add_round(record, new, engine.feature_id, answers)
        run.checkpoint()


def write_images(folder: Path, count: int) -> None:
    """Images of the first `count` queries."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(1, count + 1):
        made_image(number).save(files.image_path(folder, number))
