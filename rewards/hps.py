"""Human Preference Score v2.1: the cosine of picture and prompt in a CLIP ViT-H/14 taught by people's choices.

The published checkpoint is a state dict of OpenCLIP; it is renamed into a `transformers.CLIPModel` here. The sizes are
read from the tensors, so that a small model of the same layout loads as well; the number of heads is not in them: 16 in
both towers.

Source: Wu et al. 2023, "Human Preference Score v2", arXiv 2306.09341; https://huggingface.co/xswu/HPSv2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tiltopt.rewards.base import Score
from tiltopt.rewards.clip_score import ModelOptions, check_folder, cosine
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
from tiltopt.vision import CLIPVision, Preprocess

HEADS = 16
RENAMED = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
)
"""Names in OpenCLIP -> names in transformers; applied one after the other."""


@dataclass(frozen=True, kw_only=True)
class HpsOptions(ModelOptions):
    """Args:
    checkpoint: a local file of OpenCLIP weights, or owner/repository/file on the hub.
    tokenizer: a folder or hub id with the `CLIPTokenizer` that the model was taught with.
    scale: multiplies the cosine; 100 gives the usual 20-odd points.
    """

    checkpoint: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("checkpoint", self.checkpoint)
        check_folder(
            "tokenizer", self.tokenizer, "tokenizer_config.json", "a folder saved by CLIPTokenizer.save_pretrained"
        )


def build_score(options: HpsOptions) -> Score:
    """score(designs, prompts) = scale · cos(image, text); the whole picture is seen, between black bars if not square.

    Raises:
        RewardError: checkpoint or tokenizer does not load, or the file holds another model.
    """
    from transformers import CLIPTokenizer

    tokenizer = load_tokenizer(CLIPTokenizer, options.tokenizer)
    model = from_open_clip(*read_tensors("checkpoint", options.checkpoint), tokenizer.eos_token_id)
    check_words(tokenizer, model.config.text_config.vocab_size, options.checkpoint)
    size = model.config.vision_config.image_size
    device, dtype = options.place()
    preprocess = Preprocess(size, (size, size), edge="longest")
    tower = CLIPVision(model, preprocess, options.checkpoint, tokenizer).to(device, dtype)
    return cosine("hps", tower, options.scale)


def from_open_clip(state: Mapping[str, Tensor], source: str, end: int) -> Any:
    """The `transformers.CLIPModel` of an OpenCLIP state dict with a vision transformer and GELU.

    Args:
        source: where the tensors come from, for messages.
        end: the token at which the embedding of a prompt is read off.

    Raises:
        RewardError: another model.
    """
    from transformers import CLIPConfig, CLIPModel

    state = {name: tensor for name, tensor in state.items() if name != "attn_mask"}
    try:
        positions, _ = state["visual.positional_embedding"].shape
        width, _, patch, _ = state["visual.conv1.weight"].shape
        context, text_width = state["positional_embedding"].shape
        projection = state["text_projection"].shape[1]
        check_heads({width: HEADS, text_width: HEADS})
        config = CLIPConfig(
            vision_config={
                "hidden_size": width,
                "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
                "num_hidden_layers": count(state, "visual.transformer.resblocks.N."),
                "num_attention_heads": HEADS,
                "image_size": patch * math.isqrt(positions - 1),
                "patch_size": patch,
                "projection_dim": projection,
                "hidden_act": "gelu",
            },
            text_config={
                "vocab_size": len(state["token_embedding.weight"]),
                "hidden_size": text_width,
                "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
                "num_hidden_layers": count(state, "transformer.resblocks.N."),
                "num_attention_heads": HEADS,
                "max_position_embeddings": context,
                "projection_dim": projection,
                "hidden_act": "gelu",
                "eos_token_id": end,
            },
            projection_dim=projection,
        )
    except (KeyError, ValueError, IndexError) as error:
        expected = "the state dict of an OpenCLIP vision transformer"
        raise misfit("checkpoint", source, expected, "HPS_v2.1_compressed.pt", error) from error
    return build("checkpoint", source, CLIPModel, config, _renamed(state))


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names in transformers; the joint input projections of attention are cut in three."""
    out = {}
    for name, tensor in state.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if match := re.fullmatch(r"(.*self_attn\.)in_proj_(weight|bias)", name):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{match[1]}{part}_proj.{match[2]}"] = third
        elif name in ("visual.proj", "text_projection"):
            out["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = tensor.T
        else:
            out[name] = tensor
    return out
