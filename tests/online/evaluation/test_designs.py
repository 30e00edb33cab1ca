"""Sets of pictures, from runs and folders, held against each other: every number against one of its own."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.fakes.engine import CONFIG, FakeEngine, LoggedReward
from tests.fakes.run import picture
from tiltopt import cli
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online.evaluation import designs
from tiltopt.online.evaluation.designs import Request, bootstrap, evaluate_designs
from tiltopt.online.evaluation.diversity import pairwise_distance, truncated_entropy, vendi_score
from tiltopt.online.evaluation.picture_sets import load_sets
from tiltopt.online.loop import run as run_loop
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.report import tracking
from tiltopt.online.report.charts import undominated
from tiltopt.online.report.designs_page import write_designs
from tiltopt.online.team import Team
from tiltopt.rewards import make_reward
from tiltopt.rewards.base import FunctionReward
from tiltopt.vision import CLIPVision

ANIMALS = ["a cat", "a dog", "a fish"]


def folder_of(place: Path, count: int = 6, seed: int = 0, prompts: bool = True) -> Path:
    """A folder of images, two of each of three prompts."""
    place.mkdir(parents=True)
    for i in range(count):
        picture(seed + i).save(place / f"{i:03d}.png")
    if prompts:
        lines = [ANIMALS[i // 2 % 3] for i in range(count)]
        (place / "prompts.txt").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 + 2 x 3 queries over three prompts."""
    folder = tmp_path_factory.mktemp("designs") / "toy"
    prompts = folder.with_name("animals.txt")
    prompts.write_text("cat\ndog\nfish\n")
    settings = CONFIG | {"reward": {"name": "symmetry"}, "prompts": str(prompts), "batch_size": 3}
    with Optimizer.create(folder, settings, engine=FakeEngine()) as optimizer:
        run_loop(optimizer, FunctionReward("symmetry", "points", 16, LoggedReward()))
    return folder


def test_means_and_measures_of_a_folder(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures")
    found = evaluate_designs(load_sets([place]), Request(rewards=("symmetry",), diversity=True))
    images = [Image.open(place / f"{i:03d}.png") for i in range(6)]
    whole = found["methods"][0]["groups"]["all"]["metrics"]
    own = [float(v) for v in make_reward("symmetry")(images, [""] * 6)]
    assert whole["symmetry"]["mean"] == pytest.approx(np.mean(own))
    draws = np.random.default_rng(0).integers(6, size=(designs.RESAMPLES, 6))
    ends = np.percentile(np.array(own)[draws].mean(1), [2.5, 97.5])
    assert (whole["symmetry"]["low"], whole["symmetry"]["high"]) == pytest.approx(tuple(ends))

    tower = CLIPVision.load("embedded")
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])
    with torch.no_grad():
        z = tower(pixels).projection.double()
        z = z / z.norm(dim=1, keepdim=True)
        texts = torch.stack([t / t.norm() for t in tower.text(ANIMALS).double()])
    assert found["fidelity_by"] == "clip"
    right = (z @ texts.T).argmax(1).tolist() == np.array([0, 0, 1, 1, 2, 2])
    assert whole["fidelity"]["mean"] == pytest.approx(right.mean())
    assert whole["pairwise_distance"]["mean"] == pytest.approx(pairwise_distance(z), rel=1e-5)
    assert whole["vendi"]["mean"] == pytest.approx(vendi_score(z), rel=1e-5)
    assert whole["entropy"]["mean"] == pytest.approx(truncated_entropy(z, found["diversity"]["truncation"]), rel=1e-5)
    dogs = next(row for row in found["methods"][0]["prompts"] if row["prompt"] == "a dog")
    assert dogs["pictures"] == 2
    assert dogs["metrics"]["symmetry"] == pytest.approx(np.mean(own[2:4]))
    assert dogs["metrics"]["pairwise_distance"] == pytest.approx(1 - float(z[2] @ z[3]), rel=1e-5)


def test_a_run_brings_its_answers_nats_and_prompts(run_folder: Path) -> None:
    with Optimizer.open(run_folder, read_only=True) as run:
        frame = run.queries()
        drawn = run.store.diagnostics(2)
        alpha = run.store.rounds()[2].alpha
    last = frame[frame["round"] == 2]
    found = evaluate_designs(load_sets([run_folder]), Request())
    groups = found["methods"][0]["groups"]
    assert groups["all"]["metrics"]["target"]["mean"] == pytest.approx(last["value"].mean())
    nats = drawn["acquired"] / alpha - drawn["log_z"]
    assert groups["all"]["metrics"]["nats"]["mean"] == pytest.approx(nats.mean())
    assert groups["all"]["pictures"] == groups["seen"]["pictures"] == 3
    assert "held_out" not in groups
    assert found["fidelity_by"] == "judge"  # the settings say that the embedded prior drew them
    first = evaluate_designs(load_sets([run_folder / "round_000"]), Request())["methods"][0]
    assert first["name"] == "toy/round_000"
    assert first["groups"]["all"]["metrics"]["target"]["mean"] == pytest.approx(
        frame[frame["round"] == 0]["value"].mean()
    )


def test_seen_and_held_out_prompts_stand_apart(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures")
    known = tmp_path / "known.txt"
    known.write_text("cat\nfish\n")
    found = evaluate_designs(load_sets([place], str(known)), Request(rewards=("symmetry",)))["methods"][0]
    values = make_reward("symmetry")([Image.open(place / f"{i:03d}.png") for i in range(6)], [""] * 6)
    assert found["groups"]["seen"]["pictures"] == 4
    assert found["groups"]["held_out"]["metrics"]["symmetry"]["mean"] == pytest.approx(np.mean(values[2:4]))


def test_sets_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    places = [folder_of(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 50))]
    sets = load_sets(places)
    found = evaluate_designs(sets, Request(rewards=("symmetry",), fidelity="none"))
    values = [make_reward("symmetry")([Image.open(p) for p in one.files], [""] * 6) for one in sets]
    means = [np.array(v).reshape(3, 2).mean(1) for v in values]
    (row,) = found["differences"]
    expected = bootstrap(means[1] - means[0])
    assert (row["name"], row["metric"], row["pairs"], row["by"]) == ("b", "symmetry", 3, "prompt")
    assert [row[key] for key in ("mean", "low", "high")] == pytest.approx(
        [expected[k] for k in ("mean", "low", "high")]
    )


def test_runs_are_compared_by_prompt_and_seed(run_folder: Path) -> None:
    sets = load_sets([run_folder, run_folder / "round_002"])
    rows = evaluate_designs(sets, Request())["differences"]
    target = next(row for row in rows if row["metric"] == "target" and row["group"] == "all")
    assert (target["mean"], target["pairs"], target["by"]) == (0.0, 3, "prompt and seed")


def test_diversity_is_taken_of_as_many_pictures(tmp_path: Path) -> None:
    many, few = folder_of(tmp_path / "many", 6), folder_of(tmp_path / "few", 4)
    found = evaluate_designs(load_sets([many, few]), Request(diversity=True))
    assert found["diversity"]["pictures"] == 4
    numbers = [method["groups"]["all"]["metrics"]["vendi"] for method in found["methods"]]
    assert numbers[0] == numbers[1]  # the first four pictures are the same


@dataclass(frozen=True)
class Threads(Team):
    """Ranks that are threads of this process."""

    parts: dict[int, list[Any]] = field(default_factory=dict)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(3))

    def collect(self, mine: Sequence[tuple[int, Any]], total: int) -> list[Any]:
        self.parts[self.rank] = list(mine)
        self.barrier.wait(60)
        placed = dict(item for part in self.parts.values() for item in part)
        self.barrier.wait(60)
        return [placed[i] for i in range(total)]


def test_three_ranks_find_the_same_as_one(tmp_path: Path) -> None:
    sets = load_sets([folder_of(tmp_path / "pictures", 3 * designs.BATCH - 2)])
    request = Request(rewards=("symmetry",), diversity=True)
    first = Threads(0, 3)
    ranks = [Threads(rank, 3, first.device, first.parts, first.barrier) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda team: evaluate_designs(sets, request, team), ranks))
    assert found == [evaluate_designs(sets, request)] * 3
    assert sorted(len(part) for part in first.parts.values()) == [1, 1, 1]  # a batch each


# ---- folders of images


def test_prompts_come_from_metadata_too(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures", 2, prompts=False)
    assert load_sets([place])[0].prompts == (None, None)
    (place / "metadata.csv").write_text("file_name,text\n001.png,a dog\n000.png,a cat\n")
    assert load_sets([place])[0].prompts == ("a cat", "a dog")
    rows = [{"file_name": "000.png", "prompt": "a bee"}]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_sets([place])[0].prompts == ("a bee", None)


def test_bad_folders_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="got none in it"):
        load_sets([empty])
    with pytest.raises(ConfigError, match="no such folder"):
        load_sets([tmp_path / "nowhere"])
    place = folder_of(tmp_path / "pictures")
    with pytest.raises(ConfigError, match="different folders"):
        load_sets([place, place / "."])
    (place / "003.png").write_bytes((place / "003.png").read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"003\.png: expected a picture, got a damaged"):
        load_sets([place])
    (place / "003.png").unlink()
    with pytest.raises(ConfigError, match=r"prompts\.txt: expected a line per picture.* 6 lines for 5"):
        load_sets([place])


def test_missing_prompts_are_named_where_they_are_needed(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "pictures", prompts=False)
    sets = load_sets([place])
    assert evaluate_designs(sets, Request(rewards=("symmetry",)))["fidelity_by"] is None
    with pytest.raises(ConfigError, match=r"fidelity by clip needs the prompt .* 6 of 6 .*prompts\.txt"):
        evaluate_designs(sets, Request(fidelity="clip"))
    with pytest.raises(RewardError, match=r"pictures: reward `clip`.*prompts\.txt"):
        evaluate_designs(sets, Request(rewards=("clip",)))


def test_a_round_that_was_never_drawn_is_refused(run_folder: Path) -> None:
    (run_folder / "round_009").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match="got 9; the run has rounds 0, 1, 2"):
        load_sets([run_folder / "round_009"])


# ---- command and page


def test_the_command_prints_and_writes(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"found.{name}" for name in ("json", "csv", "html")}
    given = [str(run_folder), str(run_folder / "round_000"), "--rewards", "colorfulness"]
    written = [f"--{option}={files[name]}" for option, name in (("json", "json"), ("csv", "csv"), ("out", "html"))]
    assert cli.main(["evaluate", *given, "--diversity", *written]) == 0
    said = capsys.readouterr().out
    found = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    mean = found["methods"][0]["groups"]["all"]["metrics"]["colorfulness"]["mean"]
    assert f"{mean:.3f} [" in said
    table = pd.read_csv(files["csv"], keep_default_na=False)
    row = table.query("method == 'toy' and group == 'all' and metric == 'colorfulness'").iloc[0]
    assert float(row["mean"]) == pytest.approx(mean)
    page = files["html"].read_text()
    assert page.count("<svg viewBox") == 4  # fidelity, entropy, distance, Vendi score
    assert 'class="front"' in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "one of the two"),
        (["{}", "--surrogate", "{}"], "one of the two"),
        (["{}", "--rewards", "symetry"], "Did you mean `symmetry`"),
        (["{}", "--option", "symmetry.batch_size=2"], "the rewards asked (none)"),
        (["{}", "--option", "symmetry"], "NAME.KEY=VALUE"),
        (["{}", "--diversity", "--clip", "/no/such/clip"], "no CLIP model at"),
        (["{}", "--config", "config/ucb.py"], "goes with --surrogate"),
    ],
)
def test_what_cannot_be_is_refused(
    run_folder: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *(text.format(run_folder) for text in given)]) == 2
    assert said in capsys.readouterr().err


def test_a_tracker_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Recorder:
        def log(self, values: dict[str, Any], step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

    monkeypatch.setattr(tracking, "_start", lambda *asked: Recorder())
    place = folder_of(tmp_path / "pictures")
    asked = ["evaluate", str(place), "--rewards", "symmetry", "--json", str(tmp_path / "found.json")]
    assert cli.main([*asked, "--tracker", "wandb"]) == 0
    (step, values), end = told
    mean = json.loads((tmp_path / "found.json").read_text())["methods"][0]["groups"]["all"]["metrics"]["symmetry"]
    assert (step, end) == (0, "finished")
    assert values["pictures/all/symmetry/mean"] == mean["mean"]
    assert values["pictures/all/symmetry/low"] == mean["low"]


def test_names_of_folders_are_no_code(tmp_path: Path) -> None:
    place = folder_of(tmp_path / "<b>bold")
    sets = load_sets([place])
    page = write_designs(evaluate_designs(sets, Request(rewards=("symmetry",))), sets, tmp_path / "page.html")
    assert "<b>bold" not in page.read_text()


def test_the_front_is_what_nothing_beats() -> None:
    points = [(0.0, 3.0), (1.0, 2.0), (1.0, 1.0), (2.0, 0.0), (0.5, 2.0), (1.0, 2.0)]
    assert undominated(points) == [0, 1, 3, 5]


def test_the_mean_of_nothing_is_nothing() -> None:
    assert bootstrap(np.array([math.nan])) == {"mean": None, "low": None, "high": None, "n": 0}
    assert bootstrap(np.array([2.0, math.nan])) == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_a_reward_is_called_through_the_one_door(tmp_path: Path) -> None:
    """What may pass is tried again; what is dead is left alone, with the traceback of the user's code."""
    (tmp_path / "lab.py").write_text(
        "calls = []\n"
        "def once(images, prompts):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 1:\n"
        "        raise ConnectionError('down')\n"
        "    return [1.5]\n"
        "def never(images, prompts):\n"
        "    return [][0]\n"
    )
    sets = load_sets([folder_of(tmp_path / "pictures")])
    found = evaluate_designs(sets, Request(rewards=(f"{tmp_path / 'lab.py'}:once",), fidelity="none"))
    assert found["methods"][0]["groups"]["all"]["metrics"][f"{tmp_path / 'lab.py'}:once"]["n"] == 6
    with pytest.raises(RewardError, match=r"5 calls in a row(.|\n)*lab\.py(.|\n)*IndexError"):
        evaluate_designs(sets, Request(rewards=(f"{tmp_path / 'lab.py'}:never",), fidelity="none"))
