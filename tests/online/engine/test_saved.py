"""A saved surrogate in one call, and in BoTorch's hands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, UpperConfidenceBound
from diffusers import StableDiffusionPipeline
from PIL import Image

import tiltopt
from tests.fakes.tiny import tiny_clip, tiny_pipeline
from tiltopt.designs import to_designs
from tiltopt.errors import ConfigError, SurrogateError
from tiltopt.online.optimizer import Optimizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one tilted round; the reward is how bright a picture is."""
    parts = tmp_path_factory.mktemp("parts")
    tiny_pipeline(parts / "pipeline")
    tiny_clip(parts / "clip")
    config = {
        "initial_batch_size": 6,
        "prior": {"path": str(parts / "pipeline"), "num_steps": 3},
        "features": {"path": str(parts / "clip"), "prompt_features": True},
        "sampler": {"alpha": 0.5},
    }
    folder = tmp_path_factory.mktemp("runs") / "run"
    with Optimizer.create(folder, config, prompts=["a cat", "a bear"]) as opt:
        for size in (6, 2):
            for query in opt.ask(size):
                opt.tell(query.id, float(np.asarray(query.image).mean()))
    return folder


def test_it_predicts_what_it_had_predicted(run: Path) -> None:
    saved = tiltopt.load_surrogate(run)
    assert saved.folder == run / "round_001"
    with Optimizer.open(run, read_only=True) as opt:
        rows = opt.queries("tilted")
        images, prompts = [opt.image(int(i)) for i in rows["id"]], list(rows["prompt"])
    mean, sd = saved.predict(images, prompts)
    torch.testing.assert_close(mean, torch.tensor(rows["predicted"].to_numpy()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sd, torch.tensor(rows["predicted_sd"].to_numpy()), rtol=1e-6, atol=1e-6)
    assert "AveragedLinear" in repr(saved)
    assert len(repr(saved)) < 400


def test_of_a_run_whose_prior_was_handed_over_it_takes_that_one_and_no_other(tmp_path: Path) -> None:
    folders = [tiny_pipeline(tmp_path / f"pipeline_{seed}", seed=seed) for seed in range(2)]
    pipe, other = [StableDiffusionPipeline.from_pretrained(folder) for folder in folders]
    tiny_clip(tmp_path / "clip")
    config = {"initial_batch_size": 4, "features": {"path": str(tmp_path / "clip")}, "sampler": {"alpha": 0.5}}
    config |= {"prior": {"num_steps": 3}}
    with Optimizer.create(tmp_path / "run", config, prompts=["a cat"], prior=pipe) as opt:
        for size in (4, 2):
            for query in opt.ask(size):
                opt.tell(query.id, float(np.asarray(query.image).mean()))
        rows = opt.queries("tilted")
        images = [opt.image(int(i)) for i in rows["id"]]
    mean, _ = tiltopt.load_surrogate(tmp_path / "run", prior=pipe).predict(images)
    torch.testing.assert_close(mean, torch.tensor(rows["predicted"].to_numpy()), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match=r"load_surrogate\(.*prior=pipe\), with the pipeline of fingerprint"):
        tiltopt.load_surrogate(tmp_path / "run")
    with pytest.raises(ConfigError, match="other weights, adapters or noise levels"):
        tiltopt.load_surrogate(tmp_path / "run", prior=other)


def test_acquisitions_of_botorch_take_it_down_to_the_pixels(run: Path) -> None:
    """UCB against its formula, and its gradient with respect to a picture against finite differences."""
    saved = tiltopt.load_surrogate(run / "round_001")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    images, prompts = [Image.fromarray(p) for p in pixels], ["a cat", "a bear"]
    X = saved.features(images, prompts).unsqueeze(-2)
    mean, sd = saved.predict(images, prompts)
    ucb = UpperConfidenceBound(saved.model, beta=4.0)
    torch.testing.assert_close(ucb(X), mean + 2 * sd)
    assert LogExpectedImprovement(saved.model, best_f=0.0)(X).shape == (2,)

    def value(designs: torch.Tensor) -> torch.Tensor:
        return ucb(saved.feature_map(designs, prompts).double().unsqueeze(-2)).sum()

    designs = to_designs(images).requires_grad_()
    (slope,) = torch.autograd.grad(value(designs), designs)
    way = slope / slope.norm()
    step = 1e-2
    with torch.no_grad():
        rise = (value(designs + step * way) - value(designs - step * way)) / (2 * step)
    assert float(rise) == pytest.approx(float(slope.norm()), rel=0.05)


def test_what_is_no_surrogate_of_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which holds none"):
        tiltopt.load_surrogate(tmp_path)
    known = run / "round_001" / "surrogate.json"
    told = json.loads(known.read_text())
    try:
        known.write_text(json.dumps(told | {"features": "another"}))
        with pytest.raises(SurrogateError, match="features `another`"):
            tiltopt.load_surrogate(run)
    finally:
        known.write_text(json.dumps(told))
