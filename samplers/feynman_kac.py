"""The twisted Feynman-Kac flow of a diffusion prior: one class behind DAS, TDS, FK steering, best-of-N and the prior.

    psi_k(x) = lambda_k log G(decode(x0_hat(x, k))),   lambda_K = 1
    proposal  x_{k+1} ~ N(m_k + s_k^2 grad psi_k, s_k^2)
    increment log p(x_{k+1} | x_k) - log q(x_{k+1} | x_k) + psi_{k+1}(x_{k+1}) - psi_k(x_k)

Each step looks once at the network; the look at x_{k+1} serves both its weight and the next proposal. The potential of
an intermediate step may be any number that is known at that step, even one that depends on the other particles, as long
as the same number is added at its step and subtracted at the next; and the drift may be any vector. That is what makes
holding, cheap decoders, cheap gradients and adaptive tempering exact. Where the potential is held, psi also takes back
log p - log q of the steps since its latest look: what a drift costs is charged with the look that shows what it bought,
and weights between two looks carry no noise that the next one would only undo.

Source: Kim et al., arXiv 2501.05803 (DAS); Wu et al., arXiv 2306.17775 (TDS); Singhal et al., arXiv 2501.06848 (FK).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from tiltopt.errors import ConfigError, PotentialError, PriorError
from tiltopt.samplers.micro_batch import MicroBatch, MicroBatches, Rows
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.resampling import add_log_increment
from tiltopt.samplers.smc import OnNaN, Step
from tiltopt.samplers.tempering import Adaptive, Factors
from tiltopt.types import Conditioning, Potential

Gradient = Literal["full", "x0", "none"]
Accumulate = Literal["difference", "max", "sum"]
BELOW_WORST = 5.0  # nats


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
    nan: OnNaN = "raise"
    guidance_decoder: Callable[[Tensor], Tensor] | None = None
    x0_factor: Callable[[int, int], float] | None = None
    max_shift: float | None = None
    weighted: bool = True


class Particles(NamedTuple):
    """All that the next step needs of a particle; every field follows its ancestor at resampling.

    mean: (B, P, *event), mean of the next kernel; at step K the clean event itself.
    drift: (B, P, *event), grad psi_k.
    grad: (B, P, *event), latest gradient of log G, without lambda.
    log_g: (B, P) float64, latest log G, nats.
    log_psi: (B, P) float64, psi_k, nats.
    memory: (B, P) float64, running maximum or sum of FK steering.
    owed: (B, P) float64, log p - log q of the steps since the latest log G, nats; charged when the next one comes.
    nats: (B, P) float64, sum of |shift|^2 / 2 over the steps so far: what the drift has cost.
    """

    mean: Tensor
    drift: Tensor
    grad: Tensor
    log_g: Tensor
    log_psi: Tensor
    memory: Tensor
    owed: Tensor
    nats: Tensor


class _Look(NamedTuple):
    mean: Tensor
    log_g: Tensor | None
    grad: Tensor | None
    designs: Tensor | None


class Twisted:
    """The flow for `run_smc`; see the module.

    Args:
        prior: the chain to be tilted.
        potential: log G of designs; None samples the prior.
        cond: B prompts.
        num_particles: P.
        schedule: lambda_0 .. lambda_K, or `Adaptive`.
        options: how the potential is looked at.
        micro_batch: rows (prompts x particles) per network call; None: all at once.
        observe: called with (k, x (B*P, *event), x0_hat (B*P, *event)) at every look, k = 0 .. K.
    """

    def __init__(
        self,
        prior: Prior,
        potential: Potential | None,
        cond: Conditioning,
        num_particles: int,
        schedule: Factors | Adaptive,
        options: TwistOptions,
        micro_batch: MicroBatch = None,
        observe: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.num_steps = prior.num_steps
        self._prior, self._potential, self._cond = prior, potential, cond
        self._shape = (len(cond.prompts), num_particles)
        self._schedule, self._options, self._observe = schedule, options, observe
        self._batches = MicroBatches(cond, num_particles, micro_batch)
        self._stds = [float(prior.std(k)) for k in range(self.num_steps)]
        self._device = torch.device(getattr(prior, "device", "cpu"))
        self._design_shape: torch.Size | None = None
        guided = potential is not None and options.gradient != "none"
        if guided and not any(s > 0 for s in self._stds):
            raise ConfigError(
                "Guided sampling needs a chain with noise, but every step of this prior has std 0 (eta = 0), so "
                "guidance would do nothing. Use eta > 0, or an unguided sampler such as BestOfN."
            )
        planned = (
            plan_looks(schedule, options, self._stds) if potential is not None else [(False, False)] * self.num_steps
        )
        self._look_at = [*planned, (potential is not None, False)]

    def initial(self, generators: Sequence[Generator]) -> Step:
        """x_0 from the prior, weighted by psi_0."""
        drawn = [self._prior.initial(self._shape[1], g) for g in generators]
        x = torch.stack(drawn).to(self._device)
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        weight = torch.zeros(self._shape, dtype=torch.float64)
        nothing = torch.zeros_like(x)
        parents = Particles(x, nothing, nothing, weight, weight, weight, weight, weight)
        return self._step(0, x, parents, weight, weight, torch.zeros(self._shape[0], dtype=torch.float64))

    def propagate(
        self, k: int, parents: Particles, log_w: Tensor, before: Step, generators: Sequence[Generator]
    ) -> Step:
        """x_k ~ N(mean + s^2 drift, s^2) and its increment."""
        std, x = self._stds[k - 1], parents.mean
        ratio = torch.zeros(self._shape, dtype=torch.float64)
        nats = parents.nats
        if std > 0:
            size = parents.mean.shape[1:]
            z = torch.stack([torch.randn(size, generator=g, dtype=x.dtype) for g in generators]).to(x.device)
            shift = self._bounded(std * parents.drift)
            x = parents.mean + std * (shift + z)
            if self._options.gradient != "none":
                # log p - log q of the same x: -|z + shift|^2 / 2 + |z|^2 / 2
                ratio = -(shift * (z + 0.5 * shift)).double().flatten(2).sum(-1).cpu()
                nats = nats + 0.5 * shift.double().square().flatten(2).sum(-1).cpu()
        return self._step(k, x, parents._replace(nats=nats), log_w, ratio, before.temperature)

    def _bounded(self, shift: Tensor) -> Tensor:
        if self._options.max_shift is None:
            return shift
        norm = torch.linalg.vector_norm(shift.flatten(2), dim=-1)
        factor = (1.0 + (norm / self._options.max_shift) ** 2).rsqrt()
        return shift * factor.view(*self._shape, *(1,) * (shift.ndim - 2))

    def _step(self, k: int, x: Tensor, parents: Particles, log_w: Tensor, ratio: Tensor, before: Tensor) -> Step:
        look = self._look(k, x.flatten(0, 1))
        event = x.shape[2:]
        fresh = look.log_g is not None
        log_g = look.log_g.unflatten(0, self._shape) if look.log_g is not None else parents.log_g
        dead = torch.isnan(log_g)
        if k < self.num_steps and fresh:
            log_g = finite_look_ahead(log_g)
        grad = parents.grad if look.grad is None else look.grad.view(*self._shape, *event)
        base = ratio - parents.log_psi
        temperature = self._temperature(k, add_log_increment(log_w, base), log_g, before)
        owed = torch.zeros_like(ratio) if fresh else parents.owed + ratio
        log_psi, memory = self._twist(k, temperature.unsqueeze(-1), log_g, parents, fresh)
        log_psi = log_psi - owed
        log_psi = torch.where(dead, -math.inf, log_psi)
        increment = log_psi + base if self._options.weighted and self._potential is not None else torch.zeros_like(base)
        scale = temperature.to(x.device, x.dtype).view(-1, *(1,) * (x.ndim - 1))
        particles = Particles(look.mean.view_as(x), scale * grad, grad, log_g, log_psi, memory, owed, parents.nats)
        mean_potential = log_g.nanmean(-1) if fresh else torch.full_like(temperature, math.nan)
        designs = None if look.designs is None else look.designs.unflatten(0, self._shape)
        return Step(particles, increment, temperature, mean_potential, designs)

    def _temperature(self, k: int, log_w: Tensor, log_g: Tensor, before: Tensor) -> Tensor:
        if k == self.num_steps:
            return torch.ones_like(before)
        if isinstance(self._schedule, Adaptive):
            return self._schedule.temperature(log_w, log_g.nan_to_num(nan=0.0), before)
        return torch.full_like(before, self._schedule[k])

    def _twist(
        self, k: int, temperature: Tensor, log_g: Tensor, parents: Particles, fresh: bool
    ) -> tuple[Tensor, Tensor]:
        """psi_k and the running memory."""
        if k == self.num_steps:
            return log_g, parents.memory
        tempered = temperature * log_g
        if self._options.accumulate == "difference":
            return tempered, parents.memory
        if not fresh:
            return parents.log_psi + parents.owed, parents.memory
        if self._options.accumulate == "sum":
            memory = parents.memory + tempered
        else:
            memory = tempered if k == 0 else torch.maximum(parents.memory, tempered)
        return parents.log_psi + memory, memory

    def _look(self, k: int, x: Tensor) -> _Look:
        mean, x0, log_g, grad, designs = self._batches.map(lambda start, cond, rows: self._piece(k, rows, cond), x)
        assert mean is not None
        assert x0 is not None
        self._require_finite("prior", k, torch.isfinite(mean).flatten(1).all(1) & torch.isfinite(x0).flatten(1).all(1))
        if log_g is not None:
            log_g = log_g.double().cpu()
            bad = torch.isnan(log_g) | (log_g == math.inf)
            if self._options.nan == "raise":
                self._require_finite("potential", k, ~bad, log_g)
            log_g = torch.where(bad, math.nan, log_g)
        if grad is not None:
            known = torch.isfinite(grad)
            if self._options.nan == "raise":
                self._require_finite("gradient of the potential", k, known.flatten(1).all(1))
            grad = torch.where(known, grad, 0.0)
        if self._observe is not None:
            self._observe(k, x, x0)
        return _Look(mean, log_g, grad, designs)

    def _piece(self, k: int, x: Tensor, cond: Conditioning) -> Rows:
        """One look at some rows: next mean, x0_hat, log G, gradient, and at the last step the designs."""
        options, last = self._options, k == self.num_steps
        with_potential, with_gradient = self._look_at[k]
        full, cheap = with_gradient and options.gradient == "full", with_gradient and options.gradient == "x0"
        with torch.set_grad_enabled(full):
            leaf = x.detach().requires_grad_(full)
            mean, x0 = (leaf, leaf) if last else self._prior.reverse(k, leaf, cond)
        if mean.shape != x.shape or x0.shape != x.shape:
            raise PriorError(
                f"`prior.reverse` must return mean and x0 of shape {tuple(x.shape)}, "
                f"got {tuple(mean.shape)} and {tuple(x0.shape)} at step {k}."
            )
        if cheap:
            leaf = x0 = x0.detach().requires_grad_()
        log_g = grad = designs = None
        if with_potential or last:
            decode: Any = self._prior.decode
            if not last:
                cheaper = getattr(self._prior, "guidance_decode", decode)
                decode = cheaper if options.guidance_decoder is None else options.guidance_decoder
            with torch.set_grad_enabled(with_gradient):
                designs = decode(x0)
                self._check_designs(designs, len(x), k)
            if not last and options.guidance_decoder is not None:
                self._check_guidance(designs, x0)
            with torch.set_grad_enabled(with_gradient):
                if self._potential is not None:
                    log_g = check_potential(self._potential(designs, cond), x.shape[0], self._potential)
        if with_gradient and log_g is not None:
            grad = gradient_of(log_g, leaf, self._potential)
            if cheap and options.x0_factor is not None:
                grad = grad * options.x0_factor(k, self.num_steps)
        keep = designs.detach() if last and designs is not None else None
        return mean.detach(), x0.detach(), None if log_g is None else log_g.detach(), grad, keep

    def _check_designs(self, designs: Any, rows: int, k: int) -> None:
        """PriorError where a decoder gave something else than one design of numbers per row."""
        shape = tuple(designs.shape) if isinstance(designs, Tensor) else type(designs).__name__
        if not isinstance(designs, Tensor) or len(designs) != rows:
            raise PriorError(f"The decoder must return one design per event, got {shape} for {rows} at step {k}.")
        if self._options.nan == "raise" and not bool(torch.isfinite(designs.detach()).all()):
            raise PriorError(
                f"The decoder must return finite designs, got NaN or infinity at step {k} of {self.num_steps}. Half "
                "precision can overflow: try a wider `vae_dtype`, or another decoder."
            )

    def _check_guidance(self, designs: Tensor, x0: Tensor) -> None:
        """PriorError where a decoder for looks on the way makes designs of another shape than the prior's."""
        if self._design_shape is None:
            with torch.no_grad():
                self._design_shape = self._prior.decode(x0[:1].detach()).shape[1:]
        if designs.shape[1:] != self._design_shape:
            raise PriorError(
                f"`guidance_decoder` must make designs like the prior's, {tuple(self._design_shape)} each, got "
                f"{tuple(designs.shape[1:])}."
            )

    def _require_finite(self, what: str, k: int, good: Tensor, values: Tensor | None = None) -> None:
        if bool(good.all()):
            return
        row = int((~good).nonzero()[0])
        b, p = divmod(row, self._shape[1])
        got = "a value that is not finite" if values is None else str(float(values[row]))
        where = f"at step {k} of {self.num_steps}, prompt {b} ({self._cond.prompts[b]!r}), particle {p}"
        if what == "prior":
            raise PriorError(
                f"The prior must return finite means and x0, got {got} {where}. "
                "Half precision can overflow: try a wider dtype."
            )
        raise PotentialError(
            f"The {what} must be a finite number (log G may be -inf), got {got} {where}. "
            "Mend it, or pass nan='kill' to give such particles weight zero."
        )


def plan_looks(schedule: Factors | Adaptive, options: TwistOptions, stds: Sequence[float]) -> list[tuple[bool, bool]]:
    """Whether the look at each step k < K needs the potential, and its gradient.

    Args:
        stds: of the K kernels.
    """
    last = len(stds)

    def tempered(j: int) -> bool:
        return isinstance(schedule, Adaptive) or schedule[j] > 0

    def used(k: int, every: int, by: Callable[[int], bool]) -> bool:
        return k % every == 0 and any(by(j) for j in range(k, min(k + every, last)))

    plan = []
    for k in range(last):
        gradient = options.gradient != "none" and used(k, options.gradient_every, lambda j: tempered(j) and stds[j] > 0)
        plan.append((gradient or (options.weighted and used(k, options.potential_every, tempered)), gradient))
    return plan


def finite_look_ahead(log_g: Tensor) -> Tensor:
    """A look-ahead of -inf says only "worse than the others": 5 nats below the worst finite one of its prompt.

    Only the true x_K can have weight zero, because a path may leave the forbidden region before its end.
    """
    finite = torch.isfinite(log_g)
    worst = torch.where(finite, log_g, math.inf).amin(-1, keepdim=True)
    return torch.where(log_g == -math.inf, torch.where(torch.isfinite(worst), worst - BELOW_WORST, 0.0), log_g)


def check_potential(log_g: Tensor, num_rows: int, potential: object) -> Tensor:
    """`log_g` if it has one value per row; PotentialError otherwise."""
    if not isinstance(log_g, Tensor) or log_g.shape != (num_rows,):
        got = tuple(log_g.shape) if isinstance(log_g, Tensor) else type(log_g).__name__
        raise PotentialError(
            f"The potential must return log G of shape ({num_rows},), one value per design, "
            f"got {got} from {potential!r}."
        )
    return log_g


def gradient_of(log_g: Tensor, leaf: Tensor, potential: object) -> Tensor:
    """d sum(log_g) / d leaf; PotentialError if there is no path from one to the other."""
    grad = torch.autograd.grad(log_g.sum(), leaf, allow_unused=True)[0] if log_g.requires_grad else None
    if grad is None:
        raise PotentialError(
            f"Guided sampling needs a potential with a gradient in its designs, but {potential!r} returned a tensor "
            "without one. Use gradient='none', FKSteering or BestOfN for a potential that cannot be differentiated."
        )
    return grad.detach()
