"""A planted reward for benchmarks: a nonlinear function in the feature space of a fixed random network.

No surrogate here sees that feature space, so nothing can win by sharing it with the reward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from tiltopt.rewards.base import Options, Score, require

CHANNELS = (3, 24, 48, 96)
SIDE = 64


@dataclass(frozen=True, kw_only=True)
class PlantedOptions(Options):
    """Args:
    seed: of the network and the reward planted in it, at least 0.
    hidden: nonlinear units of the reward, at least 1.
    """

    seed: int = 0
    hidden: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seed >= 0, f"`seed` must be at least 0, got {self.seed}; change it.")
        require(self.hidden >= 1, f"`hidden` must be at least 1, got {self.hidden}; change it.")


def textures(n: int, generator: Generator) -> Tensor:
    """n smooth random colour fields (n, 3, 64, 64) in (0, 1): noise of five scales, coarse ones strongest."""
    field = torch.zeros(n, 3, SIDE, SIDE)
    for side in (2, 4, 8, 16, 32):
        noise = torch.randn(n, 3, side, side, generator=generator)
        field += 2.0 / side**0.5 * F.interpolate(noise, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return torch.sigmoid(field)


def build_score(options: PlantedOptions) -> Score:
    """score = a · tanh(V z) after standardisation; z are the standardised features of a random network.

    Features: three strided convolutions with GELU, mean and standard deviation of each channel over the image. Both
    standardisations are over 256 fixed random textures, on which the score has mean 0 and standard deviation 1.
    """
    generator = torch.Generator().manual_seed(options.seed)
    kernels = [
        torch.randn(out, into, 5, 5, generator=generator) * (2.0 / (25 * into)) ** 0.5
        for into, out in itertools.pairwise(CHANNELS)
    ]
    inner = torch.randn(2 * CHANNELS[-1], options.hidden, generator=generator) * (2.0 / (2 * CHANNELS[-1]) ** 0.5)
    outer = torch.randn(options.hidden, generator=generator)

    def features(designs: Tensor) -> Tensor:
        x = F.interpolate(designs.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        x = 4 * (x - 0.5)
        for kernel in kernels:
            x = F.gelu(F.conv2d(x, kernel.to(x.device), stride=2, padding=2))
        flat = x.flatten(2)
        return torch.cat([flat.mean(-1), (flat.var(-1, correction=0) + 1e-8).sqrt()], dim=-1)

    reference = features(textures(256, generator))
    centre, spread = reference.mean(0), reference.std(0)

    def raw(designs: Tensor) -> Tensor:
        z = (features(designs) - centre.to(designs.device)) / spread.to(designs.device)
        return torch.tanh(z @ inner.to(z.device)) @ outer.to(z.device)

    at_reference = torch.tanh((reference - centre) / spread @ inner) @ outer
    shift, scale = at_reference.mean().item(), at_reference.std().item()

    def score(designs: Tensor, prompts: Sequence[str]) -> Tensor:
        return (raw(designs) - shift) / scale

    return score
