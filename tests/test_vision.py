"""The CLIP tower: same embeddings as the reference processor on PIL images, gradients, and clear refusals."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tiltopt.errors import ConfigError, PotentialError
from tiltopt.vision import CLIPVision, Preprocess

SIZE = 32


def _vocabulary() -> tuple[dict[str, int], str]:
    """A byte-level vocabulary without merges, in the format of CLIP's tokenizer."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    symbols = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return {s: i for i, s in enumerate(symbols)}, "#version: 0.2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel folder with random weights from a seeded generator, a preprocessor file and a tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    vocab, merges = _vocabulary()
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    text = {"vocab_size": len(vocab), "max_position_embeddings": 12, "bos_token_id": bos, "eos_token_id": eos}
    config = CLIPConfig(
        text_config={**common, **text, "pad_token_id": eos},
        vision_config={**common, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel()))
            elif name.endswith("weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    size = {"shortest_edge": SIZE}
    crop = {"height": SIZE, "width": SIZE}
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    settings = {"size": size, "crop_size": crop, "image_mean": mean, "image_std": std, "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text(merges)
    return path


@pytest.fixture(scope="module")
def tower(folder: Path) -> CLIPVision:
    return CLIPVision.load(folder)


def _picture(height: int, width: int, seed: int) -> Tensor:
    """A smooth picture with some grain, (3, H, W) uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return ((smooth + 0.1 * torch.randn(3, height, width, generator=g)).clamp(0, 1) * 255).round().to(torch.uint8)


def _pil_processor(folder: Path):
    try:  # transformers 5 keeps the PIL path in a module of its own; the default one needs torchvision
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 64), (100, 140), (140, 100), (512, 512), (24, 24), (65, 97)])
def test_same_embedding_as_the_processor_on_pil_images(folder: Path, tower: CLIPVision, size: tuple[int, int]) -> None:
    picture = _picture(*size, seed=1)
    pil = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pixels = torch.as_tensor(np.asarray(_pil_processor(folder)([pil], return_tensors="np")["pixel_values"]))
    out = tower(picture[None].float() / 255)
    reference = tower.model.get_image_features(pixel_values=pixels)
    reference = getattr(reference, "pooler_output", reference)
    patches = tower.model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    hidden, spread = patches.mean(1), patches.std(1, correction=0)
    assert torch.cosine_similarity(out.projection, reference).item() > 1 - 1e-3
    assert torch.cosine_similarity(out.patch_mean, hidden).item() > 1 - 1e-3
    assert torch.cosine_similarity(out.patch_std, spread).item() > 1 - 1e-3
    # the mean pixel difference is bounded by rounding to 8 bits, once, in units of the smallest std
    assert (tower.preprocess(picture[None].float() / 255) - pixels).abs().mean() < 1 / 255 / 0.2


def test_gradient_agrees_with_finite_differences(tower: CLIPVision) -> None:
    images = (_picture(40, 48, seed=2)[None].float() / 255 * 0.8 + 0.1).requires_grad_(True)
    probe = torch.randn(tower.hidden_dim, generator=torch.Generator().manual_seed(3))
    (tower(images).patch_mean @ probe).sum().backward()
    direction = images.grad / images.grad.norm()  # the steepest direction, so that rounding is small beside the slope
    exact = images.grad.norm().item()
    eps = 1e-2
    with torch.no_grad():
        up, down = ((tower(images + s * eps * direction).patch_mean @ probe).sum().item() for s in (1, -1))
    assert (up - down) / (2 * eps) == pytest.approx(exact, rel=2e-2)
    assert all(not p.requires_grad for p in tower.model.parameters())


def test_rows_are_independent_and_shapes_are_as_documented(tower: CLIPVision) -> None:
    images = torch.stack([_picture(40, 40, seed=s) for s in range(3)]).float() / 255
    out = tower(images)
    assert out.projection.shape == (3, tower.projection_dim)
    assert out.patch_mean.shape == (3, tower.hidden_dim)
    alone = torch.cat([tower(images[i : i + 1]).patch_mean for i in range(3)])
    torch.testing.assert_close(alone, out.patch_mean, rtol=1e-4, atol=1e-5)


def test_text_equals_the_model_own_text_features(tower: CLIPVision) -> None:
    prompts = ["a cat", "the quick fox"]
    got = tower.text(prompts)
    assert got.shape == (2, tower.projection_dim)
    alone = torch.cat([tower.text([p]) for p in prompts])  # padding must not leak into the embedding
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got[0], got[1])
    assert tower.text(["word " * 40]).shape == (1, tower.projection_dim)  # longer than the context: cut
    with pytest.raises(TypeError, match="wrap it in a list"):
        tower.text("a cat")


def test_the_text_tower_takes_no_place_on_the_device(folder: Path, tower: CLIPVision) -> None:
    from transformers import CLIPModel

    moved = CLIPVision(CLIPModel.from_pretrained(folder), tower.preprocess, str(folder)).to("meta", torch.float32)
    there = {name.split(".")[0] for name, p in moved.model.named_parameters() if p.device.type == "meta"}
    assert there == {"vision_model", "visual_projection"}
    assert moved.device.type == moved.text(["a cat"]).device.type == "meta"
    assert moved(torch.rand(1, 3, SIZE, SIZE)).projection.device.type == "meta"


def test_id_names_the_weights(folder: Path, tower: CLIPVision) -> None:
    assert CLIPVision.load(folder, dtype=torch.float16).id == tower.id
    other = copy.deepcopy(tower)
    del other.id
    with torch.no_grad():
        other.model.visual_projection.weight[0, 0] += 1e-3
    assert other.id != tower.id
    assert tower.id.startswith("clip-")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 32, 32) * 2 - 1, r"\[0, 1\].*decode"),
        (torch.full((1, 3, 32, 32), 255.0), r"got \[255, 255\]"),
        (torch.full((1, 3, 32, 32), math.nan), "nan"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "divide 8-bit"),
        (torch.zeros(3, 32, 32), r"\(n, 3, H, W\)"),
        (torch.zeros(1, 4, 32, 32), r"\(1, 4, 32, 32\)"),
    ],
)
def test_refuses_what_is_not_an_image_batch(tower: CLIPVision, images: Tensor, message: str) -> None:
    with pytest.raises(PotentialError, match=message):
        tower(images)


def test_bad_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        CLIPVision.load(tmp_path / "nowhere")
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    state = load_file(broken / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"visual_projection\.weight"):
        CLIPVision.load(broken)
    more = {**load_file(folder / "model.safetensors"), "vision_model.encoder.layers.7.mlp.fc1.bias": torch.zeros(32)}
    save_file(more, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors have no place.*layers\.7"):
        CLIPVision.load(broken)
    other = {**load_file(folder / "model.safetensors"), "visual_projection.weight": torch.zeros(3, 3)}
    save_file(other, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no CLIP model"):
        CLIPVision.load(broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    with pytest.raises(ConfigError, match="no CLIP model"):
        CLIPVision.load(broken)
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    (wrong / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is damaged"):
        CLIPVision.load(wrong)
    (wrong / "preprocessor_config.json").write_text(json.dumps({"size": 16, "crop_size": 16}))
    with pytest.raises(ConfigError, match="16 x 16"):
        CLIPVision.load(wrong)


def test_folder_without_preprocessor_uses_clip_defaults(folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "preprocessor_config.json").unlink()
    assert CLIPVision.load(bare).preprocess.crop == (SIZE, SIZE)


def test_preprocess_variants() -> None:
    image = torch.rand(1, 3, 40, 20, generator=torch.Generator().manual_seed(0))
    settings = {"do_resize": True, "size": {"height": 8, "width": 6}, "do_center_crop": False, "do_normalize": False}
    out = Preprocess.from_config(settings, 32)(image)
    assert out.shape == (1, 3, 8, 6)
    assert out.min() >= 0
    assert out.max() <= 1
    padded = Preprocess(None, (44, 20), (0, 0, 0), (1, 1, 1))(image)
    torch.testing.assert_close(padded[..., 2:42, :], image)
    assert padded[..., :2, :].abs().max() == 0


def test_one_that_is_held_is_loaded_once(folder: Path) -> None:
    first = CLIPVision.load(folder)
    assert CLIPVision.load(str(folder)) is first
    half = CLIPVision.load(folder, dtype=torch.bfloat16)
    assert half is not first
    assert half.id == first.id  # the weights as stored
    assert half(torch.full((2, 3, SIZE, SIZE), 0.5)).projection.dtype == torch.float32
