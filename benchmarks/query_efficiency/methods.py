"""The methods that are compared, and the settings of those that run through the public loop."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.query_efficiency.cells import Cell
from benchmarks.query_efficiency.finetuned import training_evaluations
from benchmarks.zoo import ZOO
from tiltopt.online.settings.commandline import parse
from tiltopt.online.settings.cost import PROBES, TRIES
from tiltopt.online.settings.prompts import load_prompts
from tiltopt.online.settings.run import Settings

CONFIG = Path(__file__).resolve().parents[2] / "config"
ALPHA_PER_SD = 0.002
"""Price of leaving the prior where a method has a fixed one, in standard deviations of round 0's answers per nat: .001
kB per nat for JPEG sizes, of which 24 plain samples had a deviation of .50 kB; that of version 0.1's demo."""

FIXED: dict[str, object] = {
    "prompts": "simple_animals",
    "prior.num_steps": 12,
    "prior.dtype": "bfloat16",  # half the time of float32 on a CPU that knows it; latents stay float32
    "sampler.num_particles": 2,  # a few more gradients teach a cheap chain more than a few more particles
    "sampler.gradient_every": 2,
    "sampler.potential_every": 4,
    "sampler.kappa": 20.0,
    "micro_batch": 16,
}
"""The same for every method: the demo's, but for prompts, type and micro-batch."""

BUDGET_NATS = 48.0
"""Price of a query in nats, the demo's. Written here, so that a change of the demo is no change of the benchmark."""

OF_VERSION_0_1: dict[str, object] = {
    "features.kind": "latent_stats+patch_stats",
    "sampler.max_shift": 5.0,
    "sampler.ess_rule": "share",  # two particles never resample
    "search.fallback": False,
}
"""What else was different in version 0.1's default, beside its fixed price."""
FIXED_PRICE = ("version_0_1", "seiko", "seiko_finetune")
"""Methods that take ALPHA_PER_SD."""
UNPRICED = ("surrogate_best_of_n", "evolution")
"""Methods that draw as the prior does, so that no price means anything."""

TUNED: dict[str, tuple[str, ...]] = {
    "jpeg_compressibility": (),
    "colorfulness": (),
    "planted": ("reward.name=benchmarks.query_efficiency.planted:Planted", "reward.seed=1", "reward.batch_size=16"),
    "symmetry": (),
}
"""The rewards that defaults were tuned with."""

REWARDS: dict[str, tuple[str, ...]] = {
    **TUNED,
    **{name: ("reward.name=benchmarks.zoo:Zoo", f"reward.which={name}", "reward.batch_size=16") for name in ZOO},
}
"""Those and the zoo, of which `benchmarks.zoo` says what is set aside."""


@dataclass(frozen=True)
class Method:
    """How a method is shown, and what kind it is.

    config: file in `config/` whose preset `demo` it runs through the loop; None for methods without a surrogate.
    kind: "ours" (the default), "variant" (another model or acquisition of ours), or "baseline".
    colour: in pictures.
    """

    label: str
    kind: str
    colour: str
    config: str | None = None


DEFAULT = "linear_ucb"
METHODS: dict[str, Method] = {
    "prior": Method("prior samples", "baseline", "#999999"),
    "best_of_n": Method("best of all prior samples so far", "baseline", "#666666"),
    "surrogate_best_of_n": Method("best-of-N by the surrogate, equal evaluations", "baseline", "#56B4E9", "ucb.py"),
    "greedy": Method("greedy (posterior mean)", "baseline", "#E69F00", "greedy.py"),
    "version_0_1": Method("default of version 0.1", "baseline", "#F0E442", "ucb.py"),
    "seiko": Method("SEIKO's semantics (affine MLP, constant bonus)", "baseline", "#D55E00", "seiko.py"),
    "seiko_finetune": Method("SEIKO's own way: LoRA fine-tuned on the UCB", "baseline", "#AA4499", "seiko.py"),
    "cma_es": Method("CMA-ES over the initial noise", "baseline", "#CC79A7"),
    "turbo": Method("TuRBO over the initial noise", "baseline", "#882255"),
    "fast_direct": Method("Fast Direct: GP on latents, noise paths moved", "baseline", "#332288"),
    "evolution": Method("the best answers re-noised, no surrogate", "baseline", "#88CCEE", "ucb.py"),
    "linear_ucb": Method("linear + UCB (default)", "ours", "#000000", "ucb.py"),
    "ensemble": Method("ensemble + max over members", "variant", "#009E73", "bootstrap.py"),
    "thompson": Method("linear + Thompson", "variant", "#0072B2", "thompson.py"),
    "restarts": Method("linear + UCB, starting from answered designs too", "variant", "#44AA99", "ucb.py"),
    "gp_log_ei": Method("GP + LogEI", "variant", "#117733", "gp.py"),
}
ABLATIONS = ("greedy", "version_0_1")
"""Baselines that are our own loop with something left out: no rivals."""


@dataclass(frozen=True)
class Rivals:
    """Settings of the rivals that have any, chosen on tuning rewards (docs/query_efficiency.md).

    CMA-ES has none: its population is the batch, and a first step means nothing where noises are scaled.

    step: of Fast Direct, a noise's way along the direction, in lengths of a typical noise.
    low, high: of evolution, strengths of the noise that mutates a parent.
    subspace: of TuRBO, its dimensions.
    """

    step: float = 0.1
    low: float = 0.3
    high: float = 0.9
    subspace: int = 20


def settings_of(
    cell: Cell, run_dir: Path, alpha: float, overrides: Sequence[str] = (), rivals: Rivals = Rivals()
) -> Settings:
    """The settings of a cell, by the road that a user takes: a file in `config/` and changes of its keys.

    Args:
        alpha: price of leaving the prior of a method that has a fixed one, reward units per nat.
        overrides: further changes for every method, as `key=value`.
    """
    method = METHODS[cell.method]
    changes: dict[str, object] = {
        **FIXED,
        "run_dir": run_dir,
        "seed": cell.seed,
        "rounds": cell.budget.rounds,
        "batch_size": cell.budget.batch,
        "initial_batch_size": cell.budget.initial,
        "reference_samples": 0,
        "reward.name": cell.reward,
        "sampler.budget_nats": BUDGET_NATS,
    }
    if cell.budget.one_prompt:
        known = load_prompts(str(FIXED["prompts"]))
        changes["prompts"] = json.dumps([known[cell.seed % len(known)]])
    if cell.method in (*FIXED_PRICE, *UNPRICED):
        del changes["sampler.budget_nats"]
        changes |= {"sampler.alpha": alpha}
    changes |= dict(change.split("=", 1) for change in (*REWARDS.get(cell.reward, ()), *overrides))
    if cell.method == "version_0_1":
        changes |= OF_VERSION_0_1
    if cell.method == "restarts":  # a pool of 8 from half-way on evaluates the network as often as a guided query
        changes |= {"search.operators": "global+restart+pool", "search.pool": 8}
    if cell.method == "evolution":  # as EvoSearch (arXiv 2505.17618): parents by rank, mutated by noise of any strength
        changes |= {"sampler.name": "prior_only", "sampler.num_particles": 1, "search.operators": "restart"}
        changes |= {"search.low_strength": rivals.low, "search.high_strength": rivals.high}
    if cell.method in ("seiko", "seiko_finetune"):
        del changes["sampler.kappa"]  # its tempering is its own
        changes |= {"sampler.num_particles": 4}  # as published
        changes |= {"sampler.gradient_every": 1, "sampler.potential_every": 1}  # it looks at every step
        changes |= {"model.first": cell.budget.initial, "model.step": cell.budget.batch}
    if cell.method == "gp_log_ei":
        changes |= {"acquisition.adapt": False}  # adapting compares its value, nats, with an answer
    if cell.method == "surrogate_best_of_n":
        ours = settings_of(replace(cell, method=DEFAULT), run_dir, alpha, overrides)
        particles = equal_particles(cell, ours)
        changes |= {"sampler.name": "best_of_n", "sampler.num_particles": particles, "sampler.select": "argmax"}
    return _parse(method.config or "ucb.py", changes)


def _parse(file: str, changes: Mapping[str, object]) -> Settings:
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return Settings.from_config(parse(["--config", f"{CONFIG / file}:demo", *flags]))


def evaluations_per_query(settings: Settings) -> int:
    """Network evaluations for one tilted query: calls of the denoiser per particle, a backward pass counting as two.

    The decoder and the image tower are not counted; DAS uses them at every step, best-of-N at the last only.
    """
    sampler, steps = settings.sampler, settings.prior.num_steps
    options = sampler.options
    forward = sampler.num_particles * steps
    if sampler.name != "das" or options.get("gradient", "full") != "full":
        return forward
    first = 1 if options.get("tempering", "calibrated") in ("exp", "polynomial") else 0  # lambda_0 = 0 there
    every = int(options.get("gradient_every", 1))
    gradients = sum(min(k + every, steps) > first for k in range(0, steps, every))
    return forward + 2 * sampler.num_particles * gradients


def tilted_evaluations(cell: Cell, settings: Settings) -> int:
    """Network evaluations for all tilted queries of a cell, and at most for the search of the first price."""
    tries = TRIES * min(PROBES, cell.budget.batch) if settings.sampler.budget_nats is not None else 0
    return (cell.budget.total - cell.budget.initial + tries) * evaluations_per_query(settings)


def equal_particles(cell: Cell, settings: Settings) -> int:
    """N of a best-of-N that spends at least as many network evaluations on a cell as the sampler of `settings`."""
    plain = (cell.budget.total - cell.budget.initial) * settings.prior.num_steps
    return math.ceil(tilted_evaluations(cell, settings) / plain)


def evaluations_of(cell: Cell, settings: Settings) -> int:
    """Network evaluations of a whole cell; at most so many where queries start from designs, or a price is sought."""
    steps, budget = settings.prior.num_steps, cell.budget
    if cell.method == "fast_direct":
        return steps * (
            budget.total + budget.batch * sum(range(1, budget.rounds + 1))
        )  # round r runs each path r + 1 times
    if METHODS[cell.method].config is None:
        return budget.total * steps
    if cell.method == "seiko_finetune":
        return budget.total * steps + budget.rounds * training_evaluations(settings)
    return budget.initial * steps + tilted_evaluations(cell, settings)
