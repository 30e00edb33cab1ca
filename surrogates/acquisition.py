"""Acquisitions over surrogates: how good it would be to ask about a point, in reward units, with a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from botorch.acquisition import (
    AcquisitionFunction,
    LogExpectedImprovement,
    PosteriorMean,
    UpperConfidenceBound,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models.ensemble import EnsembleModel
from botorch.models.model import Model
from botorch.sampling.base import MCSampler
from botorch.sampling.index_sampler import IndexSampler
from botorch.sampling.list_sampler import ListSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.pareto import is_non_dominated
from scipy.special import betaincinv
from torch import Generator, Tensor, nn

from tiltopt.errors import ConfigError, SurrogateError
from tiltopt.options import check_name
from tiltopt.surrogates.ensemble import EnsembleSurrogate
from tiltopt.surrogates.several import SeveralModel

MC_SAMPLES = 128
BASELINE = 32
"""Answered designs, the best by posterior mean, that `qlog_nei` takes for possibly the best one."""

AUGMENTATION = 0.05
"""Weight of the sum beside the worst objective (Knowles 2006, ParEGO)."""
SMOOTHING = 0.25
"""How far apart objectives are, in answers' ranges, of which the worse one alone counts."""

Need = Literal["beta", "best_f", "X_pending", "X_baseline", "generator", "members", "draws", "Y", "reference", "turn"]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an acquisition is made of.

    Args:
        model: a fitted surrogate.
        beta: >= 0, multiplies the variance under the root.
        best_f: best answer so far (or best posterior mean, if answers are noisy), reward units.
        X_pending: (m, d), features of points asked but not answered; None: there are none.
        X_baseline: (n, d), features of the answered designs.
        generator: of the Thompson draw, of random weights, and of the Monte-Carlo base samples.
        Y: (n, m), answers of m objectives, reward units; their ranges make the objectives comparable. The same ones for
            a whole run, so that a price means the same in every round.
        reference: (m,), what hypervolume is measured from, reward units.
        turn: of a query among those whose draws are to be spread evenly, and which share a generator.
    """

    model: Any
    beta: float = 1.0
    best_f: float | None = None
    X_pending: Tensor | None = None
    X_baseline: Tensor | None = None
    generator: Generator | None = None
    Y: Tensor | None = None
    reference: Tensor | None = None
    turn: int = 0


@dataclass(frozen=True)
class Entry:
    """How one named acquisition is made.

    Args:
        make: what was given -> a module (b) x 1 x d float64 -> (b).
        needs: what it looks at beside the posterior; "members" and "draws": a surrogate that has them. Without pending
            points it does as well, without the others not.
        unit: of its values: "reward", so that they can be held against answers, or "nats", a logarithm, of which
            dividing by alpha makes a power; "spread", standard deviations of what the answers are worth.
        per_query: whether every query should have one of its own (a draw at random).
        several: whether it is one of several objectives, and takes a `SeveralModel`.
    """

    make: Callable[[Given], nn.Module]
    needs: frozenset[Need] = frozenset()
    unit: Literal["reward", "nats", "spread"] = "reward"
    per_query: bool = False
    several: bool = False


class Acquisition(AcquisitionFunction):
    """A BoTorch acquisition that takes any float type and any X of (b) x 1 x d, and computes in float64.

    Args:
        name: what it is, for people.
        inner: maps (b) x 1 x d float64 to (b).
        model: what it looks at.
        device: where the model lives.
    """

    def __init__(self, name: str, inner: nn.Module, model: Model, device: torch.device) -> None:
        super().__init__(model)
        self.name, self.inner, self.device = name, inner, device

    def forward(self, X: Tensor) -> Tensor:
        """(b) x 1 x d -> (b), reward units (nats of improvement for the log-EI family), float64."""
        if X.ndim < 2 or X.shape[-2] != 1:
            raise SurrogateError(f"acquisition `{self.name}` takes X of shape (b, 1, d), got {tuple(X.shape)}.")
        return self.inner(X.to(device=self.device, dtype=torch.float64))


class MaxMember(nn.Module):
    """max_k f_k(x) over the members of an ensemble; source: SEIKO, arXiv 2402.16359, bootstrap variant."""

    def __init__(self, model: EnsembleModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, X: Tensor) -> Tensor:
        return self.model.posterior(X).values.amax(dim=-3)[..., 0, 0]


class Member(nn.Module):
    """f_k(x), one member of an ensemble: what Thompson sampling draws from it."""

    def __init__(self, model: EnsembleModel, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def forward(self, X: Tensor) -> Tensor:
        return self.model.posterior(X).values[..., self.k, 0, 0]


class Draw(nn.Module):
    """f(x) of one posterior draw f of a whole function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, X: Tensor) -> Tensor:
        return self.function(X)[..., 0, 0]


def make_acquisition(name: str, model: Model, **given: Any) -> Acquisition:
    """An acquisition by name.

    | name | value at x | needs |
    |---|---|---|
    | mean | mu(x) | |
    | ucb | mu(x) + sqrt(beta) sigma(x), BoTorch's convention: beta = 4 is two standard deviations | beta |
    | log_ei | log E max(f(x) - best_f, 0) | best_f |
    | thompson | f(x), f one draw of the posterior; one call is one draw: make one per prompt | generator |
    | max_member | max_k f_k(x) | an ensemble |
    | qucb | Monte-Carlo UCB of x jointly with the points already asked | beta, generator |
    | qlog_ei | the same for log EI | best_f, generator |
    | qlog_nei | log EI over the unknown best of the answered designs; for noisy answers | X_baseline, generator |
    | chebyshev | of several: a random Chebyshev scalarisation of their UCBs | beta, generator, Y, reference, turn |
    | qlog_nehvi | of several: log expected gain of hypervolume | X_baseline, generator, reference |

    sigma is that of f, without the noise of an answer. Values are in the entry's unit.

    Args:
        given: the fields of `Given`; what the acquisition does not need is left aside.

    Raises:
        SurrogateError: on an unknown name, a missing or impossible argument, or a model that cannot do it.
    """
    try:
        entry = ACQUISITIONS[check_name("acquisition.name", name, ACQUISITIONS)]
    except ConfigError as error:
        raise SurrogateError(str(error)) from None
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    parts = Given(model=model, **given)
    for need in sorted(entry.needs):
        _check_need(name, need, parts)

    def placed(X: Tensor | None) -> Tensor | None:
        return None if X is None or len(X) == 0 else X.detach().to(device=device, dtype=torch.float64)

    parts = replace(parts, X_pending=placed(parts.X_pending), X_baseline=placed(parts.X_baseline))
    parts = replace(parts, Y=placed(parts.Y), reference=placed(parts.reference))
    return Acquisition(name, entry.make(parts), model, device)


def _check_need(name: str, need: Need, given: Given) -> None:
    """Raises SurrogateError unless what the acquisition needs is there."""
    if need == "members":
        if not isinstance(given.model, EnsembleModel):
            raise SurrogateError(
                f"`{name}` needs an ensemble, got a {type(given.model).__name__}; set the surrogate to `ensemble`, "
                "or the acquisition to `ucb`."
            )
    elif need == "beta":
        if not (given.beta >= 0 and math.isfinite(given.beta)):
            raise SurrogateError(f"`beta` must be finite and >= 0, got {given.beta}.")
    elif need == "best_f":
        if given.best_f is None or not math.isfinite(given.best_f):
            raise SurrogateError(f"acquisition `{name}` needs `best_f`, the best answer so far, got {given.best_f}.")
    elif need == "X_baseline":
        if given.X_baseline is None or len(given.X_baseline) == 0:
            raise SurrogateError(f"acquisition `{name}` needs `X_baseline`, the features of the answered designs.")
    elif need in ("Y", "reference"):
        if getattr(given, need) is None or not isinstance(given.model, SeveralModel):
            raise SurrogateError(f"acquisition `{name}` is one of several objectives, and needs a surrogate of each.")
    elif need == "generator" and given.generator is None:
        raise SurrogateError(f"acquisition `{name}` draws at random and needs a `generator`.")


def _ucb(given: Given) -> nn.Module:
    return UpperConfidenceBound(given.model, beta=torch.tensor(float(given.beta), dtype=torch.float64))


def _log_ei(given: Given) -> nn.Module:
    return LogExpectedImprovement(given.model, best_f=torch.tensor(given.best_f, dtype=torch.float64))


def _qucb(given: Given) -> nn.Module:
    return qUpperConfidenceBound(
        given.model, beta=float(given.beta), sampler=_sampler(given), X_pending=given.X_pending
    )


def _qlog_ei(given: Given) -> nn.Module:
    return qLogExpectedImprovement(given.model, best_f=given.best_f, sampler=_sampler(given), X_pending=given.X_pending)


def _qlog_nei(given: Given) -> nn.Module:
    """log EI over the unknown best of the answered designs (Letham et al. 2019, arXiv 1706.07094; Ament et al. 2023).

    The answered designs that cannot be the best are left out, which bounds the cost.
    """
    model, baseline = given.model, given.X_baseline
    assert baseline is not None
    with torch.no_grad():
        means = torch.cat([model.posterior(rows.unsqueeze(-2)).mean.flatten() for rows in baseline.split(1024)])
    best = baseline[means.topk(min(BASELINE, len(means))).indices]
    return qLogNoisyExpectedImprovement(
        model,
        X_baseline=best,
        sampler=_sampler(given),
        X_pending=given.X_pending,
        prune_baseline=False,
        cache_root=False,
    )


class Chebyshev(nn.Module):
    """-tau log sum_i exp(-t_i / tau) + rho sum_i s_i, of the UCBs of the objectives, in deviations of the answers' own.

    s_i is how far an objective is above the reference point, in answers' ranges, and t_i = s_i / w_i; below the point,
    where no hypervolume is to be gained, t_i = s_i in every direction. With tau = 0 it is min_i t_i, which asks how far
    the front lies from the reference point in the direction w; the mean over all directions is the hypervolume, so that
    random ones find the whole front, ends and dents included. Its gradient, however, sees one objective at a time, and
    drives a chain to and fro between them; the smooth minimum leads towards all that are nearly the worst.
    Source: Golovin and Zhang 2020, arXiv 2006.04655, lemma 5; Lin et al. 2024, arXiv 2402.19078, for the smooth
    minimum; Knowles 2006 (ParEGO) for the sum.

    Args:
        weights: (m,) positive, of length 1.
        reference, width: (m,), where s is 0, and how much is 1, reward units.
        Y: (n, m), answers, whose scalarisations have standard deviation 1: the prices of all directions are alike.
    """

    def __init__(
        self, model: SeveralModel, beta: float, weights: Tensor, reference: Tensor, width: Tensor, Y: Tensor
    ) -> None:
        super().__init__()
        self.model, self.beta = model, beta
        self.weights, self.reference, self.width = weights, reference, width
        spread = float(self._scalar(Y).std()) if len(Y) > 1 else 0.0
        self.unit = spread if spread > 0 else 1.0

    def forward(self, X: Tensor) -> Tensor:
        posteriors: list[Any] = [part.posterior(X) for part in self.model.models]
        u = torch.cat([p.mean + (self.beta * p.variance.clamp_min(0)).sqrt() for p in posteriors], dim=-1)
        return self._scalar(u)[..., 0] / self.unit

    def _scalar(self, u: Tensor) -> Tensor:
        """(..., m) reward units -> (...)."""
        share = (u - self.reference) / self.width
        reach = torch.where(share > 0, share / self.weights, share)
        worst = -SMOOTHING * torch.logsumexp(-reach / SMOOTHING, dim=-1)
        return worst + AUGMENTATION * share.sum(dim=-1)


def direction(m: int, turn: int, generator: Generator | None) -> Tensor:
    """A positive direction (m,) of length 1, uniform for a random generator; those of successive turns, and of every
    k-th turn, lie evenly.

    The coordinates of a uniform direction follow one after another from m - 1 uniform numbers (of those left, the next
    one's square is Beta(1/2, (left - 1) / 2)), and these from the additive recurrence of the generalised golden ratio
    (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences"), shifted at random.
    """
    ratio = 2.0
    for _ in range(64):  # the root of x^m = x + 1
        ratio = (1 + ratio) ** (1 / m)
    shift = torch.rand(m - 1, generator=generator, dtype=torch.float64).tolist()
    rest, squares = 1.0, []
    for i, start in enumerate(shift, start=1):
        share = float(betaincinv(0.5, (m - i) / 2, (start + turn * ratio**-i) % 1.0))
        squares.append(rest * share)
        rest *= 1 - share
    weights = torch.tensor([*squares, rest], dtype=torch.float64).clamp_min(0).sqrt().clamp_min(1e-3)
    return weights / weights.norm()


def _chebyshev(given: Given) -> nn.Module:
    assert given.Y is not None
    assert given.reference is not None
    weights = direction(given.Y.shape[1], given.turn, given.generator).to(given.Y.device)
    width = given.Y.amax(dim=0) - given.Y.amin(dim=0)
    return Chebyshev(given.model, given.beta, weights, given.reference, torch.where(width > 0, width, 1.0), given.Y)


def _qlog_nehvi(given: Given) -> nn.Module:
    """log of the expected gain of hypervolume over the unknown front of the answered designs.

    Only those whose posterior means come first, front after front, are looked at, which bounds the cost.
    Source: Daulton et al. 2021, arXiv 2105.08195; Ament et al. 2023, arXiv 2310.20708.
    """
    model, baseline, reference = given.model, given.X_baseline, given.reference
    assert baseline is not None
    assert reference is not None
    samplers: list[MCSampler] = []
    for part in model.models:
        kind = IndexSampler if isinstance(part, EnsembleModel) else SobolQMCNormalSampler
        samplers.append(kind(torch.Size([MC_SAMPLES]), seed=_seed(given)))
    return qLogNoisyExpectedHypervolumeImprovement(
        model,
        ref_point=reference,
        X_baseline=baseline[_first_fronts(model, baseline, BASELINE)],
        sampler=ListSampler(*samplers),
        X_pending=given.X_pending,
        prune_baseline=False,
        cache_root=False,
    )


def _first_fronts(model: SeveralModel, X: Tensor, most: int) -> Tensor:
    """Rows of X, at most so many, taken front after front by posterior means."""
    with torch.no_grad():
        parts: list[Any] = list(model.models)
        means = torch.cat([part.posterior(X.unsqueeze(-2)).mean.reshape(-1, 1) for part in parts], dim=1)
    left = torch.arange(len(X), device=means.device)
    chosen = left[:0]
    while len(left) and len(chosen) < most:
        front = is_non_dominated(means[left])
        chosen, left = torch.cat([chosen, left[front]]), left[~front]
    return chosen[:most]


def _thompson(given: Given) -> nn.Module:
    """One draw f of the posterior, as a module X (b) x 1 x d -> (b).

    Exact in weight space for `linear` and `last_layer`; one member of an ensemble; a pathwise draw for a GP and for
    utilities (Wilson et al. 2020, arXiv 2002.09309).

    Raises:
        SurrogateError: for a model that has none of these.
    """
    model, seed = given.model, _seed(given)
    if isinstance(model, EnsembleSurrogate):
        return Member(model, seed % model.num_members)
    if hasattr(model, "sample_function"):
        return Draw(model.sample_function(torch.Generator().manual_seed(seed)))
    raise SurrogateError(f"no Thompson draw is known for a {type(model).__name__}; use `ucb`.")


def _sampler(given: Given) -> MCSampler:
    """Quasi-random base samples, or the members of an ensemble in turn."""
    kind = IndexSampler if isinstance(given.model, EnsembleModel) else SobolQMCNormalSampler
    return kind(torch.Size([MC_SAMPLES]), seed=_seed(given))


def _seed(given: Given) -> int:
    assert given.generator is not None
    return int(torch.randint(2**62, (), generator=given.generator))


ACQUISITIONS: dict[str, Entry] = {
    "mean": Entry(lambda given: PosteriorMean(given.model)),
    "ucb": Entry(_ucb, frozenset({"beta"})),
    "log_ei": Entry(_log_ei, frozenset({"best_f"}), unit="nats"),
    "thompson": Entry(_thompson, frozenset({"generator", "draws"}), per_query=True),
    "max_member": Entry(lambda given: MaxMember(given.model), frozenset({"members"})),
    "qucb": Entry(_qucb, frozenset({"beta", "X_pending", "generator"})),
    "qlog_ei": Entry(_qlog_ei, frozenset({"best_f", "X_pending", "generator"}), unit="nats"),
    "qlog_nei": Entry(_qlog_nei, frozenset({"X_baseline", "X_pending", "generator"}), unit="nats"),
    "chebyshev": Entry(
        _chebyshev,
        frozenset({"beta", "generator", "Y", "reference", "turn"}),
        unit="spread",
        per_query=True,
        several=True,
    ),
    "qlog_nehvi": Entry(
        _qlog_nehvi, frozenset({"X_baseline", "X_pending", "generator", "reference"}), unit="nats", several=True
    ),
}
