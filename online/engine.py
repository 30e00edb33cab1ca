"""What draws the designs of a run: the seam between the durable loop and the models behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from botorch.models.model import Model
from PIL import Image
from torch import Tensor

from tiltopt.online.team import Team


@dataclass(frozen=True)
class Ask:
    """A query to be drawn: its number in the run (from 1), its place in its round, its prompt and its seed."""

    number: int
    round: int
    index: int
    prompt: str
    seed: int


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one `Ask`.

    Args:
        image: the 8-bit image that the black box sees.
        features: (d,) float32 on the CPU, the feature map of exactly that image.
        predicted: posterior mean of the reward at `features`, reward units; None for plain samples.
        predicted_sd: posterior standard deviation, reward units; None for plain samples.
        acquired: acquisition value at `features`, reward units; None for plain samples and for acquisitions that are
            not in reward units (log-EI).
        ess: effective sample size of the query's particles, in [1, num_particles]; None for plain samples.
        log_z: estimate of log E_prior[G] for the query, nats; None for plain samples.
        alpha: price of leaving the prior that was used, reward units per nat; None for plain samples.
    """

    image: Image.Image
    features: Tensor
    predicted: float | None = None
    predicted_sd: float | None = None
    acquired: float | None = None
    ess: float | None = None
    log_z: float | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Data:
    """Every answer so far, in the order of query numbers.

    Args:
        X: (n, d) float64 features.
        Y: (n, 1) float64 rewards.
        sem: (n, 1) float64 standard errors of the answers, or None when no answer came with one.
        pending: (m, d) float64 features of queries that are asked and not yet answered; m may be 0.
        comparisons: (c, 2) int64, rows (i, j): row i of X was preferred to row j, and Y is empty; None in a run whose
            answers are values.
        failed: (f, d) float64 features of queries whose evaluation failed; None reads as none.
    """

    X: Tensor
    Y: Tensor
    sem: Tensor | None
    pending: Tensor
    comparisons: Tensor | None = None
    failed: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How a round is drawn beyond the surrogate: the price of leaving the prior and the optimism of the acquisition."""

    alpha: float | None
    beta: float
    notes: tuple[str, ...] = field(default_factory=tuple)


class Engine(Protocol):
    """Draws designs and fits surrogates. Collective: every rank calls `draw_plain` and `draw` with the same asks."""

    @property
    def team(self) -> Team:
        """The processes that draw together."""
        ...

    @property
    def feature_id(self) -> str:
        """Names the feature map; stored with the run and with every surrogate."""
        ...

    def draw_plain(self, asks: Sequence[Ask], progress: Callable[[int, int], None] | None = None) -> list[Drawn]:
        """Plain samples of the prior, in order, on every rank. `progress(done, total)` counts denoising steps."""
        ...

    def fit(self, data: Data, round_: int) -> Model:
        """The surrogate of a round, on all data; deterministic in (settings.seed, round, data). Rank 0 only."""
        ...

    def draw(
        self,
        model: Model,
        data: Data,
        asks: Sequence[Ask],
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Drawn]:
        """Samples of the tilted prior, in order, on every rank (which all hold the same `model` and `data`)."""
        ...

    def features(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(n, d) float32 features of images, for measurements that come from elsewhere."""
        ...

    def share_model(self, model: Model | None) -> Model:
        """Rank 0's surrogate, on every rank."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, model sizes and identities, for the run's record."""
        ...
