"""How well an image fits its prompt, CLIP score and PickScore; and the CLIP models that rewards look through.

A model is loaded once for all rewards that use it, and its settings are checked beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltopt.errors import ConfigError
from tiltopt.rewards.base import Options, RewardOptionError, Score, check_prompts, require
from tiltopt.vision import HUB_ID, CLIPVision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Args:
    device: torch device, or "auto" for CUDA where there is one.
    dtype: of the model: float32, bfloat16 or float16.
    """

    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dtype in DTYPES, f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}; change it.")
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError:
                raise RewardOptionError(f"`device` must be auto, cpu or cuda:<n>, got {self.device!r}.") from None

    def place(self) -> tuple[str, torch.dtype]:
        """Device and type that the model is moved to."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return device, DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class TowerOptions(ModelOptions):
    """Args:
    clip: "embedded", a local `CLIPModel` folder, or a hub id.
    """

    clip: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_path("clip", self.clip)

    def load(self) -> CLIPVision:
        """The model, shared with everything that is alive and uses the same one.

        Raises:
            RewardOptionError: it cannot be loaded.
        """
        device, dtype = self.place()
        try:
            return CLIPVision.load(self.clip, device=device, dtype=dtype)
        except ConfigError as error:
            raise RewardOptionError(str(error)) from error


def check_model_path(option: str, path: str) -> None:
    """Raises `RewardOptionError` when `path` is neither "embedded", a model folder that exists, nor like a hub id."""
    if path != "embedded":
        check_folder(option, path, "config.json", 'a CLIPModel folder (or "embedded")')


def check_folder(option: str, path: str, marker: str, what: str) -> None:
    """Raises `RewardOptionError` unless `path` is a folder that holds the file `marker`, or looks like a hub id."""
    folder = Path(path)
    if folder.is_dir():
        require((folder / marker).is_file(), f"`{option}` must be {what}, but {path} has no {marker}; save it anew.")
        return
    require(
        HUB_ID.fullmatch(path) is not None and not folder.parent.is_dir(),
        f"`{option}` must be {what}, or a hub id such as owner/name, and {path!r} does not exist; check the path.",
    )


@dataclass(frozen=True, kw_only=True)
class ClipOptions(TowerOptions):
    """Args:
    clip: the CLIP model.
    scale: multiplies the cosine; 20 is the unit in which the published price α = 0.01 is stated.
    """

    clip: str = "openai/clip-vit-large-patch14"
    scale: float = 20.0


@dataclass(frozen=True, kw_only=True)
class PickOptions(TowerOptions):
    """Args:
    clip: a `CLIPModel` fine-tuned on human preferences (PickScore, arXiv 2305.01569).
    scale: multiplies the cosine; 1 is the unit of the published α = 0.0001, 100 gives the usual 20-odd points.
    """

    clip: str = "yuvalkirstain/PickScore_v1"
    scale: float = 1.0


def build_score(name: str, options: ClipOptions | PickOptions) -> Score:
    """The cosine of picture and prompt in the options' CLIP model, times their `scale`."""
    return cosine(name, options.load(), options.scale)


def cosine(name: str, tower: CLIPVision, scale: float) -> Score:
    """score(designs, prompts) = scale · cos(image embedding, text embedding); differentiable in the designs.

    Args:
        name: of the reward, for messages.
    """

    @functools.lru_cache(maxsize=4096)
    def text(prompt: str) -> Tensor:
        return F.normalize(tower.text([prompt])[0].double(), dim=-1)

    def score(designs: Tensor, prompts: Sequence[str]) -> Tensor:
        check_prompts(name, prompts)
        image = F.normalize(tower(designs).projection.double(), dim=-1)
        texts = torch.stack([text(prompt) for prompt in prompts]).to(image.device)
        return scale * (image * texts).sum(-1)

    return score
