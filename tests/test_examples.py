"""Each example runs as it stands, but for its size: it writes into a temporary folder, and says what it wrote."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SMALLER = {
    "ask_tell": {
        'steps": 10': 'steps": 2',
        "(16, 4, 4)": "(4, 2)",
        'initial_batch_size": 16': 'initial_batch_size": 4',
    },
    "demon": {"num_steps=12": "num_steps=3", "num_noises=8": "num_noises=2"},
    "direct_sampling": {"num_steps=25": "num_steps=3", "pilot_chains=16": "pilot_chains=8"},
    "edit_by_inversion": {"steps=20": "steps=2", "steps=30": "steps=2"},
    "own_denoiser": {"range(3000)": "range(30)", "num_steps=100": "num_steps=5"},
}
"""What is cut of each, so that it takes seconds."""


def test_every_example_is_run() -> None:
    run_elsewhere = {"http_reward", "own_reward"}  # a server, and a function that a run is pointed at
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALLER) | run_elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_an_example_says_what_it_wrote_and_leaves_nothing_where_it_was_started(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    for whole, part in SMALLER[name].items():
        assert whole in text
        text = text.replace(whole, part)
    script, here, temporary = tmp_path / f"{name}.py", tmp_path / "here", tmp_path / "temporary"
    script.write_text(text)
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert not list(here.iterdir())
    told = re.findall(rf"{re.escape(str(temporary))}[^\s:,]+", capsys.readouterr().out)
    assert any(place.endswith(".png") for place in told)
    assert all(Path(place).exists() for place in told)
