"""ImageReward on a tiny model in its authors' layout, against a plain computation in float64 without transformers."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.fakes.checkpoints import GRID, LAYERS, PATCH, WORDS, image_reward_state, tiny_image_reward
from tiltopt.errors import RewardError
from tiltopt.rewards import make_reward, validate
from tiltopt.rewards.image_reward import MAX_TOKENS, MEAN, STD, TEXT_HEADS, VISION_HEADS
from tiltopt.vision import CLIP_MEAN, CLIP_STD

PROMPTS = ["a photo of a cat", "zebras", "two zebras in the rain"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of q (n, width) to k, v (m, width)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)


def reference(state: dict[str, Tensor], images: list[Image.Image], prompts: list[str]) -> list[float]:
    """The reward of pictures that need no resizing, by the authors' definitions, one at a time."""
    s = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    out = []
    for image, prompt in zip(images, prompts, strict=True):
        mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
        pixels = (torch.from_numpy(np.asarray(image).copy()).double().permute(2, 0, 1) / 255 - mean) / std
        at = "blip.visual_encoder"
        kernel, bias = s[f"{at}.patch_embed.proj.weight"], s[f"{at}.patch_embed.proj.bias"]
        patches = F.conv2d(pixels[None], kernel, bias, stride=PATCH)[0].flatten(1).T
        x = torch.cat([s[f"{at}.cls_token"][0], patches]) + s[f"{at}.pos_embed"][0]
        for i in range(LAYERS):
            b = f"{at}.blocks.{i}"
            qkv = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + linear(f"{b}.attn.proj", attend(*qkv, VISION_HEADS))
            x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
        x = norm(f"{at}.norm", x, 1e-6)
        at = "blip.text_encoder"
        ids = [WORDS.index(word) for word in ["[CLS]", *prompt.split(), "[SEP]"]]
        h = s[f"{at}.embeddings.word_embeddings.weight"][ids]
        h = norm(f"{at}.embeddings.LayerNorm", h + s[f"{at}.embeddings.position_embeddings.weight"][: len(ids)], 1e-12)
        for i in range(LAYERS):
            b = f"{at}.encoder.layer.{i}"
            for kind, other in (("attention", None), ("crossattention", x)):
                source = h if other is None else other
                parts = (
                    linear(f"{b}.{kind}.self.query", h),
                    *(linear(f"{b}.{kind}.self.{p}", source) for p in ("key", "value")),
                )
                said = linear(f"{b}.{kind}.output.dense", attend(*parts, TEXT_HEADS))
                h = norm(f"{b}.{kind}.output.LayerNorm", h + said, 1e-12)
            said = linear(f"{b}.output.dense", F.gelu(linear(f"{b}.intermediate.dense", h)))
            h = norm(f"{b}.output.LayerNorm", h + said, 1e-12)
        value = h[0]
        for n in (0, 2, 4, 6, 7):
            value = linear(f"mlp.layers.{n}", value)
        out.append((value.item() - MEAN) / STD)
    return out


def pictures(n: int, side: int = PATCH * GRID) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny_image_reward(tmp_path_factory.mktemp("image_reward"))


def test_it_is_the_published_computation_for_prompts_of_any_length_together(parts: dict[str, str]) -> None:
    images = pictures(3)
    got = make_reward("image_reward", **parts)(images, PROMPTS)
    expected = reference(image_reward_state(), images, PROMPTS)
    assert got == pytest.approx(expected, abs=3e-5 * max(1.0, max(map(abs, expected))))
    assert np.std(expected) > 0.1  # so that agreement means something
    swapped = make_reward("image_reward", **parts)(images, PROMPTS[::-1])
    assert swapped[0] != pytest.approx(got[0], abs=1e-3)  # the prompt matters


def test_a_prompt_is_cut_at_35_tokens(parts: dict[str, str]) -> None:
    box, image = make_reward("image_reward", **parts), pictures(1)
    words = ["zebras"] * 60
    fits = " ".join(words[: MAX_TOKENS - 2])
    assert box(image, [" ".join(words)]) == box(image, [fits])
    assert box(image, [" ".join(words[: MAX_TOKENS - 3])]) != box(image, [fits])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blip.visual_encoder.norm.bias"), "BlipVisionModel.*1 are missing .first post_layernorm.bias"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "lacks 'pos_embed'; give ImageReward.pt"),
        (lambda s: s.update({"blip.visual_encoder.pos_embed": torch.zeros(3)}), "other shapes .*give ImageReward.pt"),
        (
            lambda s: s.update({"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(14, 20)}),
            "a width of 20 is no multiple of 12 heads",
        ),
        (lambda s: s.update({"visual.proj": torch.zeros(2)}), r"named blip\.visual_encoder.*got 'visual\.proj'"),
        (lambda s: s.pop("mlp.layers.4.bias"), "incomplete"),
        (lambda s: s.update({"mlp.layers.0.weight": torch.zeros(16, 9)}), "expects 9 numbers.*text tower gives 24"),
    ],
)
def test_another_checkpoint_is_named(parts: dict[str, str], tmp_path: Path, change: Callable, message: str) -> None:
    state = image_reward_state()
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=message):
        make_reward("image_reward", **(parts | {"checkpoint": str(tmp_path / "other.pt")}))


def test_missing_parts_are_named_before_anything_is_loaded(parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"`checkpoint`.*does not exist"):
        validate("image_reward", parts | {"checkpoint": str(tmp_path / "no.pt")})
    with pytest.raises(RewardError, match=r"`tokenizer`.*no tokenizer_config\.json"):
        validate("image_reward", parts | {"tokenizer": str(tmp_path)})
    validate("image_reward", {})  # the published parts, by name


def test_a_transformers_without_blip_is_named(parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertTokenizer

    old: Any = types.ModuleType("transformers")
    old.__version__, old.BertTokenizer = "4.0", BertTokenizer
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(RewardError, match=r"versions from 4\.26 on have and version 4\.0 has not"):
        make_reward("image_reward", **parts)
