"""Names of the parts that the features of an image can be made of; light enough for settings to check."""

from __future__ import annotations

from tiltopt.errors import ConfigError

PARTS = ("latent_stats", "patch_stats", "patch_mean", "projection")
DEFAULT_KIND = "latent_stats+patch_stats"


def parse_kind(kind: str) -> tuple[str, ...]:
    """The parts of a kind such as "latent_stats+patch_stats"; "both" is "patch_mean+projection".

    Raises:
        ConfigError: an unknown part, one named twice, or none.
    """
    parts = tuple(("patch_mean+projection" if kind == "both" else kind).split("+"))
    if any(part not in PARTS for part in parts) or len(set(parts)) != len(parts):
        raise ConfigError(
            f'`kind` of features must be one or several of {", ".join(PARTS)}, joined by "+", each once, got {kind!r}.'
        )
    return parts
