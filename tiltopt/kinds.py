"""Names of the blocks that the features of an image can be made of; light enough for settings to check."""

from __future__ import annotations

from tiltopt.errors import ConfigError

PARTS: dict[str, str] = {
    "latent_stats": "latents",
    "layout_2": "latents",
    "layout_4": "latents",
    "layout_8": "latents",
    "colour_histogram": "pixels",
    "spectrum": "pixels",
    "spectrum_where": "pixels",
    "patch_stats": "clip",
    "patch_mean": "clip",
    "projection": "clip",
    "denoiser": "network",
}
"""Each block and what it is computed from: the prior's latents, the pixels, a CLIP image tower, or the prior's network
(from latents)."""

DEFAULT_KIND = "bank"
BANK = "latent_stats+layout_2+layout_4+layout_8+colour_histogram+spectrum+spectrum_where+patch_stats+projection"
ALIASES = {"both": "patch_mean+projection", "bank": BANK}
"""Short names: "bank" is every cheap block that shares nothing with another one."""


def parse_kind(kind: str) -> tuple[str, ...]:
    """The blocks of a kind such as "latent_stats+patch_stats", or of a short name.

    Raises:
        ConfigError: an unknown block, one named twice, or none.
    """
    parts = tuple(ALIASES.get(kind, kind).split("+"))
    if any(part not in PARTS for part in parts) or len(set(parts)) != len(parts):
        raise ConfigError(
            f'`kind` of features must be one or several of {", ".join(PARTS)}, joined by "+", each once, or one of '
            f"{', '.join(ALIASES)}, got {kind!r}."
        )
    return parts


def needs(kind: str) -> set[str]:
    """What a kind is computed from: "latents", "pixels", "clip", "network"."""
    return {PARTS[part] for part in parse_kind(kind)}
