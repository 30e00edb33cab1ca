"""How a twisted flow looks at its potential along the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tiltopt.errors import ConfigError

Gradient = Literal["full", "x0", "none"]
Accumulate = Literal["difference", "max", "sum"]


@dataclass(frozen=True)
class TwistOptions:
    """How the potential is looked at along the chain.

    Args:
        gradient: `full` through the denoiser; `x0` at x0_hat only, times `x0_factor`; `none`: no drift.
        gradient_every: a new gradient every so many steps; in between the last one is held and scaled by lambda_k.
        potential_every: a new potential every so many steps, held likewise. The last step always evaluates it.
        accumulate: `difference` makes psi_k the tempered potential itself; `max` and `sum` multiply the running
            maximum or sum into the weights at each step and divide them out at the last (FK steering).
        nan: what a NaN or +inf potential does: `raise`, or `kill` the particle (G = 0 on its whole path).
        guidance_decoder: events -> designs, used before the last step only; None: the prior's own.
        x0_factor: (k, K) -> factor from the gradient at x0_hat to the gradient at x_k; used by gradient="x0".
        max_shift: soft bound on |s_k grad psi_k|, the shift of a proposal in standard deviations of its noise:
            shift / sqrt(1 + |shift|^2 / max_shift^2). Beyond about one, psi is no longer linear over the kernel, and
            the drift overshoots. None: no bound.
        weighted: False drops every weight (guidance); the result is then biased.
    """

    gradient: Gradient = "full"
    gradient_every: int = 1
    potential_every: int = 1
    accumulate: Accumulate = "difference"
    nan: Literal["raise", "kill"] = "raise"
    guidance_decoder: Callable[[Tensor], Tensor] | None = None
    x0_factor: Callable[[int, int], float] | None = None
    max_shift: float | None = None
    weighted: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "gradient": ("full", "x0", "none"),
            "accumulate": ("difference", "max", "sum"),
            "nan": ("raise", "kill"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.max_shift is not None and not self.max_shift > 0:
            raise ConfigError(f"`max_shift` must be positive or None, got {self.max_shift}.")
        for name in ("gradient_every", "potential_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
