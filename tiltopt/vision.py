"""A CLIP image tower that takes tensors and keeps gradients; shared by feature maps and rewards.

tower = CLIPVision.load("embedded")
out = tower(images)              # images (n, 3, H, W) in [0, 1]
out.patch_mean                   # (n, hidden)
tower.text(["a photo of a cat"]) # (1, projection_dim)
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import re
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tiltopt.digest import weights_digest
from tiltopt.errors import ConfigError, PotentialError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RANGE_TOLERANCE = 1e-2
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_LOADED: weakref.WeakValueDictionary[tuple[str, str, torch.dtype], CLIPVision] = weakref.WeakValueDictionary()


def why_not(source: str, error: Exception) -> str:
    """Why a model at `source`, a folder or a hub id, was not loaded, and how one comes here without a network."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if not HUB_ID.fullmatch(source) or Path(source).parent.is_dir():
        return first if Path(source).exists() else "no such folder"
    from huggingface_hub import constants

    return (
        f"the hub repository {source} is not whole in the cache {constants.HF_HUB_CACHE} and cannot be fetched "
        f"({type(error).__name__}: {first}); where there is a network, run `hf download {source} --local-dir FOLDER`, "
        "bring the folder here, and give its path"
    )


def with_words(tokenizer: Any) -> Any:
    """The tokenizer itself.

    Raises:
        OSError: it has no vocabulary: from a folder or hub id without one, transformers 5 makes an empty tokenizer, to
            which all prompts are the same.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise OSError("no vocabulary (tokenizer.json, or the files that its class names) is there")
    return tokenizer


class VisionOutput(NamedTuple):
    """What the tower says of n images.

    projection: (n, p), the projected image embedding, not normalised.
    patch_mean: (n, h), the mean of the last hidden patch states, without the class token.
    patch_std: (n, h), their standard deviation over the patches (population, floored at 1e-4 for its gradient).
    """

    projection: Tensor
    patch_mean: Tensor
    patch_std: Tensor


class Preprocess:
    """CLIP's image preprocessing on tensors, differentiable: resize, centre crop, normalise.

    The shortest edge is resized (bicubic, antialiased, as PIL does it), the middle is cropped, and the result is
    (x - mean) / std per channel.

    Args:
        resize: target of the resize in pixels: an int for the shortest edge, or (height, width), or None for no resize.
        crop: (height, width) of the centre crop in pixels, or None for no crop.
        mean, std: per channel, for images in [0, 1].
        edge: which edge an int is for, "shortest", or "longest": the whole picture is seen then, between black bars.
    """

    def __init__(
        self,
        resize: int | tuple[int, int] | None,
        crop: tuple[int, int] | None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        edge: Literal["shortest", "longest"] = "shortest",
    ) -> None:
        self.resize, self.crop, self.mean, self.std, self.edge = resize, crop, tuple(mean), tuple(std), edge

    @classmethod
    def from_config(cls, config: dict[str, Any] | None, image_size: int) -> Preprocess:
        """From the contents of `preprocessor_config.json`; without one, CLIP's defaults at the model's `image_size`."""
        if config is None:
            return cls(image_size, (image_size, image_size))
        resize: int | tuple[int, int] | None = None
        if config.get("do_resize", True):
            size = config.get("size", image_size)
            if isinstance(size, dict):
                resize = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
            else:
                resize = int(size)
        crop = None
        if config.get("do_center_crop", True):
            size = config.get("crop_size", image_size)
            crop = (size["height"], size["width"]) if isinstance(size, dict) else (int(size), int(size))
        normalise = config.get("do_normalize", True)
        mean = config.get("image_mean", CLIP_MEAN) if normalise else (0.0, 0.0, 0.0)
        std = config.get("image_std", CLIP_STD) if normalise else (1.0, 1.0, 1.0)
        return cls(resize, crop, mean, std)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Size in pixels of what comes out for an image of (height, width)."""
        return self.crop or self._resized(height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        if self.edge == "longest":
            scale = self.resize / max(height, width)
            return round(height * scale), round(width * scale)
        short, long = min(height, width), max(height, width)
        other = int(self.resize * long / short)
        return (self.resize, other) if height <= width else (other, self.resize)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] -> (n, 3, h, w), normalised."""
        size = self._resized(*images.shape[-2:])
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0.0, 1.0)  # bicubic overshoots; PIL saturates in the same place
        if self.crop is not None:
            images = _centre_crop(images, self.crop)
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        return (images - mean) / std


class CLIPVision:
    """A frozen CLIP model: images to embeddings with a gradient, and prompts to embeddings.

    Args:
        model: a `transformers.CLIPModel`; it is put in eval mode and its parameters are frozen.
        preprocess: the preprocessing it was trained with.
        source: where it came from, for messages and for the tokenizer.
        tokenizer: of prompts; None: the one at `source`, looked for when the first prompt comes.

    Source: Radford et al. 2021, arXiv 2103.00020.
    """

    def __init__(self, model: Any, preprocess: Preprocess, source: str, tokenizer: Any = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.source = source
        self._given = tokenizer

    @classmethod
    def load(
        cls, path: str | Path = "embedded", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> CLIPVision:
        """Load "embedded" (the one that ships), a local `CLIPModel` folder, or a hub id.

        One that somebody still holds, of the same place and precision, is shared: reward and features take memory once.

        Raises:
            ConfigError: if nothing can be loaded from `path`, weights are missing in it, or its preprocessing makes
                images of a size that the model does not take.
        """
        from safetensors import SafetensorError
        from transformers import CLIPModel

        source = resolve(path)
        key = (source, str(torch.empty(0, device=device).device), dtype)
        if key in _LOADED:
            return _LOADED[key]
        try:
            with no_progress_bar():
                loaded: Any = CLIPModel.from_pretrained(source, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f'no CLIP model at `{source}`: {why_not(source, error)}. Expected "embedded", a folder saved by '
                "CLIPModel.save_pretrained, or a hub id."
            ) from error
        model, info = loaded
        for found, fault in (("missing_keys", "are missing"), ("unexpected_keys", "have no place in its config.json")):
            names = sorted(name for name in info[found] if not name.endswith("position_ids"))  # older releases' buffer
            if names:
                raise ConfigError(
                    f"`{source}` is not a complete CLIPModel: {len(names)} tensors {fault}, first {names[0]}; "
                    "save the whole CLIPModel with save_pretrained."
                )
        image_size = model.config.vision_config.image_size
        preprocess = Preprocess.from_config(_preprocessor_config(source), image_size)
        out = preprocess.output_size(image_size, image_size)
        if out != (image_size, image_size):
            raise ConfigError(
                f"`{source}`: the model takes {image_size} x {image_size} pixels but preprocessor_config.json makes "
                f"{out[0]} x {out[1]}; make `crop_size` equal to the model's `image_size`."
            )
        tower = cls(model, preprocess, source)
        tower.id  # noqa: B018  the name is that of the weights as stored, before any cast
        _LOADED[key] = tower.to(device, dtype)
        return tower

    def to(self, device: str | torch.device, dtype: torch.dtype) -> CLIPVision:
        """Moves the image tower; the text tower, which is shown each prompt once, computes on the CPU. Returns self."""
        self.model.to(dtype=dtype)
        self.model.vision_model.to(device)
        self.model.visual_projection.to(device)
        return self

    @cached_property
    def id(self) -> str:
        """ "clip-" and the first 12 hexadecimal digits of the SHA-256 of the weights and the preprocessing."""
        pre = self.preprocess
        settings = json.dumps([pre.resize, pre.crop, pre.mean, pre.std])
        return f"clip-{weights_digest(self.model, settings)}"

    @property
    def projection_dim(self) -> int:
        """p, the size of `projection` and of `text`."""
        return int(self.model.config.projection_dim)

    @property
    def hidden_dim(self) -> int:
        """h, the size of `patch_mean`."""
        return int(self.model.config.vision_config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model lives; images and prompts are moved there."""
        return self.model.visual_projection.weight.device

    def __call__(self, images: Tensor) -> VisionOutput:
        """Embeddings of images (n, 3, H, W), float in [0, 1]; differentiable in the images.

        Raises:
            PotentialError: on another shape, an integer type, a NaN, or values outside [0, 1].
        """
        check_images(images)
        weight = self.model.visual_projection.weight
        pixels = self.preprocess(images.to(device=weight.device, dtype=torch.float32)).to(weight.dtype)
        out = self.model.vision_model(pixel_values=pixels)
        projection = self.model.visual_projection(out.pooler_output)
        patches = out.last_hidden_state[:, 1:].to(torch.float32)
        spread = (patches.var(dim=1, correction=0) + 1e-8).sqrt()
        return VisionOutput(projection.to(torch.float32), patches.mean(dim=1), spread)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Projected text embeddings of the prompts, (n, p), not normalised.

        Raises:
            ConfigError: if the folder has no tokenizer.
        """
        if isinstance(prompts, str):
            raise TypeError(f"`prompts` must be a sequence of strings, got the string {prompts!r}; wrap it in a list.")
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        place = self.model.text_projection.weight.device
        tokens = {name: tokens[name].to(place) for name in ("input_ids", "attention_mask")}
        pooled = self.model.text_model(**tokens).pooler_output
        return self.model.text_projection(pooled).to(self.device, torch.float32)

    @cached_property
    def _tokenizer(self) -> Any:
        if self._given is not None:
            return self._given
        from transformers import CLIPTokenizer

        try:
            return with_words(CLIPTokenizer.from_pretrained(self.source))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"`{self.source}` has no tokenizer, which prompt embeddings need: {why_not(self.source, error)}. Save "
                "the model's CLIPTokenizer into the same folder."
            ) from error


def resolve(path: str | Path) -> str:
    """The folder of "embedded", an existing folder unchanged, or the text itself as a hub id."""
    if str(path) == "embedded":
        try:
            return str(importlib.resources.files("tiltopt.embedded") / "clip")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "the embedded CLIP model is not installed (no package tiltopt.embedded); reinstall tiltopt or give "
                "another CLIPModel folder."
            ) from error
    return str(path)


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of RGB images, float, within [0, 1].

    Raises:
        PotentialError: saying what was expected and what came.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise PotentialError(f"images must be (n, 3, H, W), got {tuple(images.shape)}; decode latents first.")
    if not images.is_floating_point():
        raise PotentialError(f"images must be float in [0, 1], got {images.dtype}; divide 8-bit images by 255.")
    if images.numel() == 0:
        return
    low, high = (v.item() for v in torch.aminmax(images.detach()))
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise PotentialError(
            f"images must lie in [0, 1], got [{low:.4g}, {high:.4g}]; pass latents through `prior.decode` first, "
            "and map images in [-1, 1] by (x + 1) / 2."
        )


def _centre_crop(images: Tensor, crop: tuple[int, int]) -> Tensor:
    """The middle (height, width) of the images, zero-padded where they are smaller."""
    height, width = images.shape[-2:]
    pad_h, pad_w = max(crop[0] - height, 0), max(crop[1] - width, 0)
    if pad_h or pad_w:
        images = F.pad(images, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        height, width = images.shape[-2:]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    return images[..., top : top + crop[0], left : left + crop[1]]


def _preprocessor_config(source: str) -> dict[str, Any] | None:
    """The contents of preprocessor_config.json of a folder or hub id; None where there is none."""
    if Path(source).is_dir():
        file: str | Path | None = Path(source) / "preprocessor_config.json"
        if not Path(str(file)).is_file():
            return None
    else:
        from transformers.utils import cached_file

        file = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        if file is None:
            return None
    try:
        return json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is damaged ({error}); save the model's image processor into its folder.") from error


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Inside, transformers loads weights without a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
