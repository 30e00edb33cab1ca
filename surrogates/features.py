"""Feature maps: what a surrogate sees of a design and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltopt.errors import PotentialError, SurrogateError
from tiltopt.kinds import DEFAULT_KIND, parse_kind
from tiltopt.surrogates.latent_stats import LatentEncoder, LatentStatistics
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


class ImageFeatures:
    """Features of images, optionally beside those of their prompts.

    The image part is one or several of:

    - `latent_stats`: statistics of the latents of the prior's autoencoder (see `latent_statistics`): how a picture
      looks. Few numbers, learnt from few answers.
    - `patch_stats`: mean and standard deviation of the last hidden patch states of a CLIP image tower over the picture:
      what there is, and how much it varies from place to place.
    - `patch_mean`: the mean alone.
    - `projection`: the embedding that CLIP compares with text, unit norm: what the picture is of.

    Prompt features are the unit-norm text embedding; they let one surrogate serve prompts of different mean reward.

    Args:
        kind: parts joined by "+".
        tower: the CLIP model; None where no part and no prompt needs it.
        encoder: the autoencoder, for `latent_stats`.
        prompt_features: whether to append the prompt's embedding.

    Raises:
        ConfigError: an unknown kind.
        SurrogateError: a part whose model is not given.
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
        self._latents = None
        if "latent_stats" in self.parts:
            if encoder is None:
                raise SurrogateError(
                    "features `latent_stats` need the prior's autoencoder: pass `encoder=prior`, or change `kind`."
                )
            self._latents = LatentStatistics(encoder)
        self._tower, self.prompt_features = tower, prompt_features
        clip = [part for part in self.parts if part != "latent_stats"]
        if (clip or prompt_features) and tower is None:
            raise SurrogateError(f"features {kind!r} need a CLIP model: pass `tower`.")
        self.blocks = tuple(self._size(part) for part in self.parts)
        ids = [] if self._latents is None else [self._latents.id]
        if tower is not None and clip:
            ids.append(f"{tower.id}/{'+'.join(clip)}")
        if tower is not None and prompt_features:
            self.blocks += (tower.projection_dim,)
            ids.append("prompt" if clip else f"{tower.id}/prompt")
        self.id = "+".join(ids)
        self.dim = sum(self.blocks)
        self._text = cache(lambda prompt: torch.nn.functional.normalize(self.tower.text([prompt])[0], dim=-1))

    @property
    def tower(self) -> CLIPVision:
        """The CLIP model."""
        assert self._tower is not None
        return self._tower

    def _size(self, part: str) -> int:
        if part == "latent_stats":
            assert self._latents is not None
            return self._latents.dim
        sizes = {"patch_stats": 2 * self.tower.hidden_dim, "patch_mean": self.tower.hidden_dim}
        return sizes.get(part, self.tower.projection_dim)

    def __call__(self, designs: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Designs (n, 3, H, W) in [0, 1] and their n prompts -> (n, d) float32.

        Raises:
            PotentialError: if the designs are not images in [0, 1], or prompts are needed and their number is not n.
        """
        check_images(designs)
        seen = self.tower(designs) if any(part != "latent_stats" for part in self.parts) else None
        parts = [self._part(part, designs, seen) for part in self.parts]
        if self.prompt_features:
            if prompts is None or len(prompts) != len(designs):
                given = "none" if prompts is None else str(len(prompts))
                raise PotentialError(
                    f"features `{self.id}` need one prompt per design: {len(designs)} designs, {given} given."
                )
            parts.append(torch.stack([self._text(p) for p in prompts]).to(parts[0]))
        return torch.cat(parts, dim=-1)

    def _part(self, part: str, designs: Tensor, seen: VisionOutput | None) -> Tensor:
        if part == "latent_stats":
            assert self._latents is not None
            return self._latents(designs)
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
        self.blocks = (dim,)

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
) -> ImageFeatures:
    """The feature map of a CLIP model at `path` ("embedded", a local folder, or a hub id) and of an autoencoder.

    Args:
        kind: parts joined by "+", see `ImageFeatures`; "latent_stats" needs `encoder`.
        prompt_features: append the prompt's text embedding.
        encoder: of latents, usually the prior.

    Raises:
        ConfigError: on another `kind`, or if a CLIP model is needed and none can be loaded from `path`.
        SurrogateError: if `kind` needs an encoder and none is given.
    """
    clip = prompt_features or parse_kind(kind) != ("latent_stats",)
    if "latent_stats" in parse_kind(kind) and encoder is None:
        return ImageFeatures(kind, encoder=None)  # says what is missing before a model is loaded
    tower = CLIPVision.load(path, device=device) if clip else None
    return ImageFeatures(kind, tower=tower, encoder=encoder, prompt_features=prompt_features)
