"""Small tensor functions that a latent diffusion prior is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiltopt.errors import PriorError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def torch_dtype(name: str, key: str = "dtype") -> torch.dtype:
    """The precision called `name`; `key` is the setting that a PriorError blames."""
    if name not in DTYPES:
        raise PriorError(f"`{key}` must be one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


class StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] in value, identity in gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def zip_map(fn: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    """`fn` on two tensors, or on the entries of two dicts of tensors with equal keys."""
    return {k: fn(a[k], b[k]) for k in a} if isinstance(a, dict) else fn(a, b)


def guidance_embedding(scale: float, width: int, like: Tensor) -> Tensor:
    """How a distilled UNet (LCM) is told its guidance scale: sinusoids of 1000 (scale - 1), (len(like), width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=like.device))
    angles = 1000.0 * (scale - 1.0) * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2)).expand(len(like), width)
