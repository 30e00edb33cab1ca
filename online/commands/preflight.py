"""What is said and checked before a run starts: what it will cost, and whose code it executes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tiltopt.errors import ConfigError
from tiltopt.kinds import needs
from tiltopt.online.direct import run as direct
from tiltopt.online.direct.settings import DirectSettings
from tiltopt.online.engine import memory
from tiltopt.online.engine.diffusion import DiffusionEngine
from tiltopt.online.evaluation.evaluate import evaluation_settings, layout_of
from tiltopt.online.places import at_address, place_of, state_folder
from tiltopt.online.report.numbers import peak_memory_mb
from tiltopt.online.settings.cost import cost, in_words
from tiltopt.online.settings.run import Settings, flat
from tiltopt.online.settings.source import Source
from tiltopt.online.settings.validation import validated
from tiltopt.online.store.files import read_json, write_json
from tiltopt.online.store.run_folder import database_of, is_shared
from tiltopt.online.team import Team
from tiltopt.rewards import own_code
from tiltopt.samplers.diffusers_prior import load_prior
from tiltopt.samplers.loading import on_this_machine
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.work import trial

# ---------------------------------------------------------------- cost


def start_line(settings: Settings, folder: str | Path, answers_by: str) -> str:
    """What a run of the loop is, what it costs at most, and where its answers go.

    Args:
        answers_by: who answers, in words.
    """
    c = cost(settings)
    what = f"{c.queries} queries in {settings.rounds + 1} rounds"
    if c.reference:
        what += f" and {c.reference} reference samples"
    if c.comparisons:
        what += f", {c.comparisons} comparisons"
    title = (
        f"run {folder}: {what}; {settings.model.name} + {settings.acquisition.name}, {settings.sampler.name} with "
        f"{settings.sampler.num_particles} particles"
    )
    return in_words(title, c, settings.reward, answers_by, f"answers go to {_where(place_of(folder))}")


def _where(folder: Path) -> str:
    return f"the shared database of {folder}" if is_shared(folder) else str(folder / "queries.sqlite")


def dry_run(settings: Settings | DirectSettings) -> None:
    """Print the whole configuration, what the job costs, and how long it takes and how much memory it needs, from one
    step on a few rows. Nothing is asked, nothing is written.

    Raises:
        ConfigError: an impossible configuration.
    """
    team = Team.from_accelerate(settings.device)
    if isinstance(settings, DirectSettings):
        direct.check(settings)
    else:
        settings = _as_drawn(validated(settings))
        database_of(place_of(settings.run_dir), None)
    if not team.is_main:
        return
    print("\n".join(f"{key} = {value!r}" for key, value in flat(settings.to_dict()).items()), end="\n\n")
    if isinstance(settings, DirectSettings):
        print(direct.start_line(settings))
    else:
        print(start_line(settings, settings.run_dir, str(Source.of(settings.reward))))
    print(_estimate(settings, team))
    print("this was a dry run: nothing was asked, and nothing was written", flush=True)


def _as_drawn(settings: Settings) -> Settings:
    """The settings themselves; for an evaluation those of its rounds of one size."""
    if not settings.evaluate.surrogate:
        return settings
    size = layout_of(settings).size
    return dataclasses.replace(evaluation_settings(settings), initial_batch_size=max(2, size), batch_size=size)


def _estimate(settings: Settings | DirectSettings, team: Team) -> str:
    """Time and memory in words; a dash where the weights are not on this machine."""
    paths = {"prior.path": (settings.prior.path, "model_index.json")}
    if isinstance(settings, Settings) and (
        settings.features.prompt_features or "clip" in needs(settings.features.kind)
    ):
        paths["features.path"] = (settings.features.path, "config.json")
    missing = [f"{key} = {path}" for key, (path, file) in paths.items() if not on_this_machine(path, file)]
    if missing:
        return (
            f"time: -, peak memory: - (they are measured on one step, and the weights of {', '.join(missing)} are not "
            "on this machine: download them with `hf download <id>`, then ask again)"
        )
    prior: Prior
    if isinstance(settings, DirectSettings):
        prior = load_prior(settings.prior.path, **settings.prior.arguments(), device=team.device)
        tried, c = direct.what_is_tried(settings, team, prior, None), direct.cost(settings, prior)
    else:
        engine = DiffusionEngine(settings, team)
        prior, tried, c = engine.prior, engine.what_is_tried(), cost(settings, engine.prior)
    rows, chosen = settings.micro_batch, ""
    if settings.prior.memory == "auto":
        choice = memory.choose(prior, **tried)
        rows, chosen = choice.micro_batch, f"memory: {choice}\n"
    cond = tried["cond"].select([0] * rows)
    gradients = {name: getattr(c.work, name) > 0 for name in ("network_backward", "looks_backward")}
    rates = trial(prior, cond, lambda x0: tried["look"](x0, cond.prompts), **gradients)
    on_gpu = team.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(team.device) / 2**20 if on_gpu else peak_memory_mb()
    machine = torch.cuda.get_device_name(team.device) if on_gpu else "this processor"
    machines = machine if team.size == 1 else f"{team.size} of {machine}"
    rest = "what the reward computes comes on top"
    if isinstance(settings, Settings):
        rest = "answers and fits of the surrogate come on top"
    return (
        f"{chosen}time: about {_duration(rates.seconds(c.work) / team.size)} on {machines}, from one step of {rows} "
        f"rows; {rest}\npeak memory: about {peak:,.0f} MB"
    )


def _duration(seconds: float) -> str:
    """Two of days, hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:.0f} min"


# ---------------------------------------------------------------- trust


def check_trust(
    folder: str | Path, reward: str, options: Mapping[str, Any] | None = None, *, trust: bool = False
) -> None:
    """Refuse to execute code that somebody else's folder names.

    A reward of one's own, `module:function`, is Python code that the run's folder names; continuing the run executes
    it. That is the user's own doing where the folder is the user's own. A folder of another user, or one whose owner
    cannot be told (as in a bucket), has to be trusted once; this is remembered for the user, the folder and the reward.

    Args:
        reward: its name.
        options: of it; the parts of a composed reward name code, too.
        trust: the user says so now.

    Raises:
        ConfigError: not the user's folder, and never trusted.
    """
    code = own_code(reward, options or {}) if reward else []
    if not code or _is_mine(place_of(folder)):
        return
    place, known = str(place_of(folder).resolve()), read_json(_trusted_file(), {})
    unknown = [name for name in code if name not in known.get(place, [])]
    if trust:
        write_json(_trusted_file(), known | {place: [*known.get(place, []), *unknown]})
    elif unknown:
        raise ConfigError(
            f"{folder} names the code of its reward, {', '.join(map(repr, unknown))}, and is not a folder of yours: "
            "going on would execute that code. Read it; then say once --trust, which is remembered for this folder and "
            "reward."
        )


def _is_mine(folder: Path) -> bool:
    """Whether the folder and what says how its run goes on belong to the user of this process."""
    if at_address(folder) or not hasattr(os, "getuid"):  # no owners here
        return False
    parts: Sequence[Path] = [folder, *(folder / name for name in ("config.json", "queries.sqlite", "store.json"))]
    return all(part.stat().st_uid == os.getuid() for part in parts if part.exists())


def _trusted_file() -> Path:
    """Which folders this user trusts: {folder: [reward]}."""
    return state_folder() / "trusted.json"
