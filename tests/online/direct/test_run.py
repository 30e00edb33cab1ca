"""Direct sampling: what it writes, that processes do not matter, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file

from tests.fakes import tiny
from tiltopt import rewards
from tiltopt.cli import main
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online.direct import run
from tiltopt.online.direct.settings import PRESETS, DirectSettings
from tiltopt.online.report import tracking
from tiltopt.online.runner import CallPolicy, Runner
from tiltopt.online.settings.commandline import parse
from tiltopt.online.team import Team
from tiltopt.samplers.registry import SAMPLERS
from tiltopt.types import Conditioning

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "config" / "das.py")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("pipeline"), prediction_type="v_prediction")


def arguments(pipeline: Path, folder: Path, preset: str = "demo", **changes: Any) -> list[str]:
    """A command line for the tiny pipeline."""
    values = {
        "run_dir": folder,
        "prior.path": pipeline,
        "prior.num_steps": 4,
        "prior.dtype": "float32",
        "num_images": 3,
    }
    values |= {"sampler.num_particles": 2} | changes
    return ["--config", f"{CONFIG}:{preset}", *(f"--config.{k}={v}" for k, v in values.items())]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_of_a_guided_run(pipeline: Path, tmp_path: Path) -> None:
    assert main(["run", *arguments(pipeline, tmp_path, **{"sampler.pilot_chains": 8})]) == 0
    tensors = load_file(tmp_path / "samples.safetensors")
    assert tensors["log_w"].shape == (3, 2)
    torch.testing.assert_close(tensors["log_w"].logsumexp(-1), torch.zeros(3, dtype=torch.float64))
    results = lines(tmp_path / "results.jsonl")
    assert [r["prompt"] for r in results] == ["a cat", "a dog", "a horse"]
    runner = Runner(rewards.make_reward("colorfulness"))
    for i, row in enumerate(results):
        image = Image.open(tmp_path / "images" / f"{i + 1:06d}.png")
        assert row["reward"] == pytest.approx(run.score(runner, [image], [row["prompt"]]).values[0])
        assert row["ess"] == pytest.approx(float(1 / tensors["log_w"][i].exp().square().sum()))
        assert row["picked"] == int(tensors["picked"][i])
    trace = lines(tmp_path / "trace.jsonl")
    assert [(t["image"], t["k"]) for t in trace] == [(i, k) for i in (1, 2, 3) for k in range(5)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean"] == pytest.approx(sum(r["reward"] for r in results) / 3)
    assert summary["images"] == 3


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[int, dict[str, Any]] = {}

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.setdefault(step, {}).update(values)

    def finish(self) -> None:
        pass


def test_trackers_are_told_plain_and_tilted_samples(pipeline: Path, tmp_path: Path, monkeypatch: Any) -> None:
    tracker = Recorder()
    monkeypatch.setattr(tracking, "_start", lambda *asked: tracker)
    asked = arguments(pipeline, tmp_path, tracker="wandb", **{"sampler.pilot_chains": 8})
    assert main(["run", *asked]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert tracker.told[1]["mean"] == summary["mean"]
    assert tracker.told[1]["gain/mean"] == summary["gain"]["mean"]
    assert tracker.told[0]["mean"] == summary["prior"]["mean"]
    assert [row[2] for row in tracker.told[1]["media/queries"].data] == ["a cat", "a dog", "a horse"]
    assert [line["round"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]
    with pytest.raises(ConfigError, match="tracker"):
        DirectSettings.from_config({"tracker": "wandbb"})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_with_a_preset_written_for_another(pipeline: Path, tmp_path: Path, sampler: str) -> None:
    options: dict[str, Any] = {"sampler.name": sampler, "sampler.pilot_chains": 8, "num_images": 2}
    options |= {"sampler.num_noises": 2} if sampler == "demon" else {}
    assert main(["run", *arguments(pipeline, tmp_path, **options)]) == 0


@pytest.mark.parametrize("sampler", ["fk_steering", "demon", "best_of_n"])
def test_a_reward_without_gradient_runs_through_gradient_free_samplers(
    pipeline: Path, tmp_path: Path, sampler: str
) -> None:
    options = {"sampler.name": sampler} | ({"sampler.num_noises": 2} if sampler == "demon" else {})
    assert main(["run", *arguments(pipeline, tmp_path, "jpeg", **options)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward"] == "jpeg_compressibility"
    assert -2.0 < summary["mean"] < 0.0  # kilobytes of a 16-pixel picture
    assert all(math.isfinite(row["log_z"]) for row in lines(tmp_path / "results.jsonl"))


def test_two_shares_together_equal_one_process(pipeline: Path, tmp_path: Path) -> None:
    """The work of ranks 0 and 1 of two, put together, is bit for bit what one process draws."""
    settings = DirectSettings.from_config(parse(arguments(pipeline, tmp_path, **{"micro_batch": 2, "num_images": 4})))
    prior, runner = run._load_prior(settings, Team()), Runner(rewards.make_reward("colorfulness"))
    sampler = run._sampler(settings)
    potential = run._potential(settings, runner)
    prompts = settings.all_prompts()
    sampler = run._calibrated(sampler, prior, potential, prompts)

    class Half(Team):
        def collect(self, mine: Any, total: int) -> Any:
            return list(mine)

    whole = run.draw(settings, Team(), prior, sampler, potential, prompts)
    parts = {}
    for rank in (0, 1):
        parts |= dict(run.draw(settings, Half(rank, 2), prior, sampler, potential, prompts))  # type: ignore[call-overload]
    assert sorted(parts) == [0, 1, 2, 3]
    for i, one in enumerate(whole):
        assert one.image.tobytes() == parts[i].image.tobytes()
        assert torch.equal(one.log_w, parts[i].log_w)


@pytest.mark.slow
def test_two_nodes_write_the_same_images(pipeline: Path, tmp_path: Path) -> None:
    """Two launchers of one process each, which meet at an address of this machine, beside one process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    changes = {"micro_batch": 2, "sampler.pilot_chains": 8, "device": "cpu"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    for n in (1, 2):
        script = [str(ROOT / "samplers" / "main.py"), *arguments(pipeline, tmp_path / str(n), **changes)]
        nodes = []
        for node in range(n):
            launcher = ["-m", "torch.distributed.run", "--nnodes", str(n), "--node_rank", str(node), *meeting]
            command = [sys.executable, *launcher, "--nproc_per_node", "1", *script]
            nodes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        for done in nodes:
            _, said = done.communicate(timeout=500)
            assert done.returncode == 0, said[:4000] + said[-1000:]
    for i in (1, 2, 3):
        a, b = ((tmp_path / n / "images" / f"{i:06d}.png").read_bytes() for n in ("1", "2"))
        assert a == b
    assert (tmp_path / "1" / "trace.jsonl").read_text() == (tmp_path / "2" / "trace.jsonl").read_text()


@pytest.mark.parametrize(
    ("preset", "make"),
    [
        ("sdxl", tiny.tiny_pipeline_xl),
        ("lcm", lambda folder: tiny.tiny_pipeline(folder, unet_options={"time_cond_proj_dim": 12})),
        ("sd3", tiny.tiny_pipeline_sd3),
        ("flux", tiny.tiny_pipeline_flux),
    ],
)
def test_presets_of_other_families_draw_from_them(preset: str, make: Any, tmp_path: Path) -> None:
    """The preset itself, with a pipeline of its class and a reward that needs no weights."""
    changes: dict[str, Any] = {"prior.size": 16, "prior.vae_dtype": "float32"}
    changes |= {"sampler.pilot_chains": 8, "num_images": 1}
    config = parse(arguments(make(tmp_path / "pipeline"), tmp_path / "run", preset, **changes))
    with config.unlocked():
        config.reward = ConfigDict({"name": "colorfulness"})  # without the options of the preset's own
    run.run_direct(DirectSettings.from_config(config))
    assert Image.open(tmp_path / "run" / "images" / "000001.png").size == (16, 16)


def test_the_levers_of_a_prior_are_settings(pipeline: Path, tmp_path: Path) -> None:
    tiny.vae("tiny").save_pretrained(tmp_path / "small")
    levers = {"gradient_checkpointing": True, "channels_last": True, "vae_slicing": True, "offload": True}
    levers |= {"guidance_decoder": tmp_path / "small", "size": 16, "renoise": True}
    line = arguments(pipeline, tmp_path / "run", **{f"prior.{key}": value for key, value in levers.items()})
    prior = run._load_prior(DirectSettings.from_config(parse(line)), Team())
    assert prior.guidance_vae is not None
    assert prior.vae.use_slicing
    assert prior.offload
    assert prior.chain.renoise
    assert prior.image_size == (16, 16)
    assert prior.denoiser.network.is_gradient_checkpointing


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_valid_before_any_model_loads(name: str) -> None:
    settings = DirectSettings.from_config(parse(["--config", f"{CONFIG}:{name}"]))
    run.check(settings)
    assert settings.all_prompts()
    assert settings.sampler.alpha


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler.name": "das"}, "has none"),
        ({"sampler.alpha": 0.0}, "alpha"),
        ({"num_images": -1}, "num_images"),
        ({"sampler.num_particles": 0}, "num_particles"),
        ({"reward.name": "beauty"}, "beauty"),
        ({"prompts": "no_such_list"}, "no_such_list"),
        ({"prior.path": "/no/such/folder"}, "which does not exist"),
        ({"priors.path": "x"}, "Did you mean `prior.path`"),
        ({"sampler.num_noise": 3}, "num_noise"),
    ],
)
def test_bad_settings_exit_with_one_line(
    pipeline: Path, tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["run", *arguments(pipeline, tmp_path / "run", "jpeg", **changes)])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_eta_zero_and_foreign_folders_are_refused(pipeline: Path, tmp_path: Path) -> None:
    settings = DirectSettings.from_config(parse(arguments(pipeline, tmp_path, **{"prior.eta": 0.0})))
    with pytest.raises(ConfigError, match="eta > 0"):
        run.check(settings)
    run._claim(tmp_path, settings)
    run._claim(tmp_path, settings)  # the same settings may be drawn again
    with pytest.raises(ConfigError, match="other settings"):
        run._claim(tmp_path, DirectSettings.from_config(parse(arguments(pipeline, tmp_path, seed=1))))


def test_a_failed_answer_is_nan_and_counted() -> None:
    class Box:
        name, unit, batch_size = "box", "points", 2

        def __call__(self, images: Any, prompts: Any) -> list[Any]:
            return [rewards.Answer.failure("no") if p == "bad" else 2.5 for p in prompts]

    values = run.score(Runner(Box()), [Image.new("RGB", (4, 4))] * 3, ["good", "bad", "good"]).values  # type: ignore[arg-type]
    assert values[0] == values[2] == 2.5
    assert math.isnan(values[1])


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4))] * n


def test_a_black_box_is_called_by_the_policy_of_the_settings(tmp_path: Path) -> None:
    """Retries, budgets shared between processes, and the check of replies are those of every other call."""
    reward = {"name": "colorfulness", "retries": 1, "backoff_s": 0.0, "max_queries": 5}
    settings = DirectSettings.from_config({"reward": reward})
    calls: list[int] = []

    def flaky(images: Any, prompts: Any) -> list[float]:
        calls.append(len(images))
        if len(calls) == 1:
            raise ConnectionError("down")
        return [1.5] * len(images)

    box = rewards.base.FunctionReward("flaky", "", 1, flaky)
    runners = [run.make_runner(settings, Team(rank, 2), box) for rank in (0, 1)]
    assert [runner.policy.max_queries for runner in runners] == [3, 2]
    with pytest.warns(UserWarning, match="`max_queries` = 3"):
        values = run.score(runners[0], pictures(4), ["p"] * 4).values
    assert values[:3] == [1.5] * 3
    assert math.isnan(values[3])
    assert len(calls) == 4
    with pytest.raises(ConfigError, match="at least 1 for each of 8"):
        run.make_runner(settings, Team(7, 8), box)


def test_what_cannot_be_measured_has_no_weight_and_what_failed_ends_the_drawing() -> None:
    def box(answer: Any) -> Runner:
        return Runner(rewards.base.FunctionReward("box", "", 4, lambda x, p: [1.0, answer]), CallPolicy(retries=0))

    designs, cond = torch.zeros(2, 3, 4, 4), Conditioning(("a", "b"))
    assert run.BlackBoxPotential(box(math.nan), 0.5)(designs, cond).tolist() == [2.0, -math.inf]
    with pytest.raises(RewardError, match="the model refused"):
        run.BlackBoxPotential(box(rewards.Answer.failure("the model refused")), 0.5)(designs, cond)


def test_it_ends_with_a_table_a_picture_and_a_report_against_plain_samples(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments(pipeline, tmp_path / "run", **{"sampler.pilot_chains": 8})]) == 0
    told = capsys.readouterr().out
    assert "3 images and 3 plain ones beside them" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    plain, tilted = lines(tmp_path / "run" / "plain.jsonl"), lines(tmp_path / "run" / "results.jsonl")
    assert [(row["prompt"], row["seed"]) for row in plain] == [(row["prompt"], row["seed"]) for row in tilted]
    gain = [b["reward"] - a["reward"] for a, b in zip(plain, tilted, strict=True)]
    assert summary["gain"]["mean"] == pytest.approx(sum(gain) / 3)
    assert summary["gain"]["pairs"] == 3
    assert f"tilted - plain: {sum(gain) / 3:.3f}" in told
    runner = Runner(rewards.make_reward("colorfulness"))
    for row in plain:
        image = Image.open(tmp_path / "run" / "images" / f"{row['image']:06d}.png")
        assert row["reward"] == pytest.approx(run.score(runner, [image], [row["prompt"]]).values[0])
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (3 * 132 - 4, 2 * 132 - 4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "tilted by the reward itself" in page
    assert page.count("data:image/png") == 7, "three pairs and the best"
    assert "refine</button>" not in page
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text() == page


def test_plain_samples_are_drawn_where_answers_are_free_or_asked_for(pipeline: Path, tmp_path: Path) -> None:
    settings = DirectSettings.from_config({"reward": {"name": "colorfulness"}, "num_images": 5})
    assert settings.plain_images() == 5
    assert DirectSettings.from_config({"reward": {"name": "vlm"}, "num_images": 5}).plain_images() == 0
    assert DirectSettings.from_config({"reference_samples": 9, "num_images": 5}).plain_images() == 5
    for number in (0, 2):
        folder = tmp_path / str(number)
        changes = {"sampler.pilot_chains": 8, "reference_samples": number}
        assert main(["run", *arguments(pipeline, folder, **changes)]) == 0
        assert len(lines(folder / "plain.jsonl")) == number
        assert "Maximising colorfulness" in (folder / "report.html").read_text()
    assert "gain" not in json.loads((tmp_path / "0" / "summary.json").read_text())
    assert json.loads((tmp_path / "2" / "summary.json").read_text())["gain"]["pairs"] == 2


@pytest.mark.parametrize(("images", "said"), [(3, "nothing was answered of 3 images"), (6, "5 calls in a row")])
def test_a_black_box_that_never_answers_is_no_success_and_loses_no_picture(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int, said: str
) -> None:
    (tmp_path / "lab.py").write_text("def score(images, prompts):\n    return [][0]\n")
    changes = {"reward.name": f"{tmp_path / 'lab.py'}:score", "sampler.name": "prior_only", "num_images": images}
    assert main(["run", *arguments(pipeline, tmp_path / "run", **changes)]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "IndexError" in told
    assert len(list((tmp_path / "run" / "images").iterdir())) == images
    (tmp_path / "run" / "config.json").write_text("{")
    assert main(["run", *arguments(pipeline, tmp_path / "run", **changes)]) == 1
    assert "expected a readable JSON file" in capsys.readouterr().err
