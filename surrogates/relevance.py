"""How much each block of features matters, learnt from the answers.

A feature map may join blocks of different nature and size, such as 46 statistics of latents and 256 of CLIP patches.
Under one prior for all weights the larger block would speak louder, and with few answers drown the smaller one. Here
block b gets a share s_b of the variance that the surrogate expects of its features:

    f(x) = c + sum_b w_b'z_b,   w_b ~ N(0, tau2 s_b / d_b I),   sum_b s_b = 1

The shares maximise the evidence of the linear model (automatic relevance determination by blocks) under a weak
Dirichlet hyper-prior, which keeps a handful of answers from closing a block for good.

Sources: MacKay 1992, "Bayesian interpolation"; Neal 1996, "Bayesian learning for neural networks", section 1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tiltopt.errors import SurrogateError
from tiltopt.surrogates.data import Data
from tiltopt.surrogates.evidence import Spectrum, maximise, standardise

GRID = (-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Log odds of a block's share that are tried."""

CONCENTRATION = 0.5
"""Of the hyper-prior sum_b CONCENTRATION log s_b; worth half an answer at a share of .37."""


def check_blocks(blocks: Sequence[int], dim: int) -> tuple[int, ...]:
    """Sizes of the blocks, in their order.

    Raises:
        SurrogateError: unless they are positive and sum to `dim`.
    """
    sizes = tuple(int(size) for size in blocks)
    if not sizes or min(sizes) < 1 or sum(sizes) != dim:
        raise SurrogateError(f"`blocks` must be positive sizes that sum to the {dim} features, got {tuple(blocks)}.")
    return sizes


def learn_relevance(data: Data, blocks: Sequence[int], *, strength: float = 1.0) -> Tensor:
    """Relevance r of each feature: the prior standard deviation of its weight, relative, mean square 1.

    Standardised features times r bring every block to its share. Known errors of answers are not used here.

    Args:
        data: n answers, d features.
        blocks: sizes of the blocks, d in all.
        strength: of the hyper-prior on R2, see `evidence.solve`.

    Returns:
        (d,) float64; ones where there is one block.
    """
    sizes = check_blocks(blocks, data.X.shape[1])
    if len(sizes) == 1:
        return torch.ones_like(data.X[0])
    evidence = _Evidence(data, sizes, strength)
    log_odds = [0.0] * len(sizes)
    for _ in range(1 if len(sizes) == 2 else 3):
        before = list(log_odds)
        for b in range(len(sizes) - (len(sizes) == 2)):  # two blocks have one share to choose
            trials = [[*log_odds[:b], value, *log_odds[b + 1 :]] for value in GRID]
            start = GRID.index(log_odds[b])
            log_odds = _climb(trials, start, evidence) if evidence.primal else max(trials, key=evidence)
        if log_odds == before:
            break
    return _expand(_shares(log_odds), sizes).to(data.X)


def _climb(trials: Sequence[list[float]], start: int, evidence: Callable[[list[float]], float]) -> list[float]:
    """The best trial by steps to the better neighbour: with more answers than features the evidence has one peak."""
    known = {start: evidence(trials[start])}
    at = start
    while True:
        for near in (at - 1, at + 1):
            if 0 <= near < len(trials) and near not in known:
                known[near] = evidence(trials[near])
        best = max(known, key=known.__getitem__)
        if best == at:
            return trials[at]
        at = best


def _shares(log_odds: Sequence[float]) -> Tensor:
    return torch.softmax(torch.tensor(log_odds, dtype=torch.float64), dim=0)


def _expand(shares: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(d,) relevance of every feature, mean square 1."""
    total = sum(sizes)
    return torch.cat([(share * total / size).sqrt().expand(size) for share, size in zip(shares, sizes, strict=True)])


class _Evidence:
    """log evidence + log hyper-prior of a trial, from moments that are computed once."""

    def __init__(self, data: Data, sizes: tuple[int, ...], strength: float) -> None:
        scaling, moment = standardise(replace(data, relevance=None), common=False)
        self.sizes, self.strength = sizes, strength
        self.y = (data.y - scaling.y_mean) / scaling.y_scale
        Z = None
        if moment is None:
            Z = (data.X - scaling.x_mean) / scaling.x_scale
            self.kernels = [block @ block.T for block in Z.split(sizes, dim=1)]
        else:
            self.moment = moment / scaling.x_scale / scaling.x_scale[:, None]
            self.cross = ((self.y @ data.X) - self.y.sum() * scaling.x_mean) / scaling.x_scale
        self.primal = Z is None

    def __call__(self, log_odds: Sequence[float]) -> float:
        shares = _shares(log_odds)
        if self.primal:
            r = _expand(shares, self.sizes).to(self.y)
            values, vectors = torch.linalg.eigh(self.moment * r * r[:, None])
            loading = vectors.T @ (r * self.cross)
        else:
            total = sum(self.sizes)
            weights = [float(s) * total / size for s, size in zip(shares, self.sizes, strict=True)]
            kernel = sum((w * k for w, k in zip(weights, self.kernels, strict=True)), torch.zeros_like(self.kernels[0]))
            values, vectors = torch.linalg.eigh(kernel)
            loading = values.clamp_min(0).sqrt() * (vectors.T @ self.y)
        keep = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        nothing = values.new_zeros(0)
        spectrum = Spectrum(
            values[keep], nothing, loading[keep], self.y @ self.y, nothing, nothing, nothing, len(self.y) - 1
        )
        _, _, log_evidence = maximise(spectrum, None, self.strength)
        return float(log_evidence) + CONCENTRATION * float(shares.log().sum())
