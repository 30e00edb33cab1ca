"""The DDIM chain: a noise schedule and a step list turned into Gaussian kernels.

With abar_k the signal power at step k and eps the network's noise estimate, kernel k is (DDIM, eq. 12 and 16)

    x0     = (x - sqrt(1 - abar_k) eps) / sqrt(abar_k)
    s_k    = eta sqrt((1 - abar_{k+1}) / (1 - abar_k)) sqrt(1 - abar_k / abar_{k+1})
    mean   = sqrt(abar_{k+1}) x0 + sqrt(1 - abar_{k+1} - s_k^2) eps

`eta = 1` is ancestral (DDPM-like) sampling, `eta = 0` deterministic. Song, Meng, Ermon, "Denoising Diffusion Implicit
Models" (arXiv 2010.02502). Step lists, offsets and the last step follow diffusers' DDIMScheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tiltopt.errors import PriorError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)


@dataclass(frozen=True)
class DDIMChain:
    """Coefficients of K kernels, from the noisiest step to the last.

    Args:
        timesteps: K training timesteps, decreasing, 0 .. T-1.
        alphas_cumprod: abar over the T training timesteps, decreasing, in [0, 1].
        abar: K signal powers at the start of each kernel.
        abar_next: K signal powers at its end.
        std: K standard deviations; 0 is a deterministic kernel.
        eta: the noise level that made `std`.
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample".
        clip: x0 is clipped to [-clip, clip]; None for no clipping. Where it clips, x0 is constant and has no gradient.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    abar: tuple[float, ...]
    abar_next: tuple[float, ...]
    std: tuple[float, ...]
    eta: float
    prediction_type: str
    clip: float | None = None

    @property
    def num_steps(self) -> int:
        """K, the number of kernels."""
        return len(self.timesteps)

    @classmethod
    def from_scheduler(cls, scheduler: Any, num_steps: int, eta: float) -> DDIMChain:
        """The chain that `DDIMScheduler.from_config(scheduler.config)` walks in `num_steps` steps.

        A scheduler whose configuration says nothing of `clip_sample` does not clip (DDIMScheduler alone would, which
        is wrong for latents).

        Args:
            scheduler: any diffusers scheduler over a discrete variance-preserving schedule.
            num_steps: number of kernels, 1 .. T.
            eta: in [0, 1].
        Raises:
            PriorError: the scheduler is not such a one, or the numbers are out of range.
        """
        if not 0.0 <= eta <= 1.0:
            raise PriorError(f"`eta` must lie in [0, 1] (0 deterministic, 1 ancestral), got {eta}")
        ddim = as_ddim(scheduler)
        train = int(ddim.config.num_train_timesteps)
        if not 1 <= num_steps <= train:
            raise PriorError(f"`num_steps` must lie in 1 .. {train} (the training timesteps), got {num_steps}")
        ddim.set_timesteps(num_steps)
        timesteps = tuple(int(t) for t in ddim.timesteps)
        if min(timesteps) < 0 or max(timesteps) >= train:
            raise PriorError(
                f"timesteps must lie in 0 .. {train - 1}, got {min(timesteps)} .. {max(timesteps)} from spacing "
                f"{ddim.config.timestep_spacing!r}, steps_offset {ddim.config.steps_offset} and {num_steps} steps; "
                "use another number of steps"
            )
        table = [float(a) for a in ddim.alphas_cumprod]
        stride = train // num_steps
        abar = tuple(table[t] for t in timesteps)
        abar_next = tuple(table[t - stride] if t >= stride else float(ddim.final_alpha_cumprod) for t in timesteps)
        if ddim.config.prediction_type == "epsilon" and min(abar) <= 0.0:
            raise PriorError(
                "a schedule that ends without signal (rescale_betas_zero_snr) leaves x0 undefined for "
                "prediction_type='epsilon'; expected 'v_prediction' or 'sample', or timestep_spacing='leading'"
            )
        std = tuple(eta * _ddpm_std(a, b) for a, b in zip(abar, abar_next, strict=True))
        clip = float(ddim.config.clip_sample_range) if ddim.config.clip_sample else None
        return cls(timesteps, tuple(table), abar, abar_next, std, eta, ddim.config.prediction_type, clip)

    def split(self, output: Tensor, x: Tensor, abar: float) -> tuple[Tensor, Tensor]:
        """(x0, eps) from what the network said of x at signal power `abar`; x0 is not clipped.

        Args:
            output: (n, *event), the network's output, in units of its prediction type.
            x: (n, *event), variance-preserving: x = sqrt(abar) x0 + sqrt(1 - abar) eps.
            abar: in [0, 1].
        """
        signal, noise = abar**0.5, (1.0 - abar) ** 0.5
        if self.prediction_type == "epsilon":
            return (x - noise * output) / signal, output
        if self.prediction_type == "v_prediction":
            return signal * x - noise * output, signal * output + noise * x
        return output, (x - signal * output) / max(noise, 1e-12)

    def step(self, k: int, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, x0) of kernel k for x of shape (n, *event), from the network's `output` there."""
        x0, eps = self.split(output, x, self.abar[k])
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        direction = max(1.0 - self.abar_next[k] - self.std[k] ** 2, 0.0) ** 0.5
        return self.abar_next[k] ** 0.5 * x0 + direction * eps, x0


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """A DDIMScheduler over the same noise schedule as `scheduler`, or a PriorError that says why there is none."""
    name, config = type(scheduler).__name__, dict(scheduler.config)
    flow = "flow" in name.lower() or config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type", ""))
    if flow:
        raise PriorError(
            f"flow-matching schedulers cannot be expressed as a DDIM chain, got {name}; use a diffusion model with a "
            "variance-preserving noise schedule (Stable Diffusion 1.x, 2.x, SDXL, LCM)"
        )
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise PriorError(
            f"expected a scheduler with a discrete variance-preserving schedule (alphas_cumprod), got {name}; use a "
            "pipeline with DDIM, PNDM, Euler, DPM-Solver or LCM scheduling"
        )
    if config.get("thresholding"):
        raise PriorError(
            f"dynamic thresholding makes x0 depend on the whole picture's quantile, got thresholding=True in {name}; "
            "set it to False"
        )
    # from_config puts DDIM's defaults in place of the defaults of another class; these must stay as they are
    kept = {key: config[key] for key in _SCHEDULE_KEYS if key in config}
    try:
        ddim = DDIMScheduler.from_config(config, **({"clip_sample": False} | kept))
    except (NotImplementedError, ValueError, TypeError) as error:
        raise PriorError(f"the configuration of {name} cannot be read as a DDIM schedule: {error}") from error
    if ddim.config.prediction_type not in PREDICTION_TYPES:
        raise PriorError(f"`prediction_type` must be one of {PREDICTION_TYPES}, got {ddim.config.prediction_type!r}")
    theirs, ours = scheduler.alphas_cumprod.double().cpu(), ddim.alphas_cumprod.double()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-6):
        raise PriorError(f"{name} alters its noise schedule in a way that DDIM does not; use a DDIM, PNDM or Euler one")
    return ddim


def _ddpm_std(abar: float, abar_next: float) -> float:
    """Standard deviation of the DDPM posterior from signal power `abar` to `abar_next` >= abar."""
    if abar >= 1.0:
        return 0.0
    return max((1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next), 0.0) ** 0.5
