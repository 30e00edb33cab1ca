"""Bayesian linear regression by evidence maximisation, from one spectral decomposition.

Model, in standardised units: y_i = c + w'z_i + e_i, w ~ N(0, tau2 I), c flat, e_i ~ N(0, v_i) with v_i = sigma2, or
v_i = sigma2 + sem_i^2 where the error of an answer is known. With A = Z'V^-1 Z (centred) = Q diag(l) Q' and
b = Z'V^-1 y, everything that depends on the variances is a sum over eigenvalues, so the evidence costs O(d) per trial
value and its maximum is found on a grid: no iteration can stall or diverge.

Sources: MacKay 1992, "Bayesian interpolation"; Bishop 2006, sections 3.3-3.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.linalg.blas import dsyrk
from scipy.optimize import minimize_scalar
from torch import Tensor

from tiltopt.errors import SurrogateError
from tiltopt.surrogates.data import Data

CHUNK = 8192
NOISE_FLOOR = 1e-12  # smallest noise variance, relative to the variance of the answers


class Scaling(NamedTuple):
    """z = (x - x_mean) / x_scale, (d,); standardised answer = (y - y_mean) / y_scale."""

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor


class Spectrum(NamedTuple):
    """Sufficient statistics of weighted, centred data.

    values: (r,), non-zero eigenvalues l of Z'WZ.
    vectors: (d, r), their eigenvectors Q.
    loading: (r,), Q'Z'Wy.
    y_sq: (), y'Wy.
    centre: (d,), weighted mean of z; y_centre: (), weighted mean of y.
    weight: (), sum of the weights.
    dof: n - 1.
    """

    values: Tensor
    vectors: Tensor
    loading: Tensor
    y_sq: Tensor
    centre: Tensor
    y_centre: Tensor
    weight: Tensor
    dof: int


@dataclass(frozen=True)
class WeightPosterior:
    """Gaussian posterior of the weights, standardised units, factored for cheap prediction.

    mean: (d,); vectors: (d, r); variances: (r,) along them; rest: () variance along every other direction;
    centre: (d,); intercept: () mean and intercept_var: () variance of the prediction at the centre;
    noise: () sigma2, the noise beyond `sem`; prior: () tau2; log_evidence: ().
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor
    rest: Tensor
    centre: Tensor
    intercept: Tensor
    intercept_var: Tensor
    noise: Tensor
    prior: Tensor
    log_evidence: Tensor


def solve(data: Data, *, strength: float = 1.0, common_scale: bool = False) -> tuple[Scaling, WeightPosterior]:
    """Exact posterior of the weights at the most probable prior and noise variance.

    Args:
        data: n answers, d features.
        strength: weight of the hyper-prior [R2 (1 - R2)]^strength on the share R2 of the variance that the features
            explain; it keeps few answers from being read as pure noise or as noise-free, and is void beyond some
            tens of answers. 0 is plain evidence maximisation.
        common_scale: divide all features by one number, their root mean square deviation, not each by its own.

    Raises:
        SurrogateError: if the features are so large or so small that float64 overflows.
    """
    scaling, moment = standardise(data, common_scale)
    y = (data.y - scaling.y_mean) / scaling.y_scale
    if data.sem is None:
        spec = _spectrum(data.X, y, None, scaling, moment)
        ratio, noise, log_ev = maximise(spec, None, strength)
        return scaling, _weights(spec, ratio, noise, noise, log_ev)
    sem2 = (data.sem / scaling.y_scale) ** 2
    if (sem2.max() - sem2.min()) <= 1e-12 * sem2.max():
        spec = _spectrum(data.X, y, None, scaling, moment)
        ratio, total, log_ev = maximise(spec, None, strength)
        if total < sem2[0]:  # the answers cannot be cleaner than what is known of their error
            ratio, total, log_ev = maximise(spec, sem2[0], strength)
        return scaling, _weights(spec, ratio, total, (total - sem2[0]).clamp_min(0), log_ev)
    return scaling, _solve_heteroscedastic(data.X, y, sem2, scaling, strength)


def _solve_heteroscedastic(X: Tensor, y: Tensor, sem2: Tensor, scaling: Scaling, strength: float) -> WeightPosterior:
    """The same with v_i = sigma2 + sem_i^2: the noise beyond `sem` by a bounded search, the prior on the grid."""
    one = torch.ones((), dtype=y.dtype, device=y.device)

    def at(log_noise: float) -> tuple[Tensor, Tensor, Spectrum, Tensor]:
        noise = one * 10.0**log_noise
        variance = noise + sem2
        spec = _spectrum(X, y, 1 / variance, scaling, None)
        ratio, _, log_ev = maximise(spec, one, strength)
        log_ev = log_ev - 0.5 * (variance.log().sum() + spec.weight.log())
        return ratio, noise, spec, log_ev

    best = minimize_scalar(lambda s: -at(s)[3].item(), bounds=(-8.0, 0.5), method="bounded", options={"xatol": 0.05})
    ratio, noise, spec, log_ev = at(float(best.x))
    return _weights(spec, ratio, one, noise, log_ev)


def with_moments(data: Data) -> Data:
    """The same answers with the moments of their features, where those are the cheap form (n > d), for several fits."""
    if data.moments is not None or len(data) <= data.X.shape[1]:
        return data
    mean = data.X.mean(dim=0)
    return replace(data, moments=(mean, gram(data.X, mean, None)))


def standardise(data: Data, common: bool) -> tuple[Scaling, Tensor | None]:
    """Standardisation, relevance included, and the centred Gram matrix where it is the cheap form (n > d)."""
    X, y, moments = data.X, data.y, with_moments(data).moments
    mean, moment = (X.mean(dim=0), None) if moments is None else moments
    var = (moment.diagonal() if moment is not None else (X - mean).square().sum(dim=0)) / (len(X) - 1)
    scale = var.sqrt()
    varies = scale > 1e-9 * X.abs().amax(dim=0)
    typical = scale[varies].log().mean().exp() if varies.any() else torch.ones_like(scale[0])
    scale = var.mean().sqrt().expand_as(scale) if common and varies.any() else torch.where(varies, scale, typical)
    scale = scale if data.relevance is None else scale / data.relevance
    if not torch.isfinite(scale).all() or not (scale > 0).all():
        raise SurrogateError(
            f"features up to {X.abs().max().item():.3g} overflow float64 when squared; rescale them to about 1."
        )
    return Scaling(mean, scale, y.mean(), y.std()), moment


def gram(X: Tensor, centre: Tensor, weights: Tensor | None) -> Tensor:
    """(X - centre)' W (X - centre), (d, d), in chunks, so that no second copy of X is held."""
    d = X.shape[1]
    if X.device.type != "cpu":
        out = torch.zeros(d, d, dtype=X.dtype, device=X.device)
        for rows, w in zip(X.split(CHUNK), _split(weights, len(X)), strict=True):
            z = (rows - centre) if w is None else (rows - centre) * w.sqrt()[:, None]
            out.addmm_(z.T, z)
        return out
    total = torch.zeros(d, d, dtype=X.dtype).numpy().T
    for rows, w in zip(X.split(CHUNK), _split(weights, len(X)), strict=True):
        z = (rows - centre) if w is None else (rows - centre) * w.sqrt()[:, None]
        total = dsyrk(1.0, z.contiguous().numpy().T, beta=1.0, c=total, overwrite_c=1, lower=0)  # half the work
    upper = torch.from_numpy(total).triu()
    return upper + upper.triu(1).T


def _split(weights: Tensor | None, n: int) -> list[Tensor] | list[None]:
    return [None] * len(range(0, n, CHUNK)) if weights is None else list(weights.split(CHUNK))


def _spectrum(X: Tensor, y: Tensor, weights: Tensor | None, scaling: Scaling, moment: Tensor | None) -> Spectrum:
    """Eigen-decomposition of the standardised, weighted, centred data: of the Gram matrix if n > d, else an SVD."""
    n, d = X.shape
    w = torch.ones_like(y) if weights is None else weights
    total = w.sum()
    raw_centre = (w @ X) / total
    y_centre = (w @ y) / total
    y = y - y_centre
    if n > d:
        moment = gram(X, raw_centre, weights) if moment is None else moment
        values, vectors = torch.linalg.eigh(moment / scaling.x_scale / scaling.x_scale[:, None])
        raw = X.T @ (w * y) - raw_centre * (w @ y)
        loading = vectors.T @ (raw / scaling.x_scale)
    else:
        Z = (X - raw_centre) / scaling.x_scale * w.sqrt()[:, None]
        U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
        values, vectors, loading = S.square(), Vh.T, S * (U.T @ (w.sqrt() * y))
    keep = values > values.max() * d * torch.finfo(values.dtype).eps
    centre = (raw_centre - scaling.x_mean) / scaling.x_scale
    y_sq = (w * y * y).sum()
    return Spectrum(values[keep], vectors[:, keep], loading[keep], y_sq, centre, y_centre, total, n - 1)


def maximise(spec: Spectrum, noise: Tensor | None, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ratio tau2 / sigma2, sigma2 and the log evidence at their maximum; sigma2 in closed form unless given.

    The evidence over the ratio is evaluated on a grid over 28 e-folds that is refined thrice around its best point.
    """
    trace = spec.values.sum() / spec.dof
    if len(spec.values) == 0:  # no feature varies: the answers are noise
        sigma2 = spec.y_sq / spec.dof if noise is None else noise
        return torch.zeros_like(sigma2), sigma2, -0.5 * spec.dof * (sigma2.log() + 1)
    low, high = -14.0, 14.0
    for _ in range(4):
        grid = torch.linspace(low, high, 113, dtype=trace.dtype, device=trace.device)
        ratio = grid.exp() / trace
        denominator = 1 + ratio[:, None] * spec.values
        fit = spec.y_sq - (ratio[:, None] * spec.loading.square() / denominator).sum(dim=1)
        fit = fit.clamp_min(NOISE_FLOOR * spec.y_sq)
        sigma2 = fit / spec.dof if noise is None else noise.expand_as(fit)
        share = -torch.nn.functional.softplus(-grid) - torch.nn.functional.softplus(grid)  # log R2 + log(1 - R2)
        log_ev = -0.5 * (spec.dof * sigma2.log() + fit / sigma2 + denominator.log().sum(dim=1))
        best = int((log_ev + strength * share).argmax())
        step = (high - low) / 112
        low, high = grid[best].item() - step, grid[best].item() + step
    return ratio[best], sigma2[best], log_ev[best]


def _weights(spec: Spectrum, ratio: Tensor, variance: Tensor, noise: Tensor, log_evidence: Tensor) -> WeightPosterior:
    """Posterior of the weights; `variance` is what one unit of weight stands for (sigma2, or 1 if weighted)."""
    shrink = ratio / (1 + ratio * spec.values)
    full = spec.vectors.shape[1] == spec.vectors.shape[0]
    prior = ratio * variance
    return WeightPosterior(
        mean=spec.vectors @ (shrink * spec.loading),
        vectors=spec.vectors,
        variances=shrink * variance,
        rest=torch.zeros_like(prior) if full else prior,
        centre=spec.centre,
        intercept=spec.y_centre,
        intercept_var=variance / spec.weight,
        noise=noise,
        prior=prior,
        log_evidence=log_evidence,
    )
