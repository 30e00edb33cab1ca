"""Between the tensors that samplers draw and the 8-bit images that a black box sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltopt.vision import check_images


def to_images(designs: Tensor) -> list[Image.Image]:
    """(n, 3, H, W) in [0, 1] -> n 8-bit RGB images. Raises PotentialError for anything else."""
    check_images(designs)
    pixels = (designs.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def to_designs(images: Sequence[Image.Image]) -> Tensor:
    """n RGB images of one size -> (n, 3, H, W) float32 in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
