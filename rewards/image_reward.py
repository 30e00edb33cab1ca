"""ImageReward: a BLIP that reads the prompt while looking at the picture, and a head taught by people's choices.

The published checkpoint is loaded into transformers' own BLIP. Sizes are read from the tensors, so that a small model
of the same layout loads as well; the numbers of heads are not in them: 16 in the image tower, 12 in the text tower.

Source: Xu et al. 2023, "ImageReward", arXiv 2304.05977; https://huggingface.co/THUDM/ImageReward.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltopt.errors import RewardError
from tiltopt.rewards.aesthetic import Head, collapse, linear_layers
from tiltopt.rewards.base import Score, check_prompts
from tiltopt.rewards.clip_score import ModelOptions, check_folder
from tiltopt.rewards.weights import (
    build,
    check_file,
    check_heads,
    check_words,
    count,
    load_tokenizer,
    misfit,
    read_tensors,
)
from tiltopt.vision import Preprocess, check_images

VISION_HEADS, TEXT_HEADS = 16, 12
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the published training set; values are given in these standard deviations."""

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
UNUSED = ("blip.vision_proj.", "blip.text_proj.", f"{TEXT}embeddings.position_ids")
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm1\.", ".layer_norm1."),
    (r"\.norm2\.", ".layer_norm2."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
"""Names in the image tower of BLIP's authors -> names in transformers; those of the text tower are the same."""


@dataclass(frozen=True, kw_only=True)
class ImageRewardOptions(ModelOptions):
    """Args:
    checkpoint: a local file of ImageReward's weights, or owner/repository/file on the hub.
    tokenizer: a folder or hub id with BERT's uncased tokenizer.
    """

    checkpoint: str = "THUDM/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("checkpoint", self.checkpoint)
        check_folder(
            "tokenizer", self.tokenizer, "tokenizer_config.json", "a folder saved by BertTokenizer.save_pretrained"
        )


def build_score(options: ImageRewardOptions) -> Score:
    """score(designs, prompts) = (head(h) - mean) / std, h the state of the first token of the prompt, which has looked
    at the picture; differentiable in the designs.

    Raises:
        RewardError: checkpoint or tokenizer does not load, or the file holds another model.
    """
    from transformers import BertTokenizer

    vision, text, head = load(options.checkpoint)
    tokenizer = load_tokenizer(BertTokenizer, options.tokenizer)
    check_words(tokenizer, text.config.vocab_size, options.checkpoint)
    device, dtype = options.place()
    for model in (vision, text):
        model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    size = vision.config.image_size
    preprocess = Preprocess(size, (size, size))
    weight, bias = head.weight.to(device), head.bias.to(device)

    @functools.lru_cache(maxsize=4096)
    def tokens(prompt: str) -> tuple[int, ...]:
        return tuple(tokenizer(prompt, truncation=True, max_length=MAX_TOKENS)["input_ids"])

    def score(designs: Tensor, prompts: Sequence[str]) -> Tensor:
        check_prompts("image_reward", prompts)
        check_images(designs)
        pixels = preprocess(designs.to(device=device, dtype=torch.float32)).to(dtype)
        seen = vision(pixel_values=pixels).last_hidden_state
        ids = [tokens(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        padded = [[*each, *[tokenizer.pad_token_id] * (longest - len(each))] for each in ids]
        mask = [[1] * len(each) + [0] * (longest - len(each)) for each in ids]
        read = text(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        )
        return (read.last_hidden_state[:, 0].double() @ weight + bias - MEAN) / STD

    return score


def load(checkpoint: str) -> tuple[Any, Any, Head]:
    """The image tower, the text tower that looks at it, and the head, of a checkpoint.

    Raises:
        RewardError: it does not load, holds another model, or transformers has no BLIP.
    """
    try:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    except ImportError as error:
        import transformers

        raise RewardError(
            "reward `image_reward` needs the BLIP of transformers, which versions from 4.26 on have and version "
            f"{transformers.__version__} has not ({error}); install another."
        ) from error
    state, source = read_tensors("checkpoint", checkpoint)
    parts: dict[str, dict[str, Tensor]] = {VISION: {}, TEXT: {}, HEAD: {}}
    for name, tensor in state.items():
        prefix = next((p for p in parts if name.startswith(p)), None)
        if name.startswith(UNUSED):
            continue
        if prefix is None:
            raise RewardError(
                f"`checkpoint`: expected tensors named {', '.join(f'{p}…' for p in parts)} in {source}, got {name!r}; "
                "give ImageReward.pt."
            )
        parts[prefix][name.removeprefix(prefix)] = tensor
    seen, read = parts[VISION], parts[TEXT]
    try:
        width, _, patch, _ = seen["patch_embed.proj.weight"].shape
        vision_config = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(seen["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=count(seen, "blocks.N."),
            num_attention_heads=VISION_HEADS,
            image_size=patch * math.isqrt(seen["pos_embed"].shape[1] - 1),
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        vocabulary, text_width = read["embeddings.word_embeddings.weight"].shape
        text_config = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(read["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=count(read, "encoder.layer.N."),
            num_attention_heads=TEXT_HEADS,
            max_position_embeddings=len(read["embeddings.position_embeddings.weight"]),
        )
        check_heads({width: VISION_HEADS, text_width: TEXT_HEADS})
    except (KeyError, ValueError, IndexError) as error:
        raise misfit("checkpoint", source, "ImageReward's weights", "ImageReward.pt", error) from error
    vision = build("checkpoint", source, BlipVisionModel, vision_config, _renamed(seen))
    text = build("checkpoint", source, BlipTextModel, text_config, read, add_pooling_layer=False)
    head = collapse("checkpoint", linear_layers("checkpoint", parts[HEAD], source), source)
    if len(head.weight) != text_width:
        raise RewardError(
            f"`checkpoint`: the head in {source} expects {len(head.weight)} numbers, but the text tower gives "
            f"{text_width}; give ImageReward.pt."
        )
    return vision, text, head


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors under their names in transformers."""
    out = {}
    for name, tensor in state.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out
