"""An engine small enough for tests of the loop: no network, exact surrogates, images of 8 x 8 pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from botorch.models.model import Model
from PIL import Image
from torch import Tensor

from tiltopt.online.engine.diffusion import DiffusionEngine
from tiltopt.online.hooks import OnStep
from tiltopt.online.queries import Ask, Drawn, Observations, Origin, Plan
from tiltopt.online.seeds import derive, generator
from tiltopt.online.team import Team
from tiltopt.surrogates.preference import fit_pairwise

WIDTH = 4
PARTICLES = 6


class FakeEngine:
    """A prior over 4 numbers in [0, 1], drawn from each query's seed and shown as the 4 quadrants of an image.

    Tilted samples are one of `PARTICLES` prior draws, taken with weights exp(acquisition / alpha). The latents of an
    image are its 4 numbers; a restart at step k mixes those of a parent, chosen by weight, with a prior draw.
    """

    feature_id = "toy"
    num_features = WIDTH
    num_steps = 10  # of the chain that it claims to have

    def __init__(self, team: Team | None = None, seed: int = 0) -> None:
        self.team = team if team is not None else Team()
        self.seed = seed
        self.seen: list[Observations] = []  # what each fit was given

    def draw_plain(self, asks: Sequence[Ask], on_step: OnStep | None = None) -> list[Drawn]:
        mine = [(i, self._drawn(*(each[0] for each in begun(ask, 1)))) for i, ask in self.team.share(asks)]
        return self._all(mine, asks, on_step)

    def fit(self, data: Observations, round_: int) -> Model:
        from tiltopt import surrogates

        self.seen.append(data)
        if data.comparisons is not None:
            return fit_pairwise(data.X, data.comparisons, data.choices)
        return surrogates.fit("linear", data.X, data.Y, sem=data.sem, generator=generator(self.seed, "fit", round_))

    def draw(
        self,
        model: Model,
        data: Observations,
        asks: Sequence[Ask],
        plan: Plan,
        on_step: OnStep | None = None,
    ) -> list[Drawn]:
        mine = [(i, self._tilted(model, ask, plan)) for i, ask in self.team.share(asks)]
        return self._all(mine, asks, on_step)

    def _tilted(self, model: Model, ask: Ask, plan: Plan) -> Drawn:
        drawn, origins = begun(ask, PARTICLES)
        X = torch.stack([features_of(to_image(p)) for p in drawn])
        with torch.no_grad():
            posterior = model.posterior(X.double()[:, None, :])
        mean, sd = posterior.mean.flatten(), posterior.variance.flatten().clamp_min(0).sqrt()
        acquired = mean + plan.beta * sd
        log_w = acquired / (0.2 if plan.alpha is None else plan.alpha)
        w = torch.softmax(log_w, 0)
        pooled = ask.start is not None and ask.start.operator == "pool"
        i = int(w.argmax() if pooled else torch.multinomial(w, 1, generator=generator(ask.seed, "select")))
        numbers = [
            float(t) for t in (mean[i], sd[i], acquired[i], 1 / (w**2).sum(), log_w.logsumexp(0) - np.log(PARTICLES))
        ]
        return Drawn(to_image(drawn[i]), X[i], *numbers, latents=drawn[i].half(), origin=origins[i])

    def _drawn(self, point: Tensor, origin: Origin) -> Drawn:
        image = to_image(point)
        return Drawn(image, features_of(image), latents=point.half(), origin=origin)

    def _all(self, mine: list[tuple[int, Drawn]], asks: Sequence[Ask], on_step: Any) -> list[Drawn]:
        if on_step is not None:
            on_step(1, 1)
        return self.team.collect(mine, len(asks))

    def features(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.stack([features_of(image) for image in images])

    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([features_of(image) for image in images])

    def level_of(self, strength: float) -> int:
        return round((1 - strength) * self.num_steps)

    share_model = DiffusionEngine.share_model  # through the saved form: a GP does not travel any other way

    def describe(self) -> dict[str, Any]:
        return {"engine": "toy"}


def begun(ask: Ask, n: int) -> tuple[Tensor, list[Origin]]:
    """(n, 4) draws of the law that a query starts from, and where each came from."""
    fresh, start = points(ask.seed, n), ask.start
    if start is None or not start.parents:
        return fresh, [Origin() if start is None else start.origin(0)] * n
    parents = torch.multinomial(torch.tensor(start.weights), n, True, generator=generator(ask.seed, "parents"))
    kept = start.k0 / FakeEngine.num_steps
    return kept * start.latents[parents] + (1 - kept) * fresh, [start.origin(i) for i in parents.tolist()]


def points(seed: int, n: int) -> Tensor:
    """(n, 4) prior draws of a query."""
    return torch.rand(n, WIDTH, generator=generator(seed, "points"))


def to_image(point: Tensor) -> Image.Image:
    """Four grey quadrants of 4 x 4 pixels."""
    levels = (point * 255).round().to(torch.uint8).reshape(2, 2).numpy()
    return Image.fromarray(np.kron(levels, np.ones((4, 4), dtype=np.uint8))).convert("RGB")


def features_of(image: Image.Image) -> Tensor:
    """(4,) float32 in [0, 1], exactly what the image shows."""
    pixels = np.asarray(image.convert("L"), dtype=np.float32)[::4, ::4].reshape(-1)
    return torch.from_numpy(pixels / np.float32(255.0))


def truth(image: Image.Image) -> float:
    """The reward: a linear function of the quadrants with a little curvature; its best value is 2.7."""
    x = features_of(image).double()
    return float(2.0 * x[0] + x[1] - 0.5 * x[2] - 0.3 * (x[3] - 0.5) ** 2)


class LoggedReward:
    """The truth as a black box that writes down, durably, every image it is shown."""

    name, unit, batch_size = "toy", "points", 1

    def __init__(self, log: Path | None = None) -> None:
        self.log = log

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        values = [truth(image) for image in images]
        if self.log is not None:
            with open(self.log, "a") as file:
                for image, prompt in zip(images, prompts, strict=True):
                    file.write(json.dumps([derive(0, image.tobytes().hex()), prompt]) + "\n")
        return values


CONFIG = {
    "seed": 3, "rounds": 2, "batch_size": 3, "initial_batch_size": 5, "sampler": {"alpha": 0.2},
    "acquisition": {"beta": 0.5}, "answer_noise": 0.1,
}  # fmt: skip
