"""What is said of a batch of images, by things that no method has seen: an independent judge, and CLIP's projection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tiltopt.designs import to_designs
from tiltopt.online.evaluation.judge import Judge, fidelity
from tiltopt.surrogates.features import FeatureMap, make_features


class Measures:
    """Fidelity and diversity of images.

    Args:
        features: the CLIP model ("embedded", a folder, or a hub id).
    """

    def __init__(self, features: str = "embedded") -> None:
        self._features = features

    @cached_property
    def _judge(self) -> Judge:
        return Judge.load()

    @cached_property
    def _projection(self) -> FeatureMap:
        return make_features(path=self._features, kind="projection")

    def fidelity(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float | None:
        """Share of the images that show their prompt's animal to the judge; None where no prompt names one."""
        return fidelity(self._judge, list(images), list(prompts))

    def diversity(self, images: Sequence[Image.Image]) -> float:
        """Mean over pairs of 1 - cosine of the images' CLIP projections, in [0, 2]; prompts play no part."""
        with torch.no_grad():
            return spread(self._projection(to_designs(images)))


def spread(features: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of rows (n, d), n >= 2."""
    z = torch.nn.functional.normalize(features.double(), dim=-1)
    n = len(z)
    return float(1 - (z.sum(0).square().sum() - n) / (n * (n - 1)))


def weights_id(prior: str = "embedded", features: str = "embedded") -> str:
    """First 8 hexadecimal digits of the SHA-256 of the weights of a prior and of a CLIP model.

    Runs on other weights are other runs.

    Args:
        prior, features: "embedded", or local folders of a StableDiffusionPipeline and of a CLIPModel.

    Raises:
        FileNotFoundError: for weights that are not in a local folder.
    """
    embedded = Path(str(resources.files("tiltopt.embedded")))
    pipeline = embedded / "pipeline" if prior == "embedded" else Path(prior)
    clip = embedded / "clip" if features == "embedded" else Path(features)
    digest = hashlib.sha256()
    for folder in (pipeline / "unet", pipeline / "vae", pipeline / "text_encoder", clip):
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError(f"{folder} holds no safetensors; give the folder of a model with `--set`.")
        for file in weights:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
