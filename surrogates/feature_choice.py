"""Which feature map predicts the answers best, judged on answers that each fit has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from botorch.models.model import Model
from torch import Generator, Tensor

from tiltopt.errors import SurrogateError
from tiltopt.surrogates.auto import MIN_COMPARE, cross_validated
from tiltopt.surrogates.data import Data, check
from tiltopt.surrogates.evidence import with_moments
from tiltopt.surrogates.linear import LinearModel
from tiltopt.surrogates.relevance import learn_relevance

FOLDS = 8
SEED = 0  # of the folds, which all maps share


def rank_features(
    maps: Mapping[str, Tensor],
    Y: Tensor,
    *,
    sem: Tensor | float | None = None,
    blocks: Mapping[str, Sequence[int]] | None = None,
    folds: int = FOLDS,
) -> dict[str, Tensor]:
    """log p(y_i | answers of the other folds) under a `linear` surrogate on each map, best map first.

    Everything is learnt anew in every fold, the relevance of blocks too; all maps see the same folds, so that the
    densities of two maps can be compared answer by answer.

    Args:
        maps: features of the same n designs under each map, {name: (n, d)}.
        Y: (n, 1), answers, reward units; sem: their known standard error.
        blocks: sizes of the blocks of each map (`FeatureMap.blocks`); of one block where a map is not named.
        folds: at most; one answer each where there are 16 or fewer.

    Returns:
        {name: (n,) nats, float64}, by falling mean.

    Raises:
        SurrogateError: no map, fewer than 8 answers, or answers that nothing can be fitted to.
    """
    if not maps:
        raise SurrogateError("`maps` is empty; give the features of at least one map.")
    scores = {}
    for name, X in maps.items():
        data, sizes = check(X, Y, sem), (blocks or {}).get(name, (X.shape[1],))
        if len(data) < MIN_COMPARE:
            raise SurrogateError(
                f"feature maps can be compared from {MIN_COMPARE} answers on, got {len(data)}; ask for more first."
            )

        number = len(data) if len(data) <= 16 else folds
        generator = torch.Generator().manual_seed(SEED)
        scores[name] = cross_validated("linear", data, _fit, generator, number, blocks=sizes)
    order = sorted(scores, key=lambda name: float(scores[name].mean()), reverse=True)
    return {name: scores[name] for name in order}


def _fit(_: str, data: Data, __: Generator, options: dict[str, Any]) -> Model:
    data = with_moments(data)
    return LinearModel.fit(replace(data, relevance=learn_relevance(data, options["blocks"])))


def choose_features(
    maps: Mapping[str, Tensor],
    Y: Tensor,
    *,
    sem: Tensor | float | None = None,
    blocks: Mapping[str, Sequence[int]] | None = None,
) -> tuple[str, dict[str, float]]:
    """The best map of `rank_features`, and the mean log density under each, nats per answer."""
    ranked = rank_features(maps, Y, sem=sem, blocks=blocks)
    return next(iter(ranked)), {name: float(score.mean()) for name, score in ranked.items()}
