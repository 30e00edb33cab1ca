"""Feature maps: what a surrogate sees of a design and its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltopt.errors import PotentialError, SurrogateError
from tiltopt.vision import CLIPVision

KINDS = ("patch_stats", "patch_mean", "projection", "both")


@runtime_checkable
class FeatureMap(Protocol):
    """Designs and prompts to feature vectors.

    id: names the map and its weights; a surrogate fitted on one map refuses another.
    dim: d.
    """

    id: str
    dim: int

    def __call__(self, designs: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """(n, *design) and n prompts -> (n, d), differentiable in the designs."""
        ...


class CLIPFeatures:
    """Features of images by a CLIP image tower, optionally beside those of their prompts by its text tower.

    "patch_stats" is the mean and the standard deviation of the last hidden patch states over the picture: what there
    is, and how much it varies from place to place. "patch_mean" is the mean alone: it keeps texture and colour.
    "projection" is the embedding that CLIP compares with text, unit norm: it keeps what the picture is of. "both" is
    patch mean and projection. Prompt features are the unit-norm text embedding; they let one surrogate serve prompts of
    different mean reward.

    Args:
        tower: the CLIP model.
        kind: "patch_stats", "patch_mean", "projection" or "both" (patch_mean and projection).
        prompt_features: whether to append the prompt's embedding.
    """

    def __init__(self, tower: CLIPVision, kind: str = "patch_stats", prompt_features: bool = False) -> None:
        if kind not in KINDS:
            raise SurrogateError(f"`kind` of features must be one of {', '.join(KINDS)}, got {kind!r}.")
        self.tower, self.kind, self.prompt_features = tower, kind, prompt_features
        self.id = f"{tower.id}/{kind}" + ("+prompt" if prompt_features else "")
        image_dim = {
            "patch_stats": 2 * tower.hidden_dim,
            "patch_mean": tower.hidden_dim,
            "projection": tower.projection_dim,
            "both": tower.hidden_dim + tower.projection_dim,
        }
        self.dim = image_dim[kind] + (tower.projection_dim if prompt_features else 0)
        self._text = cache(lambda prompt: torch.nn.functional.normalize(tower.text([prompt])[0], dim=-1))

    def __call__(self, designs: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Designs (n, 3, H, W) in [0, 1] and their n prompts -> (n, d) float32.

        Raises:
            PotentialError: if the designs are not images in [0, 1], or prompts are needed and their number is not n.
        """
        out = self.tower(designs)
        parts = []
        if self.kind in ("patch_stats", "patch_mean", "both"):
            parts.append(out.patch_mean)
        if self.kind == "patch_stats":
            parts.append(out.patch_std)
        if self.kind in ("projection", "both"):
            parts.append(torch.nn.functional.normalize(out.projection, dim=-1))
        if self.prompt_features:
            if prompts is None or len(prompts) != len(designs):
                given = "none" if prompts is None else str(len(prompts))
                raise PotentialError(
                    f"features `{self.id}` need one prompt per design: {len(designs)} designs, {given} given."
                )
            parts.append(torch.stack([self._text(p) for p in prompts]).to(parts[0]))
        return torch.cat(parts, dim=-1)


class RawFeatures:
    """The design itself, flattened; for toy problems and for designs that are vectors already.

    Args:
        dim: d, the number of values in one design.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.id = f"raw-{dim}"

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
) -> CLIPFeatures:
    """The feature map of a CLIP model at `path`: "embedded", a local folder, or a hub id.

    Args:
        kind: "patch_mean" (hidden size), "projection" (projection size) or "both".
        prompt_features: append the prompt's text embedding.

    Raises:
        ConfigError: if no CLIP model can be loaded from `path`.
        SurrogateError: on another `kind`.
    """
    if kind not in KINDS:
        raise SurrogateError(f"`kind` of features must be one of {', '.join(KINDS)}, got {kind!r}.")
    return CLIPFeatures(CLIPVision.load(path, device=device), kind, prompt_features)
