"""What the sampler is pointed at: an acquisition over the surrogate, how likely a design is to be of any use, and the
one place where these become a potential: log G(design) = acquisition(features(design)) / alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models.model import Model
from torch import Generator, Tensor

from tiltopt.online.queries import Objective, Observations, kept, maximised
from tiltopt.surrogates.acquisition import Acquisition, make_acquisition
from tiltopt.surrogates.feasibility import FeasibilityModel
from tiltopt.surrogates.several import SeveralModel, log_feasible
from tiltopt.types import Conditioning


@dataclass(frozen=True)
class AcquisitionPotential:
    """log G of a design, in nats: its acquisition value over the price of leaving the prior.

    The sampler then targets p(x) exp(acquisition(x) / alpha), the maximiser of E[acquisition] - alpha KL(. || p).
    With `feasible`, the target is multiplied by P(answer | features): it is the same maximiser over the designs that
    come back with an answer.

    Args:
        acquisition: BoTorch acquisition over (n, 1, d) features, in reward units.
        features: designs (n, 3, H, W) in [0, 1] and their prompts -> (n, d), differentiable.
        alpha: reward units per nat, > 0.
        feasible: log P(answer | features) of (n, d), nats; None: every design comes back.
    """

    acquisition: AcquisitionFunction
    features: Callable[[Tensor, Sequence[str]], Tensor]
    alpha: float
    feasible: Callable[[Tensor], Tensor] | None = None

    def __call__(self, designs: Tensor, cond: Conditioning) -> Tensor:
        """(n, *design) -> (n,) float64 nats."""
        return self.of_features(self.features(designs, cond.prompts))

    def of_features(self, features: Tensor) -> Tensor:
        """(n, d) -> (n,) float64 nats."""
        value = self.acquisition(features.double().unsqueeze(-2)) / self.alpha
        return value if self.feasible is None else value + self.feasible(features)


class Aim(NamedTuple):
    """An acquisition over features (n, 1, d), and log P(use | features) in nats; None: every design is of use."""

    acquisition: Acquisition
    feasible: Callable[[Tensor], Tensor] | None


def aim(
    name: str,
    model: Model,
    data: Observations,
    *,
    beta: float,
    generator: Generator,
    turn: int = 0,
    learn_failures: bool = False,
) -> Aim:
    """The acquisition called `name` of what is to be maximised, and the probability that all conditions are met.

    Args:
        model: fitted to `data`; of several objectives a `SeveralModel` with one surrogate for each.
        beta: optimism.
        generator: of everything random in the acquisition.
        turn: of the query whose acquisition it is, in the run.
        learn_failures: whether the probability that a design comes back with an answer counts too.
    """
    chances = []
    if isinstance(model, SeveralModel):
        conditions = [i for i, objective in enumerate(data.objectives) if objective.above is not None]
        if conditions:
            limits = [data.objectives[i].above or 0.0 for i in conditions]
            chances.append(log_feasible([model.models[i] for i in conditions], limits))
    if learn_failures and data.failed is not None and len(data.failed) and len(data.X):
        device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
        chances.append(FeasibilityModel.fit(data.X, data.failed).to(device).log_probability)
    acquisition = make_acquisition(
        name,
        model_of(model, data.objectives),
        beta=beta,
        best_f=_best(model, data),
        X_pending=data.pending if len(data.pending) else None,
        X_baseline=_useful(data),
        generator=generator,
        turn=turn,
        Y=(data.Y if data.first is None else data.first)[:, maximised(data.objectives)] if data.objectives else None,
        reference=data.reference,
    )
    return Aim(acquisition, _together(chances))


def model_of(model: Model, objectives: Sequence[Objective]) -> Model:
    """The surrogate of what is maximised: the only one, or those of several objectives."""
    return model.only(maximised(objectives)) if isinstance(model, SeveralModel) else model


def fit_several(name: str, data: Observations, generator: Generator, **options: Any) -> Model:
    """A surrogate for every objective. Raises what `tiltopt.surrogates.fit` does."""
    return SeveralModel.fit(name, data.X, data.Y, sem=data.sem, generator=generator, **options)


def _useful(data: Observations) -> Tensor:
    """Features of the answered designs that meet every condition; of all where none does."""
    use = kept(data.objectives, data.Y)
    return data.X[use] if data.objectives and bool(use.any()) else data.X


def _best(model: Model, data: Observations) -> float | None:
    """What an improvement is measured from: the best answer; of comparisons, the best utility of a query compared."""
    if data.comparisons is None:
        use = kept(data.objectives, data.Y)
        Y = data.Y[use] if bool(use.any()) else data.Y
        place = maximised(data.objectives)[0] if data.objectives else 0
        return float(Y[:, place].max()) if len(Y) else None
    with torch.no_grad():
        posterior: Any = model.posterior(data.X.unsqueeze(-2))
    return float(posterior.mean.max())


def _together(chances: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor] | None:
    if len(chances) < 2:
        return chances[0] if chances else None

    def log_p(X: Tensor) -> Tensor:
        total = chances[0](X)
        for chance in chances[1:]:
            total = total + chance(X)
        return total

    return log_p
