"""What plain chains of the prior look like on the way: the ground on which every round's tempering is calibrated.

Round 0 draws plain chains anyway. At about a dozen steps their clean look-aheads x̂0(x_k) are turned into features and
kept; a later surrogate then needs no new chain to know how its potential behaves along the denoising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tiltopt.errors import StoreError
from tiltopt.online.store.files import write_atomic
from tiltopt.samplers.tempering import Calibration, learn

FILE = "pilot.safetensors"


@dataclass(frozen=True)
class FeaturePilot:
    """Features along M plain chains.

    Args:
        steps: (S,) int64, the steps k that were kept, increasing.
        num_steps: (1,) int64, K.
        features: (S, M, d) float32, features of decode(x̂0(x_k)).
        final: (M, d) float32, features of decode(x_K).
        distance: (S,) float64, mean over chains of ||x_K - x̂0(x_k)||^2.
        prompt: (M,) int64, the number of each chain's prompt; None in files of older versions, which did not keep it:
            all chains then count as one prompt's.
    """

    steps: Tensor
    num_steps: Tensor
    features: Tensor
    final: Tensor
    distance: Tensor
    prompt: Tensor | None = None

    @classmethod
    def of(
        cls,
        steps: Sequence[int],
        num_steps: int,
        rows: Sequence[tuple[Tensor, Tensor, Tensor]],
        prompts: Sequence[str],
    ) -> FeaturePilot:
        """From what was kept of each chain.

        Args:
            steps, num_steps: as in the class.
            rows: of each chain its features (S, d), the distances ||x_K - x̂0(x_k)||^2 (S,) and the final features (d,).
            prompts: of each chain.
        """
        features, gaps, final = (torch.stack(column) for column in zip(*rows, strict=True))
        unique = list(dict.fromkeys(prompts))
        numbers = torch.tensor([unique.index(prompt) for prompt in prompts])
        features = features.transpose(0, 1).contiguous()
        return cls(torch.tensor(steps), torch.tensor([num_steps]), features, final, gaps.mean(dim=0), numbers)

    def save(self, folder: Path) -> None:
        """Write `pilot.safetensors`, whole or not at all."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        content = save({name: value.contiguous() for name, value in kept.items() if value is not None})
        write_atomic(folder / FILE, lambda file: file.write(content))

    @classmethod
    def load(cls, folder: Path) -> FeaturePilot | None:
        """The pilot of a run, or None when there is none yet.

        Raises:
            StoreError: the file is damaged; it can be deleted, the pilot is then drawn again.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**load(path.read_bytes()))
        except (SafetensorError, TypeError, OSError) as error:
            raise StoreError(f"{path} is damaged ({error}); delete it, and the same chains are drawn again.") from error

    def calibrate(self, u: Tensor, u_final: Tensor) -> Calibration:
        """The tempering schedule for a potential.

        Args:
            u: (S, M) nats, log G at `features`.
            u_final: (M,) nats, log G at `final`.
        """
        prompts = [0] * len(u_final) if self.prompt is None else self.prompt.tolist()
        return learn(u, u_final, self.distance, (self.steps / self.num_steps).tolist(), prompts)
