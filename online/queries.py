"""What passes between the rooms of a run: the query that is asked, what was drawn for it, what was answered.

At the end: which numbers that a user hands in may pass.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tiltopt.errors import ConfigError, RewardError, StoreError
from tiltopt.notebook import Shown, gallery


@dataclass(frozen=True)
class Origin:
    """Where a query starts from.

    Args:
        operator: "global" (from noise), "restart" (from the re-noised clean latent of an earlier query), "pool" (the
            best, by the surrogate, of a pool of restarts), or "imported" (measured elsewhere).
        parents: the queries whose latents it started from, by number.
        k0: the step at which the prior's chain was entered, 0 for noise; None where there is no parent.
    """

    operator: str = "global"
    parents: tuple[int, ...] = ()
    k0: int | None = None


FROM_NOISE = Origin()


@dataclass(frozen=True, eq=False)
class Start:
    """The law that a query starts from in place of the prior; see `tiltopt.samplers.restart`.

    Args:
        operator: "restart" or "pool", as in `Origin`.
        parents: queries, by number.
        weights: of the parents, >= 0, of any positive sum.
        latents: (m, *event) float32 on the CPU, their clean latents.
        k0: the step at which the chain is entered; 0 starts from noise, and takes no parent.
        pool: designs of a pool.
    """

    operator: str
    parents: tuple[int, ...]
    weights: tuple[float, ...]
    latents: Tensor
    k0: int
    pool: int = 0

    def key(self) -> tuple[Any, ...]:
        """Queries of one key start from the same law."""
        return self.operator, self.parents, self.weights, self.k0, self.pool

    def origin(self, parent: int) -> Origin:
        """Of a query that came from the parent of this row."""
        return Origin(self.operator, self.parents[parent : parent + 1], self.k0 if self.parents else None)


@dataclass(frozen=True)
class Objective:
    """One of several numbers that an answer consists of.

    Args:
        name: what the black box calls it.
        above: at least so much is wanted, and more is no better; None: it is maximised.
    """

    name: str
    above: float | None = None


def maximised(objectives: Sequence[Objective]) -> list[int]:
    """The places of those that are maximised."""
    return [i for i, objective in enumerate(objectives) if objective.above is None]


def kept(objectives: Sequence[Objective], Y: Tensor) -> Tensor:
    """(n,) bool: the answers (n, m) that meet every condition; all where there is none."""
    use = torch.ones(len(Y), dtype=torch.bool, device=Y.device)
    for i, objective in enumerate(objectives):
        if objective.above is not None:
            use &= Y[:, i] >= objective.above
    return use


@dataclass(frozen=True)
class Ask:
    """A query to be drawn.

    Args:
        number: in the run, from 1.
        round: from 0.
        index: its place in its round.
        prompt: the text it is drawn for.
        seed: of everything random about it.
        start: what it starts from; None for the prior's noise.
    """

    number: int
    round: int
    index: int
    prompt: str
    seed: int
    start: Start | None = None


@dataclass(frozen=True)
class Drawn:
    """What was drawn for one `Ask`.

    Args:
        image: the 8-bit image that the black box sees; the picture of a design that is none.
        features: (d,) float32 on the CPU, the feature map of exactly that design.
        predicted: posterior mean of the reward at `features`, reward units; None for plain samples.
        predicted_sd: posterior standard deviation, reward units; None for plain samples.
        acquired: acquisition value at `features`, reward units; None for plain samples and for acquisitions that are
            not in reward units (log-EI).
        ess: effective sample size of the query's particles, in [1, num_particles]; None for plain samples.
        log_z: estimate of log E_prior[G] for the query, nats; None for plain samples.
        alpha: price of leaving the prior that was used, reward units per nat; None for plain samples.
        nats: what leading the query away from the prior cost; None for plain samples, and where it is not counted.
        latents: (*event) float16 on the CPU, the clean latents of the design; None where the engine keeps none.
        origin: where it started from.
        design: what the black box sees, where that is no image.
    """

    image: Image.Image
    features: Tensor
    predicted: float | None = None
    predicted_sd: float | None = None
    acquired: float | None = None
    ess: float | None = None
    log_z: float | None = None
    alpha: float | None = None
    nats: float | None = None
    latents: Tensor | None = None
    origin: Origin = FROM_NOISE
    design: Any = None


@dataclass(frozen=True)
class Observations:
    """Every answer so far, in the order of query numbers.

    Args:
        X: (n, d) float64 features.
        Y: (n, 1) float64 rewards.
        sem: (n, 1) float64 standard errors of the answers, or None when no answer came with one.
        pending: (m, d) float64 features of queries that are asked and not yet answered; m may be 0.
        comparisons: (c, 2) int64, rows (i, j): row i of X was preferred to row j, and Y is empty; None in a run whose
            answers are values.
        choices: (c,) int64, rows of `comparisons` with one number came from one choice of the best of several; None
            where each is by itself.
        failed: (f, d) float64 features of queries whose evaluation failed; None reads as none.
        objectives: what the columns of Y and sem are, which then are (n, m); () in a run of one number per answer.
        reference: (t,) float64, what the hypervolume of the t maximised objectives is measured from.
        first: (f, m) float64, the answers of m objectives before the first tilted round, which make them comparable for
            the whole run; None: all of Y.
    """

    X: Tensor
    Y: Tensor
    sem: Tensor | None
    pending: Tensor
    comparisons: Tensor | None = None
    choices: Tensor | None = None
    failed: Tensor | None = None
    objectives: tuple[Objective, ...] = ()
    reference: Tensor | None = None
    first: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How a round is drawn beyond the surrogate.

    Args:
        alpha: price of leaving the prior, reward units per nat; None: what spends `budget`, found by the engine.
        beta: optimism of the acquisition.
        notes: for people.
        budget: nats that a query may cost; None where the price is set by hand.
    """

    alpha: float | None
    beta: float
    notes: tuple[str, ...] = field(default_factory=tuple)
    budget: float | None = None


@dataclass(frozen=True)
class Spent:
    """What a run has spent on its black box so far.

    Args:
        queries: queries (or pairs) handed out, those of unknown fate included, and answers told by hand; each
            attempt counts, a retry of a call that failed does not.
        calls: the same with such retries.
        seconds: of wall clock that the run has worked.
    """

    queries: int = 0
    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class NewQuery:
    """A drawn query, on its way into the store. Units as in `tiltopt.online.engine.base.Drawn`."""

    number: int
    place: int
    prompt: str
    seed: int
    vector: bytes
    predicted: float | None = None
    predicted_sd: float | None = None
    acquired: float | None = None
    ess: float | None = None
    log_z: float | None = None
    origin: Origin = FROM_NOISE


@dataclass(frozen=True)
class RoundRecord:
    """What is known of a round.

    Args:
        round: 0, 1, ...
        kind: "plain" (samples of the prior), "tilted", "refined" (asked for near one query), or "imported"
            (measurements from elsewhere).
        size: number of queries.
        alpha: price of leaving the prior, reward units per nat; None for plain rounds.
        beta: optimism of the acquisition; None for plain rounds.
        notes: what a person should know, in sentences.
        score: how the previous surrogate had predicted the answers that came since; None when there was none.
        fingerprint: SHA-256 of the data behind the round's surrogate; None when the round has none.
        ask_seconds: fitting, drawing and writing.
        answer_seconds: waiting for the black box.
        asked_at: seconds since the epoch.
        nats: what a query cost on average, by which the next price is set; None where it was not counted.
    """

    round: int
    kind: str
    size: int
    alpha: float | None = None
    beta: float | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    score: Mapping[str, Any] | None = None
    fingerprint: str | None = None
    ask_seconds: float = 0.0
    answer_seconds: float = 0.0
    asked_at: float = 0.0
    nats: float | None = None


EXTRA_KINDS = ("imported", "refined")
"""Kinds of rounds that are none of those that a run's settings plan."""


@dataclass(frozen=True, repr=False)
class Query(Shown):
    """A design whose reward is wanted.

    Args:
        id: its number in the run, from 1.
        prompt: the text it was drawn for.
        seed: of its noise; the same seed and settings give the same image.
        image: its picture, which in a run of images is the design itself.
        predicted: the surrogate's mean, reward units; None for plain samples.
        predicted_sd: the surrogate's standard deviation, reward units; None for plain samples.
        round: the `ask` it came from, from 0.
        operator, parents, k0: where it started from, see `Origin`.
        value: its answer, where it has one and it was asked for (`Optimizer.best`).
        design: what to measure: the image, or in runs of other designs an array (`tiltopt.designs`).
    """

    id: int
    prompt: str
    seed: int
    image: Image.Image
    predicted: float | None
    predicted_sd: float | None
    round: int
    operator: str = "global"
    parents: tuple[int, ...] = ()
    k0: int | None = None
    value: float | None = None
    design: Any = None

    def __post_init__(self) -> None:
        if self.design is None:
            object.__setattr__(self, "design", self.image)

    def about(self) -> dict[str, object]:
        sd = "" if self.predicted_sd is None else f" ± {self.predicted_sd:.3g}"
        return {
            "id": self.id,
            "prompt": repr(self.prompt),
            "round": self.round,
            "value": None if self.value is None else f"{self.value:.4g}",
            "predicted": None if self.predicted is None else f"{self.predicted:.4g}{sd}",
            "start": f"{self.operator} of {', '.join(f'#{n}' for n in self.parents)}" if self.parents else None,
        }

    def _repr_html_(self) -> str:
        return gallery("", [(self.image, self.caption)])

    @property
    def caption(self) -> str:
        """What stands under its picture."""
        told = {key: value for key, value in self.about().items() if key in ("value", "predicted") and value}
        return ", ".join([f"#{self.id} {self.prompt}", *(f"{key} {value}" for key, value in told.items())])


class Queries(list[Query]):
    """Queries in a list, which a notebook shows as a row of pictures."""

    def _repr_html_(self) -> str:
        return gallery(f"{len(self)} queries", [(query.image, query.caption) for query in self])


def batch_size(n: Any, most: int) -> int:
    """`n` as a number of queries, at most `most`."""
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1:
        raise ConfigError(f"expected a number of queries, an integer >= 1, got {n!r}.")
    if int(n) > most:
        raise ConfigError(f"expected at most {most} queries at once, got {n}; ask several times.")
    return int(n)


def strength_of(strength: Any) -> float:
    """`strength` as a share of the noise."""
    number: Any = strength if isinstance(strength, numbers.Real) and not isinstance(strength, bool) else math.nan
    if not 0 < number <= 1:
        raise ConfigError(
            f"expected `strength` in (0, 1] (near 0 keeps the design, 1 is a fresh sample), got {_short(strength)}."
        )
    return float(number)


def query_number(id: Any) -> int:
    """`id` as a query's number."""
    if isinstance(id, bool) or not isinstance(id, numbers.Integral):
        raise StoreError(f"unknown query {id!r}: expected the integer `id` of a query.")
    return int(id)


def finite(value: Any, name: str = "value") -> float:
    """`value` as a finite float.

    Raises:
        RewardError: an array, text, a boolean, None, NaN or an infinity.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        hint = "; pass one number, for instance with .item()" if hasattr(value, "shape") else ""
        raise RewardError(
            f"expected `{name}` to be one finite number, got {kind} {_short(value)}{hint}. Nothing was stored."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"expected `{name}` to be a finite number, got {number}. A measurement without a result is told with "
            "fail(id, reason). Nothing was stored."
        )
    return number


def spread(sem: Any, of: str = "") -> float:
    """`sem`, of an objective or of the only one, as a finite standard error >= 0."""
    name = f"sem of {of}" if of else "sem"
    number = finite(sem, name)
    if number < 0:
        raise RewardError(f"expected `{name}`, a standard error, to be >= 0, got {number}. Nothing was stored.")
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
