"""Tempering: how strongly each step of the chain believes its look-ahead potential, lambda_0 .. lambda_K = 1.

An early x0_hat says little about the final design. Twisting by its full potential spends the particles on noise;
twisting by none of it wastes the guidance. A schedule is a sequence of K + 1 numbers; `Calibration` learns one from
plain prior chains, `Adaptive` looks for one on the run.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tiltopt.errors import ConfigError
from tiltopt.samplers.resampling import scale_for_ess

Factors = Sequence[float]
ScheduleFn = Callable[[int, int], float]
Tempering = Literal["calibrated", "exp", "polynomial", "adaptive", "none"]


def exponential(k: int, num_steps: int, gamma: float | None = None) -> float:
    """min((1 + gamma)^k - 1, 1), the schedule of DAS (arXiv 2501.05803, section 4.2).

    gamma None: the value that reaches 1 after 88 % of the steps, which is the published .008 at 100 steps.
    """
    rate = 2.0 ** (1.0 / (0.88 * num_steps)) - 1.0 if gamma is None else gamma
    return min((1.0 + rate) ** k - 1.0, 1.0)


def polynomial(k: int, num_steps: int, degree: float = 2.0) -> float:
    """(k / K)^degree."""
    return (k / num_steps) ** degree


def tabulate(fn: ScheduleFn, num_steps: int) -> list[float]:
    """lambda_0 .. lambda_K of a schedule function, with lambda_K = 1 whatever the function says.

    Raises:
        ConfigError: a value is negative or not finite.
    """
    values = [float(fn(k, num_steps)) for k in range(num_steps)] + [1.0]
    for k, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"`tempering` must give finite lambda_k >= 0, got {value} at step {k} of {num_steps}.")
    return values


@dataclass(frozen=True)
class Adaptive:
    """lambda_k as large as the effective sample size allows, found by bisection for all prompts at once.

        lambda_k = max { lambda in [lambda_{k-1}, 1] : ESS(log w + lambda log G) >= target * P }

    It hardly tempers: early look-aheads are nearly constant over particles, so lambda jumps to 1 after a step or two.
    Kept for comparison. exp(log_z) stays unbiased, because psi_k is subtracted again at the next step.

    Args:
        target: fraction of P, in (0, 1).
        iterations: halvings of the interval.
    """

    target: float = 0.5
    iterations: int = 40

    def temperature(self, log_w: Tensor, log_g: Tensor, before: Tensor) -> Tensor:
        """lambda_k for each prompt.

        Args:
            log_w: (B, P), nats, log-weights without psi_k.
            log_g: (B, P), nats, finite.
            before: (B,), lambda_{k-1}.
        """
        return scale_for_ess(log_w, log_g, self.target * log_w.shape[-1], before, self.iterations)


@dataclass(frozen=True)
class Calibration:
    """A learnt schedule, lambda(k, K) = 1 / (1 + kappa c(k / K)); callable as (k, K).

    Args:
        kappa: curvature of log G per unit of relative uncertainty, >= 0; 0 does not temper at all.
        fractions: where c is known, increasing, in [0, 1], the last one 1.
        c: mean squared error of x0_hat relative to that at the first step, decreasing to 0; linear in between.
    """

    kappa: float
    fractions: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.fractions) != len(self.c) or len(self.c) < 2:
            raise ConfigError(
                f"`fractions` and `c` must have one length of at least 2, got {len(self.fractions)}, {len(self.c)}."
            )
        if not (math.isfinite(self.kappa) and self.kappa >= 0):
            raise ConfigError(f"`kappa` must be finite and >= 0, got {self.kappa}.")

    def uncertainty(self, k: int, num_steps: int) -> float:
        """c at k / K, linear between the steps where it was measured."""
        at = min(max(k / num_steps, self.fractions[0]), self.fractions[-1])
        right = min(max(bisect.bisect_right(self.fractions, at), 1), len(self.fractions) - 1)
        x0, x1 = self.fractions[right - 1], self.fractions[right]
        weight = (at - x0) / (x1 - x0)
        return (1 - weight) * self.c[right - 1] + weight * self.c[right]

    def __call__(self, k: int, num_steps: int) -> float:
        return 1.0 / (1.0 + self.kappa * self.uncertainty(k, num_steps))


KAPPAS = (0.0, *torch.logspace(math.log10(0.02), math.log10(500.0), 50, dtype=torch.float64).tolist())


def usable_scale(u_final: Tensor, goal: float | None = None) -> float:
    """The largest s <= 1 with ESS(softmax(s u)) >= goal: how much of the tilt M prior chains can show.

    Args:
        u_final: (M,), nats.
        goal: chains; None: max(8, M / 16), but no more than M / 2: all of them show equal weights alone, from which
            rounding would choose kappa.
    """
    num_chains = len(u_final)
    goal = min(max(8.0, num_chains / 16), num_chains / 2) if goal is None else min(goal, float(num_chains))
    u = u_final.unsqueeze(0)
    return float(scale_for_ess(torch.zeros_like(u), u, goal, u.new_zeros(1), 50))


def criterion(u: Tensor, u_final: Tensor, c: Tensor, *, scale: float, kappas: Sequence[float] = KAPPAS) -> Tensor:
    """How badly tempered look-aheads predict the final tilt of plain prior chains, for each kappa.

        L(kappa) = mean over k of { log mean_j exp(v_kj) - sum_j w_j v_kj },  v_kj = s u_kj / (1 + s kappa c_k)

    Up to a constant, the divergence of the tempered look-ahead tilt of the chains from their final tilt,
    w = softmax(s u_K).

    Args:
        u: (S, M), nats, log G(x0_hat) at S steps of M prior chains.
        u_final: (M,), nats, log G of the chains' clean ends.
        c: (S,), relative uncertainty of x0_hat at those steps, in [0, 1].
        scale: s, in (0, 1].

    Returns:
        (len(kappas),), nats per step, float64.
    """
    u, u_final, c = u.double(), u_final.double(), c.double()
    weights = torch.softmax(scale * u_final, dim=0)
    values = torch.tensor(kappas, dtype=torch.float64)
    tempered = scale * u / (1 + scale * values[:, None, None] * c[:, None])
    normaliser = torch.logsumexp(tempered, dim=-1) - math.log(len(u_final))
    return (normaliser - (weights * tempered).sum(-1)).mean(-1)


def relative_uncertainty(distance: Tensor) -> Tensor:
    """c_k from the mean squared errors of x0_hat at S steps, (S,): relative to the first, made monotone."""
    return (distance.double() / distance[0].double().clamp_min(1e-300)).cummin(0).values


def learn(
    u: Tensor, u_final: Tensor, distance: Tensor, fractions: Sequence[float], prompts: Sequence[Hashable]
) -> Calibration:
    """The schedule that plain prior chains teach about a potential; the one place where kappa is fitted.

    Args:
        u: (S, M), nats, log G(x0_hat) at S steps of M prior chains.
        u_final: (M,), nats, log G of the chains' clean ends.
        distance: (S,), mean squared error of x0_hat at those steps.
        fractions: S numbers k / K.
        prompts: M names.
    """
    c = relative_uncertainty(distance.cpu())
    kappa = calibrate(u, u_final, c, prompts)
    return Calibration(kappa, (*fractions, 1.0), (*c.tolist(), 0.0))


def calibrate(u: Tensor, u_final: Tensor, c: Tensor, prompts: Sequence[Hashable] | None = None) -> float:
    """The kappa whose tempered potentials best predict the tilt of plain prior chains: argmin of `criterion`.

    s <= 1 (`usable_scale`) keeps the final weights from resting on a few chains. Weights compare particles of one
    prompt only, so the means of prompts are taken out first, see `within_prompts`.

    Args:
        u: (S, M), nats, log G(x0_hat) at S steps of M prior chains.
        u_final: (M,), nats, log G of the chains' clean ends.
        c: (S,), relative uncertainty of x0_hat at those steps, in [0, 1].
        prompts: M names; None: all chains are of one prompt.

    Returns:
        kappa >= 0.
    """
    if prompts is not None:
        u, u_final = within_prompts(u, prompts), within_prompts(u_final, prompts)
    loss = criterion(u, u_final, c, scale=usable_scale(u_final))
    return KAPPAS[int(loss.argmin())]


def within_prompts(u: Tensor, prompts: Sequence[Hashable], min_chains: int = 2) -> Tensor:
    """What distinguishes chains of one prompt: the mean of each prompt taken out, the loss of spread made good.

        u_j -> (u_j - mean of its n chains) sqrt(n / (n - 1))

    Prompts of fewer than `min_chains` chains, whose means are unknown, are treated as one.

    Args:
        u: (..., M), nats.
        prompts: M names.
    """
    count = Counter(prompts)
    names = {name: i + 1 for i, name in enumerate(name for name, n in count.items() if n >= min_chains)}
    group = torch.tensor([names.get(name, 0) for name in prompts], device=u.device)
    size = torch.bincount(group, minlength=len(names) + 1).to(u.dtype)
    total = torch.zeros(*u.shape[:-1], len(size), dtype=u.dtype, device=u.device).index_add(-1, group, u)
    mean = total / size.clamp_min(1)
    gain = (size / (size - 1).clamp_min(1)).sqrt()
    return (u - mean[..., group]) * gain[group]
