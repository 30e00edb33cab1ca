"""What a checkpoint must hold to be loaded, and what is said of one that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.contracts.priors import seeded
from tests.fakes import tiny
from tiltopt.errors import PriorError
from tiltopt.samplers import DAS
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior
from tiltopt.samplers.loading import load_pipeline

Tensors = dict[str, Tensor]
FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("loading") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def rewrite(folder: Path, part: str, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / part / FILES[part]
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without(text: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if text not in name}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("text_encoder", "layers.1."),
        ("text_encoder", "embeddings"),
        ("unet", "mid_block"),
        ("unet", "conv_out.bias"),
        ("vae", "decoder.mid_block"),
        ("vae", "post_quant_conv"),
    ],
)
def test_missing_weights_are_refused_by_name(folder: Path, part: str, text: str) -> None:
    lost = [name for name in load_file(folder / part / FILES[part]) if text in name]
    rewrite(folder, part, without(text))
    with pytest.raises(PriorError, match=f"`{part}` .* lacks weights .* {len(lost)} tensors") as caught:
        load_prior(folder, num_steps=4)
    assert min(lost) in str(caught.value)


def ddpm(folder: Path) -> Path:
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(tiny.randomise(unet, 0), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


FAMILIES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "xl": (tiny.tiny_pipeline_xl, ("text_encoder", "text_encoder_2", "unet")),
    "sd3": (tiny.tiny_pipeline_sd3, ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")),
    "flux": (tiny.tiny_pipeline_flux, ("text_encoder", "text_encoder_2", "transformer", "vae")),
    "pixart": (tiny.tiny_pipeline_pixart, ("text_encoder", "transformer")),
    "ddpm": (ddpm, ("unet",)),
    "tiny": (lambda folder: tiny.tiny_pipeline(folder, kind="tiny"), ("vae",)),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_gap_in_any_part_of_any_family_is_refused_by_name(family: str, tmp_path: Path) -> None:
    make, parts = FAMILIES[family]
    folder = make(tmp_path / "whole")
    load_prior(folder, num_steps=2)
    for part in parts:
        (path,) = (folder / part).glob("*.safetensors")
        kept = load_file(path)
        lost = sorted(kept)[len(kept) // 2]
        save_file({k: v for k, v in kept.items() if k != lost}, path, metadata={"format": "pt"})
        with pytest.raises(PriorError, match=rf"`{part}` .*lacks weights.*1 tensors, .*{lost.split('.')[-1]}"):
            load_prior(folder, num_steps=2)
        path.write_bytes(path.read_bytes()[:999])
        with pytest.raises(PriorError, match=f"`{part}` .*damaged"):
            load_prior(folder, num_steps=2)
        save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"])
def test_a_part_without_its_configuration_is_not_made_of_defaults(file: str, folder: Path) -> None:
    (folder / file).unlink()
    with pytest.raises(PriorError, match=f"`{file.partition('/')[0]}`: .*missing or damaged"):
        load_prior(folder, num_steps=2)


def test_an_empty_scheduler_is_not_one_of_defaults(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(PriorError, match=r"`scheduler` .*names no class"):
        load_prior(folder, num_steps=2)


@pytest.mark.parametrize("part", list(FILES))
def test_unexpected_weights_are_refused_by_name(folder: Path, part: str) -> None:
    rewrite(folder, part, lambda tensors: tensors | {"lora_down.weight": torch.zeros(2)})
    with pytest.raises(PriorError, match=f"`{part}` .* no place for.*lora_down"):
        load_prior(folder, num_steps=4)


@pytest.mark.parametrize("part", list(FILES))
def test_weights_of_another_shape_are_refused(folder: Path, part: str) -> None:
    def reshape(tensors: Tensors) -> Tensors:
        return tensors | {min(tensors): torch.zeros(3, 3)}

    rewrite(folder, part, reshape)
    with pytest.raises(PriorError, match=f"`{part}`"):
        load_prior(folder, num_steps=4)


def test_names_of_older_releases_load_to_the_same_prior(whole: Path, folder: Path) -> None:
    """Published checkpoints: `text_model.` and a stored buffer, and the attention of old autoencoders."""

    def published(tensors: Tensors) -> Tensors:
        named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        return named | {"text_model.embeddings.position_ids": torch.arange(tiny.LENGTH)[None]}

    def deprecated(tensors: Tensors) -> Tensors:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for name, tensor in tensors.items():
            for new, was in old.items():
                name = name.replace(f".{new}.", f".{was}.")
            renamed[name] = tensor
        return renamed

    rewrite(folder, "text_encoder", published)
    rewrite(folder, "vae", deprecated)
    ours, theirs = load_prior(folder, num_steps=4), load_prior(whole, num_steps=4)
    torch.testing.assert_close(ours.encode(["a cat"]).embeds, theirs.encode(["a cat"]).embeds, rtol=0, atol=0)
    x = theirs.initial(1, seeded(0))
    torch.testing.assert_close(ours.decode(x), theirs.decode(x), rtol=0, atol=0)
    assert ours.fingerprint == theirs.fingerprint


def test_a_folder_of_another_variant_says_which(folder: Path) -> None:
    for part, file in FILES.items():
        path = folder / part / file
        path.rename(path.with_name(file.replace(".safetensors", ".fp16.safetensors")))
    with pytest.raises(PriorError, match="no weights of variant None; pass variant='fp16'"):
        load_prior(folder, num_steps=4)
    with pytest.raises(PriorError, match="no weights of variant 'bf16'; pass variant='fp16'"):
        load_prior(folder, num_steps=4, variant="bf16")
    assert load_prior(folder, num_steps=4, variant="fp16").num_steps == 4


def test_pickled_weights_are_refused(folder: Path) -> None:
    path = folder / "unet" / FILES["unet"]
    torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
    path.unlink()
    with pytest.raises(PriorError, match=r"only safetensors are loaded"):
        load_prior(folder, num_steps=4)


def test_a_missing_part_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(PriorError, match="`vae`"):
        load_prior(folder, num_steps=4)


@pytest.mark.parametrize(
    "name", ["StableDiffusionInpaintPipeline", "KandinskyPipeline", "StableCascadeDecoderPipeline"]
)
def test_another_kind_of_pipeline_is_called_what_it_is(folder: Path, name: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    with pytest.raises(PriorError, match=f"got {name} .*TorchPrior") as caught:
        load_prior(folder, num_steps=4)
    assert "flow" not in str(caught.value)


# ---------------------------------------------------------------- parts that do not fit


def test_an_autoencoder_of_other_channels_is_refused(folder: Path) -> None:
    pipe = load_pipeline(folder)
    pipe.vae = diffusers.AutoencoderKL(latent_channels=16, block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(PriorError, match="denoises 4 channels, the autoencoder decodes 16"):
        DiffusersPrior.from_pipeline(pipe, num_steps=4)


def test_a_flow_scheduler_under_a_network_that_predicts_noise_is_refused(folder: Path) -> None:
    pipe = load_pipeline(folder)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(PriorError, match="flow-matching scheduler, but this network predicts noise"):
        DiffusersPrior.from_pipeline(pipe, num_steps=4)


def write_lora(folder: Path, layers: dict[str, int]) -> Path:
    """A LoRA of rank 2 for square layers of these names and widths."""
    path, g = folder / "pytorch_lora_weights.safetensors", seeded(4)
    tensors = {}
    for layer, width in layers.items():
        tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(2, width, generator=g)
        tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(width, 2, generator=g)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_lora_is_loaded_or_refused(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    plain = load_prior(whole, num_steps=4)
    adapted = load_prior(whole, num_steps=4, lora=write_lora(tmp_path, {layer: 16}))
    x = plain.initial(1, seeded(0))
    a, b = (p.reverse(1, x, p.encode(["a cat"])).x0 for p in (plain, adapted))
    assert float((a - b).abs().max()) > 1e-4
    assert plain.fingerprint != adapted.fingerprint
    with pytest.raises(PriorError, match=r"made for (the same|another) base"):
        load_prior(whole, num_steps=4, lora=write_lora(tmp_path, {layer: 320}))
    with pytest.raises(PriorError, match=r"made for (the same|another) base"):
        load_prior(whole, num_steps=4, lora=write_lora(tmp_path, {"joint_blocks.0.attn.to_q": 16}))
    with pytest.raises(PriorError, match="LoRA at"):
        load_prior(whole, num_steps=4, lora=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "layers",
    [
        ["unet.down_blocks.2.attentions.1.transformer_blocks.3.attn1.to_q"],
        [f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 20)],
        ["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"],
    ],
    ids=["a deeper UNet", "a deeper text tower", "a second text tower"],
)
def test_a_lora_of_which_only_a_part_fits_is_refused(layers: list[str], whole: Path, tmp_path: Path) -> None:
    """Loaders leave out what has no place, and go on with the rest."""
    pytest.importorskip("peft")
    path = write_lora(tmp_path, {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 16})
    more = {
        f"{layer}.lora_{side}.weight": torch.zeros(shape)
        for layer in layers
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(load_file(path) | more, path, metadata={"format": "pt"})
    with pytest.raises(PriorError, match=f"another base model: of its {2 + 2 * len(layers)} matrices, 2 belong"):
        load_prior(whole, num_steps=4, lora=path)


def test_a_pipeline_that_takes_no_lora_says_so(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(PriorError, match="DDPMPipeline takes no LoRA"):
        load_prior(ddpm(tmp_path / "ddpm"), num_steps=4, lora=write_lora(tmp_path, {"conv_in": 8}))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vae", "has no autoencoder"),
        ("tokenizer", "has text_encoder and no tokenizer"),
        ("text_encoder", "expected a pipeline of Stable Diffusion"),
    ],
)
def test_a_pipeline_in_memory_without_a_part_is_refused(part: str, message: str, whole: Path) -> None:
    pipe = load_pipeline(whole)
    setattr(pipe, part, None)
    with pytest.raises(PriorError, match=message):
        DiffusersPrior.from_pipeline(pipe, num_steps=4)


def test_a_size_that_cannot_be_made_is_refused(whole: Path, tmp_path: Path) -> None:
    for wrong in (17, 16.0, True, "16", (16,), (16, 18), 0):
        with pytest.raises(PriorError, match="`size` must be positive multiples of 4"):
            load_prior(whole, num_steps=2, size=wrong)
    assert load_prior(whole, num_steps=2, size=(16, 24)).image_size == (16, 24)
    with pytest.raises(PriorError, match="32 pixels at most"):
        load_prior(tiny.tiny_pipeline_sd3(tmp_path / "sd3"), num_steps=2, size=64)


def test_pictures_of_another_size_are_of_another_prior(whole: Path) -> None:
    own, same, wide = (load_prior(whole, num_steps=2, size=size).fingerprint for size in (None, 16, (16, 24)))
    assert own == same != wide


# ---------------------------------------------------------------- levers


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder of the same latents."""
    folder = tmp_path_factory.mktemp("small")
    tiny.vae("tiny", seed=7).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "lever",
    [
        {"vae_slicing": True},
        {"offload": True},
        {"gradient_checkpointing": True},
        {"channels_last": True},
        {"tf32": True},
        {"size": 16},
    ],
    ids=lambda lever: next(iter(lever)),
)
def test_levers_that_must_not_change_results_do_not(whole: Path, lever: dict) -> None:
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        plain, lean = load_prior(whole, num_steps=4), load_prior(whole, num_steps=4, **lever)
        results = []
        for prior in (plain, lean):
            x = prior.initial(2, seeded(0)).requires_grad_(True)
            designs = prior.decode(prior.reverse(1, x, prior.encode(["a cat", "a dog"])).x0)
            results.append((designs.detach(), torch.autograd.grad(designs.square().sum(), x)[0]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def bytes_on(device: str, *modules: Any) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters() if p.device.type == device)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_what_drawing_does_not_need_takes_no_place_on_the_device(kind: str, tmp_path: Path) -> None:
    """The device is `meta`, where nothing is computed and every byte is counted."""
    folder = tiny.tiny_pipeline(tmp_path / kind, kind=kind)
    all_there, lean = (load_prior(folder, num_steps=4, device="meta", offload=offload) for offload in (False, True))
    vae, text = lean.vae, lean.denoiser.encoders
    idle = [vae.encoder, *text, *([vae.quant_conv] if kind == "kl" else [])]
    parts = [[prior.denoiser.network, prior.vae, *prior.denoiser.encoders] for prior in (all_there, lean)]
    saved = bytes_on("cpu", *idle)
    assert saved == bytes_on("cpu", *parts[1]) > 0
    assert bytes_on("meta", *parts[0]) - bytes_on("meta", *parts[1]) == saved
    x = lean.initial(1, seeded(0))
    decoded = lean.decode(lean.reverse(0, x, lean.encode(["a cat"])).x0)
    pictures = torch.rand(2, 3, *lean.image_size, generator=seeded(1))
    assert decoded.device.type == lean.encode_image(pictures).device.type == "meta"
    here, away = (load_prior(folder, num_steps=4, offload=offload) for offload in (False, True))
    torch.testing.assert_close(here.encode_image(pictures), away.encode_image(pictures), rtol=0, atol=0)


def test_compiling_replaces_what_is_called(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fake(network: Any) -> Callable[..., Any]:
        return lambda *args, **options: calls.append(1) or network(*args, **options)

    monkeypatch.setattr(torch, "compile", fake)
    prior = load_prior(whole, num_steps=4, compile=True)
    prior.reverse(0, prior.initial(1, seeded(0)), prior.encode(["a cat"]))
    assert calls == [1]


def test_tiling_is_handed_to_the_autoencoder(whole: Path) -> None:
    prior = load_prior(whole, num_steps=4, vae_tiling=True)
    assert prior.vae.use_tiling
    assert prior.decode(prior.initial(1, seeded(0))).shape == (1, 3, 16, 16)


def test_a_small_decoder_serves_every_look_but_the_last(whole: Path, small: Path) -> None:
    """The designs that come out are the true decoder's; the small one only bends the way there."""
    prior = load_prior(whole, num_steps=3, guidance_scale=1.0, guidance_decoder=small)
    x = prior.initial(2, seeded(0))
    assert prior.guidance_vae is not None
    assert not torch.allclose(prior.decode(x), prior.guidance_decode(x), atol=1e-2)
    calls: list[str] = []
    prior.vae.decoder.register_forward_hook(lambda *_: calls.append("true"))
    prior.guidance_vae.decoder.register_forward_hook(lambda *_: calls.append("small"))
    samples = DAS(tempering="none", gradient="full", potential_every=1, gradient_every=1).sample(
        prior,
        lambda designs, cond: designs.mean((1, 2, 3)),
        prior.encode(["a cat"]),
        num_particles=2,
        generators=[seeded(1)],
    )
    assert calls == ["small"] * 3 + ["true"]
    torch.testing.assert_close(samples.designs[0], prior.decode(samples.x0[0]), rtol=1e-5, atol=1e-6)


def test_a_decoder_that_does_not_fit_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match="folder of an AutoencoderTiny"):
        load_prior(whole, num_steps=3, guidance_decoder="taesd")
    wide = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    with pytest.raises(PriorError, match="2 pixels per latent, got one for 4 at 4"):
        load_prior(whole, num_steps=3, guidance_decoder=wide)


@pytest.mark.parametrize("decoder", [torch.nn.Conv2d(4, 3, 1), 3, lambda z: z])
def test_what_is_no_autoencoder_decodes_nothing(decoder: Any, whole: Path) -> None:
    with pytest.raises(PriorError, match="must be an AutoencoderTiny or the folder of one"):
        load_prior(whole, num_steps=3, guidance_decoder=decoder)


def test_a_model_over_pixels_needs_no_decoder(small: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match="over pixels"):
        load_prior(ddpm(tmp_path / "ddpm"), num_steps=3, guidance_decoder=small)
