"""`tiltopt.draw` and `tiltopt.as_prior`: one call on a prior, a pipeline in memory, a black box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiltopt
from tests.fakes import tiny
from tiltopt.errors import ConfigError, PotentialError, PriorError
from tiltopt.samplers import BestOfN, TorchPrior
from tiltopt.samplers.analytic import LinearGaussianPrior, Quadratic
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior


def gaussian(num_steps: int = 40) -> LinearGaussianPrior:
    return LinearGaussianPrior(torch.tensor([0.3, -0.2]), torch.tensor([[0.8, 0.2], [0.2, 0.5]]), num_steps=num_steps)


def bowl(designs: Tensor, prompts: Sequence[str]) -> Tensor:
    """-|x - 1|^2 in reward units."""
    assert len(prompts) == len(designs)
    return -(designs - 1).square().sum(-1)


@pytest.mark.parametrize("gradient", [None, "full", "none"])
def test_the_price_is_in_reward_units_per_nat(gradient: str | None) -> None:
    """reward / alpha tilts the chain: log Z and mean against the closed form, within 4 standard errors."""
    prior, runs, alpha = gaussian(), 24, 2.0
    samples = tiltopt.draw(prior, bowl, [""] * runs, alpha=alpha, num_particles=256, seed=1, gradient=gradient)
    quadratic = Quadratic(2 / alpha * torch.eye(2), torch.ones(2))
    target, log_z = prior.chain_law().tilt(quadratic)
    z = samples.log_z.double().exp()
    assert abs(float(z.mean() - log_z.exp())) < 4 * float(z.std()) / runs**0.5
    first = (samples.log_w.double().exp().unsqueeze(-1) * samples.x0.double()).sum(1)
    assert bool(((first.mean(0) - target.mean).abs() < 4 * first.std(0) / runs**0.5).all())


def test_a_seed_names_the_draw() -> None:
    draws = [tiltopt.draw(gaussian(10), bowl, ["a", "b"], alpha=1.0, seed=seed).x0 for seed in (0, 0, 1)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (2, 4, 2)


def test_a_prior_without_a_gradient_works_without_one() -> None:
    @torch.no_grad()
    def frozen(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    abar = torch.linspace(0.99, 0.02, 20)
    prior = TorchPrior(frozen, alphas_cumprod=abar, event_shape=(2,), num_steps=10)
    samples = tiltopt.draw(prior, bowl, ["x"], alpha=1.0, num_particles=8, gradient="none")
    assert bool(torch.isfinite(samples.log_z).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("draw"))


@pytest.fixture
def pipe(folder: Path) -> Any:
    with tiny.quiet():
        return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def test_a_black_box_sees_pictures_and_may_fail(pipe: Any) -> None:
    seen: list[int] = []

    def darkest(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        assert all(image.size == (16, 16) for image in images)
        assert len(prompts) == len(images)
        seen.append(len(images))
        values = [-float(sum(image.convert("L").tobytes())) for image in images]
        values[0] = float("nan")
        return values

    prior = tiltopt.as_prior(pipe, num_steps=4, guidance_scale=1.0)
    samples = tiltopt.draw(prior, darkest, ["a cat"], alpha=100.0, num_particles=3, black_box=True)
    assert seen
    assert samples.designs.shape == (1, 3, 3, 16, 16)
    assert float(samples.log_w[0, 0]) == -torch.inf  # the answer that failed


def test_another_sampler(pipe: Any) -> None:
    samples = tiltopt.draw(
        tiltopt.as_prior(pipe, num_steps=2), lambda d, p: d.mean((1, 2, 3)), "a cat", alpha=0.1, sampler=BestOfN()
    )
    assert samples.designs.shape == (1, 4, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": 1.0, "black_box": True, "gradient": "full"}, "black box has no gradient"),
        ({"alpha": 1.0, "sampler": BestOfN(), "gradient": "none"}, "default sampler"),
        ({"alpha": 1.0, "num_particles": 0}, "num_particles"),
    ],
)
def test_impossible_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiltopt.draw(gaussian(4), bowl, ["x"], **options)


def test_a_reward_is_a_function_that_returns_numbers() -> None:
    with pytest.raises(ConfigError, match=r"function of designs and prompts.*make_differentiable"):
        tiltopt.draw(gaussian(4), "aesthetic", ["x"], alpha=1.0)  # type: ignore[arg-type]
    for nothing in (None, "many"):
        with pytest.raises(PotentialError, match="one number per design"):
            tiltopt.draw(gaussian(4), lambda d, p: nothing, ["x"], alpha=1.0, gradient="none")  # noqa: B023


# ---------------------------------------------------------------- a pipeline in memory


def test_a_pipeline_in_memory_is_the_prior_of_its_folder(folder: Path, pipe: Any) -> None:
    ours, theirs = tiltopt.as_prior(pipe, num_steps=4), load_prior(folder, num_steps=4)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.denoiser.network is pipe.unet
    x = theirs.initial(1, torch.Generator().manual_seed(0))
    for a, b in zip(*(p.reverse(1, x, p.encode(["a cat"])) for p in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_pipeline_keeps_its_precision(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    prior = tiltopt.as_prior(pipe, num_steps=4)
    assert prior.dtype == prior.vae_dtype == torch.bfloat16
    assert prior.decode(prior.initial(1, torch.Generator().manual_seed(0))).dtype == torch.float32


def test_a_prior_stays_and_other_things_are_told() -> None:
    prior = gaussian(4)
    assert tiltopt.as_prior(prior) is prior
    assert isinstance(tiltopt.as_prior("embedded", num_steps=2), DiffusersPrior)
    with pytest.raises(PriorError, match="takes no options"):
        tiltopt.as_prior(prior, num_steps=3)
    with pytest.raises(PriorError, match=r"got Linear; .*TorchPrior"):
        tiltopt.as_prior(torch.nn.Linear(2, 2))


def test_a_lora_of_the_user_stays_in_effect(pipe: Any, tmp_path: Path) -> None:
    """Loaded before `as_prior`: the network's answer is the adapted one, and the fingerprint tells."""
    peft = pytest.importorskip("peft")
    prior = tiltopt.as_prior(pipe, num_steps=4)
    x, cond = prior.initial(1, torch.Generator().manual_seed(0)), prior.encode(["a cat"])
    plain, before = prior.reverse(1, x, cond).x0, prior.fingerprint
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    state = peft.utils.get_peft_model_state_dict(pipe.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe.unet.delete_adapters("default")
    pipe.load_lora_weights(tmp_path, adapter_name="mine")
    adapted = tiltopt.as_prior(pipe, num_steps=4)
    after = adapted.fingerprint
    with_lora = adapted.reverse(1, x, cond).x0
    assert float((with_lora - plain).abs().max()) > 1e-4
    t = torch.full((2,), adapted.schedule.times[1])
    both = torch.cat([adapted.negative, cond.embeds])
    said = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
    expected = adapted.schedule.step(1, said[0] + 5.0 * (said[1] - said[0]), x)[1]
    torch.testing.assert_close(with_lora, expected, rtol=1e-4, atol=1e-5)
    pipe.set_adapters(["mine"], [0.5])
    assert len({before, after, tiltopt.as_prior(pipe, num_steps=4).fingerprint}) == 3
