"""Who answers is part of a run: it is recorded, another is refused, and how the run goes on follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.engine import CONFIG, FakeEngine, LoggedReward
from tiltopt import cli
from tiltopt.errors import ConfigError
from tiltopt.online import loop
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.settings.source import ASK_TELL, PERSON, Source
from tiltopt.rewards.base import FunctionReward

JPEG = CONFIG | {"reward": {"name": "jpeg_compressibility", "quality": 90}}


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A run from a preset with a reward, half of whose first round a lab has answered from Python."""
    folder = tmp_path / "lab"
    with Optimizer.create(folder, JPEG, engine=FakeEngine()) as optimizer:
        for query in optimizer.ask(5)[:3]:
            optimizer.tell(query.id, 150.0 + query.id)
    return folder


def values(folder: Path) -> list[float]:
    with Optimizer.open(folder, read_only=True) as optimizer:
        return optimizer.queries()["value"].dropna().tolist()


def test_no_reward_is_the_default(tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        assert optimizer.settings.reward.name == ""
        assert optimizer.source() is None
        assert "from Python" in optimizer.go_on()


def test_resume_does_not_mix_a_reward_with_the_labs_answers(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = values(told)
    for arguments in ([], ["--reward", "jpeg_compressibility"], ["--reward", "symmetry"]):
        assert cli.main(["resume", str(told), *arguments]) == 2
        message = capsys.readouterr().err
        assert "come from Python (ask and tell)" in message
        assert f"Optimizer.open('{told}')" in message
    assert values(told) == before


def test_status_says_how_the_labs_run_goes_on(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(told)]) == 0
    text = capsys.readouterr().out
    assert f"go on from Python with Optimizer.open('{told}')" in text
    assert "tiltopt resume" not in text


def test_a_person_and_a_lab_and_a_reward_do_not_mix(told: Path) -> None:
    with Optimizer.open(told, engine=FakeEngine()) as optimizer:
        assert optimizer.source() == ASK_TELL
        number = optimizer.pending()[0].id
        with pytest.raises(ConfigError, match="a person on the rating page must not be mixed"):
            optimizer.tell(number, 3.0, source=PERSON)
        with pytest.raises(ConfigError, match="the reward 'toy' must not be mixed"):
            loop.run(optimizer, LoggedReward())
        optimizer.tell(number, 3.0)


def test_a_reward_run_takes_no_values_from_python(tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "run", CONFIG | {"rounds": 0}, engine=FakeEngine()) as optimizer:
        loop.run(optimizer, LoggedReward())
        assert optimizer.source() == Source("reward", "toy")
        with pytest.raises(ConfigError, match="come from the reward 'toy', and Python"):
            optimizer.tell(1, 3.0)
        other = FunctionReward("other", "points", 1, LoggedReward())
        with pytest.raises(ConfigError, match="the reward 'other' must not be mixed"):
            loop.run(optimizer, other)
        assert loop.run(optimizer, LoggedReward()).complete


def test_a_configured_reward_is_recorded_with_its_options(tmp_path: Path) -> None:
    box = FunctionReward("jpeg_compressibility", "points", 1, LoggedReward())
    folder = tmp_path / "run"
    with Optimizer.create(folder, JPEG | {"rounds": 0}, engine=FakeEngine()) as optimizer:
        loop.run(optimizer, box)
        assert optimizer.source() == Source("reward", "jpeg_compressibility", {"quality": 90})
        assert optimizer.go_on() == f"go on with `tiltopt resume {folder}`"
        changed = Source("reward", "jpeg_compressibility", {"quality": 50})
        with pytest.raises(ConfigError, match="with other options"):
            optimizer.answers_from(changed)
        optimizer.answers_from(changed, allow_change=True)
        assert optimizer.source() == changed
        with pytest.raises(ConfigError):
            optimizer.answers_from(PERSON, allow_change=True)


@pytest.mark.parametrize(
    "source", [ASK_TELL, PERSON, Source("reward", "http", {"url": "http://lab"}), Source("reward", "toy")]
)
def test_a_source_survives_a_round_trip(source: Source) -> None:
    assert Source.from_dict(source.to_dict()) == source


def test_a_reward_does_not_say_what_is_worth_what_a_lab_has_taught(
    told: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Optimizer.open(told, engine=FakeEngine()) as optimizer:
        for query in optimizer.pending():
            optimizer.tell(query.id, 1.0)
        optimizer.ask(3)
    assert cli.main(["evaluate", "--surrogate", str(told)]) == 2
    assert "come from Python (ask and tell)" in capsys.readouterr().err
