"""A run whose prior is a pipeline in memory, with what its owner loaded into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageChops

from tests.fakes.tiny import tiny_clip, tiny_pipeline
from tiltopt import Optimizer, cli
from tiltopt.errors import ConfigError, PotentialError, PriorError
from tiltopt.samplers import TorchPrior
from tiltopt.samplers.diffusers_prior import as_prior
from tiltopt.samplers.loading import load_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = tmp_path_factory.mktemp("in_memory")
    tiny_clip(parts / "clip")
    return tiny_pipeline(parts / "pipeline").parent


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    return {
        "initial_batch_size": 6,
        "prior": {"num_steps": 4, "guidance_scale": 3.0, "eta": 0.7},
        "features": {"path": str(folder / "clip"), "kind": "projection"},
        "sampler": {"num_particles": 2, "alpha": 0.5},
        "model": {"name": "linear"},
    }


class Plain(torch.nn.Module):
    """An unconditional denoiser that knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        del t
        return self.gain * x


def told(optimizer: Optimizer, n: int) -> list[Any]:
    """A round of `n`, all answered."""
    queries = optimizer.ask(n)
    for query in queries:
        optimizer.tell(query.id, float(query.image.resize((1, 1)).convert("L").getpixel((0, 0))))
    return queries


def test_it_draws_what_its_path_draws(folder: Path, config: dict[str, Any], tmp_path: Path) -> None:
    by_path = config | {"prior": config["prior"] | {"path": str(folder / "pipeline")}}
    with Optimizer.create(tmp_path / "path", by_path) as one:
        first = told(one, 6) + told(one, 2)
    with Optimizer.create(tmp_path / "memory", config, prior=load_pipeline(folder / "pipeline")) as two:
        second = told(two, 6)
        assert two.settings.prior.path == "memory"
    with Optimizer.open(tmp_path / "memory", prior=load_pipeline(folder / "pipeline")) as two:
        assert (two.settings.prior.num_steps, two.settings.prior.eta) == (4, 0.7)
        second += told(two, 2)  # tilted, by the pilot that the first process kept
    for a, b in zip(first, second, strict=True):
        assert ImageChops.difference(a.image, b.image).getbbox() is None


def test_what_its_owner_changed_stays_in_effect_and_another_is_refused(
    folder: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    pipe = load_pipeline(folder / "pipeline")
    with Optimizer.create(tmp_path / "plain", config, prior=pipe) as plain:
        before = plain.ask(2)
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.5)  # as a LoRA that was fused would
    with Optimizer.create(tmp_path / "mine", config, prior=pipe) as mine:
        assert mine.settings.prior.fingerprint != plain.settings.prior.fingerprint
        after = mine.ask(2)
    assert any(ImageChops.difference(a.image, b.image).getbbox() for a, b in zip(before, after, strict=True))
    with pytest.raises(ConfigError, match=rf"fingerprint {plain.settings.prior.fingerprint}.*other weights"):
        Optimizer.open(tmp_path / "plain", prior=pipe)
    with Optimizer.open(tmp_path / "mine", prior=as_prior(pipe, num_steps=4, guidance_scale=3.0, eta=0.7)) as mine:
        mine.ask(1)


def test_without_it_nothing_goes_on(
    folder: Path, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, run = load_pipeline(folder / "pipeline"), tmp_path / "run"
    rewarded = config | {"reward": {"name": "jpeg_compressibility"}}
    with Optimizer.create(run, rewarded, prior=pipe) as optimizer:
        optimizer.ask(2)
    with Optimizer.open(run) as optimizer, pytest.raises(ConfigError, match=r"Optimizer\.open\(.*, prior=pipe\)"):
        optimizer.ask(1)
    assert cli.main(["resume", str(run)]) == 2
    assert "handed over in Python" in capsys.readouterr().err
    assert cli.main(["status", str(run)]) == 0


def test_what_cannot_serve_is_refused(folder: Path, config: dict[str, Any], tmp_path: Path) -> None:
    pipe = load_pipeline(folder / "pipeline")
    lora = config | {"prior": {"lora": "somewhere"}}
    with pytest.raises(ConfigError, match="before it is handed over"):
        Optimizer.create(tmp_path / "run", lora, prior=pipe)
    with pytest.raises(ConfigError, match="got both"):
        Optimizer.create(tmp_path / "run", config, prior=pipe, engine=object())  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_denoiser_of_ones_own_serves(config: dict[str, Any], tmp_path: Path) -> None:
    """Over pixels and without a pipeline; features that need no autoencoder."""
    prior = TorchPrior(
        Plain(), alphas_cumprod=torch.linspace(0.99, 0.01, 50), event_shape=(3, 16, 16), prediction="epsilon",
        num_steps=4, decode=torch.sigmoid,
    )  # fmt: skip
    with Optimizer.create(tmp_path / "run", config | {"prior": {"num_steps": 9}}, prior=prior) as optimizer:
        told(optimizer, 6)
        assert optimizer.settings.prior.num_steps == 4
        assert told(optimizer, 2)[0].image.size == (16, 16)


def own(decode: Any = torch.sigmoid, shape: tuple[int, ...] = (3, 16, 16), **options: Any) -> TorchPrior:
    levels = torch.linspace(0.99, 0.01, 50)
    return TorchPrior(Plain(), alphas_cumprod=levels, event_shape=shape, num_steps=4, decode=decode, **options)


def test_the_default_features_serve_a_prior_without_an_autoencoder(config: dict[str, Any], tmp_path: Path) -> None:
    """Pixels take the place of latents, as for a DDPM; a run goes on with a prior of the same weights alone."""
    config = {key: value for key, value in config.items() if key != "features"}
    with Optimizer.create(tmp_path / "run", config, prior=own()) as optimizer:
        told(optimizer, 6)
    with pytest.raises(ConfigError, match="other weights"):
        Optimizer.open(tmp_path / "run", prior=own(eta=0.5))
    with Optimizer.open(tmp_path / "run", prior=own()) as optimizer:
        assert told(optimizer, 2)[0].image.size == (16, 16)


@pytest.mark.parametrize(
    ("decode", "shape", "made"),
    [
        (None, (1, 64), r"\(1, 1, 64\)"),
        (lambda x: torch.sigmoid(x[:, :1]), (3, 16, 16), r"\(1, 1, 16, 16\)"),
    ],
    ids=["audio", "grey"],
)
def test_a_prior_of_other_designs_than_pictures_is_refused_before_anything_is_asked(
    decode: Any, shape: tuple[int, ...], made: str, config: dict[str, Any], tmp_path: Path
) -> None:
    with Optimizer.create(tmp_path / "run", config, prior=own(decode, shape)) as optimizer:
        with pytest.raises(ConfigError, match=rf"makes {made} was given.*design='tensor'"):
            optimizer.ask(6)
        assert sum(optimizer.store.counts().values()) == 0


def test_pictures_of_another_range_are_refused_before_anything_is_asked(config: dict[str, Any], tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "run", config, prior=own(torch.tanh)) as optimizer:
        with pytest.raises(PotentialError, match=r"must lie in \[0, 1\].*map images in \[-1, 1\]"):
            optimizer.ask(6)
        assert sum(optimizer.store.counts().values()) == 0


def test_a_chain_without_noise_is_refused_before_anything_is_there(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prior\.eta.*needs stochastic steps"):
        Optimizer.create(tmp_path / "run", config, prior=own(eta=0.0))
    assert not (tmp_path / "run").exists()
    unguided = config | {"sampler": {"name": "best_of_n", "alpha": 0.5}}
    Optimizer.create(tmp_path / "run", unguided, prior=own(eta=0.0)).close()


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda x: torch.full_like(x, torch.nan), "finite designs"),
        (lambda x: torch.sigmoid(x)[..., : 8 + len(x)], r"one shape, .* so far"),
        (lambda x: torch.sigmoid(x).flatten(), "one design per event"),
    ],
    ids=["NaN", "another shape each time", "no rows"],
)
def test_a_decoder_that_breaks_is_told_before_anything_is_asked(
    decode: Any, message: str, config: dict[str, Any], tmp_path: Path
) -> None:
    prior = TorchPrior(
        Plain(), alphas_cumprod=torch.linspace(0.99, 0.01, 50), event_shape=(3, 16, 16), num_steps=4, decode=decode
    )
    with Optimizer.create(tmp_path / "run", config | {"micro_batch": 5}, prior=prior) as optimizer:
        with pytest.raises(PriorError, match=message):
            optimizer.ask(6)
        assert sum(optimizer.store.counts().values()) == 0
    assert not list((tmp_path / "run").glob("images/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 18}, "multiples of 4"),
        ({"lora": "nowhere/pytorch_lora_weights.safetensors"}, "LoRA at"),
        ({"guidance_decoder": "nowhere"}, "folder of an AutoencoderTiny"),
    ],
)
def test_what_a_prior_cannot_do_is_told_before_anything_is_asked(
    options: dict[str, Any], message: str, folder: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    named = config["prior"] | {"path": str(folder / "pipeline")} | options
    with Optimizer.create(tmp_path / "run", config | {"prior": named}) as optimizer:
        with pytest.raises(PriorError, match=message):
            optimizer.ask(6)
        assert sum(optimizer.store.counts().values()) == 0
