"""One line per round whatever happens, the same wandb run after a resume, and no secret anywhere."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.run import made_queries, make_run, make_store
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.hooks import Hooks
from tiltopt.online.report.record import ended, write_round_summary
from tiltopt.online.report.tracking import (
    MetricsFile,
    TrackerHook,
    WandbHook,
    hide_secrets,
    log_once,
    make_tracking,
    scalars,
    wandb_options,
)
from tiltopt.online.settings.run import Settings
from tiltopt.online.settings.validation import check_tracker
from tiltopt.online.store import run_folder

ROOT = Path(__file__).parents[3]


def rounds_in(path) -> list[int]:
    return [json.loads(line)["round"] for line in path.read_text().splitlines()]


def test_a_line_per_round_without_nan(tmp_path):
    [hook] = make_tracking(Settings(), tmp_path / "run")
    hook.on_round_end({"round": 0, "mean": math.nan, "best": 1.5, "calibration": {"nll": None}})
    hook.on_round_end({"round": 1, "mean": 2.0})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()] == [
        {"round": 0, "mean": None, "best": 1.5, "calibration": {"nll": None}},
        {"round": 1, "mean": 2.0},
    ]


@pytest.mark.parametrize("cut", range(2, 40, 7))
def test_a_torn_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    hook = MetricsFile(path)
    for number in range(3):
        hook.on_round_end({"round": number, "mean": 0.123456789, "best": 0.5})
    whole = path.read_text()
    path.write_text(whole[:-cut])
    again = MetricsFile(path)
    assert path.read_text() == "".join(line + "\n" for line in whole.splitlines()[:2])
    again.on_round_end({"round": 2, "mean": 0.123456789, "best": 0.5})
    assert path.read_text() == whole


def test_a_round_told_twice_keeps_one_line_the_newest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    hook = MetricsFile(path)
    for number, mean in ((0, 1.0), (1, 2.0), (0, 3.0), (3, 4.0), (2, 5.0)):
        hook.on_round_end({"round": number, "mean": mean})
    assert rounds_in(path) == [0, 1, 2, 3]
    assert json.loads(path.read_text().splitlines()[0])["mean"] == 3.0


def test_a_doubled_and_foreign_file_is_put_right(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1, "mean": 1}\nnot json\n[1]\n{"round": 0}\n{"round": 1, "mean": 2}\n{"mean": 1}\n')
    MetricsFile(path)
    assert path.read_text() == '{"round": 0}\n{"round": 1, "mean": 2}\n'


def test_what_is_written_survives_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys\nfrom tiltopt.online.report.tracking import MetricsFile\n"
        "m = MetricsFile(sys.argv[1])\nm.on_round_end({'round': 0})\nm.on_round_end({'round': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=120).returncode == -signal.SIGKILL
    assert rounds_in(path) == [0, 1]


def test_a_round_that_ended_without_its_line_is_recorded_when_the_run_goes_on(tmp_path):
    """Killed after `round_001/summary.json` was written and before `metrics.jsonl` was."""
    make_store(tmp_path, made_queries(rounds=2))
    with run_folder.reading(tmp_path) as store:
        told = [write_round_summary(tmp_path, store, number, {"fidelity": 0.5}) for number in (0, 1)]
        [metrics] = make_tracking(Settings(), tmp_path)
        metrics.on_round_end(told[0])
        [again] = make_tracking(Settings(), tmp_path, rounds=ended(tmp_path, store))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == told
    again.on_round_end({"round": 2})
    assert rounds_in(tmp_path / "metrics.jsonl") == [0, 1, 2]


def test_a_disk_that_refuses_is_told_in_words(tmp_path):
    hook = MetricsFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*metrics\.jsonl"):
        hook.on_round_end({"round": 0})


def test_other_processes_write_nothing(tmp_path):
    assert make_tracking(Settings(tracker="wandb"), tmp_path / "run", main=False) == []
    assert not (tmp_path / "run").exists()


def test_numbers_of_nested_records():
    record = {"round": 2, "mean": 1.5, "ok": True, "note": "x", "nan": math.nan, "calibration": {"nll": 0.5, "n": 3}}
    assert scalars(record) == {"round": 2, "mean": 1.5, "calibration/nll": 0.5, "calibration/n": 3}


def test_secrets_are_hidden_and_nothing_else_is():
    tree = {
        "reward": {"api_key": "sk-1", "token": "t", "hf_token": "u", "url": "https://me:pw@host:81/a?b=c", "tokens": 5},
        "password": "p",
        "empty_secret": "",
        "list": [{"secret": "s"}],
        "prompts": "simple_animals",
        "mail": "a@b.c",
    }
    text = json.dumps(hide_secrets(tree))
    for secret in ("sk-1", '"t"', '"u"', "pw", '"p"', '"s"'):
        assert secret not in text
    shown = hide_secrets(tree)
    assert shown["reward"]["url"].startswith("https://me:***@host:81/a")
    assert shown["reward"]["tokens"] == 5
    assert (shown["prompts"], shown["mail"], shown["empty_secret"]) == ("simple_animals", "a@b.c", "")


def test_wandb_keeps_its_id_and_stays_offline_without_an_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    first = wandb_options(tmp_path)
    assert first["mode"] == "offline"
    assert first["id"] == wandb_options(tmp_path)["id"]
    other = tmp_path / "other"
    other.mkdir()
    assert wandb_options(other)["id"] != first["id"]
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert "mode" not in wandb_options(tmp_path)
    assert "k" not in json.dumps({k: v for k, v in wandb_options(tmp_path).items() if k != "dir"}).split('"')


def test_a_run_of_a_sweep_has_the_id_that_the_agent_gives_it_and_is_sent(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert wandb_options(tmp_path)["id"] == "given"
    assert "mode" not in wandb_options(tmp_path)
    monkeypatch.delenv("WANDB_SWEEP_ID")
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert wandb_options(tmp_path)["id"] == "given", "a resumed run goes on with its own"


def test_a_missing_tracker_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_tracker("tensorboard")
    check_tracker("none")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_event_files(tmp_path):
    hooks = Hooks(make_tracking(Settings(tracker="tensorboard"), tmp_path))
    hooks.on_round_end({"round": 0, "mean": 1.0})
    hooks.close()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_wandb_offline_writes_a_run_into_the_folder(tmp_path):
    code = (
        "import sys\nfrom tiltopt.online.hooks import Hooks\nfrom tiltopt.online.settings.run import Settings\n"
        "from tiltopt.online.report.tracking import make_tracking\n"
        "s = Settings.from_config({'tracker': 'wandb', 'reward': {'api_key': 'sk-very-secret'}})\n"
        "h = Hooks(make_tracking(s, sys.argv[1]))\nh.on_round_end({'round': int(sys.argv[2]), 'mean': 1.0})\nh.close()"
    )
    hidden = ("WANDB_API_KEY", "WANDB_MODE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"WANDB_SILENT": "true"}
    for number in "01":
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), number],
            env=environment,
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert runs
    assert all(run.name.endswith(identity) for run in runs)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"sk-very-secret" not in file.read_bytes()
    assert rounds_in(tmp_path / "metrics.jsonl") == [0, 1]


def test_tensorboard_gets_the_finite_numbers_of_each_round(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hooks = make_tracking(Settings.from_config({"tracker": "tensorboard"}), tmp_path)
    for number in range(3):
        for hook in hooks:
            hook.on_round_end({"round": number, "mean": 0.5 * number, "best": math.nan, "calibration": {"nll": 1.5}})
    for hook in hooks:
        hook.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("mean")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert len(events.Scalars("calibration/nll")) == 3
    assert "best" not in events.Tags()["scalars"]
    assert rounds_in(tmp_path / "metrics.jsonl") == [0, 1, 2]


class Broken:
    """A tracker that fails whatever it is asked."""

    def log(self, values, step):
        raise OSError("no space left")

    def finish(self):
        raise RuntimeError("gone")


def test_a_tracker_that_fails_stops_nothing(tmp_path):
    hook = TrackerHook(Broken())
    with pytest.warns(UserWarning, match="the run goes on: OSError: no space left"):
        hook.on_round_end({"round": 0, "mean": 1.0})
    with pytest.warns(UserWarning, match="RuntimeError: gone"):
        hook.close()


def test_a_tracker_that_does_not_start_stops_nothing(tmp_path, monkeypatch):
    def refuse(self):
        raise ConnectionError("no route to the account")

    monkeypatch.setattr("accelerate.tracking.WandBTracker.start", refuse)
    with pytest.warns(UserWarning, match="the run goes on: ConnectionError: no route"):
        [only] = make_tracking(Settings.from_config({"tracker": "wandb"}), tmp_path / "run")
    only.on_round_end({"round": 0})
    assert rounds_in(tmp_path / "run" / "metrics.jsonl") == [0]
    with pytest.warns(UserWarning, match="the run goes on: ConnectionError"):
        log_once("wandb", "p", tmp_path / "page", {}, {"mean": 1.0})


TRACKIO = """
import json, pathlib
def init(project, **options):
    print("a long introduction\\n" * 8)
    return Run(project, options)
class Config:
    def update(self, values, **more): pass
config = Config()
class Run:
    def __init__(self, *who):
        self.file = pathlib.Path(__file__).with_name("told.jsonl").open("a")
        print(json.dumps(who), file=self.file)
    def log(self, values, step=None):
        print(json.dumps([step, values]), file=self.file)
    def finish(self):
        self.file.close()
"""


def test_trackio_is_told_each_round_under_the_same_name_after_a_resume(tmp_path, monkeypatch, capsys):
    """A stand-in for the package, with the calls that accelerate makes: its own asks for other libraries than ours."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    for number in (0, 1):
        for hook in (hooks := make_tracking(Settings.from_config({"tracker": "trackio"}), tmp_path / "run")):
            hook.on_round_end({"round": number, "mean": 2.0, "best": math.nan, "calibration": {"nll": 0.5}})
        for hook in hooks:
            hook.close()
    monkeypatch.delitem(sys.modules, "trackio")
    first, round_0, second, round_1 = map(json.loads, (tmp_path / "told.jsonl").read_text().splitlines())
    assert first == second
    assert (first[0], first[1]["name"][:4], first[1]["resume"]) == ("tiltopt", "run-", "allow")
    assert round_0 == [0, {"round": 0, "mean": 2.0, "calibration/nll": 0.5}]
    assert round_1[0] == 1
    assert (
        capsys.readouterr().out.splitlines()
        == ["trackio: project 'tiltopt'; `trackio show --project tiltopt` shows it"] * 2
    )


class Told:
    """A run of wandb that keeps what it is told."""

    def __init__(self, offline: bool) -> None:
        self.offline, self.id = offline, "abc"
        self.kept: list[Any] = []
        self.used: list[str] = []

    def use_artifact(self, name: str) -> None:
        self.used.append(name)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> Any:
        self.kept.append((artifact.type, artifact.name, aliases, artifact.metadata.get("made_from")))
        return types.SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("offline", [True, False])
def test_artifacts_say_what_they_were_made_from(tmp_path, offline):
    """The queries -> the surrogate fitted to them -> its evaluation in a run of wandb of its own."""
    pytest.importorskip("wandb")
    make_run(tmp_path / "run")
    for name in ("surrogate.json", "surrogate.safetensors"):
        (tmp_path / "run" / "round_002" / name).write_text("{}")
    told = Told(offline)
    hook = WandbHook(types.SimpleNamespace(tracker=told, log=lambda values, step: None), tmp_path / "run")
    hook.on_round_end({"round": 2, "queries": 40})
    assert told.kept == [
        ("surrogate", "surrogate-abc", ["round-2"], "queries-abc:round-1"),
        ("queries", "queries-abc", ["round-2"], None),
    ]
    (tmp_path / "run" / "wandb.json").write_text('{"id": "taught"}')
    found = {"surrogate_round": 2, "evaluation": {"held_out": {"gain": {"mean": 0.5}}}}
    hook._keep_evaluation(1, found, {"surrogate": str(tmp_path / "run" / "round_002")})
    assert told.kept[-1] == ("evaluation", "evaluation-abc", ["round-1"], "surrogate-taught:round-2")
    hook._keep_evaluation(1, found, {"surrogate": str(tmp_path / "elsewhere")})
    assert told.kept[-1][-1] == str(tmp_path / "elsewhere"), "whose tracker is not known"
    assert told.used == ([] if offline else ["queries-abc:round-1", "surrogate-taught:round-2"])


TRACKED = """
import sys
from tiltopt.online.hooks import Hooks
from tiltopt.online.report.record import load_run
from tiltopt.online.report.tracking import make_tracking
from tiltopt.online.settings.run import Settings
hooks = Hooks(make_tracking(Settings.from_config({"tracker": "wandb"}), sys.argv[1]))
for summary in load_run(sys.argv[1]).rounds:
    hooks.on_round_end(summary)
hooks.close()
"""


def logged(data):
    """The records of an offline run: a log in blocks of 32 KiB, as LevelDB writes it, after 7 bytes of header."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, piece = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if piece in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def read_back(folder):
    """What an offline run holds: per step {metric: value}, those of media under their name; and its artifacts."""
    from wandb.proto import wandb_internal_pb2

    history, artifacts = [], []
    for data in logged(next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {}
            for item in record.history.item:
                first, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[first] = row.get(first, {}) | {"/".join(rest): value} if rest else value
            history.append(row)
        elif kind == "artifact":
            artifacts.append(record.artifact)
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact)
    return history, artifacts


@pytest.mark.slow
def test_an_offline_run_read_back_holds_what_the_documentation_names(tmp_path):
    """Every metric of the table in docs/report.md, the queries with their pictures, and the surrogates."""
    folder = tmp_path / "run"
    make_run(folder)
    for number in (2, 3):
        for name in ("surrogate.json", "surrogate.safetensors"):
            (folder / f"round_{number:03d}" / name).write_text("{}")
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT")}
    done = subprocess.run(
        [sys.executable, "-c", TRACKED, str(folder)], env=environment, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len((done.stdout + done.stderr).splitlines()) <= 3, done.stdout + done.stderr
    assert "`wandb sync " in done.stdout
    history, artifacts = read_back(folder)
    assert [row["_step"] for row in history] == [0, 1, 2, 3]
    page = (ROOT / "docs" / "report.md").read_text()
    named = set(re.findall(r"^\| `([a-z0-9_/]+)` \|", page.partition("## Trackers")[2], re.MULTILINE))
    assert len(named) > 15
    assert named <= set(history[2]), named - set(history[2])
    table = history[2]["media/queries"]
    assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 8, 8)
    assert history[2]["media/answers"]["_type"] == "histogram"
    kept = {(a.type, *{*a.aliases} - {"latest"}): json.loads(a.metadata) for a in artifacts if a.type in KEPT}
    assert set(kept) == {(kind, f"round-{n}") for kind, numbers in KEPT.items() for n in numbers}
    identity = json.loads((folder / "wandb.json").read_text())["id"]
    assert kept["surrogate", "round-3"]["made_from"] == f"queries-{identity}:round-2"


KEPT = {"queries": (0, 1, 2, 3), "surrogate": (2, 3)}
"""Kinds of artifacts, and the rounds that have one."""
