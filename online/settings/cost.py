"""What a job costs at most, from its settings alone: answers, calls, and rows of work for the networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiltopt.kinds import needs
from tiltopt.online.settings.run import PriorSettings, RewardSettings, Settings
from tiltopt.online.settings.samplers import make_loop_sampler
from tiltopt.online.settings.validation import reference_samples
from tiltopt.samplers import BestOfN, PriorOnly
from tiltopt.samplers.pilot import kept_steps
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.twisted import Tempered
from tiltopt.samplers.work import Steps, Work
from tiltopt.surrogates.acquisition import ACQUISITIONS

PILOT_CHAINS = 64
"""Plain chains of a run that are kept for calibration; 64 calibrate nearly as well as 256."""
PROBES, TRIES = 2, 4
"""Queries that are drawn to see what a price costs where no round has shown it yet, and how often at most."""


@dataclass(frozen=True)
class Cost:
    """What a whole job amounts to. Budgets bound the answers.

    Args:
        queries: designs that are asked about.
        reference: plain samples that are scored for the report only.
        comparisons: verdicts on two designs, in a run of comparisons; there designs get no value.
        work: of the networks.
        answers: queries or comparisons that the black box is asked about at most.
        calls: the same with every retry, at most.
    """

    queries: int
    reference: int
    comparisons: int
    work: Work
    answers: int
    calls: int


def cost(settings: Settings, prior: Prior | None = None) -> Cost:
    """The most that a run of the loop costs.

    Args:
        prior: of these settings, where it is loaded; its work is then exact.
    """
    chain = steps_of(settings.prior) if prior is None else prior
    tilted, reference = settings.rounds * settings.batch_size, reference_samples(settings)
    plain, sampler = PriorOnly().work(chain), make_loop_sampler(settings.sampler)
    if isinstance(sampler, Tempered) and sampler.tempering == "calibrated":
        sampler = replace(sampler, tempering=lambda k, n: 1.0)  # learnt from the features that round 0 keeps
    looks = len(kept_steps(chain.num_steps)) * min(PILOT_CHAINS, settings.initial_batch_size)
    work = plain * (settings.initial_batch_size + reference) + Work(looks=looks)
    tries = TRIES if tilted and settings.sampler.budget_nats is not None else 0
    query = sampler.work(chain) * settings.sampler.num_particles
    work += query * (tries * PROBES)
    if "pool" in settings.search.operators.split("+"):
        query = query.or_more(BestOfN().work(chain) * settings.search.pool)
    work += query * tilted
    if isinstance(sampler, Tempered) and sampler.needs_pilot:
        apart = ACQUISITIONS[settings.acquisition.name].per_query  # each query, and each probe, has its own potential
        learnt = settings.rounds * (settings.batch_size if apart else 1) + tries * (PROBES if apart else 1)
        work += sampler.pilot_work(chain) + sampler.learning_work(chain) * learnt
    if "network" in needs(settings.features.kind):  # two passes through half of the network: about one for each picture
        seen = work.looks + settings.initial_batch_size + reference + tilted
        work += Work(network=seen, network_backward=work.looks_backward)
    comparisons = _comparisons(settings) if settings.pairwise else 0
    wanted = comparisons or settings.initial_batch_size + tilted + reference
    answers, calls = budgeted(wanted, settings.reward)
    return Cost(settings.initial_batch_size + tilted, reference, comparisons, work, answers, calls)


def steps_of(prior: PriorSettings) -> Steps:
    """The chain of a prior that is not loaded: guidance counts twice, as it does for most models."""
    return Steps(prior.num_steps, prior.eta > 0 or prior.renoise, 1 if prior.guidance_scale == 1 else 2)


def budgeted(wanted: int, reward: RewardSettings) -> tuple[int, int]:
    """Answers and calls, at most, of a job that wants so many answers."""
    answers = min(wanted, reward.max_queries or wanted)
    calls = min(answers * (1 + reward.retries), reward.max_calls or answers * (1 + reward.retries))
    return min(answers, calls), calls


def _comparisons(settings: Settings) -> int:
    """Of the plan of `tiltopt.online.pairs`: a ring step joins every query of a round with another."""
    k = settings.comparisons_per_query
    return settings.initial_batch_size * -(-k // 2) + settings.rounds * settings.batch_size * (1 + -(-(k - 1) // 2))


def in_words(title: str, c: Cost, reward: RewardSettings, answers_by: str, outcome: str) -> str:
    """What a job is, what it costs at most, and where what comes of it goes.

    Args:
        title: what it is.
        answers_by: who answers, in words.
        outcome: where what comes of it goes.
    """
    limits = [
        f"reward.{name} = {value}"
        for name in ("max_queries", "max_calls", "max_seconds")
        if (value := getattr(reward, name)) is not None
    ]
    bound = f" ({', '.join(limits)})" if limits else ""
    return (
        f"{title}\nat most {c.answers:,} answers by {answers_by}, {c.calls:,} calls with retries{bound}, and "
        f"{c.work.network:,} network evaluations ({c.work.network_backward:,} of them differentiated); {outcome}"
    )
