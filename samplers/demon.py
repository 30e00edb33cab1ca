"""Sampling Demon: steer a diffusion with a black box alone, by choosing each step's noise. Biased.

At every noisy step, from the same x, draw K noises z_1 .. z_K, take the step with each, estimate the clean design that
each leads to, and score it. The step is then taken with

    z* = sqrt(d) sum_k w_k z_k / || sum_k w_k z_k ||,

w_k = tanh((r_k - mean r) / tau), or softmax(r / tau)_k, or r_k - mean r. Rewards need no gradient.
Yeh et al., "Training-free diffusion model alignment with Sampling Demons" (arXiv 2410.05760), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from tiltopt.errors import ConfigError, PotentialError, PriorError
from tiltopt.samplers.diffusers_prior import DiffusersPrior
from tiltopt.samplers.feynman_kac import check_potential
from tiltopt.samplers.micro_batch import MicroBatch, MicroBatches
from tiltopt.samplers.ode import (
    denoise,
    heun_step,
    integrate,
    karras_grid,
    noise_estimate,
    sigma_range,
    unguided_estimate,
)
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.resampling import log_mean_exp
from tiltopt.samplers.smc import OnNaN, Samples, Select, StepInfo, check_call, check_settings
from tiltopt.samplers.work import Steps, Work, branches_of
from tiltopt.types import Conditioning, Potential

Combine = Literal["tanh", "boltzmann", "optimal"]
SPREAD = 1e-8  # rewards closer together than this say nothing
SIGMA_MIN = 0.002  # where the published grid ends
TAIL = 18  # ODE steps from sigma_max that the published tail is a share of


def demon_weights(rewards: Tensor, combine: Combine, tau: float | None) -> Tensor:
    """Weights of K noises, (..., K), from their rewards, (..., K).

    All ones where the rewards of a row are equal. A reward that is not finite gets the weight zero.

    Args:
        rewards: (..., K), any unit, higher is better.
        combine: `tanh`, `boltzmann`, or `optimal`: r - mean r, the least-squares direction of the reward in the noise
            (published as the raw r, which depends on where the reward's zero lies).
        tau: in units of the reward; None: the standard deviation of the row.
    """
    good = torch.isfinite(rewards)
    r = torch.where(good, rewards, torch.zeros_like(rewards)).double()
    count = good.sum(-1, keepdim=True).clamp_min(1)
    centred = torch.where(good, r - r.sum(-1, keepdim=True) / count, torch.zeros_like(r))
    sd = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    scale = sd.clamp_min(SPREAD) if tau is None else torch.full_like(sd, tau)
    if combine == "tanh":
        w = torch.tanh(centred / scale)
    elif combine == "boltzmann":
        w = torch.softmax((centred / scale).masked_fill(~good, -math.inf), dim=-1)
    else:
        w = centred
    return torch.where(sd < SPREAD, torch.ones_like(w), w)


def combine_noises(z: Tensor, weights: Tensor) -> Tensor:
    """z* of norm sqrt(d) from K noises; one noise alone is returned as it is.

    Args:
        z: (n, K, *event), standard normal.
        weights: (n, K), not all zero in a row.
    """
    if z.shape[1] == 1:
        return z[:, 0]
    flat = z.flatten(2)
    total = (weights.to(z.dtype).unsqueeze(-1) * flat).sum(1)
    norm = total.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return (math.sqrt(flat.shape[-1]) * total / norm).reshape(z[:, 0].shape)


class Walk(Protocol):
    """Steps k = 0 .. num_steps - 1; every tensor has n rows, as has `cond`."""

    num_steps: int

    def initial(self, num_particles: int, generators: Sequence[Generator]) -> Tensor:
        """(B * P, *event), rows of prompt b from generators[b] alone."""
        ...

    def noisy(self, k: int) -> bool:
        """Whether step k takes a noise."""
        ...

    def first(self, k: int, x: Tensor, cond: Conditioning) -> Tensor:
        """What every candidate of step k shares."""
        ...

    def move(self, k: int, x: Tensor, first: Tensor, z: Tensor | None, cond: Conditioning) -> Tensor:
        """x after step k with the noise z."""
        ...

    def clean(self, k: int, x: Tensor, cond: Conditioning) -> Tensor:
        """Estimate of the clean event from x before step k."""
        ...

    def finish(self, x: Tensor, cond: Conditioning) -> Tensor:
        """The clean event from x after the last step."""
        ...

    def rows(self, k: int) -> tuple[int, int, int]:
        """Rows that the network is shown by `first` and `move` at step k, and by `clean` after it."""
        ...


class ChainWalk:
    """The prior's own kernels: x_{k+1} = mean + std z, clean estimate E[x_clean | x_{k+1}]."""

    def __init__(self, prior: Prior) -> None:
        self.prior, self.num_steps = prior, prior.num_steps
        if all(prior.std(k) == 0 for k in range(prior.num_steps)):
            raise ConfigError("a chain without noise (eta = 0) leaves nothing to choose; use eta > 0.")

    def initial(self, num_particles: int, generators: Sequence[Generator]) -> Tensor:
        return torch.cat([self.prior.initial(num_particles, g) for g in generators])

    def noisy(self, k: int) -> bool:
        return self.prior.std(k) > 0

    def first(self, k: int, x: Tensor, cond: Conditioning) -> Tensor:
        return self.prior.reverse(k, x, cond).mean

    def move(self, k: int, x: Tensor, first: Tensor, z: Tensor | None, cond: Conditioning) -> Tensor:
        return first if z is None else first + self.prior.std(k) * z

    def clean(self, k: int, x: Tensor, cond: Conditioning) -> Tensor:
        return x if k == self.num_steps else self.prior.reverse(k, x, cond).x0

    def finish(self, x: Tensor, cond: Conditioning) -> Tensor:
        return x

    def rows(self, k: int) -> tuple[int, int, int]:
        branches = branches_of(self.prior)
        return branches, 0, branches * (k + 1 < self.num_steps)


class HeunWalk:
    """The variance-exploding SDE by Heun's method on a Karras grid, then the ODE below `ode_after`, as published.

    The grid has T noise levels from sigma_max to .002, so T - 1 steps. A step takes a noise where it starts at
    `ode_after` or above; from the first level below it, the ODE goes on to .002 on a grid of its own. Below the least
    noise that the network was trained on it is asked as if that were the noise.

    Args:
        prior: guided by its own scale.
        steps: T >= 2.
        beta: noise level of the SDE.
        ode_after: no step that starts below this sigma takes a noise.
        baseline_steps: None: the clean estimate is one unguided network evaluation; a number: an ODE of about that many
            steps from sigma_max, fewer further down.
        consistency: whose network gives the one evaluation; None: the prior's.
    """

    def __init__(
        self, prior: DiffusersPrior, steps: int, beta: float, ode_after: float, baseline_steps: int | None,
        consistency: DiffusersPrior | None,
    ) -> None:  # fmt: skip
        if steps < 2:
            raise ConfigError(f"the heun integrator needs at least 2 noise levels, got {steps}; raise `steps`.")
        self.prior, self.beta, self.baseline_steps = prior, beta, baseline_steps
        self.consistency = consistency or prior
        self._high = sigma_range(prior)[1]
        full = karras_grid(steps - 1, self._high, SIGMA_MIN)
        self._noisy = sum(sigma >= ode_after for sigma in full[:-1])
        self.grid = (*full[: self._noisy], *self._to_the_end(full[self._noisy], TAIL))
        self.num_steps = len(self.grid) - 1

    def _to_the_end(self, sigma: float, most: int) -> tuple[float, ...]:
        """Levels of an ODE from `sigma` to the end: its share of the `most` steps from sigma_max, rounded up, + 1."""
        if sigma <= SIGMA_MIN:
            return (sigma,)
        low, here, high = (s ** (1 / 7) for s in (SIGMA_MIN, sigma, self._high))
        return karras_grid(math.ceil(most * (here - low) / (high - low)) + 1, sigma, SIGMA_MIN)

    def initial(self, num_particles: int, generators: Sequence[Generator]) -> Tensor:
        scale = self.grid[0] / self.prior.chain.initial_std
        return scale * torch.cat([self.prior.initial(num_particles, g) for g in generators])

    def noisy(self, k: int) -> bool:
        return k < self._noisy

    def first(self, k: int, x: Tensor, cond: Conditioning) -> Tensor:
        return noise_estimate(self.prior, cond)(x, self.grid[k])

    def move(self, k: int, x: Tensor, first: Tensor, z: Tensor | None, cond: Conditioning) -> Tensor:
        beta = 0.0 if z is None else self.beta
        return heun_step(noise_estimate(self.prior, cond), x, self.grid[k], self.grid[k + 1], first, beta, z)

    def clean(self, k: int, x: Tensor, cond: Conditioning) -> Tensor:
        sigma = self.grid[k]
        if self.baseline_steps is None:
            return denoise(unguided_estimate(self.consistency, cond, self.prior), x, sigma)
        return integrate(noise_estimate(self.prior, cond), x, self._to_the_end(sigma, self.baseline_steps))

    def finish(self, x: Tensor, cond: Conditioning) -> Tensor:
        return x

    def rows(self, k: int) -> tuple[int, int, int]:
        branches = branches_of(self.prior)
        if self.baseline_steps is None:
            return branches, branches, 1
        return branches, branches, 2 * branches * (len(self._to_the_end(self.grid[k + 1], self.baseline_steps)) - 1)


@dataclass(frozen=True)
class Demon:
    """Sampling Demon behind the interface of every sampler.

    `num_particles` P are P independent chains per prompt, each of which draws `num_noises` candidates per step: a step
    costs P * (1 + K * (1 network call for the step + those of the estimate)) rows per prompt, and P * K rewards.

    Biased: chains are pushed as far as the noise allows, whatever the size of log G, and nothing corrects for it.
    `log_w` is therefore uniform (-log P), and `log_z` is the log mean of G over the finished designs, which lies above
    log E_prior[G] where Demon raises G (with K = 1 and the prior's own kernels exp(log_z) is unbiased).

    Args:
        combine: `tanh` (published default), `boltzmann`, `optimal`; see `demon_weights`.
        num_noises: K >= 1; K = 1 is plain sampling of the prior, which asks for no reward on the way.
        tau: in nats; None adapts to the standard deviation of each chain's current rewards, anew at every step (the
            official code keeps the first step's).
        estimate: of the clean design, from a candidate: `consistency` is one network evaluation without guidance,
            `baseline` an ODE of about `baseline_steps` steps at sigma_max, fewer further down (DiffusersPrior only).
        integrator: `heun` solves the variance-exploding SDE (DiffusersPrior); `chain` uses the prior's own kernels
            (any prior, eta > 0); `auto` takes heun where it can.
        steps: T, the noise levels of the heun integrator's grid, >= 2; None: the prior's number of steps.
        beta: noise level of the SDE, > 0.
        ode_after: from the first level below this sigma on the rest is the ODE, without candidates.
        baseline_steps: see `estimate`.
        consistency: a distilled model (LCM) of the same latents that gives the `consistency` estimate; None: the
            prior itself.
        select: what a loop takes of the chains, as of particles: one `draw`, the `argmax` of G, or `all`.
        micro_batch: rows per network call; None: all at once. Halved when memory runs out.
        nan: what a reward that is not finite does: `raise`, or `kill` that candidate.
    """

    combine: Combine = "tanh"
    num_noises: int = 16
    tau: float | None = None
    estimate: Literal["consistency", "baseline"] = "consistency"
    integrator: Literal["auto", "heun", "chain"] = "auto"
    steps: int | None = None
    beta: float = 0.1
    ode_after: float = 0.11
    baseline_steps: int = 20
    consistency: DiffusersPrior | None = None
    select: Select = "draw"
    micro_batch: MicroBatch = None
    nan: OnNaN = "raise"

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def guided(self) -> bool:
        """Never: rewards need no gradient."""
        return False

    @property
    def needs_noise(self) -> bool:
        """Whether a chain whose every step is deterministic (eta = 0) leaves it nothing to choose."""
        return self.integrator == "chain"

    def work(self, prior: Prior | Steps) -> Work:
        """What one particle costs, with all its candidates; the most where the prior is not loaded yet."""
        if isinstance(prior, Steps):
            branches, on_chain = prior.branches, self.integrator == "chain"
            steps = prior.num_steps if on_chain else (self.steps or prior.num_steps) - 1
            estimate = 2 * branches * self.baseline_steps if self.estimate == "baseline" else 1
            rows = [(branches, 0, branches) if on_chain else (branches, branches, estimate)] * steps
            noisy = [True] * steps
            if not on_chain:  # the tail, an ODE
                rows, noisy = rows + [(branches, branches, 0)] * TAIL, noisy + [False] * TAIL
        else:
            walk = self._walk(prior)
            rows, noisy = [walk.rows(k) for k in range(walk.num_steps)], [walk.noisy(k) for k in range(walk.num_steps)]
        total = Work(looks=1)
        for (first, move, clean), tried in zip(rows, noisy, strict=True):
            total += Work(network=first + move)
            if tried and self.num_noises > 1:
                total += Work(network=move + clean, looks=1) * self.num_noises
        return total

    @torch.no_grad()
    def sample(
        self,
        prior: Prior,
        potential: Potential,
        cond: Conditioning,
        *,
        num_particles: int,
        generators: Sequence[Generator],
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Samples:
        """See `tiltopt.samplers.smc.Sampler.sample`; the callback's mean_potential is over the step's candidates."""
        check_call(cond, num_particles, generators)
        walk = self._walk(prior)
        chains = MicroBatches(cond, num_particles, self.micro_batch)
        candidates = MicroBatches(cond, num_particles * self.num_noises, self.micro_batch)
        x = walk.initial(num_particles, generators)
        mean = torch.full((len(cond),), math.nan, dtype=torch.float64)
        for k in range(walk.num_steps):
            _report(callback, k, mean, num_particles)
            first = _map(chains, lambda c, y, k=k: walk.first(k, y, c), x)
            _check_prior(first, k, walk.num_steps, cond, num_particles)
            z = None
            if walk.noisy(k):
                z = self._noises(x, num_particles, generators)
                if self.num_noises > 1:
                    rewards = self._score(prior, potential, walk, k, candidates, x, first, z)
                    mean = rewards.double().cpu().reshape(len(cond), -1).nanmean(-1)
                    weights = demon_weights(rewards, self.combine, self.tau).to(z.device)
                    z = combine_noises(z, weights)
                else:
                    z = z[:, 0]
            move = lambda c, y, f, *noise, k=k: walk.move(k, y, f, noise[0] if noise else None, c)  # noqa: E731
            x = _map(chains, move, x, first, *(() if z is None else (z,)))
        _report(callback, walk.num_steps, mean, num_particles)
        x0 = _map(chains, lambda c, y: walk.finish(y, c), x)
        designs = _map(chains, lambda c, y: prior.decode(y), x0)
        log_g = _map(chains, lambda c, d: self._rewards(potential, d, c, walk.num_steps), designs).double().cpu()
        shape = (len(cond), num_particles)
        log_w = torch.full(shape, -math.log(num_particles), device=x0.device, dtype=x0.dtype)
        killed = torch.where(torch.isfinite(log_g), log_g, -math.inf).view(shape)
        log_z = log_mean_exp(killed).to(x0.device, x0.dtype)
        return Samples(x0.unflatten(0, shape), designs.unflatten(0, shape), log_w, log_z)

    def _walk(self, prior: Prior) -> Walk:
        if isinstance(prior, DiffusersPrior) and self.integrator != "chain":
            return HeunWalk(prior, self.steps or prior.num_steps, self.beta, self.ode_after,
                            self.baseline_steps if self.estimate == "baseline" else None, self.consistency)  # fmt: skip
        if self.integrator == "heun" or self.estimate == "baseline" or self.consistency is not None:
            raise ConfigError(
                "integrator='heun', estimate='baseline' and a `consistency` model need a DiffusersPrior and its heun "
                f"integrator, got {type(prior).__name__} with integrator={self.integrator!r}; use integrator='chain' "
                "with estimate='consistency'."
            )
        return ChainWalk(prior)

    def _noises(self, x: Tensor, num_particles: int, generators: Sequence[Generator]) -> Tensor:
        """(n, K, *event) standard normal; prompt b's from generators[b] alone."""
        shape = (num_particles, self.num_noises, *x.shape[1:])
        return torch.cat([torch.randn(shape, generator=g, device=g.device, dtype=x.dtype) for g in generators]).to(
            x.device
        )

    def _rewards(self, potential: Potential, designs: Tensor, cond: Conditioning, k: int) -> Tensor:
        """The potential of n designs, (n,), checked."""
        values = check_potential(potential(designs, cond), len(designs), potential).detach()
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad and self.nan == "raise":
            raise PotentialError(
                f"The potential must be finite, got {float(values[bad[0]])} at step {k} for prompt "
                f"{cond.prompts[bad[0]]!r}; mend the reward, or pass nan='kill' to ignore such candidates."
            )
        return values

    def _score(
        self, prior: Prior, potential: Potential, walk: Walk, k: int, batches: MicroBatches,
        x: Tensor, first: Tensor, z: Tensor,
    ) -> Tensor:  # fmt: skip
        """Rewards (n, K) of the candidates of step k."""

        def look(start: int, cond: Conditioning, y: Tensor, f: Tensor, noise: Tensor) -> tuple[Tensor]:
            designs = prior.decode(walk.clean(k + 1, walk.move(k, y, f, noise, cond), cond))
            return (self._rewards(potential, designs, cond, k),)

        spread = [t.repeat_interleave(self.num_noises, dim=0) for t in (x, first)]
        (values,) = batches.map(look, *spread, z.flatten(0, 1))
        assert values is not None
        return values.reshape(z.shape[:2])


def _map(batches: MicroBatches, fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """fn(conditioning, *pieces) over all rows."""
    (out,) = batches.map(lambda start, cond, *pieces: (fn(cond, *pieces),), *inputs)
    assert out is not None
    return out


def _check_prior(first: Tensor, k: int, num_steps: int, cond: Conditioning, num_particles: int) -> None:
    """PriorError where the network's answer is not finite."""
    bad = (~torch.isfinite(first).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        b, p = divmod(bad[0], num_particles)
        raise PriorError(
            f"The prior must return finite values, got others at step {k} of {num_steps}, prompt {b} "
            f"({cond.prompts[b]!r}), particle {p}. Half precision can overflow: try a wider dtype."
        )


def _report(callback: Callable[[StepInfo], None] | None, k: int, mean: Tensor, num_particles: int) -> None:
    """What a person may want to know of step k; there are no weights, so ESS is P and log Z unknown."""
    if callback is None:
        return
    num_prompts = len(mean)
    every = torch.full((num_prompts,), float(num_particles), dtype=torch.float64)
    ancestors = torch.arange(num_particles).expand(num_prompts, -1).clone()
    callback(StepInfo(k, every, ancestors, torch.ones_like(every), torch.full_like(every, math.nan), mean.clone()))
