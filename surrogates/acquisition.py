"""Acquisitions over surrogates: how good it would be to ask about a point, in reward units, with a gradient."""

from __future__ import annotations

import math
from typing import Any

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
from botorch.models.ensemble import EnsembleModel
from botorch.models.model import Model
from botorch.sampling.get_sampler import get_sampler
from torch import Generator, Tensor, nn

from tiltopt.errors import SurrogateError

NAMES = ("mean", "ucb", "log_ei", "thompson", "max_member", "qucb", "qlog_ei", "qlog_nei")
ALIASES = {"greedy": "mean", "qlogei": "qlog_ei", "logei": "log_ei", "qlognei": "qlog_nei"}
MC_SAMPLES = 128
BASELINE = 32
"""Answered designs, the best by posterior mean, that `qlog_nei` takes for possibly the best one."""


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


def make_acquisition(
    name: str,
    model: Model,
    *,
    beta: float = 1.0,
    best_f: float | None = None,
    X_pending: Tensor | None = None,
    X_baseline: Tensor | None = None,
    generator: Generator | None = None,
    index: int | None = None,
) -> Acquisition:
    """An acquisition by name.

    | name | value at x | needs |
    |---|---|---|
    | mean, greedy | mu(x) | |
    | ucb | mu(x) + sqrt(beta) sigma(x), BoTorch's convention: beta = 4 is two standard deviations | beta |
    | log_ei | log E max(f(x) - best_f, 0) | best_f |
    | thompson | f(x), f one draw of the posterior; one call is one draw: make one per prompt | generator |
    | max_member | max_k f_k(x) | an ensemble |
    | qucb | Monte-Carlo UCB of x jointly with the points already asked | generator |
    | qlog_ei | the same for log EI | best_f, generator |
    | qlog_nei | log EI over the unknown best of the answered designs; for noisy answers | X_baseline, generator |

    sigma is that of f, without the noise of an answer. Values are in reward units; those of the log-EI family are
    logarithms, so that dividing them by alpha gives (EI)^(1/alpha).

    Args:
        beta: >= 0, multiplies the variance under the root.
        best_f: best answer so far (or best posterior mean, if answers are noisy), reward units.
        X_pending: (m, d), features of points asked but not answered; only the q-acquisitions take them into account.
        X_baseline: (n, d), features of the answered designs; the 32 of the highest posterior mean are used.
        generator: of the Thompson draw and of the Monte-Carlo base samples.
        index: which prompt of the batch a Thompson draw is for: folded into the draw, so that one generator state
            gives different functions for different prompts.

    Raises:
        SurrogateError: on an unknown name, a missing or impossible argument, or a model that cannot do it.
    """
    name = ALIASES.get(name, name)
    if name not in NAMES:
        raise SurrogateError(f"unknown acquisition {name!r}; choose one of {', '.join(NAMES)}.")
    if not (beta >= 0 and math.isfinite(beta)):
        raise SurrogateError(f"`beta` must be finite and >= 0, got {beta}.")
    if name in ("log_ei", "qlog_ei") and (best_f is None or not math.isfinite(best_f)):
        raise SurrogateError(f"acquisition `{name}` needs `best_f`, the best answer so far, got {best_f}.")
    if name == "qlog_nei" and (X_baseline is None or len(X_baseline) == 0):
        raise SurrogateError("acquisition `qlog_nei` needs `X_baseline`, the features of the answered designs.")
    if name in ("thompson", "qucb", "qlog_ei", "qlog_nei") and generator is None:
        raise SurrogateError(f"acquisition `{name}` draws at random and needs a `generator`.")
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))

    def placed(X: Tensor | None) -> Tensor | None:
        return None if X is None or len(X) == 0 else X.detach().to(device=device, dtype=torch.float64)

    inner = _inner(name, model, beta, best_f, placed(X_pending), placed(X_baseline), generator, index)
    return Acquisition(name, inner, model, device)


def _inner(
    name: str,
    model: Any,
    beta: float,
    best_f: float | None,
    pending: Tensor | None,
    baseline: Tensor | None,
    generator: Generator | None,
    index: int | None,
) -> nn.Module:
    if name == "mean":
        return PosteriorMean(model)
    if name == "ucb":
        return UpperConfidenceBound(model, beta=torch.tensor(float(beta), dtype=torch.float64))
    best = math.nan if best_f is None else float(best_f)
    if name == "log_ei":
        return LogExpectedImprovement(model, best_f=torch.tensor(best, dtype=torch.float64))
    if name == "max_member":
        if not isinstance(model, EnsembleModel):
            raise SurrogateError(
                f"`max_member` needs an ensemble, got a {type(model).__name__}; set the surrogate to `ensemble`, "
                "or the acquisition to `ucb`."
            )
        return MaxMember(model)
    assert generator is not None  # checked by the caller for every name that is left
    if name == "thompson":
        return thompson(model, generator, index)
    probe = torch.zeros(1, _dim(model), dtype=torch.float64) if pending is None else pending[:1]
    sampler = get_sampler(model.posterior(probe), torch.Size([MC_SAMPLES]), seed=_seed(generator, index))
    if name == "qucb":
        return qUpperConfidenceBound(model, beta=float(beta), sampler=sampler, X_pending=pending)
    if name == "qlog_nei":
        assert baseline is not None
        return noisy_improvement(model, baseline, sampler, pending)
    return qLogExpectedImprovement(model, best_f=best, sampler=sampler, X_pending=pending)


def noisy_improvement(model: Model, baseline: Tensor, sampler: Any, pending: Tensor | None) -> nn.Module:
    """log EI over the unknown best of the answered designs (Letham et al. 2019, arXiv 1706.07094; Ament et al. 2023).

    Args:
        baseline: (n, d), answered designs; those that cannot be the best are left out, which bounds the cost.
    """
    with torch.no_grad():
        means = torch.cat([model.posterior(rows.unsqueeze(-2)).mean.flatten() for rows in baseline.split(1024)])
    best = baseline[means.topk(min(BASELINE, len(means))).indices]
    return qLogNoisyExpectedImprovement(
        model, X_baseline=best, sampler=sampler, X_pending=pending, prune_baseline=False, cache_root=False
    )


def thompson(model: Any, generator: Generator, index: int | None = None) -> nn.Module:
    """One draw f of the posterior, as a module X (b) x 1 x d -> (b).

    Exact in weight space for `linear` and `last_layer`; one member for an ensemble, consecutive indices taking
    different members; a pathwise draw for a GP (Wilson et al. 2020, arXiv 2002.09309).

    Raises:
        SurrogateError: for a model that has none of these.
    """
    sample_function = getattr(model, "sample_function", None)
    if sample_function is not None:
        return Draw(sample_function(torch.Generator().manual_seed(_seed(generator, index))))
    if isinstance(model, EnsembleModel):
        with torch.no_grad():
            size = model.posterior(torch.zeros(1, _dim(model), dtype=torch.float64)).values.shape[-3]
        first = int(torch.randint(size, (), generator=generator))
        return Member(model, (first + (index or 0)) % size)
    raise SurrogateError(f"no Thompson draw is known for a {type(model).__name__}; use `ucb`.")


def _dim(model: Any) -> int:
    """d of a fitted surrogate."""
    mean = getattr(model, "x_mean", None)
    if mean is not None:
        return len(mean)
    return model.answers[0].shape[-1] if hasattr(model, "answers") else model.data.X.shape[-1]


def _seed(generator: Generator, index: int | None) -> int:
    """A seed from the generator, spread over indices so that draws for different prompts differ."""
    base = int(torch.randint(2**62, (), generator=generator))
    return (base + 0x9E3779B97F4A7C15 * (0 if index is None else index + 1)) % 2**63
