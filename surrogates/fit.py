"""The one table of surrogates: name -> options and how it is fitted; and fitting by name."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from botorch.models.model import Model
from torch import Generator, Tensor

from tiltopt.errors import ConfigError, SurrogateError
from tiltopt.options import REQUIRED, Option, Range, above, at_least, check_name, check_options
from tiltopt.surrogates.averaged import fit_linear
from tiltopt.surrogates.data import Data, check
from tiltopt.surrogates.ensemble import fit_ensemble
from tiltopt.surrogates.evidence import with_moments
from tiltopt.surrogates.gp import GPModel
from tiltopt.surrogates.last_layer import LastLayerModel
from tiltopt.surrogates.preference import fit_pairwise
from tiltopt.surrogates.relevance import check_blocks, with_relevance
from tiltopt.surrogates.seiko import SeikoModel
from tiltopt.surrogates.selection import fit_auto
from tiltopt.surrogates.sparse_gp import SparseGPModel


class SurrogateOptionError(SurrogateError, ConfigError):
    """A surrogate's name or options cannot be used; known before anything is fitted or any query is asked."""


@dataclass(frozen=True)
class Entry:
    """How one named surrogate is fitted.

    Args:
        fit: its function; `answers` says of what.
        options: what it takes.
        answers: "values" (fitted by `fit`) or "comparisons" (by `fit_pairwise`).
        random: whether the function takes a `generator`.
        blocks: whether it can learn how much each block of features matters.
        members: whether its posterior is that of members, as `max_member` needs.
        draws: whether whole functions can be drawn from its posterior, as `thompson` needs.
        rule: refuses, as a `ConfigError`, checked options that do not go together: (section, options) -> None.
    """

    fit: Callable[..., Model]
    options: Mapping[str, Option]
    answers: Literal["values", "comparisons"] = "values"
    random: bool = True
    blocks: bool = True
    members: bool = False
    draws: bool = True
    rule: Callable[[str, Mapping[str, Any]], None] | None = None


def options_of(function: Callable[..., Any], ranges: Mapping[str, Range]) -> dict[str, Option]:
    """What a function takes as options: its keyword-only parameters, but for those that the table hands in itself."""
    hints = typing.get_type_hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("generator", "fit"):
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            found[name] = Option(hints[name], default, ranges.get(name))
    return found


def fit_gp(
    data: Data,
    *,
    generator: Generator,
    sparse_above: int = 1024,
    inducing: int | None = None,
    max_dim: int | None = None,
    fit_size: int = 1024,
    max_iterations: int = 100,
    ard_dims: int = 32,
) -> Model:
    """An exact GP up to some number of answers, beyond that a sparse one; the other options are those of `GPModel.fit`.

    Args:
        sparse_above: answers up to which it is exact.
        inducing: points through which the Matern part is seen beyond that; None: by the number of features.
    """
    shared: dict[str, Any] = {
        "generator": generator,
        "max_dim": max_dim,
        "fit_size": fit_size,
        "max_iterations": max_iterations,
        "ard_dims": ard_dims,
    }
    if len(data) > sparse_above:
        return SparseGPModel.fit(data, inducing=inducing, **shared)
    return GPModel.fit(data, **shared)


def _check_members(where: str, options: Mapping[str, Any]) -> None:
    """An option of the other kind of member is refused."""
    member = options.get("member", "linear")
    for key in MEMBER_OPTIONS["mlp" if member == "linear" else "linear"]:
        if key in options:
            raise ConfigError(
                f"`{where}.{key}`: no option of an ensemble whose `{where}.member` is {member!r}; drop it."
            )


def _check_candidates(where: str, options: Mapping[str, Any]) -> None:
    """Names and options of what `auto` chooses from."""
    names = options.get("candidates", SURROGATES["auto"].options["candidates"].default)
    possible = [name for name, entry in SURROGATES.items() if entry.answers == "values" and name != "auto"]
    if not names:
        raise ConfigError(f"`{where}.candidates`: expected at least one of {', '.join(possible)}, got none.")
    for name in names:
        check_name(f"{where}.candidates", name, possible)
    for name, given in (options.get("options") or {}).items():
        check_name(f"{where}.options", name, names)
        if not isinstance(given, Mapping):
            raise ConfigError(f"`{where}.options.{name}`: expected a mapping of options, got {given!r}.")
        validate(name, given, f"{where}.options.{name}")


MEMBER_OPTIONS = {"linear": ("strength",), "mlp": ("hidden", "features", "max_epochs")}
COUNTS = {
    **dict.fromkeys(("hidden", "features", "max_dim", "inducing", "epochs", "first", "step"), at_least(1)),
    **dict.fromkeys(("max_epochs", "max_iterations", "ard_dims", "sparse_above"), at_least(0)),
    **dict.fromkeys(("members", "fit_size", "folds"), at_least(2)),
}
RANGES = {
    **COUNTS,
    "strength": at_least(0),
    "bonus": at_least(0),
    "ridge": above(0),
    "validation": Range(lambda share: 0 <= share < 1, "a share in [0, 1)"),
}

SURROGATES: dict[str, Entry] = {
    "linear": Entry(fit_linear, options_of(fit_linear, RANGES), random=False),
    "last_layer": Entry(LastLayerModel.fit, options_of(LastLayerModel.fit, RANGES)),
    "ensemble": Entry(fit_ensemble, options_of(fit_ensemble, RANGES), members=True, rule=_check_members),
    "gp": Entry(fit_gp, options_of(fit_gp, RANGES)),
    "auto": Entry(fit_auto, options_of(fit_auto, RANGES), rule=_check_candidates),
    "seiko": Entry(SeikoModel.fit, options_of(SeikoModel.fit, RANGES), blocks=False, draws=False),
    "pairwise": Entry(fit_pairwise, options_of(fit_pairwise, RANGES), answers="comparisons", random=False),
}
RENAMED = {"ancestor": "seiko"}
"""What surrogates were called in saved files and configurations of version 0.1."""


def validate(name: str, options: Mapping[str, Any], where: str = "model") -> dict[str, Any]:
    """Checks a surrogate's name and options without fitting anything; the options as the types that they are.

    Args:
        where: the section of a configuration that holds `name` and the options, for messages.

    Raises:
        SurrogateOptionError: an unknown name or option, a wrong type, or an impossible value.
    """
    try:
        if name in RENAMED:
            raise ConfigError(f"`{where}.name`: {name!r} is called {RENAMED[name]!r} now; write that.")
        entry = SURROGATES[check_name(f"{where}.name", name, SURROGATES)]
        taken = check_options(where, options, entry.options)
        if entry.rule is not None:
            entry.rule(where, taken)
    except ConfigError as error:
        raise SurrogateOptionError(str(error)) from None
    return taken


def fit(
    name: str,
    X: Tensor,
    Y: Tensor,
    *,
    sem: Tensor | float | None = None,
    generator: Generator | None = None,
    blocks: Sequence[int] | None = None,
    **options: Any,
) -> Model:
    """A surrogate fitted to all answers, as a BoTorch model over (b) x q x d features in reward units.

        model = fit("linear", X, Y)
        model.posterior(X_new.unsqueeze(-2)).mean   # (m, 1, 1)

    Args:
        name: "linear" (Bayesian ridge, exact), "last_layer" (perceptron with a Bayesian last layer), "ensemble"
            (bootstrap), "gp" (linear + Matern Gaussian process), or "auto" (the one that predicts best); "seiko" is
            a baseline for benchmarks (see `tiltopt.surrogates.seiko`).
        X: (n, d), features; Y: (n, 1), answers, higher is better, reward units.
        sem: known standard error of the answers, reward units: None, one number, or (n, 1).
        generator: of everything random in the fit; by default one seeded with 0.
        blocks: sizes of the blocks that the features are made of (`FeatureMap.blocks`), d in all; how much each block
            matters is then learnt from the answers (see `relevance`). None: all features are alike a priori.
        options: of the model; see `SURROGATES` and docs/surrogates.md.

    Raises:
        SurrogateOptionError: on an unknown name or option, or an impossible value.
        SurrogateError: on answers that nothing can be fitted to (see `data.check`).
    """
    options = validate(name, options)
    entry = SURROGATES[name]
    if entry.answers != "values":
        raise SurrogateOptionError(f"the surrogate {name!r} learns from comparisons; use `fit_pairwise`.")
    data = check(X, Y, sem)
    if blocks is not None and len(check_blocks(blocks, data.X.shape[1])) > 1 and entry.blocks:
        data = with_relevance(with_moments(data), blocks)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    try:
        return _fit(name, data, generator, options)
    except torch.linalg.LinAlgError as error:
        raise SurrogateError(
            f"surrogate {name!r} could not be solved for {len(data)} answers of {data.X.shape[1]} features: {error}; "
            "look for features of very different magnitude, or use `linear`."
        ) from error


def _fit(name: str, data: Data, generator: Generator, options: Mapping[str, Any]) -> Model:
    """The surrogate `name` of checked data with checked options."""
    entry = SURROGATES[name]
    extra: dict[str, Any] = {"generator": generator} if entry.random else {}
    if name == "auto":
        extra["fit"] = _fit
    return entry.fit(data, **extra, **options)
