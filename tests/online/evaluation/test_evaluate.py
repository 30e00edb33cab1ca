"""A saved surrogate on new prompts: pairs, gains, nothing paid twice, clear refusals before anything is drawn."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from tests.fakes.engine import FakeEngine, LoggedReward, truth
from tests.online.test_team import processes
from tiltopt.errors import ConfigError, RewardError, SurrogateError
from tiltopt.online.commands.inspect import status
from tiltopt.online.evaluation.evaluate import (
    check_evaluation,
    evaluate,
    evaluation_settings,
)
from tiltopt.online.loop import ask_again
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.report import tracking
from tiltopt.online.report.gain import curve_table, evaluation_table
from tiltopt.online.report.pages import write_report
from tiltopt.online.report.record import load_run
from tiltopt.online.settings.prompts import HELD_OUT_ANIMALS, fill
from tiltopt.online.settings.run import EvaluateSettings, Settings
from tiltopt.online.settings.validation import validated
from tiltopt.rewards.base import Answer, FunctionReward
from tiltopt.surrogates import fit
from tiltopt.surrogates.io import load, save
from tiltopt.surrogates.several import SeveralModel

N = 12


class Judge:
    """Recognises bright pictures."""

    def accuracy(self, images, prompts) -> float:
        return float(np.mean([np.asarray(image).mean() > 127 for image in images])) if images else math.nan


class CountingEngine(FakeEngine):
    """Counts what is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def draw_plain(self, asks, on_step=None):
        self.drawn += len(asks)
        return super().draw_plain(asks, on_step)


class Broken(LoggedReward):
    """Fails on every picture whose top left quadrant is bright, when `strict`."""

    strict = True

    def __call__(self, images, prompts):
        values = super().__call__(images, prompts)
        return [
            Answer.failure("too bright") if self.strict and image.getpixel((0, 0))[0] > 160 else value
            for image, value in zip(images, values, strict=True)
        ]


@pytest.fixture
def surrogate(tmp_path):
    """A linear surrogate of the toy's truth, saved."""
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(80, 4, generator=generator, dtype=torch.float64)
    Y = 2 * X[:, :1] + X[:, 1:2] - 0.5 * X[:, 2:3] - 0.3 * (X[:, 3:] - 0.5) ** 2
    folder = tmp_path / "run" / "round_004"
    save(fit("linear", X, Y, generator=generator), folder, feature_id="toy", data_fingerprint="f")
    return folder


@pytest.fixture
def settings(surrogate, tmp_path):
    config = {
        "evaluate": {"surrogate": str(surrogate)},
        "run_dir": str(tmp_path / "evaluation"),
        "prompts": "held_out_animals",
        "batch_size": N,
        "sampler": {"alpha": 0.05},
        "reward": {"retries": 0},
    }
    return evaluation_settings(Settings.from_config(config))


def run(settings, engine=None, judge=None, black_box=None):
    return evaluate(settings, engine or FakeEngine(), judge, settings.run_dir, black_box or LoggedReward())


def test_tilted_pictures_are_better_and_the_numbers_add_up(settings, tmp_path):
    summary = run(settings, judge=Judge())
    folder = tmp_path / "evaluation"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    with Optimizer.open(folder, read_only=True) as opt:
        rows = opt.queries().to_dict("records")
    assert len(rows) == 2 * N
    assert [row["seed"] for row in rows[:N]] == [row["seed"] for row in rows[N:]]
    truths = [truth(Image.open(folder / "images" / f"{int(row['id']):06d}.png")) for row in rows]
    assert [float(row["value"]) for row in rows] == pytest.approx(truths, abs=1e-12)
    gains = np.array(truths[N:]) - np.array(truths[:N])
    assert summary["gain"]["mean"] == pytest.approx(gains.mean())
    assert summary["gain"]["standard_error"] == pytest.approx(gains.std(ddof=1) / math.sqrt(N))
    assert summary["gain"]["mean"] > 4 * summary["gain"]["standard_error"]
    assert [r["mean"] for r in summary["rounds"]] == pytest.approx([np.mean(truths[:N]), np.mean(truths[N:])])
    predicted = [float(row["predicted"]) for row in rows]
    assert np.corrcoef(predicted, truths)[0, 1] > 0.99
    assert {row["prompt"] for row in rows[:10]} == {row["prompt"] for row in rows[N : N + 10]}
    assert "a hippopotamus" in {row["prompt"] for row in rows}
    assert "an octopus" in {row["prompt"] for row in rows}
    assert summary["prior"]["fidelity"] == summary["rounds"][0]["fidelity"]
    for key in ("seconds", "peak_memory_mb", "prior", "rounds", "calibration", "versions", "settings", "surrogate"):
        assert summary[key] is not None


def test_the_acquisition_is_the_posterior_mean(settings, tmp_path):
    run(settings)
    with Optimizer.open(tmp_path / "evaluation", read_only=True) as opt:
        d = opt.store.diagnostics(1)
    assert d["acquired"].tolist() == pytest.approx(d["predicted"].tolist(), abs=1e-12)
    assert settings.acquisition.name == "mean"


def test_the_page_and_the_table_show_both_sides(settings, tmp_path):
    summary = run(settings, judge=Judge())
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert page.count('class="pair"') == N
    assert "Prompt by prompt" in page
    assert "standard error over pairs" in page
    before = page
    assert write_report(tmp_path / "evaluation").read_text() == before  # from the files alone
    text = evaluation_table(summary)
    lines = text.splitlines()
    assert lines[0].split() == ["prompt", "pairs", "plain", "tilted", "predicted"]
    assert len([line for line in lines if line.startswith(("a ", "an "))]) == 10
    assert sum(int(row["pairs"]) for row in summary["prompts"]) == N
    assert "tilted - plain: " in text
    assert "fidelity: plain" in text


def test_without_a_judge_fidelity_is_null(settings):
    summary = run(settings)
    assert summary["prior"]["fidelity"] is None
    assert summary["rounds"][1]["fidelity"] is None
    assert "fidelity" not in evaluation_table(summary)


def test_what_was_paid_for_is_not_asked_again_and_nothing_is_drawn_again(settings, tmp_path):
    log = tmp_path / "asked"
    first = run(settings, black_box=LoggedReward(log))
    assert len(log.read_text().splitlines()) == 2 * N
    engine = CountingEngine()
    again = run(settings, engine=engine, black_box=LoggedReward(log))
    assert len(log.read_text().splitlines()) == 2 * N
    assert engine.drawn == 0
    assert [r["mean"] for r in again["rounds"]] == [r["mean"] for r in first["rounds"]]
    with pytest.raises(ConfigError, match=r"reward\.name"):
        run(dataclasses.replace(settings, reward=dataclasses.replace(settings.reward, name="colorfulness")))


class Dying(LoggedReward):
    """Says that it cannot be used any more after some answers."""

    def __init__(self, log, answers):
        super().__init__(log)
        self.left = answers

    def __call__(self, images, prompts):
        if self.left == 0:
            raise RewardError("the lab is closed")
        self.left -= 1
        return super().__call__(images, prompts)


@pytest.mark.parametrize("answers", [0, 5, N, 2 * N - 1])
def test_an_evaluation_that_was_cut_short_goes_on_and_ends_like_one_that_was_not(settings, tmp_path, answers):
    log = tmp_path / "asked"
    with pytest.raises(RewardError, match="the lab is closed"):
        run(settings, black_box=Dying(log, answers))
    engine = CountingEngine()
    pieces = run(settings, engine=engine, black_box=LoggedReward(log))
    assert engine.drawn == 0
    assert len(log.read_text().splitlines()) == 2 * N
    whole = run(dataclasses.replace(settings, run_dir=str(tmp_path / "whole")))
    assert pieces["gain"] == whole["gain"]
    assert pieces["prompts"] == whole["prompts"]


def test_failures_are_recorded_and_pairs_without_them_counted(settings, tmp_path):
    box = Broken()
    summary = run(settings, black_box=box)
    assert summary["failed"] > 0
    assert summary["gain"]["pairs"] + summary["failed"] >= N > summary["gain"]["pairs"]
    assert "too bright" in (tmp_path / "evaluation" / "report.html").read_text()
    box.strict = False
    assert run(settings, black_box=box)["failed"] == summary["failed"], "what failed is asked again on demand alone"
    with Optimizer.open(tmp_path / "evaluation", engine=FakeEngine()) as opt:
        assert ask_again(opt) == summary["failed"]
    assert run(settings, black_box=box)["failed"] == 0


def test_a_budget_ends_it_cleanly_and_more_budget_goes_on(settings, tmp_path):
    limited = dataclasses.replace(settings, reward=dataclasses.replace(settings.reward, max_queries=5))
    log = tmp_path / "asked"
    for _ in range(2):
        summary = run(limited, black_box=LoggedReward(log))
        assert len(log.read_text().splitlines()) == 5
        assert summary["answered"] == 5
        assert not summary["complete"]


def test_a_dead_black_box_is_left_alone(settings, tmp_path):
    calls = []

    def dead(images, prompts):
        calls.append(1)
        raise NameError("lab")

    with pytest.raises(RewardError, match=r"(?s)5 calls in a row.*NameError: lab"):
        run(settings, black_box=FunctionReward("dead", "", 1, dead))
    assert len(calls) == 5


def test_a_surrogate_of_other_features_is_refused_before_anything_is_drawn(settings, surrogate, tmp_path):
    engine = CountingEngine()
    engine.feature_id = "another map"
    with pytest.raises(SurrogateError, match="another map"):
        run(settings, engine=engine)
    assert engine.drawn == 0
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("missing", ["surrogate.json", "surrogate.safetensors", None])
def test_not_a_surrogate_folder_is_refused_with_what_was_expected(settings, surrogate, tmp_path, missing):
    if missing is None:
        settings = dataclasses.replace(settings, evaluate=EvaluateSettings(str(tmp_path / "run" / "round_099")))
        shutil.copytree(surrogate, tmp_path / "run" / "round_002")
    else:
        (surrogate / missing).unlink()
    expected = "no such folder.*round_002" if missing is None else f"no {missing}"
    with pytest.raises(ConfigError, match=f"expected the folder of a saved surrogate.*{expected}"):
        check_evaluation(settings, settings.run_dir)
    with pytest.raises(ConfigError):
        run(settings, engine=CountingEngine())


def test_a_surrogate_of_several_objectives_is_refused(settings, surrogate):
    X = torch.rand(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = SeveralModel.fit("linear", X, X[:, :2], sem=None, generator=torch.Generator().manual_seed(1))
    save(model, surrogate, feature_id="toy", data_fingerprint="f")
    with pytest.raises(ConfigError, match=r"of one number per answer.*several objectives"):
        check_evaluation(settings, settings.run_dir)


def test_a_runs_own_folder_is_not_written_over(settings, tmp_path):
    Optimizer.create(tmp_path / "evaluation", {}, engine=FakeEngine()).close()
    with pytest.raises(ConfigError, match="holds a run"):
        check_evaluation(settings, settings.run_dir)


# ---- several surrogates, several seeds, seen and held-out prompts


@pytest.fixture
def taught(tmp_path):
    """The folder of a run with three surrogates: of the truth's opposite, of half of it, and of the truth."""
    X = torch.rand(80, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = 2 * X[:, :1] + X[:, 1:2] - 0.5 * X[:, 2:3] - 0.3 * (X[:, 3:] - 0.5) ** 2
    noise = torch.randn(80, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for number, Y in ((1, -whole), (2, X[:, 1:2] + 0.3 * noise), (4, whole)):
        model = fit("linear", X, Y, generator=torch.Generator().manual_seed(number))
        save(model, tmp_path / "run" / f"round_{number:03d}", feature_id="toy", data_fingerprint="f")
    return tmp_path / "run"


def settings_over(taught, folder, pairs=8, **evaluate_):
    config = {
        "evaluate": {"surrogate": str(taught), "rounds": "all", "seeds": 3, "seen": "demo_animals"} | evaluate_,
        "run_dir": str(folder),
        "prompts": "held_out_animals",
        "batch_size": pairs,
        "sampler": {"alpha": 0.05},
        "reward": {"retries": 0},
    }
    return evaluation_settings(Settings.from_config(config))


def test_the_curve_over_rounds_equals_what_is_computed_from_the_table(taught, tmp_path):
    settings = settings_over(taught, tmp_path / "evaluation")
    assert settings.evaluate.rounds == "1, 2, 4"
    log = tmp_path / "asked"
    summary = run(settings, black_box=LoggedReward(log))
    size = 8 * 2 * 3
    assert len(log.read_text().splitlines()) == 4 * size, "the plain pictures are paid for once"
    with Optimizer.open(tmp_path / "evaluation", read_only=True) as opt:
        table = opt.queries()
        X = opt.store.vectors_of(list(table["id"]))
    assert [(r["round"], r["group"]) for r in summary["curve"]] == [
        (number, group) for number in (1, 2, 4) for group in ("all", "seen", "held_out")
    ]
    value = table["value"].to_numpy().reshape(4, 3, 2, 8)  # round, seed, held out and seen, pair
    prompts = table["prompt"].to_numpy().reshape(4, 3, 2, 8)
    held_out = {fill("a {}", word) for word in HELD_OUT_ANIMALS}
    assert set(prompts[:, :, 0].flat) <= held_out
    assert not set(prompts[:, :, 1].flat) & held_out
    assert table["seed"].to_numpy().reshape(4, -1).std(axis=0).max() == 0
    for place, number in enumerate((1, 2, 4), start=1):
        for group, column in (("held_out", 0), ("seen", 1)):
            row = next(r for r in summary["curve"] if (r["round"], r["group"]) == (number, group))
            gains = (value[place] - value[0])[:, column].mean(axis=1)
            reach = stats.t.ppf(0.975, 2) * gains.std(ddof=1) / math.sqrt(3)
            expected = [gains.mean(), gains.mean() - reach, gains.mean() + reach]
            assert [row["gain"][key] for key in ("mean", "low", "high")] == pytest.approx(expected)
            assert (row["gain"]["over"], row["pairs"]) == ("seeds", 24)
    model = load(taught / "round_002", feature_id="toy")
    rows = X.reshape(4, 3, 2, 8, 4)[2, :, 0]  # the tilted pictures of its round on held-out prompts
    with torch.no_grad():
        posterior = [model.posterior(x) for x in rows]
    noise = model.noise_variance
    nll = [
        -stats.norm.logpdf(y, p.mean.flatten(), (p.variance.flatten() + noise).sqrt()).mean()
        for p, y in zip(posterior, value[2][:, 0], strict=True)
    ]
    tau = [stats.kendalltau(p.mean.flatten(), y)[0] for p, y in zip(posterior, value[2][:, 0], strict=True)]
    row = next(r for r in summary["curve"] if (r["round"], r["group"]) == (2, "held_out"))
    assert row["calibration"]["tilted"]["nll"]["mean"] == pytest.approx(np.mean(nll))
    assert row["calibration"]["tilted"]["kendall_tau"]["mean"] == pytest.approx(np.mean(tau))
    bad, half, good = (r for r in summary["curve"] if r["group"] == "all")
    assert bad["gain"]["high"] < 0 < half["gain"]["low"]
    assert half["gain"]["high"] < good["gain"]["low"]
    assert bad["calibration"]["plain"]["kendall_tau"]["mean"] < -0.9
    assert good["calibration"]["plain"]["kendall_tau"]["mean"] > 0.9


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told = {}

    def log(self, values, step):
        known = self.told.setdefault(step, {})  # numbers first, then pictures
        assert not set(known) & set(values)
        known |= values

    def finish(self):
        pass


def test_the_curve_is_a_table_a_picture_and_told_to_trackers(taught, tmp_path, monkeypatch):
    tracker = Recorder()
    monkeypatch.setattr(tracking, "_start", lambda *asked: tracker)
    settings = dataclasses.replace(settings_over(taught, tmp_path / "evaluation", seeds=2, pairs=3), tracker="wandb")
    summary = run(settings)
    folder = tmp_path / "evaluation"
    table = pd.read_csv(folder / "curve.csv")
    row = table[(table["round"] == 4) & (table["group"] == "seen") & (table["measure"] == "gain")].iloc[0]
    known = next(r for r in summary["curve"] if (r["round"], r["group"]) == (4, "seen"))
    assert row["mean"] == pytest.approx(known["gain"]["mean"])
    assert len(table) == 3 * 3 * (3 + 2 * 4)
    page = (folder / "report.html").read_text()
    assert page.count("against surrogate of round") >= 4
    assert "held out" in page
    assert curve_table(summary["curve"]).count("held out") == 3
    assert list(tracker.told) == [0, 1, 2, 3]
    assert tracker.told[3]["evaluation/seen/gain/mean"] == known["gain"]["mean"]
    assert [tracker.told[step]["surrogate_round"] for step in (1, 2, 3)] == [1, 2, 4]
    run(settings)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4, "nothing is told twice"


@pytest.mark.parametrize("answers", [10])
def test_an_evaluation_of_several_that_was_cut_short_goes_on(taught, tmp_path, answers):
    log = tmp_path / "asked"
    settings = settings_over(taught, tmp_path / "evaluation", seeds=1, rounds="1, 4", pairs=4)
    with pytest.raises(RewardError, match="the lab is closed"):
        run(settings, black_box=Dying(log, answers))
    engine = CountingEngine()
    pieces = run(settings, engine=engine, black_box=LoggedReward(log))
    assert engine.drawn == 0
    assert len(log.read_text().splitlines()) == 3 * 8
    whole = run(settings_over(taught, tmp_path / "whole", seeds=1, rounds="1, 4", pairs=4))
    assert pieces["curve"] == whole["curve"]
    assert pieces["curve"][0]["gain"]["over"] == "pairs"
    assert status(tmp_path / "evaluation")["rounds"] == {"drawn": 3, "planned": 3}


def test_which_surrogates_are_evaluated_is_said_or_refused(taught, tmp_path):
    one = settings_over(taught, tmp_path / "evaluation", rounds="newest")
    assert one.evaluate.surrogate == str(taught / "round_004")
    for rounds, says in (("3", "1, 2, 4"), ("1, 9", "9")):
        with pytest.raises(ConfigError, match=f"evaluate.rounds.*{says}"):
            settings_over(taught, tmp_path / "evaluation", rounds=rounds)
    with pytest.raises(ConfigError, match="which is one of them"):
        settings_over(taught / "round_002", tmp_path / "evaluation")
    with pytest.raises(ConfigError, match=r"evaluate\.rounds"):
        settings_over(taught, tmp_path / "evaluation", rounds="every")
    with pytest.raises(ConfigError, match=r"evaluate\.seen.*in both"):
        validated(dataclasses.replace(one, evaluate=dataclasses.replace(one.evaluate, seen="held_out_animals")))
    (taught / "round_002" / "surrogate.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"round_002.*no surrogate\.safetensors"):
        run(settings_over(taught, tmp_path / "evaluation"))
    assert not (tmp_path / "evaluation").exists()


def evaluated_by(team, folder):
    """An evaluation by several processes; its curve."""
    settings = settings_over(folder.parent / "run", folder / "evaluation", seeds=2, rounds="1, 4", pairs=2)
    return evaluate(settings, FakeEngine(team), None, settings.run_dir, LoggedReward() if team.is_main else None)[
        "curve"
    ]


def test_an_evaluation_does_not_depend_on_the_number_of_processes(taught, tmp_path):
    results = {size: processes(size, evaluated_by, tmp_path / str(size)) for size in (1, 2, 3)}
    for size, by_rank in results.items():
        assert by_rank == [results[1][0]] * size


def test_a_folder_of_an_evaluation_can_be_read_like_a_run(settings, tmp_path):
    run(settings)
    record = load_run(tmp_path / "evaluation")
    assert list(record.queries["round"].unique()) == [0, 1]
    assert record.settings["prompts"] == "held_out_animals"
    found = status(tmp_path / "evaluation")
    assert found["rounds"] == {"drawn": 2, "planned": 2}
    assert found["complete"] is True


def test_an_evaluation_of_which_nothing_was_answered_is_no_success(settings):
    """Too few calls to be found dead."""
    few = dataclasses.replace(settings, batch_size=2)
    with pytest.raises(RewardError, match=r"nothing was answered: 4 queries failed(.|\n)*KeyError(.|\n)*tiltopt retry"):
        run(few, black_box=FunctionReward("toy", "", 1, lambda images, prompts: {}["nothing"]))
    with Optimizer.open(few.run_dir, engine=FakeEngine()) as opt:
        assert ask_again(opt) == 4
    assert run(few)["answered"] == 4
