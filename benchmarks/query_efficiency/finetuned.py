"""SEIKO's own way (arXiv 2402.16359) as an engine of the loop: each round fine-tunes the prior on the optimistic
surrogate, held to the prior by the Kullback-Leibler divergence, and draws its queries from the fine-tuned model.

    max over theta of E[UCB(x)] - alpha KL(p_theta || p)

It differs from what was published in two things: every round begins at the prior itself, so that an interrupted run
goes on the same, and the gradient goes through the last `DEPTH` steps of the chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from botorch.models.model import Model
from torch import Tensor

from benchmarks.frontier.finetune import Training, backpropagation, evaluations_per_update
from benchmarks.frontier.lora import LoRAPolicy
from benchmarks.query_efficiency.plain import CachedPlain
from tiltopt.errors import TiltoptError
from tiltopt.online.hooks import OnStep
from tiltopt.online.queries import Ask, Drawn, Observations, Plan
from tiltopt.online.seeds import generator
from tiltopt.online.settings.run import Settings
from tiltopt.samplers import PriorOnly
from tiltopt.samplers.diffusers_prior import load_prior
from tiltopt.types import Conditioning

RANK, RATE, BATCH, DEPTH, UPDATES = 8, 1e-3, 8, 4, 20
"""Of the LoRA; of Adam, in chains per update and in steps that the gradient goes through; updates per round."""


def training_of(alpha: float) -> Training:
    """How a round is trained at a price, reward units per nat."""
    return Training(rate=RATE, batch=BATCH, kl=alpha, depth=DEPTH)


def training_evaluations(settings: Settings) -> int:
    """Network evaluations of one round's training."""
    return UPDATES * evaluations_per_update(training_of(1.0), settings.prior.num_steps)


class FineTuned(CachedPlain):
    """An engine that draws from a fine-tuned prior in place of sampling a tilted one."""

    def draw(
        self, model: Model, data: Observations, asks: Sequence[Ask], plan: Plan, on_step: OnStep | None = None
    ) -> list[Drawn]:
        """Fine-tunes on the acquisition, on the prompts of the asks, and draws each ask once."""
        if plan.alpha is None:
            raise TiltoptError(
                "expected `sampler.alpha`, the price at which fine-tuning leaves the prior; got a budget."
            )
        s, source = self.settings, generator(self.settings.seed, "finetune", asks[0].round)
        own = load_prior(s.prior.path, **s.prior.arguments(), device=self.team.device)
        policy = LoRAPolicy(own, RANK, source)
        acquisition = self._aim(model, data, plan).acquisition

        def reward(x: Tensor, cond: Conditioning) -> Tensor:
            return acquisition(self.feature_map(own.decode(x), cond.prompts).double().unsqueeze(-2))

        prompts = self._encode([ask.prompt for ask in asks])
        turns = (prompts.select([(BATCH * turn + i) % len(asks) for i in range(BATCH)]) for turn in range(UPDATES))
        updates = backpropagation(policy, reward, turns, training_of(plan.alpha), source)
        for _ in range(UPDATES):
            next(updates)
        groups = self._deal(asks, s.micro_batch)
        tick, out = self._counter(on_step, groups), []
        for group in groups:
            samples = PriorOnly(micro_batch=self._rows).sample(
                own,
                None,
                self._encode([ask.prompt for _, ask in group]),
                num_particles=1,
                generators=[generator(ask.seed, "sample") for _, ask in group],
                callback=tick,
            )
            out += self._finish(group, dataclasses.replace(samples, nats=None), None, model, None)
        return self.team.collect(out, len(asks))
