"""LPIPS, the perceptual distance of two pictures, read from its two published weight files.

One holds the convolutional part of AlexNet as torchvision publishes it (`features.N.weight`, `.bias`), the other the
linear heads of the `lpips` package, version 0.1 (`linN.model.1.weight`). Widths are those of the files.

Source: Zhang et al. 2018, arXiv 1801.03924.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tiltopt.designs import to_designs
from tiltopt.errors import RewardError
from tiltopt.online.seeds import generator
from tiltopt.rewards.weights import read_tensors

LAYERS = (("0", 4, 2, False), ("3", 1, 2, True), ("6", 1, 1, True), ("8", 1, 1, False), ("10", 1, 1, False))
"""Of each convolution: its number in the file, stride, padding, and whether it is pooled before."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Per channel, for pictures in [-1, 1]."""
PAIRS = 1000


class LPIPS(nn.Module):
    """d(x, y) = sum over layers of the spatial mean of w_l (f_l(x) - f_l(y))^2, f_l normalised over channels.

    Args:
        tower: tensors of the convolutions, heads: of the linear layers; by their published names.

    Raises:
        RewardError: one of them is missing, or a head does not fit its layer.
    """

    def __init__(self, tower: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        super().__init__()
        for i, (number, *_) in enumerate(LAYERS):
            names = (f"features.{number}.weight", f"features.{number}.bias", f"lin{i}.model.1.weight")
            for name, state in zip(names, (tower, tower, heads), strict=True):
                if name not in state:
                    raise RewardError(
                        f"`lpips`: expected {name}, which is missing; give torchvision's alexnet-owt file and the "
                        "weights/v0.1/alex.pth of the lpips package."
                    )
            width, head = tower[names[0]].shape[0], heads[names[2]]
            if head.shape != (1, width, 1, 1):
                raise RewardError(
                    f"`lpips`: expected {names[2]} of shape (1, {width}, 1, 1), got {tuple(head.shape)}; the two files "
                    "are of different networks."
                )
            for kind, name, state in (
                ("weight", names[0], tower),
                ("bias", names[1], tower),
                ("head", names[2], heads),
            ):
                self.register_buffer(f"{kind}{i}", state[name].float())

    @classmethod
    def load(cls, tower: str, heads: str) -> LPIPS:
        """From two weight files, each local or owner/repository/file on the hub."""
        return cls(dict(read_tensors("lpips", tower)[0]), dict(read_tensors("lpips", heads)[0]))

    def _features(self, images: Tensor) -> list[Tensor]:
        shift, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (SHIFT, SCALE))
        x = (2 * images - 1 - shift) / scale
        out = []
        for i, (_, stride, padding, pooled) in enumerate(LAYERS):
            if pooled:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, self.get_buffer(f"weight{i}"), self.get_buffer(f"bias{i}"), stride, padding))
            out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches (n, 3, H, W) in [0, 1], of at least 31 pixels a side -> (n,) distances."""
        total = first.new_zeros(len(first))
        for i, (a, b) in enumerate(zip(self._features(first), self._features(second), strict=True)):
            total = total + ((a - b).square() * self.get_buffer(f"head{i}")).sum(1).mean((1, 2))
        return total


@torch.no_grad()
def mean_distance(distance: LPIPS, images: Sequence[Image.Image]) -> float:
    """Mean over all pairs of pictures, or over `PAIRS` of them chosen once and for all where there are more.

    Raises:
        RewardError: pictures of different sizes, or fewer than two.
    """
    if len({image.size for image in images}) != 1 or len(images) < 2:
        raise RewardError(f"LPIPS compares two or more pictures of one size, got {len(images)} of different sizes.")
    pairs = torch.combinations(torch.arange(len(images)))
    if len(pairs) > PAIRS:
        pairs = pairs[torch.randperm(len(pairs), generator=generator(0, "lpips"))[:PAIRS]]
    designs = to_designs([image.convert("RGB") for image in images])
    device = distance.get_buffer("head0").device
    parts = [distance(designs[p[:, 0]].to(device), designs[p[:, 1]].to(device)).cpu() for p in pairs.split(16)]
    return float(torch.cat(parts).double().mean())
