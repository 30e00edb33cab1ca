"""Direct sampling: one known reward, no loop, prompts shared between processes.

    accelerate launch samplers/main.py --config config/das.py:demo

A sampler that follows gradients gets the reward as a differentiable function; any other asks the black box itself.
Files: `config.json`, `images/NNNNNN.png` (the chosen particle), `samples.safetensors` (log_w (N, P), log_z (N,),
picked (N,)), `results.jsonl` (one line per image), `trace.jsonl` (one line per image and step), `summary.json`,
`samples.png`, `report.html`, `metrics.jsonl`; and `plain.jsonl` of the plain samples beside them, of the same prompts
and seeds. Trackers are told the plain samples as step 0 and the tilted ones as step 1.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from tiltopt import rewards
from tiltopt.designs import IMAGES, to_images
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online.direct.outcome import show
from tiltopt.online.direct.settings import DirectSettings
from tiltopt.online.engine import memory
from tiltopt.online.places import place_of
from tiltopt.online.report.record import BESIDE, DIRECT
from tiltopt.online.runner import CallPolicy, Fault, Runner, Stop
from tiltopt.online.seeds import generator, query_seed
from tiltopt.online.settings.cost import Cost, budgeted, in_words, steps_of
from tiltopt.online.settings.samplers import make_sampler, select_rule
from tiltopt.online.settings.validation import check_device, check_path, check_sampler, check_tracker
from tiltopt.online.store.files import image_path, read_json, write_atomic, write_designs, write_json
from tiltopt.online.team import Team, on_main
from tiltopt.rewards.base import Answer, BlackBox
from tiltopt.rewards.differentiable import has_gradient, make_differentiable
from tiltopt.samplers import Demon, PriorOnly, Sampler, StepInfo
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior
from tiltopt.samplers.micro_batch import RowLimit
from tiltopt.samplers.prior import Prior
from tiltopt.samplers.twisted import Tempered, TwistedSampler
from tiltopt.types import Conditioning, Potential


class DirectSample(NamedTuple):
    """One image: the chosen particle, the weights of all, and what happened on the way."""

    image: Image.Image
    picked: int
    log_w: Tensor
    log_z: Tensor
    trace: list[dict[str, float]]


def run_direct(settings: DirectSettings, team: Team | None = None) -> dict[str, Any]:
    """Draw, score and save every image; returns the summary. Collective.

    Image i depends on (seed, i), its prompt and the micro-batch alone, whatever the number of processes.
    Without a `team`, the processes that the launcher started are one, and it is left at the end.
    """
    check(settings)
    if team is None:
        team = Team.from_accelerate(settings.device)
        summary = run_direct(settings, team)
        team.leave()
        return summary
    folder, started = place_of(settings.run_dir), time.monotonic()
    on_main(team, lambda: _claim(folder, settings))
    if team.is_main:
        print(start_line(settings), flush=True)
    prompts = settings.all_prompts()
    prior = _load_prior(settings, team)
    box = rewards.make_reward(settings.reward.name, **settings.reward.options)
    runner = make_runner(settings, team, box)
    potential = _potential(settings, runner)
    if settings.prior.memory == "auto":
        chosen = memory.settle(folder, team, prior, **what_is_tried(settings, team, prior, potential))
        settings = replace(settings, micro_batch=chosen.micro_batch)
    rows = RowLimit(settings.micro_batch)  # one for all: what does not fit once is not tried again
    sampler = replace(_sampler(settings), micro_batch=rows)
    if isinstance(sampler, Tempered) and sampler.needs_pilot:
        sampler = _calibrated(sampler, prior, potential, prompts)
    drawn = draw(settings, team, prior, sampler, potential, prompts)
    beside = _beside(settings, team, prior, prompts[: settings.plain_images()], rows)
    return on_main(team, lambda: _save(folder, settings, prompts, drawn, beside, runner, started))


def check(settings: DirectSettings) -> None:
    """Refuse what can be known to fail before a model is loaded. Raises ConfigError."""
    settings.all_prompts()
    check_sampler(settings.sampler, settings.prior)
    check_tracker(settings.tracker)
    check_device(settings.device)
    if not settings.reward.name:
        raise ConfigError("`reward.name`: expected the reward to sample for, got none; see docs/rewards.md.")
    rewards.validate(settings.reward.name, settings.reward.options)
    check_path("prior.path", settings.prior.path, "model_index.json", "the folder of a pipeline")
    if settings.reward.options.get("standardise"):
        raise ConfigError(
            "`reward.standardise` needs round 0 of a run, and direct sampling has none; weigh the parts in their own "
            "units."
        )
    if _sampler(settings).guided and not has_gradient(settings.reward.name, settings.reward.options):
        raise ConfigError(
            f"`sampler.name`: {settings.sampler.name!r} follows gradients, and the reward {settings.reward.name!r} has "
            "none. Use --config.sampler.name=fk_steering, best_of_n or demon."
        )


def cost(settings: DirectSettings, prior: Prior | None = None) -> Cost:
    """The most that drawing costs. A sampler without gradients asks the black box about every look.

    Args:
        prior: of these settings, where it is loaded; its work is then exact.
    """
    chain, sampler = steps_of(settings.prior) if prior is None else prior, _sampler(settings)
    images = len(settings.all_prompts())
    work = sampler.work(chain) * (images * settings.sampler.num_particles)
    if isinstance(sampler, Tempered) and sampler.needs_pilot:
        work += sampler.pilot_work(chain) + sampler.learning_work(chain)
    asks = sampler.guided or isinstance(sampler, PriorOnly)
    looks, plain = 0 if asks else work.looks, settings.plain_images()
    work += PriorOnly().work(chain) * plain
    answers, calls = budgeted(images + looks + plain, settings.reward)
    return Cost(images, plain, 0, work, answers, calls)


def what_is_tried(
    settings: DirectSettings, team: Team, prior: DiffusersPrior, potential: Potential | None
) -> dict[str, Any]:
    """Arguments of `memory.settle` and `choose`. A black box is not asked."""
    work, sampler = _sampler(settings).work(prior), _sampler(settings)

    def look(x0: Tensor, prompts: Sequence[str]) -> Tensor:
        designs = prior.guidance_decode(x0)
        return potential(designs, Conditioning(tuple(prompts))) if potential and sampler.guided else designs

    return {
        "look": look,
        "cond": prior.encode(settings.all_prompts()[:1]),
        "wanted": memory.wanted_rows(
            team, settings.micro_batch, len(settings.all_prompts()) * settings.sampler.num_particles
        ),
        "backward": "full" if work.network_backward else "look" if work.looks_backward else "none",
        "change_precision": True,
    }


def start_line(settings: DirectSettings) -> str:
    """What is drawn, what it costs at most, and where it goes."""
    c, s = cost(settings), settings.sampler
    beside = f" and {c.reference} plain ones beside them" if c.reference else ""
    title = f"direct sampling: {c.queries} images{beside}, {s.name} with {s.num_particles} particles"
    return in_words(title, c, settings.reward, f"the reward {settings.reward.name!r}", f"all go to {settings.run_dir}")


def _sampler(settings: DirectSettings) -> TwistedSampler | Demon:
    return make_sampler(settings.sampler)


def draw(
    settings: DirectSettings,
    team: Team,
    prior: DiffusersPrior,
    sampler: Sampler,
    potential: Potential,
    prompts: Sequence[str],
) -> list[DirectSample]:
    """One `DirectSample` per prompt, in order, on every rank. Groups of prompts, not prompts, are dealt to the
    processes, so that a prompt's neighbours in a network call are the same on any number of them."""
    size = settings.micro_batch // math.gcd(settings.micro_batch, settings.sampler.num_particles)
    groups = [list(range(i, min(i + size, len(prompts)))) for i in range(0, len(prompts), size)]
    mine: list[tuple[int, DirectSample]] = []
    for _, group in tqdm(team.share(groups), desc="prompts", disable=not (team.is_main and sys.stderr.isatty())):
        steps: list[StepInfo] = []
        gens = [generator(query_seed(settings.seed, 0, i), "sample") for i in group]
        samples = sampler.sample(
            prior,
            potential,
            prior.encode([prompts[i] for i in group]),
            num_particles=settings.sampler.num_particles,
            generators=gens,
            callback=steps.append,
        )
        selectors = [generator(query_seed(settings.seed, 0, i), "select") for i in group]
        picked = samples.pick(select_rule(settings.sampler), selectors)[:, 0].tolist()  # type: ignore[arg-type]
        images = to_images(torch.stack([samples.designs[b, p] for b, p in enumerate(picked)]))
        log_w, log_z = samples.log_w.double().cpu(), samples.log_z.double().cpu()
        for b, i in enumerate(group):
            mine.append((i, DirectSample(images[b], picked[b], log_w[b], log_z[b], [_line(step, b) for step in steps])))
    return team.collect(mine, len(prompts))


def _beside(
    settings: DirectSettings, team: Team, prior: DiffusersPrior, prompts: Sequence[str], rows: RowLimit
) -> list[Image.Image]:
    """A plain sample of each prompt, from the seed of the tilted one."""
    alone = replace(settings, sampler=replace(settings.sampler, name="prior_only", num_particles=1, options={}))
    plain = PriorOnly(micro_batch=rows)
    found = draw(alone, team, prior, plain, lambda designs, cond: designs.new_zeros(len(designs)), prompts)
    return [sample.image for sample in found]


class BlackBoxPotential:
    """log G = reward / alpha, from a black box that sees 8-bit images; -inf for what cannot be measured. No gradient.

    Args:
        runner: calls the reward.
        alpha: > 0, reward units per nat.
    """

    def __init__(self, runner: Runner, alpha: float) -> None:
        self.runner, self.alpha = runner, alpha

    def __call__(self, designs: Tensor, cond: Conditioning) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n,) nats.

        Raises:
            RewardError: the black box gave no answer about a design; a sample without it would be of another target.
        """
        answers = self.runner.ask(to_images(designs), cond.prompts)
        lost = next((answer for answer in answers if answer.failed and not answer.infeasible), None)
        if lost is not None:
            raise RewardError(f"reward `{self.runner.black_box.name}`: {lost.reason}; without it nothing can be drawn.")
        values = [-math.inf if answer.infeasible else answer.value for answer in answers]
        return torch.tensor(values, dtype=torch.float32, device=designs.device) / self.alpha


def make_runner(settings: DirectSettings, team: Team, box: BlackBox) -> Runner:
    """What calls the reward on this process, with its share of the budgets."""
    policy = CallPolicy.from_reward(settings.reward)
    shares = {
        name: limit // team.size + (team.rank < limit % team.size)
        for name in ("max_queries", "max_calls")
        if (limit := getattr(policy, name)) is not None
    }
    if 0 in shares.values():
        raise ConfigError(f"`reward`: expected budgets of at least 1 for each of {team.size} processes, got {shares}.")
    return Runner(box, replace(policy, **shares))


class Scored(NamedTuple):
    """What the reward said of pictures: an answer each, a failure where a budget ended before, and why it ended."""

    answers: list[Answer]
    stop: Stop | None

    @property
    def values(self) -> list[float]:
        """NaN where there is none."""
        return [float(answer) for answer in self.answers]

    @property
    def trouble(self) -> str:
        """What went wrong, for people: the black box is dead, or answered nothing; "" where nothing did."""
        if self.stop is not None and self.stop.failed:
            return self.stop.message
        if not self.answers or not all(answer.failed for answer in self.answers):
            return ""
        first = self.answers[0]
        told = f"\n{first.raw}" if isinstance(first, Fault) and first.raw else ""
        return f"nothing was answered of {len(self.answers)} images, the first with: {first.reason}{told}"


def score(runner: Runner, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
    """The reward of every image."""
    found: dict[Any, Answer] = {}
    stop = runner.run([(i, *item) for i, item in enumerate(zip(images, prompts, strict=True))], found.__setitem__)
    if stop is not None and not stop.failed:
        warnings.warn(stop.message, stacklevel=2)
    unasked = Answer.failure(stop.message if stop is not None else "")
    return Scored([found.get(i, unasked) for i in range(len(images))], stop)


def _potential(settings: DirectSettings, runner: Runner) -> Potential:
    alpha = float(settings.sampler.alpha or 0.0)
    if not _sampler(settings).guided:
        return BlackBoxPotential(runner, alpha)
    reward = make_differentiable(settings.reward.name, **settings.reward.options)
    return lambda designs, cond: reward(designs, cond.prompts) / alpha


def _load_prior(settings: DirectSettings, team: Team) -> DiffusersPrior:
    s = settings.prior
    return load_prior(s.path, **s.arguments(), device=team.device)


def _calibrated(sampler: Tempered, prior: DiffusersPrior, potential: Potential, prompts: Sequence[str]) -> Tempered:
    """The sampler with all that is learnt on the first prompts of the whole list, the same on every process."""
    cond = prior.encode(list(dict.fromkeys(prompts))[:8])
    return sampler.calibrate(prior, potential, sampler.run_pilot(prior, cond))


def _line(step: StepInfo, b: int) -> dict[str, float]:
    return {
        "k": step.k,
        "ess": float(step.ess[b]),
        "temperature": float(step.temperature[b]),
        "log_z": float(step.log_z[b]),
        "mean_potential": float(step.mean_potential[b]),
    }


def _claim(folder: Path, settings: DirectSettings) -> None:
    """The folder with its configuration; one that holds other settings is refused."""
    path = folder / "config.json"
    told = dict.fromkeys(("tracker", "project"))  # which say nothing of what is drawn
    known = read_json(path, settings.to_dict())
    if json.dumps(known | told, sort_keys=True) != json.dumps(settings.to_dict() | told, sort_keys=True):
        raise ConfigError(
            f"`run_dir`: {folder} holds samples of other settings; name another folder with --config.run_dir."
        )
    write_json(path, settings.to_dict())


def _save(
    folder: Path,
    settings: DirectSettings,
    prompts: Sequence[str],
    drawn: Sequence[DirectSample],
    beside: Sequence[Image.Image],
    runner: Runner,
    started: float,
) -> dict[str, Any]:
    """Everything that was drawn, which is kept before it is scored; returns the summary.

    Raises:
        RewardError: the black box is dead, or answered nothing.
    """
    images = [*(d.image for d in drawn), *beside]
    write_designs({image_path(folder, i): image for i, image in enumerate(images, start=1)}, IMAGES)
    scored = score(runner, images, [*prompts, *prompts[: len(beside)]])
    values, plain = scored.values[: len(drawn)], scored.values[len(drawn) :]
    results: list[dict[str, Any]] = []
    trace: list[dict[str, Any]] = []
    for i, (d, value) in enumerate(zip(drawn, values, strict=True)):
        ess = float(torch.exp(-torch.logsumexp(2 * d.log_w, dim=0)))
        row = _row(settings, prompts[i], i, i + 1, value)
        results.append(row | {"picked": d.picked, "ess": ess, "log_z": _number(float(d.log_z))})
        trace += [{"image": i + 1} | {k: _number(v) for k, v in line.items()} for line in d.trace]
    others = [_row(settings, prompts[i], i, len(drawn) + i + 1, value) for i, value in enumerate(plain)]
    for name, lines in ((DIRECT, results), ("trace.jsonl", trace), (BESIDE, others)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    tensors = {
        "log_w": torch.stack([d.log_w for d in drawn]),
        "log_z": torch.stack([d.log_z for d in drawn]),
        "picked": torch.tensor([d.picked for d in drawn]),
    }
    write_atomic(folder / "samples.safetensors", lambda file: file.write(save(tensors)))
    unit = runner.black_box.unit
    summary = show(folder, settings, images[: len(drawn)], beside, unit, time.monotonic() - started)
    if scored.trouble:
        raise RewardError(f"{scored.trouble}\nEverything that was drawn is in {folder}.")
    return summary


def _row(settings: DirectSettings, prompt: str, i: int, image: int, value: float) -> dict[str, Any]:
    seed = query_seed(settings.seed, 0, i)
    return {"image": image, "prompt": prompt, "seed": seed, "reward": _number(value)}


def _number(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
