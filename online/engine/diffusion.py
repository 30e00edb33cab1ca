"""The engine of real runs: a diffusion prior, a CLIP feature map, a surrogate, and a sampler, on every rank."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from botorch.models.model import Model
from torch import Tensor

from tiltopt import surrogates
from tiltopt.designs import IMAGES, design_type
from tiltopt.errors import ConfigError, TiltoptError
from tiltopt.kinds import needs
from tiltopt.online.engine import memory
from tiltopt.online.engine.feature_pilot import FeaturePilot
from tiltopt.online.engine.in_memory import encoder_of, held_prior, named
from tiltopt.online.engine.potential import AcquisitionPotential, Aim, aim, fit_several, model_of
from tiltopt.online.engine.price import LEAST, bound, cost_of, first_price
from tiltopt.online.engine.restarts import check_noise, latents_of, law_of, origin_of, sampler_of
from tiltopt.online.hooks import OnStep
from tiltopt.online.places import place_of
from tiltopt.online.queries import Ask, Drawn, Observations, Plan
from tiltopt.online.seeds import derive, generator, query_seed
from tiltopt.online.settings.cost import PILOT_CHAINS, PROBES, TRIES
from tiltopt.online.settings.objectives import objectives_of
from tiltopt.online.settings.prompts import load_prompts, prompt_of
from tiltopt.online.settings.run import FeatureSettings, Settings
from tiltopt.online.settings.samplers import make_loop_sampler, select_rule
from tiltopt.online.team import Team
from tiltopt.samplers import Pilot, PriorOnly, Sampler, Samples, StepInfo
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior
from tiltopt.samplers.micro_batch import MicroBatches, RowLimit, Rows
from tiltopt.samplers.pilot import run_pilot
from tiltopt.samplers.restart import level_of
from tiltopt.samplers.smc import Lineage
from tiltopt.samplers.twisted import Tempered
from tiltopt.surrogates.acquisition import ACQUISITIONS
from tiltopt.surrogates.features import FeatureMap, LatentEncoder, RawFeatures, make_features
from tiltopt.surrogates.io import load, packed
from tiltopt.surrogates.preference import fit_pairwise
from tiltopt.surrogates.several import SeveralModel
from tiltopt.types import Conditioning


class StepCounter:
    """A sampler's callback that counts denoising steps over all groups."""

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self._on_step = on_step
        self._total = total
        self._done = 0

    def __call__(self, info: StepInfo) -> None:
        """Step 0 is the initial noise and is not counted."""
        if info.k > 0:
            self._done += 1
            if self._on_step is not None:
                self._on_step(self._done, self._total)


class DiffusionEngine:
    """Draws designs from a (tilted) diffusion model. Models load at first use, so that building one costs nothing.

    Each query is drawn from its own generator, in groups that fill `settings.micro_batch` rows, and the groups are
    dealt to the ranks: an image depends on its query alone, whatever the number of processes. Where memory runs out,
    the networks see fewer rows at once from then on.
    """

    def __init__(self, settings: Settings, team: Team | None = None, prior: Any = None) -> None:
        """
        Args:
            prior: one in memory, see `tiltopt.as_prior`: a pipeline of diffusers, used as it stands with its adapters,
                or a `Prior`. It takes the place of `settings.prior.path`, and the engine's settings name its
                fingerprint.
        """
        self.settings = settings
        self.team = team or Team()
        if prior is not None:
            self.__dict__["prior"] = held = held_prior(prior, settings.prior)
            self.settings = replace(settings, prior=named(settings.prior, held))
            self.team = team or Team(device=torch.device(getattr(held, "device", "cpu")))
        self.kind = design_type(settings.design)
        self._rows, self._settled = RowLimit(settings.micro_batch), False

    @cached_property
    def prior(self) -> DiffusersPrior:
        """The diffusion model as a Gaussian chain."""
        s = self.settings.prior
        if s.fingerprint:
            raise ConfigError(
                "the prior of this run was handed over in Python, and only Python can go on with it: "
                f"Optimizer.open({str(self._folder)!r}, prior=pipe), with the pipeline of fingerprint {s.fingerprint}."
            )
        return load_prior(s.path, **s.arguments(), device=self.team.device)

    @cached_property
    def encoder(self) -> LatentEncoder:
        """Pictures -> latents."""
        return encoder_of(self.prior)

    @cached_property
    def feature_map(self) -> FeatureMap:
        """Designs and prompts -> features: of pictures those that the settings name, of anything else the design."""
        s = self.settings.features
        if self.kind is not IMAGES:
            return RawFeatures(
                self.prior.decode(torch.zeros(1, *self.prior.event_shape, device=self.team.device)).numel()
            )
        encoder = self.encoder if needs(s.kind) & {"latents", "network"} else None
        return make_features(s.path, s.kind, s.prompt_features, self.team.device, encoder, getattr(torch, s.dtype))

    def seen_by(self, features: FeatureSettings) -> DiffusionEngine:
        """An engine with other features and the same prior, which is loaded once for both."""
        other = DiffusionEngine(replace(self.settings, features=features), self.team)
        if needs(features.kind) & {"latents", "network"}:
            other.__dict__["prior"] = self.prior
        return other

    @property
    def feature_id(self) -> str:
        """Names the feature map; a surrogate saved for another one is refused."""
        return self.feature_map.id

    @property
    def num_features(self) -> int:
        """d of the feature map."""
        return self.feature_map.dim

    # ------------------------------------------------------------------ drawing

    def look(self, x0: Tensor, prompts: Sequence[str]) -> Tensor:
        """(n, d) features of the designs of n clean events, as they are looked at on the way."""
        decode = getattr(self.prior, "guidance_decode", self.prior.decode)
        return self.feature_map(decode(x0), prompts)

    def what_is_tried(self) -> dict[str, Any]:
        """Arguments of `memory.settle` and `choose`."""
        s = self.settings
        work = make_loop_sampler(s.sampler).work(self.prior)
        return {
            "look": self.look,
            "cond": self.prior.encode([prompt_of(s, 1)]),
            "wanted": memory.wanted_rows(self.team, s.micro_batch, s.batch_size * s.sampler.num_particles),
            "backward": "full" if work.network_backward else "look" if work.looks_backward else "none",
            "change_precision": not s.prior.fingerprint,  # a pipeline that was handed over stays as it is
        }

    def _settle(self) -> None:
        """Rows and levers that fit, where the settings leave them to the device; once per process. Collective."""
        if self.kind is IMAGES:
            self.encoder  # noqa: B018  where designs are no pictures, this says so
        check_noise(make_loop_sampler(self.settings.sampler), self.prior)
        if self._settled:
            return
        if self.settings.prior.memory == "auto":
            chosen = memory.settle(self._folder, self.team, self.prior, **self.what_is_tried())
            self.settings = replace(self.settings, micro_batch=chosen.micro_batch)
            self._rows.size = chosen.micro_batch
        memory.recall(self._folder, self.team, self._rows)
        self._settled = True

    def draw_plain(self, asks: Sequence[Ask], on_step: OnStep | None = None) -> list[Drawn]:
        """Plain samples of the prior. Round 0 also lays down the pilot for later rounds."""
        self._settle()
        first = bool(asks) and asks[0].round == 0 and asks[0].index == 0
        keeps_pilot = first and self.team.broadcast(self.team.is_main and FeaturePilot.load(self._folder) is None)
        drawn = self._draw_pilot(asks, on_step) if keeps_pilot else self._plain(asks, on_step)
        memory.keep(self._folder, self.team, self._rows, self.settings.micro_batch)
        return drawn

    def draw(
        self, model: Model, data: Observations, asks: Sequence[Ask], plan: Plan, on_step: OnStep | None = None
    ) -> list[Drawn]:
        """Samples of p(x) exp(acquisition / alpha), one per ask."""
        self._settle()
        plan = replace(plan, alpha=self._price(model, data, asks, plan))
        per_query = self._per_query
        rows, particles = self.settings.micro_batch, self.settings.sampler.num_particles
        groups = self._deal(asks, 1 if per_query else rows // math.gcd(rows, particles))  # whole calls, none half empty
        tick = self._counter(on_step, groups)
        shared = None if per_query else self._tilt(model, data, plan)
        out: list[tuple[int, Drawn]] = []
        for group in groups:
            potential, sampler = shared or self._tilt(model, data, plan, group[0][1])
            drawn = self._sample(group, sampler, potential, self.settings.sampler.num_particles, tick)
            out += self._finish(group, *drawn, model, potential)
        memory.keep(self._folder, self.team, self._rows, self.settings.micro_batch)
        return self.team.collect(out, len(asks))

    def _sample(
        self,
        group: Sequence[tuple[int, Ask]],
        sampler: Sampler,
        potential: AcquisitionPotential | None,
        num_particles: int,
        tick: StepCounter,
    ) -> tuple[Samples, Tensor | None]:
        """Particles of a group's queries, and at which of the first ones each of them began, both (B, P, ...)."""
        start, lineage = group[0][1].start, Lineage(tick)
        if potential is not None:
            sampler, num_particles = sampler_of(sampler, num_particles, start, prior=self.prior, rows=self._rows)
        samples = sampler.sample(
            law_of(self.prior, start),
            potential,  # type: ignore[arg-type]  # plain samples need none
            self._encode([ask.prompt for _, ask in group]),
            num_particles=num_particles,
            generators=[generator(ask.seed, "sample") for _, ask in group],
            callback=lineage,
        )
        return samples, lineage.roots

    def _counter(self, on_step: OnStep | None, groups: Sequence[Sequence[tuple[int, Ask]]]) -> StepCounter:
        starts = [group[0][1].start for group in groups]
        return StepCounter(on_step, sum(self.prior.num_steps - (start.k0 if start else 0) for start in starts))

    def _tilt(
        self, model: Model, data: Observations, plan: Plan, ask: Ask | None = None
    ) -> tuple[AcquisitionPotential, Sampler]:
        """What is sampled, and by what: the acquisition over its price, and the sampler calibrated to it."""
        if plan.alpha is None:
            raise TiltoptError("expected `alpha` in the plan, or `budget`; got neither.")
        acquisition, feasible = self._aim(model, data, plan, ask)
        potential = AcquisitionPotential(acquisition, self.feature_map, plan.alpha, feasible)
        return potential, self._sampler(potential, plan)

    def _aim(self, model: Model, data: Observations, plan: Plan, ask: Ask | None = None) -> Aim:
        """`ask`: whose own acquisition it is; None: that of all queries."""
        wanted = self.settings.acquisition
        even = ask is None or "turn" in ACQUISITIONS[wanted.name].needs
        seed = derive(self.settings.seed, "acquisition") if even or ask is None else ask.seed
        return aim(
            wanted.name,
            model,
            data,
            beta=plan.beta,
            generator=generator(seed, "acquisition"),
            turn=0 if ask is None else ask.number,
            learn_failures=wanted.feasibility,
        )

    def _plain(self, asks: Sequence[Ask], on_step: OnStep | None) -> list[Drawn]:
        groups = self._deal(asks, self.settings.micro_batch)
        tick = self._counter(on_step, groups)
        return self.team.collect([drawn for group in groups for drawn in self._plain_group(group, tick)], len(asks))

    def _plain_group(self, group: Sequence[tuple[int, Ask]], tick: StepCounter) -> list[tuple[int, Drawn]]:
        plain = PriorOnly(micro_batch=self._rows)
        return self._finish(group, *self._sample(group, plain, None, 1, tick), None, None)

    def _draw_pilot(self, asks: Sequence[Ask], on_step: OnStep | None) -> list[Drawn]:
        """Plain samples, the first of them looked at on the way: the same designs as `_plain`, and the pilot beside."""
        groups = self._deal(asks, self.settings.micro_batch)
        tick = self._counter(on_step, groups)
        out: list[tuple[int, Drawn]] = []
        looks: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
        steps: tuple[int, ...] = ()
        for group in groups:
            kept = [at for at, _ in group if at < PILOT_CHAINS]
            if not kept:
                out += self._plain_group(group, tick)
                continue
            cond = self._encode([ask.prompt for _, ask in group])
            gens = [generator(ask.seed, "sample") for _, ask in group]
            chains = run_pilot(self.prior, cond, generators=gens, micro_batch=self._rows, callback=tick)
            steps = chains.steps
            zero = torch.zeros(len(group), 1, dtype=torch.float64)
            ends = Samples(chains.x_final.unsqueeze(1), chains.designs.unsqueeze(1), zero, zero[:, 0])
            drawn = self._finish(group, ends, None, None, None)
            features = torch.stack([self._looked_at(x0[: len(kept)], cond) for x0 in chains.x0])
            gaps = (chains.x_final - chains.x0).double().square().flatten(2).sum(-1).cpu()
            looks += [(at, (features[:, i], gaps[:, i], drawn[i][1].features)) for i, at in enumerate(kept)]
            out += drawn
        rows = self.team.collect(looks, min(PILOT_CHAINS, len(asks)))
        self._keep_pilot(steps or (), rows, [ask.prompt for ask in asks[:PILOT_CHAINS]])
        return self.team.collect(out, len(asks))

    def _looked_at(self, x0: Tensor, cond: Conditioning) -> Tensor:
        """(n, d) float32 features of the designs of n clean events, on the CPU; `cond` may have more rows."""

        def look(start: int, cond: Conditioning, x0: Tensor) -> Rows:
            del start
            with torch.no_grad():
                return (self.feature_map(self.prior.decode(x0), cond.prompts).float().cpu(),)

        (features,) = MicroBatches(cond.select(slice(len(x0))), 1, self._rows).map(look, x0)
        assert features is not None
        return features

    def _finish(
        self,
        group: Sequence[tuple[int, Ask]],
        samples: Samples,
        roots: Tensor | None,
        model: Model | None,
        potential: AcquisitionPotential | None,
    ) -> list[tuple[int, Drawn]]:
        """The chosen particle of each query, as the black box will see it, with what the surrogate thinks of it."""
        gens = [generator(ask.seed, "select") for _, ask in group]
        start, num_particles = group[0][1].start, samples.log_w.shape[1]
        rule = "argmax" if start is not None and start.operator == "pool" else select_rule(self.settings.sampler)
        picked = samples.pick(rule, gens)  # type: ignore[arg-type]
        cost, pick, rows = samples.cost(picked), picked[:, 0], torch.arange(len(group))
        designs, x0 = (each[rows, pick.to(each.device)] for each in (samples.designs, samples.x0))
        found = self.kind.of(designs)
        X = self.features(found, [ask.prompt for _, ask in group])
        drawn = []
        for i, (position, ask) in enumerate(group):
            extra: dict[str, Any] = {
                "design": None if self.kind is IMAGES else found[i],
                "latents": x0[i].to("cpu", torch.float16),
                "origin": origin_of(self.prior, ask, num_particles, 0 if roots is None else int(roots[i, pick[i]])),
            }
            if model is not None:
                with torch.no_grad():
                    row = X[i : i + 1].double().to(self.team.device)
                    extra |= {"ess": float(samples.ess[i]), "log_z": float(samples.log_z[i])}
                    extra |= self._predict(model, row)
                    if cost is not None:
                        extra["nats"] = float(cost[i])
                if potential is not None:
                    extra["alpha"] = potential.alpha
                    if ACQUISITIONS[self.settings.acquisition.name].unit == "reward":  # a logarithm promises none
                        extra["acquired"] = float(potential.acquisition(row.unsqueeze(-2)))
            drawn.append((position, Drawn(self.kind.view(found[i]), X[i], **extra)))
        return drawn

    def _predict(self, model: Model, row: Tensor) -> dict[str, float]:
        """What the surrogate expects of a design; nothing where several objectives are maximised."""
        model = model_of(model, objectives_of(self.settings))
        if isinstance(model, SeveralModel):
            return {}
        posterior: Any = model.posterior(row)
        return {"predicted": float(posterior.mean), "predicted_sd": float(posterior.variance.clamp_min(0).sqrt())}

    def features(self, designs: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """(n, d) float32 features of designs as the black box sees them, on the CPU."""

        def look(start: int, cond: Conditioning) -> Rows:
            with torch.no_grad():
                events = self.kind.events(designs[start : start + len(cond)]).to(self.team.device)
                return (self.feature_map(events, cond.prompts).float().cpu(),)

        (features,) = MicroBatches(Conditioning(tuple(prompts)), 1, self._rows).map(look)
        assert features is not None
        return features

    def latents(self, designs: Sequence[Any]) -> Tensor:
        """(n, *event) float32 on the CPU, clean latents of designs."""
        return latents_of(self.prior, designs, self.kind)

    def level_of(self, strength: float) -> int:
        """The step at which the prior's chain is entered."""
        return level_of(strength, self.prior.num_steps)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """Each prompt is encoded by itself, so that what it becomes does not depend on its neighbours."""
        known = self.__dict__.setdefault("_encoded", {})
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = self.prior.encode([prompt])
        unique = list(dict.fromkeys(prompts))
        stacked = Conditioning.join([known[p] for p in unique])
        return stacked.select([unique.index(p) for p in prompts])

    def _deal(self, asks: Sequence[Ask], size: int) -> list[list[tuple[int, Ask]]]:
        """This rank's groups of asks with their positions; those of a group start from the same law.

        Groups are cut before they are dealt, so a group is the same, and its arithmetic too, on any number of ranks.
        """
        size = max(1, size)
        alike: dict[Any, list[tuple[int, Ask]]] = {}
        for position, ask in enumerate(asks):
            alike.setdefault(ask.start and ask.start.key(), []).append((position, ask))
        groups = [placed[i : i + size] for placed in alike.values() for i in range(0, len(placed), size)]
        return [group for _, group in self.team.share(groups)]

    # ------------------------------------------------------------------ price and tempering

    @property
    def _per_query(self) -> bool:
        """Whether each query follows a random acquisition of its own."""
        return ACQUISITIONS[self.settings.acquisition.name].per_query

    @property
    def _folder(self) -> Path:
        return place_of(self.settings.run_dir)

    @cached_property
    def pilot(self) -> FeaturePilot:
        """The run's pilot, drawn again from the seeds of round 0 when its file is missing. Collective."""
        pilot = self.team.broadcast(FeaturePilot.load(self._folder) if self.team.is_main else None)
        if pilot is not None:
            return pilot
        prompts = load_prompts(self.settings.prompts)
        asks = [
            Ask(i + 1, 0, i, prompt_of(self.settings, i + 1, prompts), query_seed(self.settings.seed, 0, i))
            for i in range(min(PILOT_CHAINS, self.settings.initial_batch_size))
        ]
        self._draw_pilot(asks, None)
        return self.__dict__["pilot"]

    def _keep_pilot(
        self, steps: tuple[int, ...], rows: Sequence[tuple[Tensor, Tensor, Tensor]], prompts: Sequence[str]
    ) -> None:
        pilot = FeaturePilot.of(self.team.broadcast(steps), self.prior.num_steps, rows, prompts)
        if self.team.is_main:
            pilot.save(self._folder)
        self.__dict__["pilot"] = pilot

    def _values(self, fn: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        """`fn` of the pilot's features, in float64 on the CPU: (..., d) -> (...)."""
        with torch.no_grad():
            flat = features.flatten(0, -2).double().to(self.team.device)
            return fn(flat).reshape(features.shape[:-1]).double().cpu()

    def _price(self, model: Model, data: Observations, asks: Sequence[Ask], plan: Plan) -> float | None:
        """The price of a round; where no round has shown what it costs, queries are drawn to see. Collective."""
        if plan.budget is None:
            return plan.alpha
        probes = list(asks[:PROBES])
        groups: list[tuple[Ask | None, list[Ask]]] = [(ask, [ask]) for ask in probes]
        groups = groups if self._per_query else [(None, probes)]
        aims = [self._aim(model, data, plan, ask).acquisition for ask, _ in groups]
        values = [self._values(lambda X, of=of: of(X.unsqueeze(-2)), self.pilot.final) for of in aims]  # type: ignore[misc]
        spread = sum(float(v.std()) for v in values) / len(values) or 1.0

        def cost(alpha: float) -> float | None:
            found = []
            for own, group in groups:
                potential, sampler = self._tilt(model, data, replace(plan, alpha=alpha), own)
                cond, seeds = self._encode([ask.prompt for ask in group]), [ask.seed for ask in group]
                found.append(cost_of(sampler, self.prior, potential, cond, self.settings.sampler, seeds))
            known = [nats for nats in found if nats is not None]
            return sum(known) / len(known) if known else None

        alpha = plan.alpha
        if alpha is None:
            alpha = self.team.broadcast(first_price(cost, spread, plan.budget, TRIES) if self.team.is_main else None)
        return max(alpha, LEAST * spread)

    def _sampler(self, potential: AcquisitionPotential, plan: Plan) -> Sampler:
        """The configuration's sampler with all that it has to learn about a potential, learnt from plain chains: the
        same ones for the whole run, on every rank."""
        given = {} if plan.budget is None else {"max_shift": bound(plan.budget, self.prior.num_steps)}
        sampler = replace(make_loop_sampler(self.settings.sampler, **given), micro_batch=self._rows)
        if not isinstance(sampler, Tempered):
            return sampler
        if sampler.tempering == "calibrated":
            u = self._values(potential.of_features, self.pilot.features)
            fitted = self.pilot.calibrate(u, self._values(potential.of_features, self.pilot.final))
            sampler = sampler.with_calibration(fitted)
        if sampler.needs_pilot:
            sampler = sampler.calibrate(self.prior, potential, self._chains(sampler))
        return sampler

    def _chains(self, sampler: Tempered) -> Pilot:
        """Plain chains on the run's first prompts, with their latents; drawn once."""
        if "chains" not in self.__dict__:
            prompts = load_prompts(self.settings.prompts)
            first = [prompt_of(self.settings, i + 1, prompts) for i in range(self.settings.batch_size)]
            self.__dict__["chains"] = sampler.run_pilot(self.prior, self._encode(first))
        return self.__dict__["chains"]

    # ------------------------------------------------------------------ surrogate

    def fit(self, data: Observations, round_: int) -> Model:
        """The surrogate of a round, on all answers, from the round's own generator."""
        if data.comparisons is not None:
            return fit_pairwise(data.X, data.comparisons, data.choices, **self.settings.model.options)
        name, source = self.settings.model.name, generator(self.settings.seed, "fit", round_)
        options = {"blocks": self.feature_map.blocks, **self.settings.model.options}
        if data.objectives:
            return fit_several(name, data, source, **options)
        return surrogates.fit(name, data.X, data.Y, sem=data.sem, generator=source, **options)

    def share_model(self, model: Model | None) -> Model:
        """Rank 0's surrogate on every rank, through its saved form."""
        if self.team.size == 1:
            assert model is not None
            return model
        files = self.team.broadcast(
            None if model is None else packed(model, feature_id=self.feature_id, data_fingerprint="")
        )
        if model is not None:
            return model
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return load(folder, feature_id=self.feature_id)

    def describe(self) -> dict[str, Any]:
        """What was loaded, for the run's record."""
        return {"prior": self.prior.describe(), "features": self.feature_id, "device": str(self.team.device)}
