"""Feature maps: what a surrogate sees of a design and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltopt.errors import PotentialError, SurrogateError
from tiltopt.kinds import DEFAULT_KIND, PARTS, needs, parse_kind
from tiltopt.surrogates import blocks
from tiltopt.vision import CLIPVision, VisionOutput, check_images


@runtime_checkable
class FeatureMap(Protocol):
    """Designs and prompts to feature vectors.

    id: names the map and its weights; a surrogate fitted on one map refuses another.
    dim: d.
    blocks: sizes of the parts that the vector is made of, d in all; a surrogate learns how much each of them matters.
    """

    id: str
    dim: int
    blocks: tuple[int, ...]

    def __call__(self, designs: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """(n, *design) and n prompts -> (n, d), differentiable in the designs."""
        ...


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


@runtime_checkable
class NetworkEncoder(LatentEncoder, Protocol):
    """A prior whose network can be looked into.

    fingerprint: names its weights and its chain.
    """

    @property
    def fingerprint(self) -> str:
        """See the class."""
        ...

    def mid_states(self, z: Tensor) -> Tensor:
        """Clean latents (n, C, h, w) -> (n, d), differentiable."""
        ...


class ImageFeatures:
    """Features of images, optionally beside those of their prompts: one or several blocks, side by side.

    - `latent_stats`: statistics of the latents of the prior's autoencoder (`blocks.latent_statistics`): how a picture
      looks. Few numbers, learnt from few answers.
    - `layout_2`, `layout_4`, `layout_8`: where colours and latents are, in three bands of scale (`blocks.layout`).
    - `colour_histogram`: which colours there are (`blocks.colour_histogram`).
    - `spectrum`, `spectrum_where`: how fine the texture is and which way it runs; how that differs between the
      quarters of the picture (`blocks.spectrum`).
    - `patch_stats`: mean and standard deviation of the last hidden patch states of a CLIP image tower over the picture:
      what there is, and how much it varies from place to place.
    - `patch_mean`: the mean alone.
    - `projection`: the embedding that CLIP compares with text, unit norm: what the picture is of.
    - `denoiser`: what the middle of the prior's own network makes of the picture under a little noise
      (`DiffusersPrior.mid_states`; Baranchuk et al., 2022): what there is, without a CLIP. Two half network calls each.

    Prompt features are the unit-norm text embedding; they let one surrogate serve prompts of different mean reward.
    Pictures are encoded once, and shown to CLIP once, whatever the number of blocks.

    Args:
        kind: blocks joined by "+", or a short name (`tiltopt.kinds.ALIASES`).
        tower: the CLIP model; None where no block and no prompt needs it.
        encoder: the autoencoder, for the blocks of latents. Pictures of another size are resized to the encoder's
            (bilinear, antialiased).
        prompt_features: whether to append the prompt's embedding.

    Raises:
        ConfigError: an unknown kind.
        SurrogateError: a block whose model is not given.
    """

    def __init__(
        self,
        kind: str = DEFAULT_KIND,
        *,
        tower: CLIPVision | None = None,
        encoder: LatentEncoder | None = None,
        prompt_features: bool = False,
    ) -> None:
        self.parts = parse_kind(kind)
        self._encoder, self._tower, self.prompt_features = encoder, tower, prompt_features
        by_need: dict[str, list[str]] = {need: [] for need in ("latents", "network", "pixels", "clip")}
        for part in self.parts:
            by_need[PARTS[part]].append(part)
        if (by_need["latents"] or by_need["network"]) and encoder is None:
            raise SurrogateError(
                f"features `{(by_need['latents'] + by_need['network'])[0]}` need the prior's autoencoder: pass "
                "`encoder=prior`, or change `kind`."
            )
        if by_need["network"] and not isinstance(encoder, NetworkEncoder):
            raise SurrogateError(
                f"features `denoiser` need a prior whose network can be looked into, such as a DiffusersPrior, got "
                f"{type(encoder).__name__}; leave the block out."
            )
        if (by_need["clip"] or prompt_features) and tower is None:
            raise SurrogateError(f"features {kind!r} need a CLIP model: pass `tower`.")
        self.blocks = tuple(self._size(part) for part in self.parts)
        ids = []
        for need, place in (
            ("latents", encoder.encoder_id if encoder is not None else ""),
            ("network", encoder.fingerprint if by_need["network"] and isinstance(encoder, NetworkEncoder) else ""),
            ("pixels", "pixels"),
            ("clip", tower.id if tower is not None else ""),
        ):
            if by_need[need]:
                ids.append(f"{place}/{'+'.join(by_need[need])}")
        if prompt_features:
            self.blocks += (self.tower.projection_dim,)
            ids.append("prompt" if by_need["clip"] else f"{self.tower.id}/prompt")
        self.id = "+".join(ids)
        self.dim = sum(self.blocks)
        self._text = cache(lambda prompt: torch.nn.functional.normalize(self.tower.text([prompt])[0], dim=-1))

    @property
    def tower(self) -> CLIPVision:
        """The CLIP model."""
        assert self._tower is not None
        return self._tower

    @property
    def encoder(self) -> LatentEncoder:
        """The autoencoder."""
        assert self._encoder is not None
        return self._encoder

    def _size(self, part: str) -> int:
        """Length of a block: that of a CLIP block from the tower, that of another from one blank picture."""
        if PARTS[part] == "clip":
            sizes = {"patch_stats": 2 * self.tower.hidden_dim, "patch_mean": self.tower.hidden_dim}
            return sizes.get(part, self.tower.projection_dim)
        if part == "denoiser":
            return int(self._looked_into(torch.zeros(1, *self.encoder.event_shape)).shape[1])
        z = torch.zeros(1, *self.encoder.event_shape) if PARTS[part] == "latents" else torch.zeros(0)
        return int(blocks.BLOCKS[part](torch.zeros(1, 3, 32, 32), z).shape[1])

    def __call__(self, designs: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Designs (n, 3, H, W) in [0, 1] and their n prompts -> (n, d) float32.

        Raises:
            PotentialError: if the designs are not images in [0, 1], or prompts are needed and their number is not n.
        """
        check_images(designs)
        wanted = {PARTS[part] for part in self.parts}
        seen = self.tower(designs) if "clip" in wanted else None
        z = self._encode(designs) if wanted & {"latents", "network"} else None
        parts = [self._part(part, designs, z, seen) for part in self.parts]
        if self.prompt_features:
            if prompts is None or len(prompts) != len(designs):
                given = "none" if prompts is None else str(len(prompts))
                raise PotentialError(
                    f"features `{self.id}` need one prompt per design: {len(designs)} designs, {given} given."
                )
            parts.append(torch.stack([self._text(p) for p in prompts]).to(parts[0]))
        return torch.cat(parts, dim=-1)

    def _encode(self, designs: Tensor) -> Tensor:
        size = tuple(self.encoder.image_size)
        if tuple(designs.shape[-2:]) != size:
            designs = F.interpolate(designs, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self.encoder.encode_image(designs).float()

    def _looked_into(self, z: Tensor) -> Tensor:
        assert isinstance(self.encoder, NetworkEncoder)
        return self.encoder.mid_states(z).float()

    def _part(self, part: str, designs: Tensor, z: Tensor | None, seen: VisionOutput | None) -> Tensor:
        if part in blocks.BLOCKS:
            return blocks.BLOCKS[part](designs.float(), torch.zeros(0) if z is None else z)
        if z is not None and part == "denoiser":
            return self._looked_into(z)
        assert seen is not None
        if part == "projection":
            return torch.nn.functional.normalize(seen.projection, dim=-1)
        return seen.patch_mean if part == "patch_mean" else torch.cat([seen.patch_mean, seen.patch_std], dim=-1)


class RawFeatures:
    """The design itself, flattened; for toy problems and for designs that are vectors already.

    Args:
        dim: d, the number of values in one design.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.id = f"raw-{dim}"
        self.blocks: tuple[int, ...] = (dim,)

    def __call__(self, designs: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """(n, *design) -> (n, d), no change of values."""
        flat = designs.flatten(1)
        if flat.shape[1] != self.dim:
            raise PotentialError(
                f"features `{self.id}` take designs of {self.dim} values, got shape {tuple(designs.shape)}."
            )
        return flat


def make_features(
    path: str | Path = "embedded",
    kind: str = "patch_stats",
    prompt_features: bool = False,
    device: str | torch.device = "cpu",
    encoder: LatentEncoder | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImageFeatures:
    """The feature map of a CLIP model at `path` ("embedded", a local folder, or a hub id) and of an autoencoder.

    Args:
        kind: blocks joined by "+", see `ImageFeatures`; those of latents need `encoder`.
        prompt_features: append the prompt's text embedding.
        encoder: of latents, usually the prior.
        dtype: in which the CLIP model computes; features are float32.

    Raises:
        ConfigError: on another `kind`, or if a CLIP model is needed and none can be loaded from `path`.
        SurrogateError: if `kind` needs an encoder and none is given.
    """
    wanted = needs(kind)
    if wanted & {"latents", "network"} and encoder is None:
        return ImageFeatures(kind, encoder=None)  # says what is missing before a model is loaded
    tower = CLIPVision.load(path, device=device, dtype=dtype) if prompt_features or "clip" in wanted else None
    return ImageFeatures(kind, tower=tower, encoder=encoder, prompt_features=prompt_features)
