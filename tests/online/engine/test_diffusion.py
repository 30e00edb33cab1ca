"""The engine of real runs on tiny components: a query's image depends on the query alone, and the pilot is durable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes.counted import counted
from tests.fakes.tiny import tiny_clip, tiny_pipeline
from tiltopt.designs import to_designs, to_images
from tiltopt.errors import ConfigError, SurrogateError
from tiltopt.online.engine.diffusion import DiffusionEngine
from tiltopt.online.engine.feature_pilot import FILE, FeaturePilot
from tiltopt.online.engine.price import next_price
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import Ask, Drawn, Objective, Observations, Origin, Plan, Start
from tiltopt.online.seeds import query_seed
from tiltopt.online.settings.cost import cost
from tiltopt.online.settings.prompts import prompt_of
from tiltopt.online.settings.run import Settings
from tiltopt.online.store.latents import read_latents
from tiltopt.samplers.work import Work
from tiltopt.surrogates.feasibility import FeasibilityModel
from tiltopt.types import Conditioning

CHAINS = 10


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    parts = tmp_path_factory.mktemp("parts")
    tiny_pipeline(parts / "pipeline")
    tiny_clip(parts / "clip")
    return Settings.from_config(
        {
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "initial_batch_size": CHAINS,
            "micro_batch": 4,
            "prior": {"path": str(parts / "pipeline"), "num_steps": 4},
            "features": {"path": str(parts / "clip")},
            "sampler": {"num_particles": 2, "alpha": 0.5},
            "model": {"name": "linear"},
        }
    )


def asks(settings: Settings, round_: int, n: int) -> list[Ask]:
    return [
        Ask(round_ * 100 + i + 1, round_, i, prompt_of(settings, i + 1), query_seed(settings.seed, round_, i))
        for i in range(n)
    ]


def data_of(drawn: list[Drawn]) -> Observations:
    X = torch.stack([d.features for d in drawn]).double()
    Y = torch.tensor([[float(np.asarray(d.image).mean())] for d in drawn], dtype=torch.float64)
    return Observations(X, Y, None, torch.empty(0, X.shape[1], dtype=torch.float64))


@pytest.fixture(scope="module")
def engine(settings: Settings) -> DiffusionEngine:
    return DiffusionEngine(settings)


@pytest.fixture(scope="module")
def first(engine: DiffusionEngine, settings: Settings) -> list[Drawn]:
    return engine.draw_plain(asks(settings, 0, CHAINS))


def close(a: Drawn, b: Drawn) -> bool:
    """Within 1/255 on 99 % of the pixels."""
    difference = np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int))
    return bool((difference <= 1).mean() >= 0.99)


def test_images_do_not_depend_on_their_batch(engine: DiffusionEngine, settings: Settings, first: list[Drawn]) -> None:
    some = asks(settings, 0, CHAINS)[3:8]
    again = engine.draw_plain(some)
    assert all(close(a, b) for a, b in zip(again, first[3:8], strict=True))
    same = engine.draw_plain(asks(settings, 0, CHAINS))
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(same, first, strict=True))


def test_features_are_those_of_the_image_that_the_black_box_sees(engine: DiffusionEngine, first: list[Drawn]) -> None:
    again = engine.features([d.image for d in first], [""] * CHAINS)
    torch.testing.assert_close(torch.stack([d.features for d in first]), again, rtol=1e-4, atol=1e-5)
    back = to_images(to_designs([d.image for d in first]))
    assert all(a.tobytes() == d.image.tobytes() for a, d in zip(back, first, strict=True))


def test_the_pilot_is_written_and_drawn_again_when_it_is_gone(settings: Settings, first: list[Drawn]) -> None:
    folder = Path(settings.run_dir)
    written = FeaturePilot.load(folder)
    assert written is not None
    assert torch.equal(written.final, torch.stack([d.features for d in first]))
    (folder / FILE).unlink()
    again = DiffusionEngine(settings).pilot
    for name in ("steps", "num_steps", "features", "final", "distance"):
        assert torch.equal(getattr(written, name), getattr(again, name)), name
    assert (folder / FILE).is_file()


def test_tilted_queries_are_reproducible_and_independent_of_their_batch(
    engine: DiffusionEngine, settings: Settings, first: list[Drawn]
) -> None:
    data = data_of(first)
    model, plan = engine.fit(data, 1), Plan(alpha=0.5, beta=1.0)
    batch = asks(settings, 1, 5)
    one, two = engine.draw(model, data, batch, plan), engine.draw(model, data, batch, plan)
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(one, two, strict=True))
    alone = engine.draw(model, data, batch[2:3], plan)
    assert close(alone[0], one[2])
    for d in one:
        assert 1.0 <= d.ess <= settings.sampler.num_particles + 1e-4
        assert d.acquired == pytest.approx(d.predicted + d.predicted_sd, rel=1e-4)


def from_parents(
    engine: DiffusionEngine, parents: list[Drawn], asked: list[Ask], k0: int, operator: str = "restart"
) -> list[Ask]:
    """The same asks, started from these designs with equal weights."""
    latents = torch.stack([d.latents.float() for d in parents])
    numbers = tuple(range(1, len(parents) + 1))
    pool = engine.settings.search.pool if operator == "pool" else 0
    start = Start(operator, numbers, (1.0,) * len(parents), latents, k0, pool)
    return [replace(ask, start=start) for ask in asked]


def apart(a: Drawn, b: Drawn) -> float:
    return float((a.latents.float() - b.latents.float()).square().mean())


def test_the_level_of_entry_says_how_much_is_kept(
    engine: DiffusionEngine, settings: Settings, first: list[Drawn]
) -> None:
    asked = asks(settings, 1, 3)
    fresh = engine.draw_plain(asked)
    from_noise = engine.draw_plain(from_parents(engine, first[:1], asked, 0))
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(from_noise, fresh, strict=True))
    kept = [engine.draw_plain(from_parents(engine, first[:1], asked, k0)) for k0 in (1, 2, 3)]
    distances = [np.mean([apart(d, first[0]) for d in drawn]) for drawn in kept]
    assert distances[0] > distances[1] > distances[2]
    assert all(d.origin == Origin("restart", (1,), 3) for d in kept[2])
    again = engine.draw_plain(from_parents(engine, first[:1], asked, 2)[1:2])
    assert close(again[0], kept[1][1]), "whatever the batch"
    assert [engine.level_of(s) for s in (1.0, 0.5, 0.01)] == [0, 2, 3]


def test_the_latents_of_an_image_are_near_those_it_was_decoded_from(engine: DiffusionEngine) -> None:
    images = [Image.new("RGB", size, (200, 90, 40)) for size in ((16, 16), (48, 48))]
    one, two = engine.latents(images)
    assert one.shape == engine.prior.event_shape
    assert torch.allclose(one, two, atol=1e-5), "of any size"
    designs = to_designs(images[:1])
    assert torch.equal(one, engine.prior.encode_image(designs)[0].float())


@pytest.mark.parametrize("operator", ["restart", "pool"])
def test_a_restart_follows_the_surrogate_and_knows_its_parent(
    settings: Settings, first: list[Drawn], operator: str
) -> None:
    """Two parents far apart, hardly any noise: the design shows which of them it came from."""
    engine = DiffusionEngine(replace(settings, search=replace(settings.search, pool=6)))
    data = data_of(first)
    model, plan = engine.fit(data, 1), Plan(alpha=1e3, beta=0.0)
    parents = [replace(d, latents=d.latents + 9 * sign) for d, sign in ((first[0], 1), (first[0], -1))]
    steps: list[tuple[int, int]] = []
    asked = from_parents(engine, parents, asks(settings, 1, 8), 3, operator)
    drawn = engine.draw(model, data, asked, plan, lambda done, total: steps.append((done, total)))
    came = [d.origin.parents[0] for d in drawn]
    assert {apart(d, parents[0]) > apart(d, parents[1]) for d in drawn} == {True, False} or operator == "pool"
    assert came == [1 + (apart(d, parents[0]) > apart(d, parents[1])) for d in drawn]
    assert [d.origin.k0 for d in drawn] == [3] * 8
    assert steps[-1][0] == steps[-1][1], "every step is counted"
    alone = engine.draw(model, data, asked[3:4], plan)
    assert close(alone[0], drawn[3])
    assert all(d.predicted is not None for d in drawn)


def test_a_pool_keeps_what_the_surrogate_thinks_best(settings: Settings, first: list[Drawn]) -> None:
    data = data_of(first)
    best = {}
    for size in (1, 12):
        engine = DiffusionEngine(replace(settings, search=replace(settings.search, pool=size)))
        model = engine.fit(data, 1)
        asked = from_parents(engine, first, asks(settings, 1, 6), 2, "pool")
        drawn = engine.draw(model, data, asked, Plan(alpha=0.5, beta=0.0))
        best[size] = np.mean([d.predicted for d in drawn])
    spread = float(model.posterior(data.X).mean.std())
    assert best[12] > best[1] + 0.5 * spread


def test_a_run_starts_from_the_latents_it_kept(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a cat")
    search = replace(settings.search, operators="restart+pool", pool=3, low_strength=0.3, high_strength=0.6)
    changed = replace(settings, prompts=str(tmp_path / "one.txt"), prompt_template="", search=search)
    drawn: list[bytes] = []
    for place in (tmp_path / "one", tmp_path / "two"):
        with Optimizer.create(place, changed) as opt:
            for query in opt.ask(CHAINS):
                opt.tell(query.id, float(np.asarray(query.image).mean()))
        with Optimizer.open(place) as opt:
            began = opt.ask(6)
            assert {query.operator for query in began} == {"restart", "pool"}
            assert all(query.parents[0] <= CHAINS and query.k0 in (2, 3) for query in began)
            (child,) = opt.refine(began[0].id, strength=0.3)
            assert (child.parents, child.k0) == ((began[0].id,), 3)
            near, far = (np.abs(np.asarray(child.image, int) - np.asarray(q.image, int)).mean() for q in began[:2])
            assert near < far
            kept = read_latents(place, 1, [query.id for query in began])
            assert sorted(kept) == [query.id for query in began]
            shown = to_images(opt.engine.prior.decode(kept[began[0].id][None]))[0]  # type: ignore[attr-defined]
            assert np.abs(np.asarray(shown, int) - np.asarray(began[0].image, int)).max() <= 2, "float16 is enough"
            drawn.append(b"".join(query.image.tobytes() for query in (*began, child)))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["tds", "fk_steering", "best_of_n", "guidance", "demon"])
def test_every_sampler_goes_on_from_a_design(settings: Settings, first: list[Drawn], name: str) -> None:
    engine = DiffusionEngine(replace(settings, sampler=replace(settings.sampler, name=name)))
    data = data_of(first)
    drawn = engine.draw(engine.fit(data, 1), data, from_parents(engine, first[:2], asks(settings, 1, 2), 2),
                        Plan(alpha=0.5, beta=1.0))  # fmt: skip
    assert all(d.origin.parents[0] in (1, 2) and d.origin.k0 == 2 for d in drawn)


@pytest.fixture(scope="module")
def ending(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """On a chain whose last step has no noise, as most published ones."""
    folder = tiny_pipeline(tmp_path_factory.mktemp("ending"), set_alpha_to_one=True)
    return replace(settings, prior=replace(settings.prior, path=str(folder)))


@pytest.mark.parametrize("name", ["das", "guidance", "demon"])
def test_a_chain_entered_where_no_noise_is_left_weighs_what_it_was_given(
    ending: Settings, first: list[Drawn], name: str
) -> None:
    engine = DiffusionEngine(replace(ending, sampler=replace(ending.sampler, name=name)))
    assert [engine.prior.std(k) > 0 for k in range(4)] == [True, True, True, False]
    data = data_of(first)
    drawn = engine.draw(engine.fit(data, 1), data, from_parents(engine, first[:2], asks(ending, 1, 2), 3),
                        Plan(alpha=0.5, beta=1.0))  # fmt: skip
    assert all(d.origin.parents[0] in (1, 2) and d.origin.k0 == 3 for d in drawn)


def test_a_chain_without_any_noise_is_refused_before_anything_is_asked(ending: Settings, tmp_path: Path) -> None:
    one = replace(ending, prior=replace(ending.prior, num_steps=1))
    with Optimizer.create(tmp_path / "run", one) as opt:
        with pytest.raises(ConfigError, match="none of the 1 steps of this prior has any"):
            opt.ask(CHAINS)
        assert sum(opt.store.counts().values()) == 0
    unguided = replace(one, sampler=replace(one.sampler, name="best_of_n"))
    with Optimizer.create(tmp_path / "other", unguided) as opt:
        assert len(opt.ask(2)) == 2


@pytest.mark.parametrize("name", ["thompson", "log_ei", "mean", "qucb", "qlog_nei"])
def test_every_acquisition_draws(settings: Settings, first: list[Drawn], name: str) -> None:
    changed = replace(settings, acquisition=replace(settings.acquisition, name=name))
    data = data_of(first)
    engine = DiffusionEngine(changed)
    drawn = engine.draw(engine.fit(data, 1), data, asks(settings, 1, 2), Plan(alpha=0.5, beta=1.0))
    assert all(np.isfinite([d.predicted, d.predicted_sd]).all() for d in drawn)
    assert all((d.acquired is None) == (name in ("log_ei", "qlog_nei")) for d in drawn)


def test_failures_weigh_on_what_is_sampled_when_asked(settings: Settings, first: list[Drawn]) -> None:
    """The darker half of the pictures failed: the potential of every design falls by what the classifier says of it."""
    light = [np.asarray(d.image).mean() for d in first]
    order = np.argsort(light)
    half = len(order) // 2
    failed, kept = [first[i] for i in order[:half]], [first[i] for i in order[half:]]
    data = replace(data_of(kept), failed=torch.stack([d.features for d in failed]).double())
    designs = to_designs([d.image for d in failed + kept])
    cond = Conditioning(("",) * len(designs))
    values = {}
    for careful in (False, True):
        changed = replace(settings, acquisition=replace(settings.acquisition, feasibility=careful))
        engine = DiffusionEngine(changed)
        potential, _ = engine._tilt(engine.fit(data, 1), data, Plan(alpha=0.5, beta=1.0))
        values[careful] = potential(designs, cond)
        assert len(engine.draw(engine.fit(data, 1), data, asks(settings, 1, 2), Plan(alpha=0.5, beta=1.0))) == 2
    seen = torch.stack([d.features for d in failed + kept]).double()
    says = FeasibilityModel.fit(data.X, data.failed).log_probability(seen)
    torch.testing.assert_close(values[True] - values[False], says, rtol=1e-3, atol=1e-4)
    assert says[:half].mean() < says[half:].mean() - 0.5


def test_thompson_queries_follow_draws_of_their_own(settings: Settings, first: list[Drawn]) -> None:
    changed = replace(settings, acquisition=replace(settings.acquisition, name="thompson"))
    engine, data = DiffusionEngine(changed), data_of(first)
    drawn = engine.draw(engine.fit(data, 1), data, asks(settings, 1, 3), Plan(alpha=0.5, beta=1.0))
    gaps = {round(d.acquired - d.predicted, 6) for d in drawn}
    assert len(gaps) == 3


def budgeted(settings: Settings, nats: float) -> Settings:
    return replace(settings, sampler=replace(settings.sampler, alpha=None, budget_nats=nats))


@pytest.mark.parametrize(("name", "nats"), [("ucb", 4.0), ("thompson", 1.0)])
def test_a_budget_is_spent(settings: Settings, first: list[Drawn], name: str, nats: float) -> None:
    """By the factor that two queries can tell of six, at one price for the round, far from where the search began."""
    data = data_of(first)
    changed = budgeted(replace(settings, acquisition=replace(settings.acquisition, name=name)), nats)
    engine = DiffusionEngine(changed)
    drawn = engine.draw(engine.fit(data, 1), data, asks(settings, 1, 6), Plan(None, 1.0, budget=nats))
    assert len({d.alpha for d in drawn}) == 1
    assert nats / 3 < np.mean([d.nats for d in drawn]) < 3 * nats


def test_the_first_price_is_that_of_the_queries_own_directions(
    settings: Settings, first: list[Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of one direction which no query follows, and one mean over them."""
    tried: list[tuple[tuple[float, ...], int]] = []

    def cost(sampler: Any, prior: Any, potential: Any, cond: Any, settings: Any, seeds: list[int]) -> float:
        tried.append((tuple(potential.acquisition.inner.weights.tolist()), seeds[0]))
        return 9.0 if len(tried) % 2 else 1.0

    monkeypatch.setattr("tiltopt.online.engine.diffusion.cost_of", cost)
    acquisition = replace(settings.acquisition, name="chebyshev")
    engine = DiffusionEngine(budgeted(replace(settings, acquisition=acquisition, objectives="a, b"), 5.0))
    one = data_of(first)
    Y = torch.cat([one.Y, torch.randn(len(one.Y), 1, generator=torch.Generator().manual_seed(0)).double()], 1)
    data = replace(one, Y=Y, objectives=(Objective("a"), Objective("b")), reference=Y.amin(0), first=Y)
    model, batch, plan = engine.fit(data, 1), asks(settings, 1, 3), Plan(None, 1.0, budget=5.0)
    alpha = engine._price(model, data, batch, plan)
    assert alpha is not None
    drawn = engine.draw(model, data, batch, replace(plan, alpha=alpha))
    assert [seed for _, seed in tried] == [ask.seed for ask in batch[:2]], "their mean is the budget: found at once"
    own = [engine._tilt(model, data, Plan(alpha, 1.0), ask)[0].acquisition.inner.weights for ask in batch[:2]]
    assert [weights for weights, _ in tried] == [tuple(weights.tolist()) for weights in own]
    assert len({weights for weights, _ in tried}) == 2
    assert {d.alpha for d in drawn} == {alpha}


def test_a_price_never_falls_without_end(settings: Settings, first: list[Drawn]) -> None:
    """Where a budget cannot be spent, the price that follows from round to round would."""
    engine, data = DiffusionEngine(budgeted(settings, 1000.0)), data_of(first)
    drawn = engine.draw(engine.fit(data, 1), data, asks(settings, 1, 2), Plan(1e-300, 1.0, budget=1000.0))
    assert all(d.alpha > 1e-12 and np.isfinite(d.predicted) for d in drawn)


def test_the_next_price_is_in_the_record_of_the_round(settings: Settings, tmp_path: Path) -> None:
    """So that a run that was stopped after any round goes on at the price it would have had."""
    changed = budgeted(settings, 2.0)
    with Optimizer.create(tmp_path / "run", changed) as opt:
        for query in opt.ask(CHAINS):
            opt.tell(query.id, float(np.asarray(query.image).mean()))
        for query in opt.ask(2):
            opt.tell(query.id, float(np.asarray(query.image).mean()))
    with Optimizer.open(tmp_path / "run") as opt:
        opt.ask(2)
        plain, one, two = opt.store.rounds()
    assert (plain.alpha, plain.nats) == (None, None)
    assert two.alpha == pytest.approx(next_price(one.alpha, one.nats, 2.0), rel=1e-9)


@pytest.mark.parametrize("name", ["ucb", "log_ei", "qucb", "thompson"])
def test_comparisons_tilt_the_prior(settings: Settings, tmp_path: Path, name: str) -> None:
    changed = replace(
        settings,
        model=replace(settings.model, name="pairwise"),
        acquisition=replace(settings.acquisition, name=name),
        sampler=replace(settings.sampler, alpha=None, budget_nats=0.5),
    )
    with Optimizer.create(tmp_path / "run", changed) as opt:
        opt.ask(CHAINS)
        for a, b in opt.pairs():
            brighter = np.asarray(a.image).mean() > np.asarray(b.image).mean()
            opt.compare(*((a.id, b.id) if brighter else (b.id, a.id)))
        drawn = opt.ask(2)
        assert all(np.isfinite([d.predicted, d.predicted_sd]).all() for d in drawn)
        record = opt.store.rounds()[1]
        assert record.kind == "tilted"
        assert not record.notes
        assert record.alpha is not None
        assert record.alpha > 0


def test_fitting_is_deterministic(engine: DiffusionEngine, first: list[Drawn]) -> None:
    data = data_of(first)
    one, two = (engine.fit(data, 1).posterior(data.X).mean for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(SurrogateError):
        engine.fit(replace(data, X=data.X[:1], Y=data.Y[:1]), 1)


@pytest.mark.parametrize("gradient", ["full", "x0", "none"])
def test_a_run_costs_what_was_said_before(settings: Settings, tmp_path: Path, gradient: str) -> None:
    """More than the pilot keeps in round 0, so that the rest of it is decoded once."""
    options = {"gradient": gradient, "gradient_every": 2, "potential_every": 1, "pilot_chains": 8}
    sampler = replace(settings.sampler, num_particles=3, options=options)
    changed = replace(
        settings, run_dir=str(tmp_path), initial_batch_size=70, rounds=1, batch_size=5, micro_batch=16, sampler=sampler
    )
    engine = DiffusionEngine(changed)
    with counted(engine.prior) as seen:
        plain = engine.draw_plain(asks(changed, 0, 70))
        data = data_of(plain)
        engine.draw(engine.fit(data, 1), data, asks(changed, 1, 5), Plan(alpha=0.5, beta=1.0))
    assert Work(**seen) == cost(changed, engine.prior).work


def test_memory_that_runs_out_in_the_decoder_costs_no_round(
    settings: Settings, tmp_path: Path, first: list[Drawn]
) -> None:
    """In the pilot, in plain and in tilted rounds; and what did not fit is not tried again."""
    engine = DiffusionEngine(replace(settings, run_dir=str(tmp_path), micro_batch=8))
    decode, tried = engine.prior.decode, []

    def small(x0: torch.Tensor) -> torch.Tensor:
        tried.append(len(x0))
        if len(x0) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(x0)

    engine.prior.decode = engine.prior.guidance_decode = small  # type: ignore[method-assign]
    with pytest.warns(ResourceWarning, match="going on with 2"):
        plain = engine.draw_plain(asks(settings, 0, CHAINS))
    assert all(close(a, b) for a, b in zip(plain, first, strict=True))
    data = data_of(plain)
    tried.clear()
    model = engine.fit(data, 1)
    engine.draw(model, data, asks(settings, 1, 3), Plan(alpha=0.5, beta=1.0))
    assert max(tried) == 2
    later = DiffusionEngine(engine.settings)  # another process of the same run
    later.prior.decode = later.prior.guidance_decode = small  # type: ignore[method-assign]
    tried.clear()
    later.draw(model, data, asks(settings, 1, 3), Plan(alpha=0.5, beta=1.0))
    assert max(tried) == 2
    larger = DiffusionEngine(replace(engine.settings, micro_batch=3))  # who asks for another number gets it
    larger.prior.decode = larger.prior.guidance_decode = small  # type: ignore[method-assign]
    with pytest.warns(ResourceWarning, match="with 3 rows"):
        larger.draw(model, data, asks(settings, 1, 3), Plan(alpha=0.5, beta=1.0))
