"""The bank of feature blocks: what can be seen of a picture, each block cheap, differentiable, and of one nature.

What no block shows cannot be learnt, however many answers are paid for; what a block shows beside the point costs
little, because the surrogate learns from the answers how much each block matters (`tiltopt.surrogates.relevance`).

A block is a function of the pictures (n, 3, H, W) in [0, 1] or of their latents (n, C, h, w); CLIP's blocks and the
denoiser's are made in `tiltopt.surrogates.features`, from networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltopt.errors import SurrogateError

SMOOTHING = 1e-4
"""Under the root of |difference|, in latents of about unit variance: the gradient stays finite at zero."""

BINS = 8
"""Bins of a colour histogram, per channel."""

SCALES = 3
"""Scales of the spectrum: full size, half, quarter."""

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Steps (down, along) whose differences the spectrum measures: vertical, horizontal, and the two diagonal grains."""

_FLOOR = 1e-4
"""Added to an energy under the logarithm: a hundredth of full contrast, squared."""


def latent_statistics(z: Tensor) -> Tensor:
    """Statistics of latents z (n, C, h, w): how a picture looks, whatever it shows. In this order:

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


def opponent(images: Tensor) -> Tensor:
    """Brightness, red less green, blue less yellow of pictures (n, 3, H, W) in [0, 1]: (n, 3, H, W).

    The first lies in [0, 1], the others in [-1, 1]. Unlike red, green and blue they hardly go together in pictures, so
    that each of them can matter by itself.
    """
    red, green, blue = images.unbind(1)
    return torch.stack([0.299 * red + 0.587 * green + 0.114 * blue, red - green, blue - (red + green) / 2], dim=1)


def cosines(cells: int, like: Tensor) -> Tensor:
    """The orthonormal cosine basis of `cells` places, (cells, cells), row by row the mean first (DCT-II)."""
    place = torch.arange(cells, dtype=like.dtype, device=like.device)
    basis = torch.cos(torch.pi / cells * (place + 0.5) * place[:, None]) * (2 / cells) ** 0.5
    basis[0] = cells**-0.5
    return basis


def layout(images: Tensor, z: Tensor, cells: int) -> Tensor:
    """Where things are, between a grid of cells / 2 and one of `cells`: cosine coefficients of colours and latents.

    Opponent colours and latents are averaged over `cells` x `cells` places and written in the cosine basis; of the
    coefficients those are kept that a grid of half as many cells does not have (for `cells` = 2, all but the mean). So
    the bands of 2, 4 and 8 cells share nothing, and "the right half is brighter" is one number, not a difference of
    two that go together.

    Args:
        images: (n, 3, H, W). z: their latents (n, C, h, w). cells: 2, 4, 8, ...

    Returns:
        (n, (3 + C) 3 cells^2 / 4).
    """
    basis = cosines(cells, images)
    kept = torch.ones(cells, cells, dtype=torch.bool, device=images.device)
    kept[: cells // 2, : cells // 2] = False
    parts = []
    for x in (opponent(images), z.to(images)):
        coefficients = basis @ F.adaptive_avg_pool2d(x, cells) @ basis.T
        parts.append(coefficients[..., kept].flatten(1))
    return torch.cat(parts, dim=1)


def colour_histogram(images: Tensor) -> Tensor:
    """Which colours there are, wherever: cumulative histograms of brightness, red less green, and blue less yellow.

    A value counts for the two bins around it in proportion to its nearness (linear binning), so that the shares are
    differentiable almost everywhere. They are summed up from the darkest bin on, and the sums written in the cosine
    basis: a bin that is empty in almost every picture would vary too little among few of them for its scale to be
    known, and no coefficient is such a bin.

    Returns:
        (n, 3 (BINS - 1)), shares of the picture.
    """
    centres = torch.linspace(0, 1, BINS, dtype=images.dtype, device=images.device)
    basis = cosines(BINS - 1, images)
    parts = []
    for i, values in enumerate(opponent(images).unbind(1)):
        spread = values if i == 0 else (torch.tanh(2 * values) + 1) / 2  # differences crowd around zero: finer there
        near = (1 - (spread.flatten(1)[:, None] - centres[:, None]).abs() * (BINS - 1)).clamp_min(0)
        below = near.mean(dim=2).cumsum(dim=1)[:, :-1]  # the last is one
        parts.append(below @ basis.T)
    return torch.cat(parts, dim=1)


def spectrum(images: Tensor, where: bool = False) -> Tensor:
    """How fine the texture is and which way it runs: log energy of brightness' differences.

    For each of `SCALES` scales (2 x 2 averages between them), each of `DIRECTIONS` and each quarter of the picture the
    log of the mean squared difference; then, over directions, quarters and scales, in the cosine bases. So "lying
    stripes" is one number, and so is "finer below than above".

    Args:
        where: how the quarters differ, rather than their mean.

    Returns:
        (n, DIRECTIONS SCALES), nats, or three times as many.
    """
    y = opponent(images)[:, :1]
    energies = []
    for scale in range(SCALES):
        for down, along in DIRECTIONS:
            moved = y[..., down:, along:] if along >= 0 else y[..., down:, :along]
            still = y[..., : y.shape[-2] - down, : y.shape[-1] - along] if along >= 0 else y[..., :-down, -along:]
            energies.append((F.adaptive_avg_pool2d((moved - still).square(), 2) + _FLOOR).log().flatten(1))
        y = F.avg_pool2d(y, 2) if scale + 1 < SCALES else y
    logs = torch.stack(energies, dim=1).unflatten(1, (SCALES, len(DIRECTIONS)))  # (n, scale, direction, quarter)
    bases = [cosines(size, logs) for size in logs.shape[1:]]
    parts = torch.einsum("nsdq,as,bd,cq->nabc", logs, *bases)
    return (parts[..., 1:] if where else parts[..., 0]).flatten(1)


BLOCKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "latent_stats": lambda images, z: latent_statistics(z),
    "layout_2": lambda images, z: layout(images, z, 2),
    "layout_4": lambda images, z: layout(images, z, 4),
    "layout_8": lambda images, z: layout(images, z, 8),
    "colour_histogram": lambda images, z: colour_histogram(images),
    "spectrum": lambda images, z: spectrum(images),
    "spectrum_where": lambda images, z: spectrum(images, where=True),
}
"""Blocks of pictures (n, 3, H, W) and, where `tiltopt.kinds.PARTS` says so, of their latents (n, C, h, w)."""
