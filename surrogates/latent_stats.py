"""Statistics of a picture's latents: its colours, how they go together, and how much it varies at every scale.

A few dozen numbers that say little of what a picture shows and much of how it looks, so that few answers suffice to
learn a reward of texture, colour, contrast or layout. The latents are those of the prior's own autoencoder.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltopt.errors import SurrogateError

SMOOTHING = 1e-4
"""Under the root of |difference|, in latents of about unit variance: the gradient stays finite at zero."""


@runtime_checkable
class LatentEncoder(Protocol):
    """What turns pictures into latents; a `DiffusersPrior` is one.

    encoder_id: names the encoder and its weights.
    event_shape: (C, h, w) of one latent. image_size: (height, width) of the pictures, pixels.
    """

    event_shape: torch.Size
    image_size: tuple[int, int]

    @property
    def encoder_id(self) -> str:
        """See the class."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (n, 3, height, width) in [0, 1] -> (n, C, h, w), differentiable."""
        ...


def latent_statistics(z: Tensor) -> Tensor:
    """Statistics of latents z (n, C, h, w), in this order:

    - mean of each channel, C;
    - covariance of the channels over the places, its lower triangle, C (C + 1) / 2;
    - mean |difference| of horizontal, then of vertical neighbours, per channel, at full size and after each halving by
      2 x 2 averages, for as long as the shorter side has two places: 2 C for each of S scales.

    At the coarsest scale the differences compare the halves of the picture; at the finest they are its total variation.

    Returns:
        (n, C + C (C + 1) / 2 + 2 C S).

    Raises:
        SurrogateError: z is not four-dimensional, or has fewer than 2 x 2 places.
    """
    if z.ndim != 4 or min(z.shape[-2:]) < 2:
        raise SurrogateError(f"latents must be (n, C, h, w) with h, w >= 2, got {tuple(z.shape)}.")
    flat = z.flatten(2)
    mean = flat.mean(dim=2)
    centred = flat - mean.unsqueeze(-1)
    covariance = centred @ centred.mT / flat.shape[2]
    row, column = torch.tril_indices(z.shape[1], z.shape[1], device=z.device)
    parts = [mean, covariance[:, row, column]]
    for _ in range(num_scales(z.shape[-2], z.shape[-1])):
        for difference in (z[..., 1:] - z[..., :-1], z[..., 1:, :] - z[..., :-1, :]):
            parts.append((difference.square() + SMOOTHING).sqrt().mean(dim=(2, 3)))
        z = F.avg_pool2d(z, 2) if min(z.shape[-2:]) >= 2 else z
    return torch.cat(parts, dim=1)


def num_scales(height: int, width: int) -> int:
    """S: how often the shorter side can be halved until one place is left."""
    return min(height, width).bit_length() - 1


def num_statistics(channels: int, height: int, width: int) -> int:
    """Length of `latent_statistics`."""
    return channels + channels * (channels + 1) // 2 + 2 * channels * num_scales(height, width)


class LatentStatistics:
    """Pictures to the statistics of their latents.

    Args:
        encoder: of the pictures. Pictures of another size are resized to the encoder's (bilinear, antialiased).
    """

    def __init__(self, encoder: LatentEncoder) -> None:
        self.encoder = encoder
        self.id = f"{encoder.encoder_id}/latent_stats"
        self.dim = num_statistics(*encoder.event_shape)

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, d) float32, differentiable."""
        if tuple(images.shape[-2:]) != tuple(self.encoder.image_size):
            size = self.encoder.image_size
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return latent_statistics(self.encoder.encode_image(images).float())
