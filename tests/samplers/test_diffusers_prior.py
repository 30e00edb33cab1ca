"""DiffusersPrior against diffusers' own schedulers and text encoding, closed forms, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from tests.contracts.priors import PriorContract, seeded
from tests.fakes import tiny
from tiltopt.errors import PriorError
from tiltopt.samplers.denoisers import TextTowers, UNetDenoiser
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior
from tiltopt.samplers.schedules import as_ddim, diffusion_schedule
from tiltopt.types import Conditioning

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("prior") / "kl", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def folder_tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("prior") / "tiny", kind="tiny")


class TestAutoencoderKL(PriorContract):
    @pytest.fixture
    def prior(self, folder: Path) -> DiffusersPrior:
        return load_prior(str(folder), num_steps=4)

    @pytest.fixture
    def prior64(self, folder: Path) -> DiffusersPrior:
        return load_prior(str(folder), num_steps=4, dtype="float64", vae_dtype="float64")


class TestAutoencoderTiny(PriorContract):
    @pytest.fixture
    def prior(self, folder_tiny_vae: Path) -> DiffusersPrior:
        return load_prior(str(folder_tiny_vae), num_steps=3, eta=0.5, guidance_scale=1.0)


class TestEmbedded(PriorContract):
    @pytest.fixture(scope="class")
    def prior(self) -> DiffusersPrior:
        return load_prior("embedded", num_steps=3, guidance_scale=4.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_kernels_are_ddim_scheduler_steps(prediction_type: str, spacing: str, eta: float, to_one: bool) -> None:
    config = SCALED | {"set_alpha_to_one": to_one, "steps_offset": 1, "prediction_type": prediction_type}
    _compare(DDIMScheduler(**config, timestep_spacing=spacing), 10, eta)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": True, "clip_sample_range": 1.5},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
        {"num_train_timesteps": 500},
    ],
)
@pytest.mark.parametrize("num_steps", [7, 50])
def test_kernels_are_ddim_scheduler_steps_for_other_configurations(options: dict, num_steps: int) -> None:
    _compare(DDIMScheduler(**(SCALED | options)), num_steps, 0.9)


def _compare(scheduler: DDIMScheduler, num_steps: int, eta: float) -> None:
    """Mean + std * noise and x0 of every kernel against `scheduler.step`, to 1e-5."""
    schedule = diffusion_schedule(scheduler, num_steps, eta)
    scheduler.set_timesteps(num_steps)
    assert schedule.times == tuple(scheduler.timesteps.tolist())
    g = seeded(0)
    for k, t in enumerate(scheduler.timesteps):
        x, output, noise = (torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
        step = scheduler.step(output, int(t), x, eta=eta, variance_noise=noise)
        mean, x0 = schedule.step(k, output, x)
        scale = float(step.pred_original_sample.abs().max())
        drawn = mean + schedule.chain.std[k] * noise
        torch.testing.assert_close(drawn, step.prev_sample, rtol=1e-5, atol=1e-5 * max(scale, 1))
        torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-5, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNDMScheduler", {"steps_offset": 1}),
        ("EulerDiscreteScheduler", {"steps_offset": 1}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
        ("DDPMScheduler", {"clip_sample": False}),
        ("LCMScheduler", {}),
        ("UniPCMultistepScheduler", {"prediction_type": "sample"}),
        ("HeunDiscreteScheduler", {"steps_offset": 1}),
    ],
)
def test_any_scheduler_configuration_becomes_the_same_chain(name: str, options: dict) -> None:
    scheduler = getattr(diffusers, name)(**{k: v for k, v in SCALED.items() if k != "clip_sample"}, **options)
    schedule = diffusion_schedule(scheduler, 10, 1.0)
    spacing = as_ddim(scheduler).config.timestep_spacing
    reference = DDIMScheduler(**(SCALED | options), timestep_spacing=spacing)
    assert schedule == diffusion_schedule(reference, 10, 1.0)
    assert schedule.prediction.clip is None


def test_defaults_of_another_scheduler_class_survive() -> None:
    """LCMScheduler's default schedule is not DDIMScheduler's, and it does not clip."""
    lcm = diffusers.LCMScheduler()
    schedule = diffusion_schedule(lcm, 8, 0.5)
    abar = 1 / (1 + torch.tensor(schedule.sigmas) ** 2)
    torch.testing.assert_close(abar, lcm.alphas_cumprod[: len(abar)])
    assert schedule.prediction.clip is None


def test_the_first_kernel_of_a_zero_snr_schedule_forgets_its_start() -> None:
    """abar_0 = 0: at eta = 1 the kernel is N(sqrt(abar_1) x0, 1 - abar_1), where x0 = -v does not depend on x."""
    scheduler = DDIMScheduler(
        **SCALED, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    schedule = diffusion_schedule(scheduler, 10, 1.0)
    chain = schedule.chain
    assert chain.a[0] == 0.0
    assert chain.std[0] == pytest.approx(chain.b[1])
    v, x = torch.full((1, 2), 3.0), torch.full((1, 2), 7.0)
    mean, x0 = schedule.step(0, v, x)
    torch.testing.assert_close(x0, -v)
    torch.testing.assert_close(mean, -v * chain.a[1])


class GaussianUNet(nn.Module):
    """The exact network for data N(mu, s^2 I): E[eps | x_t], or v, or x0, at the training timestep t."""

    def __init__(self, scheduler: DDIMScheduler, mu: float, s: float) -> None:
        super().__init__()
        self.alphas_cumprod, self.kind, self.mu, self.s = (
            scheduler.alphas_cumprod,
            scheduler.config.prediction_type,
            mu,
            s,
        )
        self.unused = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(in_channels=4, out_channels=4, sample_size=4, block_out_channels=(8,))

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Any, return_dict: bool) -> tuple[Tensor]:
        abar = self.alphas_cumprod.double()[t.long()].reshape(-1, 1, 1, 1).to(x.dtype)
        x0 = self.mu + abar.sqrt() * self.s**2 * (x - abar.sqrt() * self.mu) / (abar * self.s**2 + 1 - abar)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
        return ({"epsilon": eps, "v_prediction": v, "sample": x0}[self.kind],)


def gaussian_prior(mu: float, s: float, num_steps: int, eta: float, **options: Any) -> DiffusersPrior:
    """A prior whose data are N(mu, s^2 I), in float64."""
    scheduler = DDIMScheduler(**(SCALED | {"timestep_spacing": "trailing", "set_alpha_to_one": True} | options))
    text = TextTowers((tiny.tokenizer(),), (tiny.randomise(tiny.CLIPTextModel(tiny.text_config()), 0),))
    return DiffusersPrior(
        UNetDenoiser(GaussianUNet(scheduler, mu, s), text),
        tiny.vae(),
        scheduler,
        num_steps=num_steps,
        eta=eta,
        dtype="float64",
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_is_the_posterior_mean_of_a_gaussian(prediction_type: str) -> None:
    mu, s = 0.7, 0.4
    prior = gaussian_prior(mu, s, 10, 1.0, prediction_type=prediction_type)
    cond, x = prior.encode(["a cat"] * 3), prior.initial(3, seeded(0))
    for k in range(prior.num_steps):
        abar, after = prior.chain.a[k] ** 2, prior.chain.ends[k][0] ** 2
        x0 = mu + abar**0.5 * s**2 / (abar * s**2 + 1 - abar) * (x - abar**0.5 * mu)
        mean, estimate = prior.reverse(k, x, cond)
        torch.testing.assert_close(estimate, x0, rtol=1e-6, atol=1e-6)
        # eta = 1: the DDPM posterior q(x_next | x, x0), linear in x and x0 (Ho et al. 2020, eq. 7)
        ratio = abar / after
        expected = (after**0.5 * (1 - ratio) * x0 + ratio**0.5 * (1 - after) * x) / (1 - abar)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
        assert prior.std(k) == pytest.approx(((1 - after) / (1 - abar) * (1 - ratio)) ** 0.5, abs=1e-12)


def test_the_chain_draws_the_gaussian_that_its_exact_recursion_predicts() -> None:
    mu, s, n = 0.7, 0.4, 400
    prior = gaussian_prior(mu, s, 20, 1.0, prediction_type="v_prediction")
    cond, g = prior.encode(["a cat"] * n), seeded(1)
    x, mean, var = prior.initial(n, g), 0.0, 1.0
    for k in range(prior.num_steps):
        probe = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 4, 4, 4)
        offset, one = (float(m) for m in prior.reverse(k, probe, cond.select([0, 1])).mean[:, 0, 0, 0])
        mean, var = offset + (one - offset) * mean, (one - offset) ** 2 * var + prior.std(k) ** 2
        x = prior.reverse(k, x, cond).mean + prior.std(k) * torch.randn(x.shape, generator=g, dtype=x.dtype)
    m = x.numel()
    assert abs(float(x.mean()) - mean) < 4 * (var / m) ** 0.5
    assert abs(float(x.var()) - var) < 4 * var * (2 / m) ** 0.5


def test_guidance_in_one_call_equals_two_calls(folder: Path) -> None:
    prior = load_prior(folder, num_steps=4, guidance_scale=3.0, negative_prompt="a dog")
    calls: list[int] = []
    prior.denoiser.network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    x, cond, negative = prior.initial(2, seeded(0)), prior.encode(["a cat", "a fish"]), prior.encode(["a dog"] * 2)
    t = float(prior.schedule.times[1])
    with torch.no_grad():
        guided = prior.reverse(1, x, cond)
        assert calls == [4]
        yes, no = prior.network(x, t, cond.embeds), prior.network(x, t, negative.embeds)
    mean, x0 = prior.schedule.step(1, no + 3.0 * (yes - no), x)
    torch.testing.assert_close(guided.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided.x0, x0, rtol=1e-4, atol=1e-5)


def test_no_guidance_means_one_row_per_latent(folder: Path) -> None:
    prior = load_prior(folder, num_steps=4, guidance_scale=1.0)
    calls: list[int] = []
    prior.denoiser.network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    with torch.no_grad():
        prior.reverse(0, prior.initial(2, seeded(0)), prior.encode(["a cat", "a fish"]))
    assert calls == [2]


def test_a_chain_equals_the_pipeline(folder: Path) -> None:
    """Deterministic sampling and decoding against StableDiffusionPipeline itself."""
    prior = load_prior(folder, num_steps=5, eta=0.0, guidance_scale=3.0, negative_prompt="a dog")
    x, cond = prior.initial(2, seeded(0)), prior.encode(["a cat", "a fish"])
    start = x.clone()
    with torch.no_grad():
        for k in range(prior.num_steps):
            x = prior.reverse(k, x, cond).mean
        designs = prior.decode(x)
    with tiny.quiet():
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        list(cond.prompts),
        negative_prompt=["a dog"] * 2,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=start,
        output_type="pt",
    ).images
    torch.testing.assert_close(designs, theirs, rtol=1e-3, atol=1e-4)


def test_text_encoding_equals_the_pipeline(folder: Path) -> None:
    prior = load_prior(folder, num_steps=5, negative_prompt="a dog")
    with tiny.quiet():
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    ours = prior.encode(["a cat", "a fish", "a cat"]).embeds
    theirs, negative = pipe.encode_prompt(["a cat", "a fish", "a cat"], "cpu", 1, True, negative_prompt=["a dog"] * 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.negative, negative[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_for_the_network_only(folder: Path, dtype: str) -> None:
    half, full = load_prior(folder, num_steps=4, dtype=dtype), load_prior(folder, num_steps=4)
    assert half.denoiser.network.dtype == half.denoiser.encoders[0].dtype == getattr(torch, dtype)
    assert half.vae.dtype == torch.float32
    x = half.initial(2, seeded(0))
    with torch.no_grad():
        a, b = (p.reverse(1, x, p.encode(["a cat", "a dog"])) for p in (half, full))
        designs = half.decode(a.x0)
    assert a.mean.dtype == a.x0.dtype == designs.dtype == torch.float32
    # eight or eleven bits of mantissa through a few layers, times the guidance scale
    assert float((a.mean - b.mean).norm() / b.mean.norm()) < (0.05 if dtype == "bfloat16" else 0.01)


def test_pictures_lie_in_the_unit_interval_and_keep_their_gradient(folder: Path) -> None:
    prior = load_prior(folder, num_steps=4)
    x0 = (20 * prior.initial(2, seeded(0))).requires_grad_(True)
    prior.vae.decoder.conv_out.bias.data.fill_(3.0)  # every pixel saturates
    designs = prior.decode(x0)
    assert float(designs.detach().min()) >= 0
    assert float(designs.detach().max()) == 1.0
    (gradient,) = torch.autograd.grad(designs.sum(), x0)
    assert float(gradient.abs().sum()) > 0


def test_encode_image_inverts_decode_on_the_embedded_prior() -> None:
    prior = load_prior("embedded", num_steps=8, eta=0.0, guidance_scale=4.0)
    x, cond = prior.initial(2, seeded(0)), prior.encode(["a cat", "a fish"])
    with torch.no_grad():
        for k in range(prior.num_steps):
            x = prior.reverse(k, x, cond).mean
        designs = prior.decode(x)
        again = prior.decode(prior.encode_image(designs))
    assert float((designs - again).pow(2).mean()) < 0.01  # at least 20 dB


def test_modules_are_frozen_and_in_inference_mode(folder: Path) -> None:
    prior = load_prior(folder, num_steps=4)
    for module in (prior.denoiser.network, prior.vae, *prior.denoiser.encoders):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_checkpointing_and_channels_last_change_nothing(folder: Path) -> None:
    plain = load_prior(folder, num_steps=4)
    lean = load_prior(folder, num_steps=4, gradient_checkpointing=True, channels_last=True)
    gradients = []
    for prior in (plain, lean):
        x = prior.initial(1, seeded(0)).requires_grad_(True)
        value = prior.decode(prior.reverse(1, x, prior.encode(["a cat"])).x0).pow(2).sum()
        gradients.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_another_size(folder: Path) -> None:
    prior = load_prior(folder, num_steps=4, size=(24, 16))
    assert prior.event_shape == (4, 12, 8)
    with torch.no_grad():
        x0 = prior.reverse(0, prior.initial(1, seeded(0)), prior.encode(["a cat"])).x0
        assert prior.decode(x0).shape == (1, 3, 24, 16)
    with pytest.raises(PriorError, match="multiples of 4"):
        load_prior(folder, num_steps=4, size=18)


def test_describe_is_json(folder: Path) -> None:
    record = json.loads(json.dumps(load_prior(folder, num_steps=4, eta=0.5).describe()))
    assert record["eta"] == 0.5
    assert record["event_shape"] == [4, 8, 8]
    assert record["prediction_type"] == "v_prediction"


def test_a_distilled_unet_is_told_its_guidance_scale(tmp_path: Path) -> None:
    folder = tiny.tiny_pipeline(tmp_path, unet_options={"time_cond_proj_dim": 12}, steps_offset=0)
    calls: list[Any] = []
    prior = load_prior(folder, num_steps=4, guidance_scale=7.5)
    network = prior.denoiser.network
    network.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        prior.reverse(0, prior.initial(2, seeded(0)), prior.encode(["a cat", "a dog"]))
    told = calls[0][1]["timestep_cond"]
    pipe = diffusers.LatentConsistencyModelPipeline
    expected = pipe.get_guidance_scale_embedding(None, torch.tensor([6.5, 6.5]), embedding_dim=12)
    assert len(calls[0][0][0]) == 2  # one row per latent: no second branch
    torch.testing.assert_close(told, expected, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="session")
def folder_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline_xl(tmp_path_factory.mktemp("prior") / "xl")


class TestXL(PriorContract):
    @pytest.fixture
    def prior(self, folder_xl: Path) -> DiffusersPrior:
        return load_prior(str(folder_xl), num_steps=3)


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_an_xl_chain_equals_the_pipeline(folder_xl: Path, negative: str) -> None:
    prior = load_prior(folder_xl, num_steps=4, eta=0.0, guidance_scale=3.0, negative_prompt=negative)
    x, cond = prior.initial(2, seeded(0)), prior.encode(["a cat", "a fish"])
    start = x.clone()
    with torch.no_grad():
        for k in range(prior.num_steps):
            x = prior.reverse(k, x, cond).mean
    with tiny.quiet():
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder_xl)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"negative_prompt": [negative] * 2} if negative else {}
    steps: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": start, "output_type": "latent"}
    theirs = pipe(list(cond.prompts), **steps, **options).images
    torch.testing.assert_close(x, theirs, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1001}, "1 .. 1000"),
        ({"eta": -0.1}, "eta"),
        ({"eta": 1.5}, "eta"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"dtype": "int8"}, "dtype"),
        ({"vae_dtype": "half"}, "vae_dtype"),
    ],
)
def test_impossible_settings_are_refused(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(PriorError, match=message):
        load_prior(folder, **({"num_steps": 4} | options))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "no-slash", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(PriorError, match="is no folder here") as caught:
        load_prior(path, num_steps=4)
    assert path in str(caught.value)


def test_an_unreachable_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PriorError, match=r"HF_HUB_OFFLINE is set.*not whole in the cache .*hf download tiltopt-t"):
        load_prior("tiltopt-tests/no-such-model", num_steps=4)


def test_a_pipeline_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers would make an empty tokenizer, and every prompt the same."""
    folder = tiny.tiny_pipeline(tmp_path / "pipeline")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(PriorError, match="incomplete or damaged: no vocabulary"):
        load_prior(folder, num_steps=4)


def test_folders_that_are_no_pipeline_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PriorError, match=r"model_index\.json"):
        load_prior(tmp_path, num_steps=4)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(PriorError, match="FluxPipeline"):
        load_prior(tmp_path, num_steps=4)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(PriorError, match="not a diffusers model index"):
        load_prior(tmp_path, num_steps=4)
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(PriorError, match="incomplete or damaged"):
        load_prior(tmp_path, num_steps=4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow-matching"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow-matching"),
        (diffusers.VQDiffusionScheduler(num_vec_classes=3), "variance-preserving"),
        (DDIMScheduler(thresholding=True), "thresholding"),
        (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "zero_snr"),
        (diffusers.CogVideoXDDIMScheduler(), "alters its noise schedule"),
    ],
)
def test_schedulers_that_are_not_the_chain_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(PriorError, match=message):
        diffusion_schedule(scheduler, 10, 1.0)


def test_bad_prompts_and_conditionings_are_refused(folder: Path) -> None:
    prior = load_prior(folder, num_steps=4)
    with pytest.raises(PriorError, match="must be a list"):
        prior.encode("a cat")
    with pytest.raises(PriorError, match="at least one"):
        prior.encode([])
    with pytest.raises(PriorError, match="int"):
        prior.encode([3])  # type: ignore[list-item]
    x = prior.initial(2, seeded(0))
    with pytest.raises(PriorError, match="1 rows for 2 latents"):
        prior.reverse(0, x, prior.encode(["a cat"]))
    with pytest.raises(PriorError, match=r"prior\.encode"):
        prior.reverse(0, x, Conditioning(("a", "b")))


def test_an_inpainting_unet_is_refused(tmp_path: Path) -> None:
    folder = tiny.tiny_pipeline(tmp_path, unet_options={"in_channels": 9})
    with pytest.raises(PriorError, match="9 and 4"):
        load_prior(folder, num_steps=4)
