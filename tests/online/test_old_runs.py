"""Runs that tiltopt 0.1 made (tests/data/run_0_1) still open, report, export and go on."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from tiltopt import cli
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.settings.source import Source

ARCHIVE = Path(__file__).parents[1] / "data" / "run_0_1" / "runs.tar.gz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run_0_1"


@pytest.fixture
def runs(unpacked: Path, tmp_path: Path) -> Path:
    """Copies of the four folders, to be written."""
    shutil.copytree(unpacked, tmp_path / "run_0_1")
    return tmp_path / "run_0_1"


STOPPED = [-3.266, -3.025, -3.465, -2.67, -2.85, -2.905]
"""What 0.1 wrote into the summaries and tables of the run `stopped`: its answers, in kB."""


def test_answers_read_as_they_were_written(runs: Path) -> None:
    with Optimizer.open(runs / "stopped", read_only=True) as optimizer:
        frame = optimizer.queries()
    assert frame["value"].tolist() == STOPPED
    assert frame["round"].tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["stopped", "asked", "compared", "evaluated"])
def test_status_report_and_export(runs: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(runs / name)
    assert cli.main(["report", folder]) == 0
    assert (runs / name / "report.html").stat().st_size > 10_000
    capsys.readouterr()
    assert cli.main(["status", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["queries"].values()) == {"stopped": 6, "asked": 6, "compared": 4, "evaluated": 4}[name]
    assert cli.main(["export", folder, "--csv", str(tmp_path / "all.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "all.csv")) == sum(found["queries"].values())


def test_who_answered_is_unknown_and_asked_for_once(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "stopped"
    assert cli.main(["resume", str(folder)]) == 2
    assert f"tiltopt resume {folder} --reward NAME" in capsys.readouterr().err
    assert cli.main(["evaluate", "--surrogate", str(folder)]) == 2
    assert "an unknown source" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    config["reward"]["max_queries"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    named = ["resume", str(folder), "--reward", "jpeg_compressibility", "--allow-change"]
    assert cli.main(named) == 0, "until the budget ends it again"
    config = json.loads((folder / "config.json").read_text())
    config["reward"]["max_queries"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["resume", str(folder), "--allow-change"]) == 0
    with Optimizer.open(folder, read_only=True) as optimizer:
        frame = optimizer.queries()
        assert optimizer.store.spent().queries == 8, "the answers of 0.1 count as paid"
        assert optimizer.source() == Source("reward", "jpeg_compressibility", {})
        assert len(optimizer.queries(kind="reference")) == 0, "the reference samples of 0.1 are not paid for again"
    assert frame["value"].tolist()[:6] == STOPPED
    assert frame["round"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["complete"], summary["answered"], summary["prior"]["samples"]) == (True, 8, 4)
    assert summary["prior"]["mean"] == pytest.approx(-3.17125)


def test_ask_and_tell_go_on_under_the_surrogates_new_name(runs: Path) -> None:
    with Optimizer.open(runs / "asked") as optimizer:
        assert optimizer.settings.model.name == "seiko"
        assert optimizer.settings.model.options["epochs"] == 5
        assert "answers: unknown" in repr(optimizer)
        assert [query.id for query in optimizer.pending()] == [5, 6]
        assert [query.round for query in optimizer.pending()] == [1, 1]
        assert optimizer.queries()["sem"].tolist()[:4] == [0.05] * 4
        assert optimizer.store.get(5).attempt == 2
        optimizer.tell(5, -2.5)
        optimizer.tell(6, -3.5)
        (query,) = optimizer.ask(1)
        assert (query.id, query.round) == (7, 2)
        assert query.predicted is not None
    with Optimizer.open(runs / "asked") as optimizer:
        assert optimizer.queries()["value"].tolist()[:6] == pytest.approx([-2.9, -3.0, -3.1, -3.2, -2.5, -3.5])


def test_the_surrogate_that_was_called_ancestor_is_read(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["surrogate", str(runs / "asked" / "round_001")]) == 0
    assert "seiko" in capsys.readouterr().out


def test_comparisons_go_on(runs: Path) -> None:
    with Optimizer.open(runs / "compared") as optimizer:
        before = optimizer.comparisons()
        assert before[["winner", "loser", "outcome"]].values.tolist() == [[1, 2, "win"], [2, 3, "tie"]]
        assert before["rater"].tolist()[0] == "ann"
        assert optimizer.compare(4, 1) == 3
        assert optimizer.queries()["state"].tolist() == ["answered"] * 4


def test_an_evaluation_of_0_1_is_read_and_not_gone_on_with(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", str(runs / "evaluated")]) == 1
    assert "no query store" in capsys.readouterr().err
    assert cli.main(["report", str(runs / "evaluated")]) == 0
    assert "a hedgehog" in (runs / "evaluated" / "report.html").read_text()
