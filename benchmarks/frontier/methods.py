"""The methods of the frontier benchmark, how strongly each is set to work, and what that costs.

Cost is counted in network evaluations of one picture: 1 for a guided evaluation of the denoiser at one step, 2 more for
a backward pass through it. Decoding and rewards are not counted. What a method learns before it draws (the pilot of
DAS, all of fine-tuning) is shared out over the pictures of the cell and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.frontier.finetune import BACKWARD
from tiltopt.samplers import DAS, TDS, BestOfN, Demon, FKSteering, Guidance, PriorOnly, Sampler
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.twisted import Tempered
from tiltopt.samplers.work import Work, branches_of

EVALUATIONS = 108
"""Network evaluations per picture that every sampler may spend: nine plain chains of 12 steps, or three particles of
DAS as published, the fewest that its rule ever resamples."""

PRICES = (0.5, 0.2, 0.08, 0.03, 0.01)
"""alpha, in standard deviations of the reward over plain samples per nat: the weak tilt first."""


@dataclass(frozen=True)
class Method:
    """How a method is shown and set to work.

    Args:
        label: for people.
        kind: "price" (the strengths are alpha), "chains" or "noises" (their number), "train" (training, as a share of
            what the samplers spend on the whole cell), or "plain".
        strengths: at least five of them, weakest first.
        variants: settings to choose among on the tuning cells, by name; the first one where nothing was chosen.
    """

    label: str
    kind: str
    strengths: tuple[float, ...]
    variants: Mapping[str, Mapping[str, Any]]

    @property
    def together(self) -> bool:
        """Whether one job gives every strength: the checkpoints of a training, or the first of many chains."""
        return self.kind in ("train", "chains")


PUBLISHED = DAS(
    tempering="exp", gradient="full", gradient_every=1, potential_every=1, max_shift=None, ess_threshold=0.5,
    ess_rule="share", resampling="ssp", select="argmax",
)  # fmt: skip

METHODS: dict[str, Method] = {
    "prior": Method("plain samples", "plain", (0.0,), {"": {}}),
    "das": Method("DAS()", "price", PRICES, {"": {"sampler": DAS(pilot_chains=12)}}),
    "das_published": Method("DAS as published", "price", PRICES, {"": {"sampler": PUBLISHED}}),
    "fk_steering": Method(
        "FK steering",
        "price",
        PRICES,
        {
            "difference": {"sampler": FKSteering()},
            "difference_4": {"sampler": FKSteering(potential_every=4)},
            "max": {"sampler": FKSteering(accumulate="max")},
        },
    ),
    "tds": Method("TDS", "price", PRICES, {"": {"sampler": TDS()}}),
    "best_of_n": Method("best-of-N", "chains", (2, 3, 4, 6, 9), {"": {}}),
    "guidance": Method(
        "guidance (DPS), best of three",
        "price",
        PRICES,
        {"none": {"sampler": Guidance()}, "exp": {"sampler": Guidance(tempering="exp")}},
    ),
    "demon": Method(
        "Demon",
        "noises",
        (2, 3, 4, 5, 6),
        {"tanh": {"combine": "tanh"}, "boltzmann": {"combine": "boltzmann"}},
    ),
    "policy_gradient": Method(
        "policy gradient (DDPO), LoRA",
        "train",
        (0.5, 1, 2, 4, 8),
        {"1e-3": {"rate": 1e-3}, "3e-3": {"rate": 3e-3}, "3e-4": {"rate": 3e-4}},
    ),
    "backpropagation": Method(
        "direct backpropagation, LoRA",
        "train",
        (0.5, 1, 2, 4, 8),
        {
            "last_1e-3": {"rate": 1e-3, "depth": 1},
            "last_3e-3": {"rate": 3e-3, "depth": 1},
            "all_1e-3": {"rate": 1e-3, "depth": None},
        },
    ),
}
OURS = "das"
RANK = 8
"""Of the LoRA."""


def evaluations(work: Work, prior: Prior) -> float:
    """Network evaluations of some work."""
    return (work.network + BACKWARD * work.network_backward) / branches_of(prior)


def sampler_of(method: str, variant: str, strength: float) -> Sampler:
    """The sampler of a method that has one."""
    known = METHODS[method]
    options = known.variants[variant]
    if known.kind == "plain":
        return PriorOnly()
    if method == "best_of_n":
        return BestOfN()
    if method == "demon":
        return Demon(num_noises=int(strength), **options)
    sampler: Sampler = options["sampler"]
    return sampler


def learning(sampler: Sampler, prior: Prior) -> float:
    """Evaluations that a sampler spends before it draws, once for a cell."""
    if not (isinstance(sampler, Tempered) and sampler.needs_pilot):
        return 0.0
    return evaluations(sampler.pilot_work(prior) + sampler.learning_work(prior), prior)


def particles(method: str, strength: float, sampler: Sampler, prior: Prior, pictures: int) -> int:
    """How many a picture gets, so that the cell stays within `EVALUATIONS` for each of its pictures."""
    if METHODS[method].kind == "plain" or method == "demon":
        return 1
    if method == "best_of_n":
        return int(strength)
    each = evaluations(sampler.work(prior), prior)  # type: ignore[attr-defined]
    return max(1, int((EVALUATIONS - learning(sampler, prior) / pictures) // each))
