"""The console command on a real run of the toy engine: what it prints, what it writes, how it exits."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

import tiltopt
from tests.contracts.stores import new_queries
from tests.fakes.engine import CONFIG, FakeEngine, LoggedReward, features_of
from tiltopt import cli
from tiltopt.errors import ConfigError
from tiltopt.online.commands import run
from tiltopt.online.commands.import_table import read_measurements
from tiltopt.online.loop import run as run_loop
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import RoundRecord
from tiltopt.online.settings import commandline
from tiltopt.online.store import run_folder
from tiltopt.rewards.base import FunctionReward
from tiltopt.surrogates.io import load


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 5 + 2 x 3 queries."""
    folder = tmp_path_factory.mktemp("checkpoints") / "toy"
    with Optimizer.create(folder, CONFIG | {"reward": {"name": "symmetry"}}, engine=FakeEngine()) as optimizer:
        run_loop(optimizer, FunctionReward("symmetry", "points", 16, LoggedReward()))
        frame = optimizer.queries()
    return folder, frame


@pytest.fixture
def half(tmp_path):
    """A run of which round 0 is asked; three queries are answered, one has failed, one is waiting."""
    folder = tmp_path / "half"
    with Optimizer.create(folder, CONFIG, engine=FakeEngine()) as optimizer:
        queries = optimizer.ask(5)
        for query in queries[:3]:
            optimizer.tell(query.id, float(query.id))
        optimizer.fail(queries[3].id, "plate broken")
    return folder


def test_refine_asks_for_designs_near_a_query(half, capsys, monkeypatch):
    monkeypatch.setattr("tiltopt.online.engine.diffusion.DiffusionEngine", lambda settings, team: FakeEngine(team))
    assert cli.main(["refine", str(half), "2", "--strength", "0.3", "--n", "2"]) == 0
    said = capsys.readouterr().out
    for number in (6, 7):
        assert f"query {number}: {half / 'images' / f'{number:06d}.png'}\n" in said
    assert "they wait for an answer; go on from Python" in said
    with Optimizer.open(half, read_only=True) as optimizer:
        frame = optimizer.queries().tail(2)
    assert (frame["parents"].tolist(), frame["k0"].tolist()) == (["2", "2"], [7, 7])
    for arguments, message in (
        (["9"], "unknown query 9: the run has queries 1 to 7"),
        (["2", "--strength", "1.5"], r"`strength` in (0, 1]"),
        (["4"], "query 4 is failed; expected one that is asked or answered"),
    ):
        assert cli.main(["refine", str(half), *arguments]) in (1, 2)
        assert message in capsys.readouterr().err
    assert cli.main(["export", str(half), "--csv", str(half / "table.csv")]) == 0
    table = pd.read_csv(half / "table.csv", dtype=str, keep_default_na=False)
    assert table["operator"].tolist() == ["global"] * 5 + ["restart"] * 2
    assert table["parents"].tolist() == [""] * 5 + ["2"] * 2
    assert table["k0"].tolist() == [""] * 5 + ["7"] * 2


def test_status_of_a_finished_run(finished, capsys):
    folder, frame = finished
    assert cli.main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "rounds       3 of 3 drawn" in text
    assert "queries      11: 11 answered" in text
    assert "state        complete" in text
    assert f"{frame.loc[frame['round'] == 2, 'value'].mean():.3f}" in text


def test_status_of_a_run_in_the_middle_says_how_to_go_on(half, capsys):
    assert cli.main(["status", str(half)]) == 0
    text = capsys.readouterr().out
    assert "1 of 3 drawn" in text
    assert "queries      5: 1 asked, 3 answered, 1 failed" in text
    assert f"1 queries wait for an answer; go on from Python with Optimizer.open('{half}')" in text
    assert "answers      Python (ask and tell)" in text


def test_status_for_machines(half, capsys):
    assert cli.main(["status", str(half), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["queries"] == {"asked": 1, "answered": 3, "failed": 1, "abandoned": 0}
    assert found["complete"] is False
    assert found["summary"]["rounds"][0]["mean"] == 2.0


def test_looking_works_while_another_process_writes(half, capsys):
    with Optimizer.open(half, engine=FakeEngine()):
        assert cli.main(["status", str(half)]) == 0
    assert "5: 1 asked" in capsys.readouterr().out


def test_export_holds_every_query_and_where_its_image_is(finished, tmp_path, capsys):
    folder, frame = finished
    target = tmp_path / "deep" / "all.csv"
    assert cli.main(["export", str(folder), "--csv", str(target)]) == 0
    assert "11 queries written" in capsys.readouterr().out
    table = pd.read_csv(target)
    assert list(table.columns) == [*frame.columns, "image"]
    assert table["value"].tolist() == frame["value"].tolist()
    assert table["seed"].tolist() == frame["seed"].tolist()
    assert all((folder / place).is_file() for place in table["image"])


NASTY = ['=HYPERLINK("http://x")', "+1", "-2", "@cmd", "\t=1", "'=kept", "'quoted'", "a cat", "''=x"]


def test_a_csv_file_runs_no_formula_and_comes_back_as_it_was(tmp_path, capfd):
    store, _ = run_folder.create(tmp_path, {}, None)
    new = [dataclasses.replace(q, prompt=text) for q, text in zip(new_queries(1, len(NASTY)), NASTY, strict=True)]
    answers = {number: (-float(number), None) for number in range(1, len(NASTY))}
    store.add_round(RoundRecord(0, "plain", len(NASTY)), new, "toy", answers)
    store.fail(len(NASTY), "=1+1")
    store.close()
    Image.new("RGB", (2, 2)).save(tmp_path / "pixel.png")
    assert cli.main(["export", str(tmp_path), "--csv", str(tmp_path / "all.csv")]) == 0
    table = pd.read_csv(tmp_path / "all.csv", dtype={"prompt": str}, skipinitialspace=False)
    assert not [cell for cell in (*table["prompt"], *table["error"].dropna()) if cell[0] in "=+-@\t\r"]
    assert table["value"].tolist()[:2] == [-1.0, -2.0], "numbers stay numbers"
    table[table["value"].notna()].assign(image=str(tmp_path / "pixel.png")).to_csv(tmp_path / "back.csv", index=False)
    assert list(read_measurements(tmp_path / "back.csv").prompts) == NASTY[:-1]
    capfd.readouterr()
    assert cli.main(["export", str(tmp_path), "--csv", "-"]) == 0
    assert capfd.readouterr().out == (tmp_path / "all.csv").read_text()


def test_parquet_equals_csv_or_says_what_to_install(finished, tmp_path, capsys):
    folder, frame = finished
    target = tmp_path / "all.parquet"
    code = cli.main(["export", str(folder), "--parquet", str(target)])
    try:
        import pyarrow.parquet
    except ImportError:
        assert code == 2
        assert "pip install pyarrow" in capsys.readouterr().err
    else:
        assert code == 0
        columns = pyarrow.parquet.read_schema(target)
        assert columns.names == [*frame.columns, "image"]
        assert {str(columns.field(name).type) for name in ("prompt", "state", "error")} <= {"string", "large_string"}
        table = pd.read_parquet(target)
        for name in frame.columns:
            assert table[name].isna().tolist() == frame[name].isna().tolist()
            assert table[name].dropna().tolist() == frame[name].dropna().tolist()
        assert not list(tmp_path.glob("*.part"))


def test_report_of_a_real_run(finished, capsys):
    folder, _ = finished
    assert cli.main(["report", str(folder), "--per-round", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert text.count("<figure data-value") == 6
    assert "What the surrogate had predicted" in text


def test_a_damaged_round_summary_is_made_again_by_the_report(finished, tmp_path, capsys):
    folder = tmp_path / "toy"
    shutil.copytree(finished[0], folder)
    place = folder / "round_001" / "summary.json"
    whole = json.loads(place.read_text())
    place.write_text(place.read_text()[:100])
    assert cli.main(["status", str(folder)]) == 0
    assert cli.main(["report", str(folder)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    again = json.loads(place.read_text())
    assert 0 <= again.pop("fidelity") <= 1
    assert set(again.pop("unrecognised")) <= {6, 7, 8}
    assert again == whole | {"mass_lift": again["mass_lift"]}  # the reference samples came after the round


def test_surrogate_says_what_it_is_and_how_it_predicted_what_it_had_not_seen(finished, capsys):
    folder, frame = finished
    assert cli.main(["surrogate", str(folder / "round_001")]) == 0
    text = capsys.readouterr().out
    assert "kind           linear" in text
    assert "features       toy" in text
    assert "5 answers of the rounds before round 1" in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["1", "3"], ["2", "3"]]
    model = load(folder / "round_001", feature_id="toy")
    for row, (_, batch) in zip(rows, frame[frame["round"] > 0].groupby("round"), strict=True):
        images = [Image.open(folder / "images" / f"{number:06d}.png") for number in batch["id"]]
        posterior = model.posterior(torch.stack([features_of(image) for image in images]).double()[:, None])
        mean, sd = posterior.mean.flatten().detach().numpy(), posterior.variance.flatten().sqrt().detach().numpy()
        nll = -stats.norm.logpdf(batch["value"], mean, sd).mean()
        assert float(row[2]) == pytest.approx(nll, abs=6e-4)
        assert float(row[-1]) == pytest.approx((mean - batch["value"]).mean(), abs=6e-4)


@pytest.mark.parametrize(
    ("place", "code", "expected"),
    [
        ("", 1, "Saved surrogates in it:"),
        ("round_000", 1, "without a surrogate.json"),
        ("x", 2, "no such folder. Nearby: "),
    ],
)
def test_not_a_surrogate(finished, capsys, place, code, expected):
    folder, _ = finished
    assert cli.main(["surrogate", str(folder / place)]) == code
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "report", "resume"])
def test_not_a_run_is_told_in_one_message_without_a_traceback(finished, tmp_path, capsys, command):
    folder, _ = finished
    assert cli.main([command, str(folder.parent / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "expected the folder of a run, with a config.json in it, got no such folder" in captured.err
    assert str(folder) in captured.err
    assert "Traceback" not in captured.err


def test_a_damaged_store_is_named(half, capsys):
    (half / "queries.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    for extra in half.glob("queries.sqlite-*"):
        extra.unlink()
    assert cli.main(["status", str(half)]) == 1
    error = capsys.readouterr().err
    assert "queries.sqlite" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("left", ["a damaged store", "nothing but the rounds' copies"])
def test_a_damaged_store_is_recovered_when_asked(finished, tmp_path, capsys, monkeypatch, left):
    folder = shutil.copytree(finished[0], tmp_path / "toy")
    for extra in [*folder.glob("queries.sqlite*"), folder / "config.json"]:
        extra.unlink()
    if left == "a damaged store":
        shutil.copy(finished[0] / "config.json", folder)
        (folder / "queries.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    assert cli.main(["status", str(folder)]) == 1
    assert "--recover" in capsys.readouterr().err
    carried_on = []
    monkeypatch.setattr(run, "_carry_on", lambda optimizer, *times: carried_on.append(optimizer.folder) or 0)
    assert cli.main(["resume", str(folder), "--recover"]) == 0
    assert carried_on == [folder]
    assert cli.main(["status", str(folder)]) == 0
    assert "answered" in capsys.readouterr().out


def test_a_run_that_exists_is_not_opened_under_another_configuration(half, capsys):
    arguments = ["rate", str(half), "--config", "config/ucb.py:demo", "--config.seed=77"]
    assert cli.main(arguments) == 2
    assert "seed: 3 -> 77" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["status"],
        ["status", "a", "b"],
        ["export", "a"],
        ["report", "a", "--per-round", "-1"],
        ["status", "--x"],
    ],
)
def test_bad_usage_exits_with_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "usage: tiltopt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["rnu", "--config=config/ucb.py:demo"], "unknown command 'rnu'. Did you mean `run`?"),
        (["resmue", "a"], "Did you mean `resume`?"),
        (["--debug", "repotr", "a"], "Did you mean `report`?"),
        (["evaluate", "a", "--reward", "b"], "unrecognized arguments: --reward b. Did you mean `--rewards`?"),
        (["run", "--dryrun", "--config=config/ucb.py:demo"], "Did you mean `--dry-run`?"),
    ],
)
def test_a_misspelt_command_or_option_is_told_with_the_one_that_is_meant(arguments, meant, capsys):
    assert cli.main(arguments) == 2
    assert meant in capsys.readouterr().err


def test_errors_become_exit_codes(capsys):
    def failing(error):
        def action():
            raise error

        return action

    assert cli.guarded(lambda: None) == 0
    assert cli.guarded(failing(ConfigError("bad key"))) == 2
    assert cli.guarded(failing(RuntimeError("boom"))) == 1
    assert cli.guarded(failing(KeyboardInterrupt())) == 130
    error = capsys.readouterr().err
    assert "tiltopt: bad key\n" in error
    assert "unexpected RuntimeError: boom; run it again with --debug" in error
    assert "Traceback" not in error
    cli.guarded(failing(RuntimeError("boom")), debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_names_the_command_that_goes_on(tmp_path, capsys):
    """Where a reward answers, with its folder; a black box of one's own is carried on from Python."""

    def interrupted(optimizer, reward="toy"):
        class Lab(LoggedReward):
            name = reward

            def __call__(self, images, prompts):
                os.kill(os.getpid(), signal.SIGINT)
                return super().__call__(images, prompts)

        return lambda: run.carry_on(optimizer, Lab(), None, 0.0)

    with Optimizer.create(tmp_path / "mine", CONFIG, engine=FakeEngine()) as optimizer:
        assert cli.guarded(interrupted(optimizer)) == 130
    said = capsys.readouterr().err
    assert "tiltopt: interrupted; every answer so far is stored; go on from Python" in said
    named = CONFIG | {"reward": {"name": "symmetry"}}
    with Optimizer.create(tmp_path / "run", named, engine=FakeEngine()) as optimizer:
        assert cli.guarded(interrupted(optimizer, "symmetry")) == 130
    assert f"every answer so far is stored; go on with `tiltopt resume {tmp_path / 'run'}`." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "status", "nowhere"], ["status", "nowhere", "--debug"]])
def test_debug_shows_the_traceback_before_or_after_the_command(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom tiltopt.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'pandas', 'numpy', 'diffusers', 'botorch'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("run", "resume", "report", "status", "export", "surrogate", "features"):
        assert f"    {command}" in done.stdout


def test_the_installed_command_exits_as_main_says(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tiltopt", "status", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tiltopt: ")
    assert done.stderr.count("\n") == 1


def test_a_launcher_takes_its_own_folder_off_the_import_path(tmp_path, monkeypatch):
    """A user's `report.py` or `loop.py` must not be shadowed by ours."""
    online = Path(cli.__file__).resolve().parents[1] / "online"
    for name in ("report", "loop", "team"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    monkeypatch.setattr(sys, "path", [str(online), str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=config/ucb.py:demo"])
    seen = []
    monkeypatch.setattr(cli, "main", lambda arguments: seen.append(arguments) or 3)
    assert cli.launch(str(online / "main.py")) == 3
    assert seen == [["run", "--config=config/ucb.py:demo"]]
    importlib.invalidate_caches()
    for name in ("report", "loop", "team"):
        assert Path(importlib.util.find_spec(name).origin).parent == tmp_path


def test_every_shipped_preset_is_listed_with_a_line(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split() for line in lines if line.startswith(" ")]
    sources = {words[0] for words in listed}
    assert {"config/ucb.py:demo", "config/bootstrap.py:jpeg", "config/das.py:demo", "config/seiko.py:demo"} <= sources
    assert all(len(words) > 3 for words in listed)
    for source in sources:
        commandline.parse([f"--config={source}"])


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "tiltopt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"tiltopt {tiltopt.__version__}"


def test_what_is_misspelt_is_told_before_anything_heavy_is_imported():
    loop = "num_particles alpha sampler.num_particels sampler.xyz model.kernl reward.qualty prior.num_step surrogate"
    wrong = [["run", "--config=config/ucb.py:demo", f"--config.{key}=3"] for key in loop.split()]
    wrong += [["run", "--config=config/das.py:demo", "--config.sampler.xyz=3"], ["run", "--config=config/ucb.py:dmo"]]
    wrong += [["run", "--config=config/ucb.py:demo", "--config.prompts=simple_animal"]]
    folders = "status report resume retry evaluate features surrogate serve rate work".split()
    wrong += [[command, "nowhere"] for command in folders]
    wrong += [["refine", "nowhere", "3"], ["export", "nowhere", "--csv=-"], ["evaluate", "--surrogate=nowhere"]]
    wrong += [["import", "nowhere", "table.csv"]]
    code = (
        f"import sys\nfrom tiltopt.cli import main\nfor wrong in {wrong!r}:\n"
        "    assert main(wrong) == 2, wrong\n"
        "    heavy = {'torch', 'pandas', 'diffusers', 'botorch'} & set(sys.modules)\n"
        "    assert not heavy, (wrong, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"`{key}`" in done.stderr for key in loop.split())


@pytest.mark.parametrize("answer", ["[][0]", "[float('nan')] * len(images)"])
def test_a_worker_of_which_nothing_was_answered_fails(tmp_path, monkeypatch, capsys, answer):
    url = f"sqlite:///{tmp_path / 'team.sqlite'}"
    monkeypatch.setenv("TILTOPT_STORE_URL", url)
    (tmp_path / "lab.py").write_text(f"def score(images, prompts):\n    return {answer}\n")
    config = CONFIG | {"rounds": 0, "reward": {"name": f"{tmp_path / 'lab.py'}:score"}}
    with Optimizer.create(tmp_path / "run", config, engine=FakeEngine(), store_url=url) as optimizer:
        optimizer.ask(5)
    assert cli.main(["work", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert ("lab.py" in told and "IndexError" in told) if "[0]" in answer else "nothing was answered" in told
    assert f"tiltopt retry {tmp_path / 'run'}" in told
