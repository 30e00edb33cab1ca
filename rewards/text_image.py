"""How well an image fits its prompt: CLIP score and PickScore."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltopt.rewards.base import Score
from tiltopt.rewards.towers import TowerOptions


@dataclass(frozen=True, kw_only=True)
class ClipOptions(TowerOptions):
    """Args:
    clip: the CLIP model.
    scale: multiplies the cosine; 20 is the unit in which the published price α = 0.01 is stated.
    """

    clip: str = "openai/clip-vit-large-patch14"
    scale: float = 20.0


@dataclass(frozen=True, kw_only=True)
class PickOptions(TowerOptions):
    """Args:
    clip: a `CLIPModel` fine-tuned on human preferences (PickScore, arXiv 2305.01569).
    scale: multiplies the cosine; 1 is the unit of the published α = 0.0001, 100 gives the usual 20-odd points.
    """

    clip: str = "yuvalkirstain/PickScore_v1"
    scale: float = 1.0


def build_score(options: ClipOptions | PickOptions) -> Score:
    """score(designs, prompts) = scale · cos(image embedding, text embedding); differentiable in the designs."""
    tower = options.load()

    @functools.lru_cache(maxsize=4096)
    def text(prompt: str) -> Tensor:
        return F.normalize(tower.text([prompt])[0].double(), dim=-1)

    def score(designs: Tensor, prompts: Sequence[str]) -> Tensor:
        image = F.normalize(tower(designs).projection.double(), dim=-1)
        texts = torch.stack([text(prompt) for prompt in prompts]).to(image.device)
        return options.scale * (image * texts).sum(-1)

    return score
