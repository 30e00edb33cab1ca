"""Queries that start from earlier designs: from which law, by which sampler, and which design each came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiltopt.designs import IMAGES, DesignType, to_designs
from tiltopt.errors import ConfigError, PriorError
from tiltopt.online.queries import FROM_NOISE, Ask, Origin, Start
from tiltopt.online.seeds import generator
from tiltopt.samplers import BestOfN, Demon, Sampler
from tiltopt.samplers.micro_batch import RowLimit
from tiltopt.samplers.restart import Restart
from tiltopt.samplers.twisted import Tempered


def check_noise(sampler: Any, prior: Any) -> None:
    """Raises ConfigError for a sampler that guides through noise, on a chain that has none."""
    if sampler.needs_noise and not any(prior.std(k) > 0 for k in range(prior.num_steps)):
        raise ConfigError(
            f"`sampler.name`: {type(sampler).__name__} acts through the noise of steps, and none of the "
            f"{prior.num_steps} steps of this prior has any. Set more prior.num_steps and prior.eta > 0, or "
            "sampler.name=best_of_n."
        )


def law_of(prior: Any, start: Start | None) -> Any:
    """What queries start from, a `Prior`: the one given where it is noise.

    Raises:
        PriorError: the prior does not say which Gaussian chain it runs.
    """
    if start is None or start.k0 == 0:
        return prior
    if not hasattr(prior, "chain"):
        raise PriorError(
            f"expected a prior with a Gaussian `chain`, which could be entered at step {start.k0}, got "
            f"{type(prior).__name__}; start from noise (search.operators = 'global', strength = 1)."
        )
    latents = start.latents.to(getattr(prior, "device", "cpu"), getattr(prior, "latent_dtype", torch.float32))
    return Restart(prior, latents, start.k0, torch.tensor(start.weights, dtype=torch.float64))


def sampler_of(
    sampler: Any, num_particles: int, start: Start | None, *, prior: Any, rows: RowLimit
) -> tuple[Sampler, int]:
    """The sampler and the number of particles of tilted queries that start from there.

    Where no step with noise is left, nothing can be guided: the particles, which differ in the noise that they were
    given, are weighed.

    Args:
        prior: with the whole chain.
        rows: per network call.
    """
    if start is None:
        return sampler, num_particles
    if start.operator == "pool":
        return BestOfN(micro_batch=rows), start.pool
    steps = prior.num_steps
    acts = sampler.needs_noise or isinstance(sampler, Demon)  # which walks a chain that is entered half-way
    if acts and not any(prior.std(k) > 0 for k in range(start.k0, steps)):
        return BestOfN(micro_batch=rows), num_particles
    return (sampler.entered_at(start.k0, steps) if isinstance(sampler, Tempered) else sampler), num_particles


def origin_of(prior: Any, ask: Ask, num_particles: int, root: int) -> Origin:
    """Where a query came from that was drawn by `num_particles` particles and descends from the first one `root`."""
    if ask.start is None:
        return FROM_NOISE
    law = law_of(prior, ask.start)
    if not isinstance(law, Restart):
        return ask.start.origin(0)
    return ask.start.origin(int(law.choose(num_particles, generator(ask.seed, "sample"))[root]))


def latents_of(prior: Any, designs: Sequence[Any], kind: DesignType) -> Tensor:
    """(n, *event) float32 on the CPU, clean latents of designs; pictures may be of any size.

    Raises:
        PriorError: the prior has no encoder.
    """
    if kind is not IMAGES:
        events = kind.events(designs)
        if events.shape[1:] == prior.event_shape:  # designs are events
            return events
        raise PriorError(f"{type(prior).__name__} decodes its events, and no latents were kept; nothing was asked.")
    if not hasattr(prior, "encode_image"):
        raise PriorError(f"{type(prior).__name__} cannot encode images, and no latents were kept; nothing was asked.")
    size = tuple(prior.image_size)[::-1]  # PIL says width first
    shown = [image if image.size == size else image.convert("RGB").resize(size) for image in designs]
    with torch.no_grad():
        return torch.cat([prior.encode_image(to_designs([image]).to(prior.device)).float().cpu() for image in shown])
