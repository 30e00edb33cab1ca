"""What is said before a run costs anything, and whose code is executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny import tiny_pipeline
from tiltopt import cli
from tiltopt.errors import ConfigError
from tiltopt.online.commands.preflight import check_trust, start_line
from tiltopt.online.settings.cost import cost
from tiltopt.online.settings.run import Settings
from tiltopt.online.store import run_folder

CONFIG = Path(__file__).parents[3] / "config"
SIZES = {"initial_batch_size": 10, "rounds": 2, "batch_size": 3, "prior": {"num_steps": 5, "guidance_scale": 4.0}}


def settings(**changes: Any) -> Settings:
    return Settings.from_config(SIZES | {"sampler": {"num_particles": 4, "alpha": 0.1}} | changes)


def test_cost_counts_everything_that_is_drawn_and_asked() -> None:
    found = cost(settings(reference_samples=7, reward={"name": "my:lab", "retries": 2}))
    assert (found.queries, found.reference, found.comparisons) == (16, 7, 0)
    assert found.work.network == (10 + 7 + 2 * 3 * 4) * 5 * 2
    assert found.work.network_backward == 2 * 3 * 4 * 5 * 2
    assert (found.answers, found.calls) == (23, 69)


def test_finding_the_price_of_a_budget_is_counted() -> None:
    """Two queries of four particles, at most four times, over five guided steps."""
    known, sought = (cost(settings(sampler={"num_particles": 4, key: 2.0})).work for key in ("alpha", "budget_nats"))
    assert sought.network - known.network == 2 * 4 * 4 * 5 * 2


def test_features_that_look_into_the_network_are_counted() -> None:
    without, found = cost(settings()), cost(settings(features={"kind": "denoiser"}))
    pictures = without.work.looks + 10 + 2 * 3  # looked at on the way, and once more as they are asked about
    assert found.work.network - without.work.network == pictures
    assert found.work.network_backward - without.work.network_backward == without.work.looks_backward


def test_a_pool_is_counted_where_a_query_may_come_from_one() -> None:
    found = cost(settings(search={"operators": "global+pool", "pool": 9}))
    assert found.work.network == (10 + 2 * 3 * 9) * 5 * 2
    assert found.work.network_backward == 2 * 3 * 4 * 5 * 2


@pytest.mark.parametrize(
    ("reward", "answers", "calls"),
    [
        ({"max_queries": 5}, 5, 15),
        ({"max_queries": 5, "max_calls": 8}, 5, 8),
        ({"max_calls": 3}, 3, 3),
        ({"retries": 0}, 16, 16),
    ],
)
def test_budgets_bound_the_cost(reward: dict[str, Any], answers: int, calls: int) -> None:
    found = cost(settings(reward={"name": "my:lab"} | reward))
    assert (found.answers, found.calls) == (answers, calls)


def test_comparisons_are_counted_as_the_plan_makes_them() -> None:
    """k = 2: a ring of n pairs in round 0; later a ring and one earlier query each. See `tiltopt.online.pairs`."""
    found = cost(settings(model={"name": "pairwise"}, comparisons_per_query=2))
    assert found.comparisons == 10 + 2 * 3 * 2
    assert found.answers == found.comparisons


def test_the_start_line_says_what_is_paid_and_where_answers_go(tmp_path: Path) -> None:
    text = start_line(settings(reference_samples=7, reward={"name": "my:lab", "max_queries": 20}), tmp_path, "the lab")
    said = ["16 queries in 3 rounds", "7 reference samples", "at most 20 answers by the lab", "60 calls"]
    said += ["reward.max_queries = 20", "410 network evaluations (240 of them differentiated)"]
    for part in (*said, str(tmp_path / "queries.sqlite")):
        assert part in text


def dry(folder: Path, *arguments: str) -> int:
    return cli.main(["run", "--dry-run", *arguments, f"--config.run_dir={folder / 'run'}", "--config.device=cpu"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("preflight") / "pipeline")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("ucb.py:smoke", ["features.kind = 'bank'", "20 queries in 3 rounds", "(256 of them differentiated)"]),
        ("das.py:demo", ["8 images and 8 plain ones beside them, das with 4 particles", "at most 16 answers"]),
    ],
)
def test_a_dry_run_says_all_and_does_nothing(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, said: list[str]
) -> None:
    small = ["--config.sampler.pilot_chains=8", f"--config.prior.path={pipeline}", "--config.prior.num_steps=7"]
    assert dry(tmp_path, "--config", f"{CONFIG / config}", *small) == 0
    out = capsys.readouterr().out
    for part in (*said, f"prior.path = '{pipeline}'", "time: about", "peak memory: about", "nothing was asked"):
        assert part in out, part
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_weights_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(tmp_path, "--config", f"{CONFIG / 'ucb.py:smoke'}", "--config.prior.path=nobody/nothing") == 0
    out = capsys.readouterr().out
    assert "time: -, peak memory: -" in out
    assert "prior.path = nobody/nothing" in out
    assert "hf download" in out


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(tmp_path, "--config", f"{CONFIG / 'ucb.py:smoke'}", "--config.prior.eta=0") == 2
    assert "prior.eta" in capsys.readouterr().err
    assert dry(tmp_path, "--config", f"{CONFIG / 'das.py:jpeg'}", "--config.sampler.name=das") == 2
    assert "follows gradients" in capsys.readouterr().err


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder of another user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    return folder


def test_code_named_by_another_users_folder_is_not_executed_untrusted(foreign: Path) -> None:
    check_trust(foreign, "jpeg_compressibility")  # ours, not the folder's
    with pytest.raises(ConfigError, match=r"not a folder of yours.*--trust"):
        check_trust(foreign, "lab.py:score")
    check_trust(foreign, "lab.py:score", trust=True)
    check_trust(foreign, "lab.py:score")  # remembered ...
    with pytest.raises(ConfigError, match="--trust"):
        check_trust(foreign, "other.py:score")  # ... for this reward ...
    with pytest.raises(ConfigError, match="--trust"):
        check_trust(foreign.parent, "lab.py:score")  # ... and this folder


def test_code_among_the_parts_of_a_reward_is_code(foreign: Path) -> None:
    ours = {"parts": "symmetry, 2 colorfulness"}
    check_trust(foreign, "weighted", ours)
    nested = [{"name": "weighted", "parts": "lab.py:score"}]
    for parts in ("symmetry, 2 lab.py:score", nested, "symmetry, lab.py:score > 1"):
        with pytest.raises(ConfigError, match=r"'lab\.py:score'.*--trust"):
            check_trust(foreign, "weighted", {"parts": parts})
    check_trust(foreign, "weighted", {"parts": "lab.py:score"}, trust=True)
    check_trust(foreign, "lab.py:score")
    with pytest.raises(ConfigError, match=r"'other\.py:score'"):
        check_trust(foreign, "weighted", {"parts": "lab.py:score, other.py:score"})


@pytest.mark.parametrize("command", ["resume", "retry", "evaluate --surrogate"])
def test_commands_look_before_anything_of_another_users_folder_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Even to find a module is to import the package that it is in."""
    package = tmp_path / "evil"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'done')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    folder.mkdir()
    store, _ = run_folder.create(folder, {"reward": {"name": "weighted", "parts": "evil.lab:score"}}, None)
    store.close()
    (folder / "round_001").mkdir()
    (folder / "round_001" / "surrogate.json").write_text("{}")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert cli.main([*command.split(), str(folder)]) == 2
    assert "--trust" in capsys.readouterr().err
    assert not (tmp_path / "done").exists()


def test_a_folder_without_an_owner_is_nobodys_own(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    with pytest.raises(ConfigError, match="--trust"):
        check_trust(foreign, "lab.py:score")


def test_ones_own_folder_is_trusted_but_not_with_a_foreign_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "run"
    folder.mkdir()
    check_trust(folder, "lab.py:score")
    (folder / "config.json").write_text("{}")
    real = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        found = real(path, **options)
        return found if path.name != "config.json" else os.stat_result((*found[:4], found.st_uid + 1, *found[5:10]))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ConfigError, match="--trust"):
        check_trust(folder, "lab.py:score")
