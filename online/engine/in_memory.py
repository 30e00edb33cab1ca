"""A prior that was handed over in Python: taken as it stands, and described by the settings of its run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from tiltopt.errors import ConfigError
from tiltopt.online.settings.run import PriorSettings
from tiltopt.samplers.diffusers_prior import as_prior
from tiltopt.samplers.prior import Prior
from tiltopt.surrogates.features import LatentEncoder

IN_MEMORY = "memory"
"""`prior.path` of a prior that was handed over in Python."""


def held_prior(prior: Any, settings: PriorSettings) -> Any:
    """A prior that was handed over, in its own precision and on its own device.

    Raises:
        ConfigError: settings that only a path can have, or a prior without a fingerprint.
    """
    if settings.lora or settings.variant:
        raise ConfigError("`prior.lora`, `prior.variant`: load these into the pipeline before it is handed over.")
    mine = isinstance(prior, Prior)
    own = ("variant", "lora", "dtype", "vae_dtype")
    held = as_prior(prior, **({} if mine else {k: v for k, v in settings.arguments().items() if k not in own}))
    if not hasattr(held, "fingerprint"):
        raise ConfigError(
            f"`prior`: expected one with a `fingerprint`, by which the run knows it again, got {type(held).__name__}."
        )
    return held


def named(settings: PriorSettings, held: Any) -> PriorSettings:
    """The settings as they describe a prior that was handed over."""
    said = getattr(held, "describe", dict)() | {"num_steps": held.num_steps}
    if not any(held.std(k) > 0 for k in range(held.num_steps)):
        said["eta"] = 0.0
    same = ("num_steps", "eta", "renoise", "guidance_scale", "negative_prompt", "dtype", "vae_dtype")
    found = {key: said[key] for key in same if key in said and said[key] != "float64"}
    return replace(settings, path=IN_MEMORY, fingerprint=held.fingerprint, **found)


def check_same(own: PriorSettings, held: PriorSettings, of: object) -> None:
    """Raises ConfigError where a prior that was handed over is not the run's own.

    Args:
        own: of the run.
        held: the settings as `named` by what was handed over.
        of: what the message calls the run.
    """
    if held.fingerprint != own.fingerprint:
        had = f"was made with the prior of fingerprint {own.fingerprint}" if own.fingerprint else f"loads {own.path!r}"
        raise ConfigError(
            f"`prior`: {of} {had}, got one of fingerprint {held.fingerprint}: other weights, adapters or noise levels. "
            "Go on with the run's own, or start another run."
        )


class Pixels:
    """Pictures as their own latents, in [-1, 1]: the `LatentEncoder` of a prior that has no autoencoder.

    Args:
        image_size: (height, width), pixels.
    """

    encoder_id = "pixels"

    def __init__(self, image_size: tuple[int, int]) -> None:
        self.image_size, self.event_shape = image_size, torch.Size((3, *image_size))

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> the same in [-1, 1]."""
        return images * 2 - 1


def encoder_of(prior: Any) -> LatentEncoder:
    """What turns pictures into latents: the prior's autoencoder, or `Pixels`.

    Raises:
        ConfigError: its designs are no pictures.
    """
    if hasattr(prior, "encode_image"):
        return prior
    with torch.no_grad():
        shape = tuple(prior.decode(prior.initial(1, Generator().manual_seed(0))).shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ConfigError(
            f"`prior`: this run asks about pictures, (n, 3, H, W) in [0, 1], and a {type(prior).__name__} that makes "
            f"{shape} was given. Let its `decode` make pictures, or say what it makes: design='tensor', 'tokens:20'."
        )
    return Pixels((shape[2], shape[3]))
