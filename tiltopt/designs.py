"""Types of designs: what a black box is handed, how that lies in a file, and how it is shown.

A run draws events of its prior, tensors; its setting `design` says what they stand for:

- `image`: pictures, the default; a `PIL.Image.Image` each, as PNG.
- `tokens:20` or `tokens:ACGT`: sequences over an alphabet of so many tokens, or of these letters; an int64 array (L,)
  each, as JSON. Their events are one-hot rows, (L, S).
- `tensor`: arrays of any shape, float32 each, as `.npy`.

Store, ask and tell, export, import, resume, surrogates and report ask nothing else of a type than `DesignType`.
"""

from __future__ import annotations

import colorsys
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from PIL import Image, ImageDraw

from tiltopt.errors import ConfigError

if TYPE_CHECKING:  # reading and writing designs loads no torch
    from torch import Tensor

MAX_PIXELS = 64 * 10**6
"""Images that claim to be larger are refused before they are decoded."""

CELL, ROW = 18, 16
"""A token's side in a view, pixels; tokens of a line."""
LEAST_SIDE, MOST_SIDE = 96, 512
"""Pixels of the sides of a tensor's view."""


class DesignType(Protocol):
    """One type of design.

    suffix: of its files, with the dot.
    written: whether a design can stand in a cell of a table, as text; otherwise only its file can.
    """

    suffix: ClassVar[str]
    written: ClassVar[bool]

    def of(self, events: Tensor) -> list[Any]:
        """Decoded events (n, *event) -> n designs, on the CPU."""
        ...

    def events(self, designs: Sequence[Any]) -> Tensor:
        """Designs of one shape -> (n, *event) float32: the events that `of` makes these designs of."""
        ...

    def view(self, design: Any) -> Image.Image:
        """The picture of a design that a person sees."""
        ...

    def dump(self, design: Any) -> bytes:
        """The content of its file."""
        ...

    def load(self, content: bytes) -> Any:
        """A design from the content of its file. Raises ValueError where it holds none."""
        ...

    def text(self, design: Any) -> str:
        """How it is written into a cell of a table, where it can be."""
        ...

    def parse(self, text: str) -> Any:
        """What `text` wrote. Raises ValueError on anything else."""
        ...


def to_images(designs: Tensor) -> list[Image.Image]:
    """(n, 3, H, W) in [0, 1] -> n 8-bit RGB images. Raises PotentialError for anything else."""
    from tiltopt.vision import check_images

    check_images(designs)
    pixels = (designs.detach().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
    return [Image.fromarray(p) for p in pixels]


def to_designs(images: Sequence[Image.Image]) -> Tensor:
    """n RGB images of one size -> (n, 3, H, W) float32 in [0, 1]."""
    import torch

    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


class Filed:
    """Designs that only a file can hold."""

    written: ClassVar[bool] = False

    def text(self, design: Any) -> str:
        """See `DesignType`."""
        raise TypeError("this type of design is not written as text")

    def parse(self, text: str) -> Any:
        """See `DesignType`."""
        raise TypeError("this type of design is not written as text")


class Pictures(Filed):
    """8-bit RGB images, of events (3, H, W) in [0, 1]."""

    suffix: ClassVar[str] = ".png"

    def of(self, events: Tensor) -> list[Image.Image]:
        """See `to_images`."""
        return to_images(events)

    def events(self, designs: Sequence[Image.Image]) -> Tensor:
        """See `to_designs`."""
        return to_designs(designs)

    def view(self, design: Image.Image) -> Image.Image:
        """The picture itself."""
        return design

    def dump(self, design: Image.Image) -> bytes:
        """PNG."""
        buffer = io.BytesIO()
        design.save(buffer, "PNG")
        return buffer.getvalue()

    def load(self, content: bytes) -> Image.Image:
        """See `DesignType`; one of more than `MAX_PIXELS` is refused before it is decoded."""
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_PIXELS:
                    told = f"{image.width} x {image.height} pixels"
                    raise ValueError(f"{told}, more than {MAX_PIXELS // 10**6} megapixels")
                image.load()
                return image
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from error


class Tokens:
    """Sequences of tokens 0 .. S - 1, of events (L, S).

    Args:
        size: S. alphabet: S different characters for them; "" for numbers.
    """

    suffix: ClassVar[str] = ".json"
    written: ClassVar[bool] = True

    def __init__(self, size: int, alphabet: str = "") -> None:
        self.size, self.alphabet = size, alphabet

    def of(self, events: Tensor) -> list[np.ndarray]:
        """The likeliest token of every place."""
        return list(events.detach().argmax(dim=-1).cpu().numpy())

    def events(self, designs: Sequence[Any]) -> Tensor:
        """One-hot rows."""
        import torch

        return torch.from_numpy(np.eye(self.size, dtype=np.float32)[np.stack([self.checked(d) for d in designs])])

    def checked(self, design: Any) -> np.ndarray:
        """A sequence as an int64 array (L,). Raises ValueError where it is none, and names the unknown token."""
        tokens = np.asarray(design)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise ValueError(f"expected a sequence of integers, got shape {tokens.shape} of {tokens.dtype}")
        unknown = tokens[(tokens < 0) | (tokens >= self.size)]
        if len(unknown):
            raise ValueError(f"expected tokens 0 to {self.size - 1}, got {unknown[0]}")
        return tokens.astype(np.int64)

    def view(self, design: Any) -> Image.Image:
        """A cell for each token, in a hue of its own, lines of `ROW`."""
        tokens = self.checked(design)
        lines = math.ceil(len(tokens) / ROW)
        picture = Image.new("RGB", (CELL * min(ROW, len(tokens)), CELL * lines), "white")
        draw = ImageDraw.Draw(picture)
        for i, token in enumerate(tokens.tolist()):
            x, y = i % ROW * CELL, i // ROW * CELL
            colour = tuple(round(255 * c) for c in colorsys.hls_to_rgb(token / self.size, 0.8, 0.6))
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=colour)
            draw.text((x + CELL // 2, y + CELL // 2), self._name(token), fill="black", anchor="mm")
        return picture

    def dump(self, design: Any) -> bytes:
        """A list of integers."""
        return json.dumps(self.checked(design).tolist()).encode()

    def load(self, content: bytes) -> np.ndarray:
        """See `DesignType`."""
        try:
            found = json.loads(content)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a list of integers, got {error}") from error
        if not isinstance(found, list):
            raise ValueError(f"expected a list of integers, got {type(found).__name__}")
        return self.checked(found)

    def text(self, design: Any) -> str:
        """Letters in a row, or numbers with spaces between."""
        return ("" if self.alphabet else " ").join(map(self._name, self.checked(design).tolist()))

    def parse(self, text: str) -> np.ndarray:
        """See `DesignType`."""
        if not self.alphabet:
            parts = text.split()
            if not all(part.isdecimal() for part in parts):
                raise ValueError(f"expected numbers with spaces between, got {text!r}")
            return self.checked([int(part) for part in parts])
        if unknown := [letter for letter in text if letter not in self.alphabet]:
            raise ValueError(f"expected letters of {self.alphabet}, got {unknown[0]!r}")
        return self.checked([self.alphabet.index(letter) for letter in text])

    def _name(self, token: int) -> str:
        return self.alphabet[token] if self.alphabet else str(token)


class Tensors(Filed):
    """Arrays of one shape, float32."""

    suffix: ClassVar[str] = ".npy"

    def of(self, events: Tensor) -> list[np.ndarray]:
        """See `DesignType`."""
        return list(events.detach().float().cpu().numpy())

    def events(self, designs: Sequence[Any]) -> Tensor:
        """See `DesignType`."""
        import torch

        return torch.from_numpy(np.stack([self.checked(design) for design in designs]))

    def checked(self, design: Any) -> np.ndarray:
        """As float32. Raises ValueError where it is not finite."""
        found = np.asarray(design)
        if found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            raise ValueError(f"expected finite numbers, got {found.dtype}, not all of them finite")
        return found.astype(np.float32)

    def view(self, design: Any) -> Image.Image:
        """A vector as a line; anything else as its matrices side by side, the lowest value black, the highest white."""
        values = self.checked(design)
        return _line(values.reshape(-1)) if values.ndim < 2 else _grey(values)

    def dump(self, design: Any) -> bytes:
        """NumPy's own format."""
        buffer = io.BytesIO()
        np.save(buffer, self.checked(design), allow_pickle=False)
        return buffer.getvalue()

    def load(self, content: bytes) -> np.ndarray:
        """See `DesignType`."""
        try:
            return self.checked(np.load(io.BytesIO(content), allow_pickle=False))
        except (OSError, EOFError) as error:
            raise ValueError(str(error)) from error


def _unit(values: np.ndarray) -> np.ndarray:
    """The same from 0 to 1; .5 where all are equal."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)


def _line(values: np.ndarray) -> Image.Image:
    picture = Image.new("RGB", (2 * LEAST_SIDE, LEAST_SIDE), "white")
    x = np.linspace(4, 2 * LEAST_SIDE - 5, len(values)) if len(values) > 1 else np.array([LEAST_SIDE - 0.5])
    points = list(zip(x.tolist(), (LEAST_SIDE - 5 - (LEAST_SIDE - 10) * _unit(values)).tolist(), strict=True))
    draw = ImageDraw.Draw(picture)
    draw.line(points, fill="black", width=2)
    for at in points if len(points) <= ROW else ():
        draw.ellipse((at[0] - 2, at[1] - 2, at[0] + 2, at[1] + 2), fill="black")
    return picture


def _grey(values: np.ndarray) -> Image.Image:
    sheets = _unit(values).reshape(-1, *values.shape[-2:])
    apart = np.pad(sheets, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    joined = apart.transpose(1, 0, 2).reshape(values.shape[-2], -1)
    picture = Image.fromarray((255 * joined[:, :-1]).round().astype(np.uint8)).convert("RGB")
    scale = max(1, min(MOST_SIDE // max(picture.size), math.ceil(LEAST_SIDE / max(1, min(picture.size)))))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


IMAGES = Pictures()

DESIGNS: dict[str, Callable[[str], DesignType]] = {
    "image": lambda given: _alone("image", given, IMAGES),
    "tokens": lambda given: _tokens(given),
    "tensor": lambda given: _alone("tensor", given, Tensors()),
}
"""Types by the name before the colon of the setting `design`, made from what stands behind it ("" without one). A type
of one's own is entered here before its run is made or opened."""


def _alone(name: str, given: str, made: DesignType) -> DesignType:
    if given:
        raise ConfigError(f"`design`: expected {name!r} alone, got {name}:{given}.")
    return made


def _tokens(given: str) -> Tokens:
    if given.isdecimal() and int(given) >= 2:
        return Tokens(int(given))
    if len(set(given)) != len(given) or len(given) < 2 or given.isdecimal():
        raise ConfigError(
            "`design`: expected how many tokens there are, 2 or more (tokens:20), or different letters for them "
            f"(tokens:ACGT), got tokens:{given}."
        )
    return Tokens(len(given), given)


def design_type(said: str) -> DesignType:
    """The type that the setting `design` names.

    Raises:
        ConfigError: an unknown type, or one that cannot be made of what stands behind the colon.
    """
    name, _, given = said.partition(":")
    if name not in DESIGNS:
        raise ConfigError(f"`design`: expected one of {', '.join(DESIGNS)}, such as tokens:20, got {said!r}.")
    return DESIGNS[name](given)
