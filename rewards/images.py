"""Rewards computed from the pixels alone: file size, colourfulness, left-right symmetry."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltopt.errors import RewardError
from tiltopt.rewards.base import FunctionReward, Options, Score, require


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; transparency is laid over black, as PIL does.

    Raises:
        RewardError: not a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise RewardError(
            f"a reward expects PIL images, got {type(image).__name__}; convert arrays with PIL.Image.fromarray."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(images: Sequence[Image.Image], dtype: torch.dtype = torch.float32) -> Tensor:
    """n images of one size -> (n, 3, H, W) in [0, 1], 8-bit value / 255."""
    arrays = np.stack([np.asarray(to_rgb(image)) for image in images])
    return torch.from_numpy(arrays.copy()).permute(0, 3, 1, 2).to(dtype) / 255


@dataclass(frozen=True, kw_only=True)
class JpegOptions(Options):
    """Args:
    quality: JPEG quality of PIL's encoder, 1 to 100.
    """

    quality: int = 95

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.quality <= 100, f"`quality` must be 1 to 100, got {self.quality}; the usual value is 95.")


def jpeg_kilobytes(image: Image.Image, quality: int = 95) -> float:
    """Size of the image as a JPEG file, in kilobytes of 1000 bytes (the measure of DDPO, arXiv 2305.13301)."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue()) / 1000


def build_compressibility(options: JpegOptions) -> FunctionReward:
    """Minus the JPEG size in kB: small files score high."""
    return FunctionReward(
        "jpeg_compressibility",
        "kB",
        options.batch_size,
        lambda images, prompts: [-jpeg_kilobytes(image, options.quality) for image in images],
    )


def build_incompressibility(options: JpegOptions) -> FunctionReward:
    """The JPEG size in kB: large files score high."""
    return FunctionReward(
        "jpeg_incompressibility",
        "kB",
        options.batch_size,
        lambda images, prompts: [jpeg_kilobytes(image, options.quality) for image in images],
    )


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 rather than infinite."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def colorfulness(designs: Tensor) -> Tensor:
    """How colourful, differentiable in the designs.

    With rg = R − G, yb = (R + G)/2 − B on the 0..255 scale: sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²).

    Args:
        designs: (n, 3, H, W) in [0, 1].

    Returns:
        (n,), 0 for grey images, about 109 for what people call extremely colourful.

    Source: Hasler and Süsstrunk, Measuring colourfulness in natural images, 2003, equations for M̂(3).
    """
    red, green, blue = (255 * designs).flatten(2).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = _sqrt(rg.var(-1, correction=0) + yb.var(-1, correction=0))
    return spread + 0.3 * _sqrt(rg.mean(-1).square() + yb.mean(-1).square())


def symmetry(designs: Tensor) -> Tensor:
    """Left-right symmetry: correlation of the image with its mirror image, differentiable in the designs.

    s = Σ (x − x̄)(x' − x̄) / (Σ (x − x̄)² + ε), x' the mirror image, x̄ the mean of each channel, ε = 1e-6 per value:
    1 for a mirror-symmetric image, −1 for an antisymmetric one, 0 for a flat one (which therefore gains nothing).

    Args:
        designs: (n, 3, H, W) in [0, 1].

    Returns:
        (n,) in [−1, 1].
    """
    centred = designs - designs.mean((-2, -1), keepdim=True)
    covariance = (centred * centred.flip(-1)).mean((1, 2, 3))
    return covariance / (centred.square().mean((1, 2, 3)) + 1e-6)


def from_tensors(
    name: str,
    unit: str,
    batch_size: int,
    score: Score,
    dtype: torch.dtype = torch.float32,
) -> FunctionReward:
    """The black box of a differentiable reward: PIL images become tensors, images of unlike size are scored alone.

    Args:
        score: designs (n, 3, H, W) in [0, 1] and n prompts -> (n,).
    """

    @torch.no_grad()
    def function(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        if len({image.size for image in map(to_rgb, images)}) <= 1:
            return score(to_tensor(images, dtype), prompts).tolist() if images else []
        return [score(to_tensor([image], dtype), [text]).item() for image, text in zip(images, prompts, strict=True)]

    return FunctionReward(name, unit, batch_size, function)
