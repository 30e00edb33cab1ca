"""What draws the designs of a run: the seam between the durable loop and the models behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from botorch.models.model import Model
from torch import Tensor

from tiltopt.online.hooks import OnStep
from tiltopt.online.queries import Ask, Drawn, Observations, Plan
from tiltopt.online.team import Team


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

    @property
    def num_features(self) -> int:
        """d, the length of the feature vectors."""
        ...

    def draw_plain(self, asks: Sequence[Ask], on_step: OnStep | None = None) -> list[Drawn]:
        """Plain samples of the prior, or of what an ask starts from, in order, on every rank.

        `on_step(done, total)` counts denoising steps.
        """
        ...

    def fit(self, data: Observations, round_: int) -> Model:
        """The surrogate of a round, on all data; deterministic in (settings.seed, round, data). Rank 0 only."""
        ...

    def draw(
        self,
        model: Model,
        data: Observations,
        asks: Sequence[Ask],
        plan: Plan,
        on_step: OnStep | None = None,
    ) -> list[Drawn]:
        """Samples of the tilted prior, in order, on every rank (which all hold the same `model` and `data`)."""
        ...

    def features(self, designs: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """(n, d) float32 features of designs, for measurements that come from elsewhere."""
        ...

    def latents(self, designs: Sequence[Any]) -> Tensor:
        """(n, *event) float32 on the CPU, clean latents of designs."""
        ...

    def level_of(self, strength: float) -> int:
        """The step at which the prior's chain is entered for a strength in (0, 1]; 0, which is noise, for 1."""
        ...

    def share_model(self, model: Model | None) -> Model:
        """Rank 0's surrogate, on every rank."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, model sizes and identities, for the run's record."""
        ...
