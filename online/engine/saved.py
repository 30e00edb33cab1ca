"""A saved surrogate with the feature map that it was fitted on, in one call: `tiltopt.load_surrogate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from botorch.models.model import Model
from PIL import Image
from torch import Tensor

from tiltopt.errors import ConfigError
from tiltopt.notebook import Shown
from tiltopt.online.engine.diffusion import DiffusionEngine
from tiltopt.online.engine.in_memory import check_same
from tiltopt.online.places import place_of
from tiltopt.online.settings.run import NEWEST, EvaluateSettings
from tiltopt.online.store import run_folder
from tiltopt.surrogates import io
from tiltopt.surrogates.features import FeatureMap


@dataclass(frozen=True, repr=False)
class SavedSurrogate(Shown):
    """A BoTorch model over the features of pictures.

    Args:
        folder: where it is saved.
        model: `posterior(X)` for X (..., q, d) float64; any acquisition function of BoTorch takes it.
        engine: of its run: prior and feature map, loaded when first needed.
    """

    folder: Path
    model: Model
    engine: DiffusionEngine

    @property
    def feature_map(self) -> FeatureMap:
        """Designs (n, 3, H, W) in [0, 1] and prompts -> features (n, d), differentiable."""
        return self.engine.feature_map

    def features(self, images: Sequence[Image.Image], prompts: Sequence[str] | None = None) -> Tensor:
        """(n, d) float64 features of pictures; prompts are needed where the run has `features.prompt_features`."""
        return self.engine.features(images, [""] * len(images) if prompts is None else prompts).double()

    def predict(self, images: Sequence[Image.Image], prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of each picture's reward, (n,) each, reward units."""
        with torch.no_grad():
            posterior: Any = self.model.posterior(self.features(images, prompts).unsqueeze(-2))
        return posterior.mean.flatten(), posterior.variance.clamp_min(0).sqrt().flatten()

    def about(self) -> dict[str, object]:
        known = io.describe(self.folder)
        return {"folder": self.folder, "model": repr(self.model), "features": known["features"]}


def load_surrogate(folder: str | Path, *, prior: Any = None) -> SavedSurrogate:
    """A run's surrogate, ready to predict and to be used in BoTorch.

    Args:
        folder: of a run, for its newest surrogate, or of one of its rounds, such as `checkpoints/demo/round_003`.
        prior: the one that the run was created with, where that was handed over.

    Raises:
        ConfigError: no surrogate there, no run around it, or another prior than the run's own. SurrogateError: it is
            damaged, or of other features.
    """
    place = newest_surrogate(place_of(folder))
    run = place.resolve().parent
    with run_folder.reading(run) as store:
        settings = run_folder.stored_settings(run, store)
    if prior is None and settings.prior.fingerprint:
        raise ConfigError(
            f"the prior of {run} was handed over in Python: load_surrogate({str(folder)!r}, prior=pipe), with the "
            f"pipeline of fingerprint {settings.prior.fingerprint}."
        )
    engine = DiffusionEngine(settings, prior=prior)
    check_same(settings.prior, engine.settings.prior, run)
    return SavedSurrogate(place, io.load(place, feature_id=engine.feature_id), engine)


def chosen_surrogates(evaluate: EvaluateSettings) -> dict[int, Path]:
    """{round: folder} of the surrogates that are to be evaluated, in order.

    Raises:
        ConfigError: none there, a round without one, or rounds asked of a single one.
    """
    folder, wanted = place_of(evaluate.surrogate), evaluate.numbers
    if evaluate.rounds == NEWEST:
        newest = newest_surrogate(folder)
        return {_round_of(newest): newest}
    if (folder / "surrogate.json").is_file():
        raise ConfigError(
            f"`evaluate.rounds`: expected the folder of a run, to choose among its surrogates, got {str(folder)!r}, "
            f"which is one of them; name {folder.parent}."
        )
    newest_surrogate(folder)
    found = {_round_of(place.parent): place.parent for place in sorted(folder.glob("round_*/surrogate.json"))}
    lacking = [str(number) for number in wanted if number not in found]
    if lacking:
        raise ConfigError(
            f"`evaluate.rounds`: expected rounds with a surrogate ({', '.join(map(str, found))}), got "
            f"{', '.join(lacking)}, which {folder} has none of."
        )
    return {number: found[number] for number in sorted(set(wanted)) or found}


def _round_of(folder: Path) -> int:
    """Of `round_NNN`; 0 for any other name."""
    name = folder.resolve().name.removeprefix("round_")
    return int(name) if name.isdecimal() else 0


def newest_surrogate(folder: Path) -> Path:
    """The folder itself where it holds a surrogate, else that of the run's newest one. Raises ConfigError."""
    found = (
        [folder]
        if (folder / "surrogate.json").is_file()
        else sorted(p.parent for p in folder.glob("round_*/surrogate.json"))
    )
    if not found:
        raise ConfigError(
            f"expected a run or the folder of a saved surrogate, such as checkpoints/<run>/round_004, got "
            f"{str(folder)!r}, which holds none."
        )
    return found[-1]
