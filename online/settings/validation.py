"""The one validation of a whole configuration: everything that is knowable before a model is loaded or a query is paid.

`Settings.from_config` knows types and ranges of the settings' own keys. Here the tables of samplers, surrogates,
acquisitions and rewards say whether names and options exist, and what does not go together is refused. The command line
and `Optimizer.create` and `open` all come through here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Literal

import torch

from tiltopt import rewards, surrogates
from tiltopt.designs import Pictures, design_type
from tiltopt.errors import ConfigError
from tiltopt.online.places import place_of
from tiltopt.online.queries import maximised
from tiltopt.online.settings.objectives import objectives_of
from tiltopt.online.settings.prompts import load_prompts
from tiltopt.online.settings.run import KEYS, FeatureSettings, PriorSettings, SamplerSettings, Settings
from tiltopt.online.settings.samplers import make_sampler, select_rule
from tiltopt.options import check_name, unknown_key
from tiltopt.surrogates.acquisition import ACQUISITIONS


def validated(settings: Settings) -> Settings:
    """The settings, complete: with the number of reference samples that they amount to.

    Raises:
        ConfigError: with the key, what was expected, what came.
    """
    load_prompts(settings.prompts)
    _check_design(settings)
    check_sampler(settings.sampler, settings.prior)
    check_tracker(settings.tracker)
    check_device(settings.device)
    _check_model(settings)
    _check_acquisition(settings)
    _check_search(settings)
    if not settings.prior.fingerprint:
        check_path("prior.path", settings.prior.path, "model_index.json", "the folder of a pipeline")
    check_path("features.path", settings.features.path, "config.json", "a CLIPModel folder")
    _check_reward(settings)
    if settings.evaluate.surrogate:
        _check_evaluation(settings)
    _check_several(settings)
    if settings.pairwise and not settings.evaluate.surrogate:
        _check_pairwise(settings)
    return dataclasses.replace(settings, reference_samples=reference_samples(settings))


def reference_samples(settings: Settings) -> int:
    """How many plain samples are scored for the report: those asked for, else those that cost nothing."""
    if settings.reference_samples is not None:
        return settings.reference_samples
    if not settings.reward.name or settings.pairwise or settings.objectives:
        return 0
    return settings.free_reference_samples if rewards.is_free(settings.reward.name, settings.reward.options) else 0


def _check_design(settings: Settings) -> None:
    """The type of the designs, and that a run of others than pictures asks for no features. Raises ConfigError."""
    if isinstance(design_type(settings.design), Pictures):
        return
    if settings.features != FeatureSettings():
        raise ConfigError(
            f"`features`: they are of pictures; of designs of the type {settings.design!r} a surrogate sees the design "
            "itself. Leave `features` as it is."
        )


def check_sampler(sampler: SamplerSettings, prior: PriorSettings) -> None:
    """Whether the sampler exists, takes its options, and can do with the prior's steps. Raises ConfigError."""
    made = make_sampler(sampler)
    select_rule(sampler)
    if made.needs_noise and prior.eta == 0 and not prior.renoise:
        raise ConfigError(
            f"`prior.eta`: the sampler {sampler.name!r} needs stochastic steps, eta > 0, got 0. "
            "Set --config.prior.eta=1, or use --config.sampler.name=best_of_n."
        )


def check_tracker(name: str) -> None:
    """Whether the package of a tracker is there. Raises ConfigError."""
    known = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}
    packages = known.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ConfigError(
            f"`tracker`: expected an installed tracker, got {name!r}, whose package is missing. Install it with "
            f"`pip install {packages[0]}`, or set --config.tracker=none."
        )


def check_device(name: str) -> None:
    """Whether there is a device of that name, be it on another machine. Raises ConfigError."""
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        raise ConfigError(f'`device`: expected "auto" or a device such as cpu or cuda:0, got {name!r}.') from None


def check_path(key: str, value: str, marker: str, what: str) -> None:
    """A local folder must hold `marker`; "embedded" and hub ids (owner/name) are looked up when they are loaded."""
    path = Path(value)
    if value == "embedded" or (path.is_dir() and (path / marker).is_file()):
        return
    looks_like_hub_id = value.count("/") == 1 and not path.exists() and not value.startswith((".", "/", "~"))
    if looks_like_hub_id and not Path(value.split("/")[0]).is_dir():
        return
    state = "which does not exist" if not path.exists() else f"which holds no {marker}"
    raise ConfigError(f'`{key}`: expected "embedded", {what}, or a hub id owner/name, got {value!r}, {state}.')


def _check_model(settings: Settings) -> None:
    """Whether the surrogate exists and takes its options."""
    known = surrogates.SURROGATES[check_name("model.name", settings.model.name, surrogates.SURROGATES)].options
    for key in settings.model.options:
        if key not in known:
            raise unknown_key(f"model.{key}", [*(f"model.{name}" for name in known), *KEYS])
    surrogates.validate(settings.model.name, settings.model.options)


def _check_acquisition(settings: Settings) -> None:
    """Whether the acquisition exists, and finds what it needs in the surrogate."""
    name = check_name("acquisition.name", settings.acquisition.name, ACQUISITIONS)
    count = len(maximised(objectives_of(settings))) or 1
    if ACQUISITIONS[name].several != (count > 1) and not settings.evaluate.surrogate:
        fitting = ", ".join(other for other, entry in ACQUISITIONS.items() if entry.several == (count > 1))
        raise ConfigError(
            f"`acquisition.name`: expected one of {fitting} for {count} maximised objective{'s' if count > 1 else ''} "
            f"(`objectives`), got {name!r}."
        )
    needs = ACQUISITIONS[name].needs
    if "members" in needs and (lack := _lack(settings, "members")):
        raise ConfigError(
            f"`acquisition.name`: {name!r} looks at the members of a surrogate, and {lack}, or acquisition.name to ucb."
        )
    if "draws" in needs and (lack := _lack(settings, "draws")):
        raise ConfigError(
            f"`acquisition.name`: {name!r} draws functions from a surrogate, and {lack}, or acquisition.name to ucb."
        )


def _lack(settings: Settings, need: Literal["members", "draws"]) -> str:
    """Which of the surrogates that may be fitted has nothing of the kind, in words; "" where each has."""
    table, model = surrogates.SURROGATES, settings.model
    known = table["auto"].options["candidates"].default
    chosen = model.options.get("candidates", known) if model.name == "auto" else (model.name,)
    without = [name for name in chosen if not getattr(table[name], need)]
    having = [name for name, entry in table.items() if getattr(entry, need) and name != "auto"]
    return f"model.name = {without[0]!r} has none; set model.name to {', '.join(having)}" if without else ""


def _check_search(settings: Settings) -> None:
    """Whether queries can start where they are to start."""
    search = settings.search
    if search.operators == "global":
        return
    if settings.prior.num_steps < 2:
        raise ConfigError(
            f"`search.operators`: {search.operators!r} enters the chain half-way, and prior.num_steps = 1 has no such "
            "place; take more steps, or 'global'."
        )
    if search.parents == "thompson" and (lack := _lack(settings, "draws")):
        raise ConfigError(
            f"`search.parents`: 'thompson' draws functions from a surrogate, and {lack}, or search.parents to rank."
        )


def _check_reward(settings: Settings) -> None:
    if not settings.reward.name:
        for key in settings.reward.options:  # of which reward?
            raise unknown_key(f"reward.{key}", KEYS)
        return
    if settings.reward.options.get("mode") == "compare" and not settings.pairwise:
        raise ConfigError(
            "`reward.mode`: 'compare' compares pairs and scores no image, got it with model.name = "
            f"{settings.model.name!r}; set model.name = 'pairwise', or another mode."
        )
    rewards.validate(settings.reward.name, settings.reward.options)


def _check_evaluation(settings: Settings) -> None:
    """Whether there is a surrogate, and whether the prompts that taught it are others than the held-out ones."""
    folder = place_of(settings.evaluate.surrogate)
    if not (folder / "surrogate.json").is_file() and not any(folder.glob("round_*/surrogate.json")):
        raise ConfigError(
            "`evaluate.surrogate`: expected the folder of a saved surrogate, such as checkpoints/<run>/round_004, or "
            f"of a run that has some, got {settings.evaluate.surrogate!r}, which holds no surrogate.json."
        )
    if settings.evaluate.seen:
        both = sorted(set(load_prompts(settings.evaluate.seen)) & set(load_prompts(settings.prompts)))
        if both:
            raise ConfigError(
                "`evaluate.seen`: expected prompts that are not among the held-out ones (`prompts`), got "
                f"{', '.join(both[:3])} in both."
            )


def _check_several(settings: Settings) -> None:
    """What has no meaning where an answer is several numbers is refused."""
    names = [objective.name for objective in objectives_of(settings)]
    if not names:
        return
    why = f"where an answer is several numbers (`objectives` = {', '.join(names)})"
    if settings.pairwise:
        raise ConfigError(f"`model.name`: expected a surrogate of values {why}, got 'pairwise'; take linear.")
    if settings.evaluate.surrogate:
        raise ConfigError(f"`evaluate.surrogate`: expected a run of one number per answer, not one {why}.")
    if settings.search.operators != "global":
        raise ConfigError(f"`search.operators`: expected 'global' {why}: it ranks no parents, got another.")
    if settings.acquisition.adapt:
        raise ConfigError(f"`acquisition.adapt`: expected False {why}: no promise is held against all, got True.")
    if settings.reference_samples:
        raise ConfigError(f"`reference_samples`: expected 0 {why}, got {settings.reference_samples}.")
    if settings.reward.options.get("standardise"):
        raise ConfigError(f"`reward.standardise`: expected False {why}, each in its own unit, got True.")
    parts = rewards.parts_of(settings.reward.name, settings.reward.options) if settings.reward.name else None
    lacking = [name for name in names if parts is not None and name not in parts]
    if lacking:
        raise ConfigError(
            f"`objectives`: the reward {settings.reward.name!r} says nothing of {', '.join(lacking)}, only of "
            f"{', '.join(parts or ()) or 'one number'}. Name them in reward.parts of the reward `weighted`."
        )


def _check_pairwise(settings: Settings) -> None:
    """What has no meaning where answers are comparisons is refused."""
    why = "where answers are comparisons (model.name = 'pairwise')"
    if settings.acquisition.adapt:
        raise ConfigError(
            f"`acquisition.adapt`: expected False {why}: utilities promise no reward to be held against, got True."
        )
    if settings.search.operators != "global":
        raise ConfigError(
            f"`search.operators`: expected 'global' {why}: there is no answer to rank parents by, got "
            f"{settings.search.operators!r}; `refine` starts from a design of your choice."
        )
    if settings.reference_samples:
        raise ConfigError(
            f"`reference_samples`: expected 0 {why}: a plain sample by itself has no value, got "
            f"{settings.reference_samples}."
        )
