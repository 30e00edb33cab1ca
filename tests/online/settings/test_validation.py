"""One validation of a whole configuration, the same from Python as on the command line, before anything is drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine import CONFIG, FakeEngine
from tiltopt.errors import ConfigError
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.settings.commandline import parse
from tiltopt.online.settings.presets import PRESETS, preset
from tiltopt.online.settings.run import KEYS, PriorSettings, SamplerSettings, Settings
from tiltopt.online.settings.samplers import make_sampler
from tiltopt.online.settings.validation import check_sampler, validated
from tiltopt.samplers import registry

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": {"kernl": "rbf"}}, "unknown configuration key `model.kernl`"),
    ({"model": {"alpha": 1.0}}, "Did you mean `sampler.alpha`"),
    ({"model": {"name": "liner"}}, "`model.name`: expected one of .* Did you mean `linear`"),
    ({"model": {"name": "ancestor"}}, "`model.name`: 'ancestor' is called 'seiko' now"),
    ({"model": {"name": "ensemble", "members": 1}}, "`model.members`"),
    ({"sampler": {"alpa": 1.0}}, "unknown configuration key `sampler.alpa`. Did you mean `sampler.alpha`"),
    ({"sampler": {"name": "dass"}}, "`sampler.name`: .* Did you mean `das`"),
    ({"sampler": {"resampling": "magic"}}, "`sampler.resampling`"),
    ({"sampler": {"select": "all"}}, "`sampler.select`: expected one of draw, argmax"),
    ({"acquisition": {"name": "ucbb"}}, "`acquisition.name`: .* Did you mean `ucb`"),
    ({"acquisition": {"name": "max_member"}, "model": {"name": "linear"}}, "`acquisition.name`: .*members"),
    ({"acquisition": {"name": "max_member"}, "model": {"name": "auto"}}, "`acquisition.name`: .*members"),
    (
        {"acquisition": {"name": "thompson"}, "model": {"name": "seiko"}},
        "`acquisition.name`: 'thompson' draws functions .*model.name = 'seiko' has none",
    ),
    (
        {"acquisition": {"name": "thompson"}, "model": {"name": "auto", "candidates": ["linear", "seiko"]}},
        "`acquisition.name`: 'thompson' draws functions .*model.name = 'seiko' has none",
    ),
    (
        {"search": {"operators": "global+restart", "parents": "thompson"}, "model": {"name": "seiko"}},
        "`search.parents`: 'thompson' draws functions .*model.name = 'seiko' has none",
    ),
    ({"search": {"operators": "restart"}, "prior": {"num_steps": 1}}, "`search.operators`: 'restart' enters"),
    ({"prompt_template": "{} and {}"}, "`prompt_template`"),
    ({"good_prompt_template": "a {} {0}"}, "`good_prompt_template`"),
    ({"model": {"name": "auto", "options": {"linear": 3}}}, "`model.options.linear`: expected a mapping"),
    ({"reward": {"name": "jpeg_compresibility"}}, "jpeg_compressibility"),
    ({"reward": {"name": "jpeg_compressibility", "qualty": 3}}, "quality"),
    ({"reward": {"nam": "jpeg_compressibility"}}, "unknown configuration key `reward.nam`. Did you mean `reward.name`"),
    ({"reward": {"retrys": 1}}, "unknown configuration key `reward.retrys`. Did you mean `reward.retries`"),
    ({"prior": {"eta": 0.0}}, "`prior.eta`"),
    ({"prior": {"path": "/no/such/folder"}}, "`prior.path`"),
    ({"prompts": "nothing.txt"}, "`prompts`"),
    ({"surrogate": "checkpoints/demo/round_003"}, "`surrogate` is called `evaluate.surrogate` now"),
    ({"job": "direct"}, "`job`"),
    ({"device": "cudaa"}, "`device`: expected .auto. or a device"),
    ({"batch_size": 10_001}, "`batch_size`"),
    ({"initial_batch_size": 10_001}, "`initial_batch_size`"),
    ({"prompts": ["a \ud83d cat"]}, "`prompts`: .* half of a surrogate pair"),
]


@pytest.mark.parametrize(("config", "says"), WRONG)
def test_what_cannot_work_is_refused_at_create_before_anything_is_there(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Optimizer.create(tmp_path / "run", config, engine=FakeEngine())
    assert not (tmp_path / "run").exists()


def test_changed_settings_are_validated_when_a_run_is_opened(tmp_path: Path) -> None:
    Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()).close()
    with pytest.raises(ConfigError, match=r"model\.kernl"):
        Optimizer.open(tmp_path / "run", config=CONFIG | {"model": {"kernl": 1}}, allow_change=True)


def test_a_consistency_model_has_noise_whatever_eta_is() -> None:
    check_sampler(SamplerSettings(), PriorSettings(eta=0.0, renoise=True))
    with pytest.raises(ConfigError, match=r"prior\.eta"):
        check_sampler(SamplerSettings(), PriorSettings(eta=0.0))


@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_every_sampler_takes_a_preset_written_for_another(name: str) -> None:
    config = preset("demo")
    config.sampler.name = name
    settings = validated(Settings.from_config(config))
    assert type(make_sampler(settings.sampler)) is registry.SAMPLERS[name]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 256),
        ({"reference_samples": 12}, 12),
        ({"reference_samples": 0}, 0),
        ({"reward": {"name": "http", "url": "http://lab.example/score"}}, 0),
        ({"reward": {"name": "http", "url": "http://lab.example/score"}, "reference_samples": 12}, 12),
        ({"reward": {"name": "json:dumps"}}, 0),
        ({"reward": {"name": ""}}, 0),
    ],
)
def test_reference_samples_cost_nothing_unless_asked_for(changes: dict[str, Any], expected: int) -> None:
    tree = Settings.from_config(preset("demo")).to_dict() | changes
    assert validated(Settings.from_config(tree)).reference_samples == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes(name: str) -> None:
    validated(Settings.from_config(preset(name)))


def test_published_sizes_of_the_paper_presets() -> None:
    for file, first in (("ucb", 16), ("bootstrap", 256)):
        config = parse([f"--config=config/{file}.py:aesthetic"])
        assert (config.initial_batch_size, config.rounds, config.batch_size) == (first, 256, 16)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.num_particles=8", "Did you mean `sampler.num_particles`"),
        ("--config.alpha=8", "Did you mean `sampler.alpha`"),
        ("--config.sampler.num_particels=8", "Did you mean `sampler.num_particles`"),
        ("--config.surrogate=checkpoints/demo/round_001", "`surrogate` is called `evaluate.surrogate` now"),
    ],
)
def test_a_forgotten_section_and_a_slip_are_understood(argument: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse(["--config=config/ucb.py:demo", argument])


def test_a_renamed_file_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("config/ancestor.py is called config/seiko.py now")):
        parse(["--config=config/ancestor.py:demo"])


def test_every_key_is_known_for_what_may_have_been_meant() -> None:
    assert {"sampler.num_particles", "evaluate.surrogate", "rounds"} <= set(KEYS)
