"""Loading the CLIP models that rewards look through, once per model, and checking their settings beforehand."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from tiltopt.errors import ConfigError
from tiltopt.rewards.base import Options, RewardOptionError, require
from tiltopt.vision import CLIPVision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_LOADED: weakref.WeakValueDictionary[tuple[str, str, str], CLIPVision] = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class TowerOptions(Options):
    """Args:
    clip: "embedded", a local `CLIPModel` folder, or a hub id.
    device: torch device, or "auto" for CUDA where there is one.
    dtype: of the CLIP model: float32, bfloat16 or float16.
    """

    clip: str
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model_path("clip", self.clip)
        require(self.dtype in DTYPES, f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}; change it.")
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError:
                raise RewardOptionError(f"`device` must be auto, cpu or cuda:<n>, got {self.device!r}.") from None

    def load(self) -> CLIPVision:
        """The model, shared with every reward that is alive and uses the same one.

        Raises:
            RewardOptionError: it cannot be loaded.
        """
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        key = (self.clip, device, self.dtype)
        tower = _LOADED.get(key)
        if tower is None:
            try:
                tower = CLIPVision.load(self.clip, device=device, dtype=DTYPES[self.dtype])
            except ConfigError as error:
                raise RewardOptionError(str(error)) from error
            _LOADED[key] = tower
        return tower


def check_model_path(option: str, path: str) -> None:
    """Raises `RewardOptionError` when `path` is neither "embedded", a model folder that exists, nor like a hub id."""
    if path == "embedded":
        return
    folder = Path(path)
    if folder.is_dir():
        require(
            (folder / "config.json").is_file(),
            f"`{option}` must be a CLIPModel folder, but {path} has no config.json; save the model with "
            "CLIPModel.save_pretrained.",
        )
        return
    require(
        HUB_ID.fullmatch(path) is not None and not folder.parent.is_dir(),
        f'`{option}` must be "embedded", a CLIPModel folder or a hub id like openai/clip-vit-large-patch14, and '
        f"{path!r} does not exist; check the path.",
    )
