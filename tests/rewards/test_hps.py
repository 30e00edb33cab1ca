"""HPS on a tiny model in OpenCLIP's layout, against a plain computation in float64 without transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.fakes.checkpoints import GRID, LAYERS, PATCH, WIDTH, open_clip_state, tiny_hps
from tests.fakes.tiny import LENGTH, tokenizer
from tiltopt.errors import RewardError
from tiltopt.rewards import make_reward, validate
from tiltopt.rewards.hps import HEADS
from tiltopt.vision import CLIP_MEAN, CLIP_STD

PROMPTS = ["a photo of a cat", "a dog", "two zebras in the rain"]


def transformer(s: dict[str, Tensor], prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Pre-norm residual blocks of x (n, tokens, width)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-5)

    for i in range(LAYERS):
        at = f"{prefix}transformer.resblocks.{i}"
        h = norm(f"{at}.ln_1", x)
        qkv = h @ s[f"{at}.attn.in_proj_weight"].T + s[f"{at}.attn.in_proj_bias"]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        x = x + linear(f"{at}.attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"{at}.mlp.c_proj", F.gelu(linear(f"{at}.mlp.c_fc", norm(f"{at}.ln_2", x))))
    return x


def reference(state: dict[str, Tensor], images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Cosine of each picture and its prompt, by the definitions of OpenCLIP; PIL resizes and pads the pictures."""
    s = {name: tensor.double() for name, tensor in state.items()}
    side, out = PATCH * GRID, []
    for image, prompt in zip(images, prompts, strict=True):
        scale = side / max(image.size)
        small = image.resize([round(scale * n) for n in image.size], Image.Resampling.BICUBIC)
        square = Image.new("RGB", (side, side))
        square.paste(small, ((side - small.size[0]) // 2, (side - small.size[1]) // 2))
        pixels = torch.from_numpy(np.asarray(square).copy()).double().permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
        pixels = (pixels - mean) / std
        patches = F.conv2d(pixels, s["visual.conv1.weight"], stride=PATCH).flatten(2).mT
        x = torch.cat([s["visual.class_embedding"].view(1, 1, -1), patches], dim=1) + s["visual.positional_embedding"]
        x = F.layer_norm(x, (WIDTH,), s["visual.ln_pre.weight"], s["visual.ln_pre.bias"], 1e-5)
        x = transformer(s, "visual.", x, None)[:, 0]
        x = F.layer_norm(x, (WIDTH,), s["visual.ln_post.weight"], s["visual.ln_post.bias"], 1e-5) @ s["visual.proj"]
        ids = tokenizer()(prompt)["input_ids"]  # start ... end, and nothing after the end can be seen from it
        t = s["token_embedding.weight"][ids][None] + s["positional_embedding"][: len(ids)]
        causal = torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
        t = transformer(s, "", t, causal)
        t = F.layer_norm(t, t.shape[-1:], s["ln_final.weight"], s["ln_final.bias"], 1e-5)[:, -1]
        t = t @ s["text_projection"]
        out.append(F.cosine_similarity(x, t).item())
    return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_hps(tmp_path_factory.mktemp("hps"))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize("size", [(32, 32), (80, 80), (96, 64), (40, 72)])
def test_it_is_the_cosine_by_the_definition_for_pictures_of_any_shape(parts: dict[str, str], size: tuple) -> None:
    images = pictures(size, size, size)
    got = make_reward("hps", **parts)(images, PROMPTS)
    expected = reference(open_clip_state(), images, PROMPTS)
    rounding = 2e-5 if size == (32, 32) else 5e-3  # PIL rounds what it resizes to 8 bits
    assert got == pytest.approx(expected, abs=rounding)
    assert np.std(expected) > 0.02  # so that agreement means something
    assert make_reward("hps", scale=100.0, **parts)(images, PROMPTS) == pytest.approx([100 * v for v in got], rel=1e-9)


def test_weights_alone_in_the_file_and_in_safetensors_load_too(parts: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    images, state = pictures((32, 32)), open_clip_state()
    torch.save(state | {"attn_mask": torch.zeros(LENGTH, LENGTH)}, tmp_path / "bare.pt")
    save_file(state, tmp_path / "bare.safetensors")
    expected = make_reward("hps", **parts)(images, PROMPTS[:1])
    for name in ("bare.pt", "bare.safetensors"):
        assert make_reward("hps", **(parts | {"checkpoint": str(tmp_path / name)}))(images, PROMPTS[:1]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.proj"), "1 are missing.*visual_projection"),
        (lambda s: s.pop("visual.conv1.weight"), r"lacks 'visual\.conv1\.weight'; give HPS_v2"),
        (lambda s: s.update({"visual.conv1.weight": torch.zeros(3)}), r"other shapes \(not enough values.*give HPS_v2"),
        (
            lambda s: s.update({"visual.conv1.weight": torch.zeros(28, 3, 8, 8)}),
            "a width of 28 is no multiple of 16 heads",
        ),
        (lambda s: s.update({"score_head.weight": torch.zeros(3)}), "1 are strange .first score_head"),
        (lambda s: s.update({"visual.ln_pre.weight": torch.zeros(3)}), r"pre_layrnorm\.weight of shape \(32,\)"),
    ],
)
def test_another_checkpoint_is_named(parts: dict[str, str], tmp_path: Path, change, message: str) -> None:
    state = open_clip_state()
    change(state)
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=message):
        make_reward("hps", **(parts | {"checkpoint": str(tmp_path / "other.pt")}))


def test_the_tokenizer_of_a_larger_model_is_refused(parts: dict[str, str], tmp_path: Path) -> None:
    state = open_clip_state()
    torch.save(state | {"token_embedding.weight": state["token_embedding.weight"][:-5]}, tmp_path / "small.pt")
    with pytest.raises(RewardError, match=r"`tokenizer`: expected at most the .* tokens"):
        make_reward("hps", **(parts | {"checkpoint": str(tmp_path / "small.pt")}))


def test_missing_parts_are_named_before_anything_is_loaded(parts: dict[str, str], tmp_path: Path) -> None:
    for options, message in (
        ({"checkpoint": str(tmp_path / "no.pt")}, "`checkpoint`.*does not exist"),
        ({"tokenizer": str(tmp_path)}, "`tokenizer`.*no tokenizer_config.json"),
        ({"scale": "100"}, "`reward.scale`: expected float"),
    ):
        with pytest.raises(RewardError, match=message):
            validate("hps", parts | options)
    validate("hps", {})  # the published parts, by name


def test_a_picture_without_a_prompt_is_refused(parts: dict[str, str]) -> None:
    with pytest.raises(RewardError, match=r"`hps`.*picture 2 of 2 has none"):
        make_reward("hps", **parts)(pictures((32, 32), (32, 32)), ["a cat", " "])
