"""Black-box optimisers over the initial noise of a deterministic sampler: no surrogate of designs, no guidance.

A point of the search is a direction; the noise is that direction scaled to the length sqrt(D) of a typical draw of
N(0, I) in D dimensions, so that a step of the optimiser does not leave the noise that the denoiser was trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from benchmarks.query_efficiency.turbo import Turbo
from tiltopt.designs import to_images
from tiltopt.samplers.prior import Prior


class Search(Protocol):
    """An optimiser of noises, higher is better."""

    def ask(self, n: int) -> Tensor:
        """(n, D) float64 noises on the sphere of radius sqrt(D)."""
        ...

    def tell(self, values: Tensor) -> None:
        """The values (n,) of the noises of the last `ask`."""
        ...


def typical(points: Tensor) -> Tensor:
    """Rows scaled to the length sqrt(D)."""
    return points * points.shape[1] ** 0.5 / points.norm(dim=1, keepdim=True).clamp_min(1e-300)


class CMAES:
    """CMA-ES with a diagonal covariance, from mean 0 and step 1: its first generation is the prior's own noise.

    A full covariance has D (D + 1) / 2 numbers to learn, far more than there are answers.

    Args:
        dim: D.
        batch: queries per round, the population; round 0 may be larger, and then selects more sharply.
        seed: of everything random.
    """

    def __init__(self, dim: int, batch: int, seed: int) -> None:
        import cma

        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {"popsize": batch, "CMA_diagonal": True, "verbose": -9, "verb_log": 0}
        options["AdaptSigma"] = cma.sigma_adaptation.CMAAdaptSigmaCSA  # the other rule spends two queries of each round
        options |= {"randn": lambda *shape: rng.standard_normal(shape), "seed": np.nan}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy = cma.CMAEvolutionStrategy(np.zeros(dim), 1.0, options)
        self._asked: list[np.ndarray] = []

    def ask(self, n: int) -> Tensor:
        """See `Search`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._asked = self._strategy.ask(number=n)
        return typical(torch.from_numpy(np.stack(self._asked)))

    def tell(self, values: Tensor) -> None:
        """See `Search`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a population of another size than announced
            self._strategy.tell(self._asked, (-values).tolist())


class TurboNoise:
    """TuRBO over a random subspace: noise = typical(G u), G Gaussian (D, s), u in [-1, 1]^s.

    For any u, over the draw of G, the noise is uniform on the sphere, like the prior's.

    Args:
        dim: D.
        seed: of the subspace and of the search.
        subspace: s.
    """

    def __init__(self, dim: int, seed: int, subspace: int) -> None:
        generator = Generator().manual_seed(seed)
        self._basis = torch.randn(subspace, dim, generator=generator, dtype=torch.float64)
        self._search = Turbo(subspace, seed)
        self._asked = torch.empty(0, subspace, dtype=torch.float64)

    def ask(self, n: int) -> Tensor:
        """See `Search`."""
        self._asked = self._search.ask(n)
        return typical((2 * self._asked - 1) @ self._basis)

    def tell(self, values: Tensor) -> None:
        """See `Search`."""
        self._search.tell(self._asked, values)


@torch.no_grad()
def denoise(prior: Prior, noise: Tensor, prompts: Sequence[str], batch: int) -> list[Image.Image]:
    """The images that a deterministic prior (eta = 0) makes of noises (n, D), one prompt each, `batch` at a time."""
    if any(prior.std(k) > 0 for k in range(prior.num_steps)):
        raise ValueError("the noise determines an image only when `eta` is 0; load the prior with eta=0.")
    images: list[Image.Image] = []
    for start in range(0, len(noise), batch):
        cond = prior.encode(list(prompts[start : start + batch]))
        x = noise[start : start + batch].float().view(-1, *prior.event_shape).to(getattr(prior, "device", "cpu"))
        for k in range(prior.num_steps):
            x = prior.reverse(k, x, cond).mean
        images += to_images(prior.decode(x))
    return images
