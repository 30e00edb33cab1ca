"""The query-efficiency benchmark: every method runs to its end, nothing is run twice, costs are what they are said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.query_efficiency import __main__ as query_efficiency
from benchmarks.query_efficiency.cells import Budget, Cell, append, missing, read
from benchmarks.query_efficiency.learnable import between_prompts, correlation
from benchmarks.query_efficiency.measure import Measures, spread, weights_id
from benchmarks.query_efficiency.methods import (
    FIXED,
    FIXED_PRICE,
    METHODS,
    TUNED,
    UNPRICED,
    equal_particles,
    evaluations_of,
    evaluations_per_query,
    settings_of,
)
from benchmarks.query_efficiency.noise import CMAES, TurboNoise, denoise, typical
from benchmarks.query_efficiency.plain import CachedPlain, plain_asks
from benchmarks.query_efficiency.pooled import bootstrap, pooled, told
from benchmarks.query_efficiency.run import Round, Workshop, kept, price, run_cell
from benchmarks.query_efficiency.table import aggregate, interval, text
from benchmarks.query_efficiency.turbo import LENGTH, SHORTEST, Region, Turbo
from tests.fakes.tiny import tiny_clip, tiny_pipeline
from tiltopt.designs import to_images
from tiltopt.online.engine.diffusion import DiffusionEngine
from tiltopt.online.engine.feature_pilot import FILE as PILOT
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.settings.cost import PROBES, TRIES
from tiltopt.online.settings.presets import preset
from tiltopt.online.settings.prompts import load_prompts
from tiltopt.online.settings.validation import validated
from tiltopt.rewards import make_reward
from tiltopt.samplers import PriorOnly
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior

SMALL = Budget(2, 2, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and a CLIP model with random weights."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline(folder / "pipeline")
    tiny_clip(folder / "clip")
    return folder


def changes(parts: Path) -> tuple[str, ...]:
    return f"prior.path={parts / 'pipeline'}", f"features.path={parts / 'clip'}", "prior.num_steps=3"


@pytest.fixture
def shop(parts: Path, tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "work", changes(parts), measures=Measures(str(parts / "clip")))


def cell(method: str, budget: Budget = SMALL, seed: int = 0) -> Cell:
    return Cell("colorfulness", method, seed, budget, "tiny")


class Counter:
    """Rows that the denoiser saw, a backward pass counting as two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, original = 0, DiffusersPrior.reverse

        def reverse(prior: DiffusersPrior, k: int, x: torch.Tensor, cond: Any) -> Any:
            out = original(prior, k, x, cond)
            self.rows += len(x)
            if out.x0.requires_grad:
                seen: list[int] = []

                def count(_: torch.Tensor) -> None:
                    if not seen:  # a gradient may come by the mean, by the estimate, or by both
                        self.backward(len(x))
                    seen.append(1)

                for tensor in out:
                    tensor.register_hook(count)
            return out

        monkeypatch.setattr(DiffusersPrior, "reverse", reverse)

    def backward(self, rows: int) -> None:
        self.rows += 2 * rows


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs_to_the_end_at_the_cost_it_is_said_to_have(
    method: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    row = run_cell(cell(method), shop)
    assert [r["queries"] for r in row["rounds"]] == [2, 4]
    assert all(np.isfinite([r["mean"], r["best"], r["diversity"]]).all() for r in row["rounds"])
    assert row["rounds"][1]["best"] >= row["rounds"][0]["best"]
    assert 0 <= row["rounds"][1]["fidelity"] <= 1
    settings = settings_of(cell(method), Path("x"), 1.0, shop.overrides)
    if METHODS[method].config is not None and settings.sampler.budget_nats is not None:
        search = TRIES * PROBES * evaluations_per_query(settings)  # the first price takes as many tries as it takes
        assert row["evaluations"] - search < counter.rows <= row["evaluations"]
    else:
        assert row["evaluations"] == counter.rows
    assert row["seconds"] > 0
    assert json.loads(json.dumps(row, allow_nan=False)) == row


@pytest.mark.parametrize("method", ["evolution", "linear_ucb"])
def test_all_queries_may_be_of_one_prompt(method: str, shop: Workshop) -> None:
    budget = Budget.parse("2+2x1:1")
    assert str(budget) == "2+2x1:1"
    settings = settings_of(cell(method, budget, seed=3), Path("x"), 1.0, shop.overrides)
    every = load_prompts(str(FIXED["prompts"]))
    assert load_prompts(settings.prompts) == (every[3],)
    row = run_cell(cell(method, budget, seed=3), shop)
    assert row["budget"] == "2+2x1:1"
    if method == "evolution":
        with Optimizer.open(shop.folder / "runs" / cell(method, budget, seed=3).folder, read_only=True) as opt:
            table = opt.queries()
        assert (table["parents"] != "").tolist() == [False, False, True, True]


def test_best_of_n_spends_what_das_spends(shop: Workshop) -> None:
    small = Budget.parse("16+8x4")
    ours = settings_of(cell("linear_ucb", small), Path("x"), 1.0)
    rival = settings_of(cell("surrogate_best_of_n", small), Path("x"), 1.0)
    assert (ours.sampler.num_particles, rival.sampler.num_particles) == (2, 5)  # 4, and what the price took
    for settings in (ours, rival):
        assert evaluations_of(cell("linear_ucb", small), settings) in (16 * 12 + 40 * 48, 16 * 12 + 32 * 60)
    assert evaluations_per_query(ours) == 48  # 2 x 12 forward, 2 x 6 x 2 backward
    assert rival.sampler.options["select"] == "argmax"
    assert rival.model == ours.model

    def changed(steps: int, every: int) -> Any:
        return settings_of(
            cell("linear_ucb"), Path("x"), 1.0, (f"prior.num_steps={steps}", f"sampler.gradient_every={every}")
        )

    assert evaluations_per_query(changed(5, 2)) == 2 * 5 + 2 * 2 * 3  # gradients at steps 0, 2, 4
    assert equal_particles(cell("linear_ucb", small), changed(5, 2)) == 6  # 22 x 40 / 32 / 5, rounded up
    exp = settings_of(cell("seiko"), Path("x"), 1.0)
    assert evaluations_per_query(exp) == 4 * 12 + 2 * 4 * 11  # at every step but the first, where lambda is 0


@pytest.mark.parametrize("reward", [*TUNED, "ochre"])
def test_the_settings_of_every_loop_method_are_valid(reward: str) -> None:
    for name, method in METHODS.items():
        if method.config is not None:
            settings = settings_of(Cell(reward, name, 5, Budget(64, 16, 4), "x"), Path("runs/x"), 0.25)
            validated(settings)
            assert settings.seed == 5
            assert settings.sampler.alpha == (0.25 if name in (*FIXED_PRICE, *UNPRICED) else None)
            assert settings.sampler.budget_nats == (None if name in (*FIXED_PRICE, *UNPRICED) else 48)
            known = {"planted": {"seed": 1, "batch_size": 16}, "ochre": {"which": "ochre", "batch_size": 16}}
            assert settings.reward.options == known.get(reward, {})
            assert (settings.features.kind == "bank") == (name not in FIXED_PRICE)


def test_round_0_is_what_the_loop_draws_itself_and_is_drawn_once(
    parts: Path, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(cell("linear_ucb"), tmp_path / "plain", 1.0, shop.overrides)
    with Optimizer.create(tmp_path / "plain", settings) as optimizer:
        queries = optimizer.ask(2)
        features = torch.stack([d.features for d in optimizer.engine.draw_plain(plain_asks(settings, 0, (2, 2)))])
    asks = plain_asks(settings, 0, (2, 2))
    assert [(q.id, q.prompt, q.seed) for q in queries] == [(a.number, a.prompt, a.seed) for a in asks]
    other = dataclasses.replace(settings, run_dir=str(tmp_path / "other"))
    drawn = CachedPlain(other, tmp_path / "store", "tiny").draw_plain(asks)
    third = dataclasses.replace(settings, run_dir=str(tmp_path / "third"))
    monkeypatch.setattr(DiffusionEngine, "draw_plain", None)  # nothing is drawn again
    engine = CachedPlain(third, tmp_path / "store", "tiny")
    again = engine.draw_plain(asks)
    for a, b, query in zip(drawn, again, queries, strict=True):
        assert a.image.tobytes() == b.image.tobytes() == query.image.tobytes()
    assert torch.equal(torch.stack([d.features for d in again]), features)
    pilots = [(tmp_path / name / PILOT).read_bytes() for name in ("plain", "other", "third")]
    assert pilots[0] == pilots[1] == pilots[2]
    assert engine.plain_seconds(asks) > 0
    with pytest.raises(TypeError):  # other weights, other samples
        CachedPlain(third, tmp_path / "store", "better").draw_plain(asks)


def test_an_interrupted_cell_of_the_loop_goes_on_and_ends_the_same(parts: Path, shop: Workshop, tmp_path: Path) -> None:
    whole = run_cell(cell("version_0_1"), shop)
    other = dataclasses.replace(shop, folder=tmp_path / "again")
    folder = other.folder / "runs" / cell("version_0_1").folder
    first = settings_of(cell("version_0_1"), folder, 1.0, other.overrides)
    alpha = price(cell("version_0_1"), first, make_reward("colorfulness"), other)
    settings = settings_of(cell("version_0_1"), folder, alpha, other.overrides)
    engine = CachedPlain(settings, other.folder / "plain", "tiny")
    with Optimizer.create(folder, settings, engine=engine) as optimizer:
        optimizer.ask(2)  # killed here
    resumed = run_cell(cell("version_0_1"), other)
    assert resumed["rounds"] == whole["rounds"]
    assert resumed["alpha"] == whole["alpha"]


def test_finished_cells_are_not_run_again(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results, ran = tmp_path / "cells.jsonl", []
    cells = [cell(method) for method in ("prior", "greedy", "turbo")]

    def one(cell: Cell, shop: Workshop) -> dict[str, Any]:
        ran.append(cell.method)
        if len(ran) == 2:
            raise KeyboardInterrupt
        if len(ran) == 3:
            raise RuntimeError("broken")
        return made(cell.method, 0, [0.0, 1.0])

    with pytest.raises(KeyboardInterrupt):
        query_efficiency.work(cells, shop, results, 9, one=one)
    assert len(read(results)) == 1
    with results.open("a") as file:
        file.write('{"reward": "colorf')  # killed while it wrote
    with pytest.warns(UserWarning, match="line 3"):
        assert query_efficiency.work(cells, shop, results, 9, one=one) == 1  # the broken one is left
    assert ran == ["prior", "greedy", "greedy", "turbo"]
    assert "FAILED colorfulness greedy seed 0 2+2x1: broken" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="line 3"):
        assert [c.method for c in missing(cells, read(results))] == ["greedy"]
    with pytest.warns(UserWarning, match="line 3"):
        assert query_efficiency.work(cells, shop, results, 0.0, one=one) == 1  # no time: nothing is begun
    assert len(ran) == 4


def made(method: str, seed: int, means: list[float], **more: Any) -> dict[str, Any]:
    """A line of the results file."""
    rounds = [
        {"queries": 2 * (i + 1), "mean": m, "best": m + 1, "fidelity": 0.5, "diversity": 0.1}
        for i, m in enumerate(means)
    ]
    base = {"reward": "colorfulness", "method": method, "seed": seed, "budget": "2+2x1", "prior": "tiny"}
    base |= {"rounds": rounds, "evaluations": 12, "seconds": 1.0, "date": "2026-01-01", "machine": {}}
    return base | more


def test_interval_is_the_t_interval() -> None:
    x = [1.0, 2.0, 4.0]
    got = interval(x)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(x), scale=stats.sem(x))
    assert got["mean"] == pytest.approx(np.mean(x))
    assert got["half_width"] == pytest.approx((high - low) / 2)
    assert interval([3.0]) == {"mean": 3.0, "half_width": None, "n": 1}
    assert interval([None, 2.0])["n"] == 1


def test_the_goal_is_the_best_baselines_last_round() -> None:
    rows = [made("prior", s, [0.0, 0.2]) for s in (0, 1)]
    rows += [made("greedy", s, [0.0, 1.0 + s], budget="2+2x1") for s in (0, 1)]
    rows += [made("ensemble", 0, [0.0, 9.0])]  # a variant of ours sets no goal
    rows += [made("linear_ucb", s, [0.0, 1.4 + 0.3 * s]) for s in (0, 1)]
    (block,) = aggregate(rows)
    goal = block["goal"]
    assert (goal["baseline"], goal["value"], goal["queries"], goal["tilted_queries"]) == ("greedy", 1.5, 4, 2)
    assert "4 of 4 queries" in text([block])
    assert block["goal_others"]["baseline"] == "prior"  # greedy is our own loop without optimism
    assert (block["goal_others"]["value"], block["goal_others"]["queries"]) == (0.2, 4)
    rows += [made("cma_es", 0, [0.0, 1.35])]  # ran on seed 0 only, where greedy ends at 1.0 and our default at 1.4
    assert aggregate(rows)[0]["goal"]["queries"] == 4
    assert aggregate(rows)[0]["goal"]["value"] == 1.35
    rows += [made("turbo", 0, [0.0, 2.0])]
    assert aggregate(rows)[0]["goal"]["queries"] is None
    assert "has not reached" in text(aggregate(rows))
    assert aggregate(rows[:2])[0]["goal"] is None
    rounds = [{"queries": 4, "mean": 99.0, "best": 99.0, "fidelity": 0.39, "diversity": 0.1}]  # of the prior's .5
    cheat = aggregate([*rows, made("seiko", 0, [0.0], rounds=rounds)])[0]["goal"]
    assert (cheat["set_aside"], cheat["value"]) == (["seiko"], 2.0)


def test_the_best_batch_is_what_one_would_keep() -> None:
    def round_of(*values: float) -> Round:
        return Round(0, [], [], list(values), 0.0)

    rounds = [round_of(1.0, 5.0), round_of(4.0, 2.0)]
    greedy, best_of_n = (Cell("colorfulness", name, 0, Budget(2, 2, 1), "x") for name in ("greedy", "best_of_n"))
    assert [kept(greedy, rounds[:n]) for n in (1, 2)] == [3.0, 4.5]
    assert kept(best_of_n, rounds) == 3.0  # its last round is it


def test_what_is_kept_has_a_goal_of_its_own() -> None:
    def with_kept(method: str, kept: list[float]) -> dict[str, Any]:
        row = made(method, 0, [0.0] * len(kept))
        return row | {"rounds": [r | {"kept": k} for r, k in zip(row["rounds"], kept, strict=True)]}

    rows = [with_kept("best_of_n", [1.0, 2.0]), with_kept("linear_ucb", [1.0, 2.5]), made("turbo", 0, [9.0, -1.0])]
    (block,) = aggregate(rows)  # a cell from before this was recorded counts for the first goal alone
    assert (block["kept_goal"]["baseline"], block["kept_goal"]["value"], block["kept_goal"]["queries"]) == (
        "best_of_n", 2.0, 4,
    )  # fmt: skip
    assert "best batch so far: the best baseline" in text([block])
    assert block["reached"] == {"best_of_n": {"mean": 2, "kept": 4}, "turbo": {"mean": 2, "kept": None}}
    assert aggregate([*rows[:1], with_kept("linear_ucb", [1.0, 1.9])])[0]["kept_goal"]["queries"] is None


def ended(reward: str, method: str, seed: int, mean: float, kept: float, fidelity: float = 0.5) -> dict[str, Any]:
    """A line whose last round ended so; half-way it kept half as much."""
    one = {"best": 9.0, "fidelity": fidelity, "diversity": 0.1}
    rounds = [{"queries": 2 + 2 * i, "mean": m, "kept": k} | one for i, (m, k) in enumerate([(0, 0), (0, kept / 2)])]
    rounds.append({"queries": 6, "mean": mean, "kept": kept} | one)
    return made(method, seed, [0.0], reward=reward, rounds=rounds, budget="2+2x2")


def test_pooled_differences_are_paired_by_seed_to_the_best_faithful_rival_of_each_reward() -> None:
    rows = []
    for seed in (0, 1):
        for reward, lead in (("spotlight", 2.0), ("size", -1.0)):
            rows.append(ended(reward, "prior", seed, 0.0, 1.0))
            rows.append(ended(reward, "turbo", seed, 1.0 + seed, 3.0 + seed))
            rows.append(ended(reward, "cma_es", seed, 0.5, 2.0))
            rows.append(ended(reward, "seiko", seed, 50.0, 60.0, fidelity=0.39))  # .78 of the prior's: no rival
            rows.append(ended(reward, "greedy", seed, 40.0, 50.0))  # our own: no rival
            rows.append(ended(reward, "linear_ucb", seed, 2.0 + seed, 3.0 + lead + 2 * seed, fidelity=0.45))
    rows.append(ended("spotlight", "linear_ucb", 2, 99.0, 99.0))  # a seed that the others lack
    rows.append(ended("ochre", "linear_ucb", 0, 99.0, 99.0))  # no rival yet
    got = pooled(rows, "2+2x2", {"spotlight": 2.0, "size": 0.5, "ochre": 1.0})
    assert list(got["rewards"]) == ["spotlight", "size"]
    spot, size = got["rewards"]["spotlight"], got["rewards"]["size"]
    assert spot["seeds"] == [0, 1]
    assert (spot["kept"]["rival"], spot["kept"]["each"]) == ("turbo", [1.0, 1.5])  # (2, 3) / 2
    assert size["kept"]["each"] == [-2.0, 0.0]  # (-1, 0) / .5
    assert size["mean"]["each"] == [2.0, 2.0]
    assert spot["gain"]["linear_ucb"] == pytest.approx(1.25)
    assert spot["fidelity"]["linear_ucb"] == pytest.approx(0.9)
    assert spot["half"] == {"turbo": False}
    assert got["all"]["kept"] | {"low": 0, "high": 0} == {
        "mean": pytest.approx(0.125), "low": 0, "high": 0, "at_least_half": 1, "not_worse": 1, "of": 2,
    }  # fmt: skip
    assert got["all"]["kept"]["low"] < 0.125 < got["all"]["kept"]["high"]
    assert "not worse than -.1 on 1 of 2" in told(got)
    assert pooled(rows, "2+2x2", {"ochre": 1.0})["rewards"] == {}


def test_the_bootstrap_draws_rewards_and_their_seeds() -> None:
    rng = np.random.default_rng(0)
    between, within, rewards, seeds = 0.6, 0.8, 40, 5
    differences = [list(rng.normal(rng.normal(1.0, between), within, seeds)) for _ in range(rewards)]
    low, high = bootstrap(differences, draws=4000)
    # the variance of the mean over rewards as drawn, plus that of each mean over seeds
    means = np.array([np.mean(d) for d in differences])
    inner = np.mean([np.var(d) / seeds for d in differences])
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt((means.var() + inner) / rewards), rel=0.06)


def test_table_json_and_picture_hold_the_runs_on_these_weights(parts: Path, tmp_path: Path, capsys) -> None:
    results, picture = tmp_path / "cells.jsonl", tmp_path / "picture.png"
    arguments = ["--table", "--results", str(results), "--picture", str(picture), "--set", *changes(parts)]
    assert query_efficiency.main(arguments) == 1
    prior = weights_id(str(parts / "pipeline"), str(parts / "clip"))
    for seed in (0, 1):
        append(results, made("prior", seed, [0.0, 0.5], prior=prior))
        append(results, made("linear_ucb", seed, [0.0, 0.7], prior=prior))
    append(results, made("linear_ucb", 2, [0.0, 99.0], prior="older"))
    assert query_efficiency.main(arguments) == 0
    record = json.loads(results.with_suffix(".json").read_text())
    assert record["blocks"][0]["methods"]["linear_ucb"]["last"] == {"mean": 0.7, "half_width": 0.0, "n": 2}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    captured = capsys.readouterr()
    assert "1 cells were run on other weights" in captured.err
    assert "linear + UCB (default)" in captured.out


def test_command_line_runs_a_cell_and_then_has_nothing_left(parts: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--methods", "prior", "--rewards", "symmetry", "--seeds", "0", "--budgets", "2+2x1", "--minutes", "9"]
    arguments += ["--results", str(tmp_path / "r.jsonl"), "--work", str(tmp_path / "w"), "--set", *changes(parts)]
    assert query_efficiency.main(arguments) == 0
    assert query_efficiency.main(arguments) == 0
    assert "1 of 1 cells are done" in capsys.readouterr().out
    assert len(read(tmp_path / "r.jsonl")) == 1
    assert list((tmp_path / "w" / "plain").iterdir())


@pytest.mark.parametrize("bad", ["64", "64+16", "1+4x2", "4+4x0", "a+bxc"])
def test_impossible_budgets_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(bad)
    assert str(Budget.parse("64+16x4")) == "64+16x4"
    assert Budget.parse("64+16x4").sizes == (64, 16, 16, 16, 16)


def test_diversity_is_the_mean_over_pairs() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(x.double(), dim=-1)
    pairs = [1 - float(z[i] @ z[j]) for i in range(5) for j in range(5) if i != j]
    assert spread(x) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert spread(x[:1].repeat(3, 1)) == pytest.approx(0.0, abs=1e-12)


def test_a_noise_gives_the_image_of_the_deterministic_prior(parts: Path) -> None:
    prior = load_prior(parts / "pipeline", num_steps=3, eta=0.0, guidance_scale=4.0)
    prompts = ["a cat", "a dog", "a fox"]
    generators = [torch.Generator().manual_seed(s) for s in range(3)]
    drawn = PriorOnly().sample(prior, None, prior.encode(prompts), num_particles=1, generators=generators)
    noise = torch.cat([prior.initial(1, torch.Generator().manual_seed(s)) for s in range(3)]).flatten(1)
    images = denoise(prior, noise, prompts, 2)
    for a, b in zip(images, to_images(drawn.designs[:, 0]), strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1
    with pytest.raises(ValueError, match="eta"):
        denoise(load_prior(parts / "pipeline", num_steps=3, eta=1.0), noise, prompts, 2)


def quadratic(points: torch.Tensor) -> torch.Tensor:
    """-|x - .7|^2 of rows."""
    return -(points - 0.7).square().sum(1)


def test_turbo_improves_on_a_quadratic() -> None:
    gains = []
    for seed in range(3):
        turbo, best = Turbo(5, seed, candidates=200), []
        for size in (12, 8, 8, 8):
            X = turbo.ask(size)
            assert X.shape == (size, 5)
            assert bool(((X >= 0) & (X <= 1)).all())
            assert len(X.unique(dim=0)) == size
            turbo.tell(X, quadratic(X))
            best.append(float(quadratic(X).max()))
        random = torch.rand(36, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gains.append(best[-1] - float(quadratic(random).max()))
        assert best[-1] > best[0]
    assert min(gains) > 0
    assert best[-1] > -0.05  # uniform points lie at -|x - .7|^2 = -.62 on average


def test_the_trust_region_doubles_halves_and_collapses() -> None:
    region = Region()
    for _ in range(3):
        region = region.after(True, 2)
    assert region == Region(2 * LENGTH)
    assert region.after(True, 2).after(False, 2).after(True, 2).successes == 1
    for _ in range(2 * 8):
        region = region.after(False, 2)
    assert region.length == 2 * LENGTH / 2**8
    assert region.length < SHORTEST
    assert region.collapsed


@pytest.mark.parametrize("sizes", [(8, 2, 2, 2), (16, 8, 8), (64, 16, 16)])
def test_cma_es_takes_every_size_of_round_in_many_dimensions(sizes: tuple[int, ...]) -> None:
    search, values = CMAES(1024, sizes[-1], 0), []
    for size in sizes:
        noise = search.ask(size)
        assert noise.shape == (size, 1024)
        assert len(noise.unique(dim=0)) == size
        values.append(noise.mean(1))
        search.tell(values[-1])
    assert values[0].abs().mean() < 0.1  # round 0 is N(0, I) on the sphere: the mean of a row has deviation 1 / 32
    assert values[-1].mean() > 0


@pytest.mark.parametrize("kind", ["cma_es", "turbo"])
def test_searches_over_noise_climb_and_stay_typical(kind: str) -> None:
    dim = 24
    goal = typical(torch.randn(1, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    before, rounds = np.random.get_state()[1].copy(), []  # noqa: NPY002 (looked at, not used)
    search = CMAES(dim, 12, 0) if kind == "cma_es" else TurboNoise(dim, 0, subspace=4)
    again = CMAES(dim, 12, 0) if kind == "cma_es" else TurboNoise(dim, 0, subspace=4)
    for size in (24, *[12] * 5):
        noise = search.ask(size)
        assert torch.equal(noise, again.ask(size))
        torch.testing.assert_close(noise.norm(dim=1), torch.full((size,), dim**0.5, dtype=torch.float64))
        values = -(noise - goal).square().mean(1)
        search.tell(values)
        again.tell(values)
        rounds.append(values)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    error = (rounds[0].var() / 24 + rounds[-1].var() / 12).sqrt()
    assert rounds[-1].mean() - rounds[0].mean() > 4 * error


def test_the_default_of_the_benchmark_is_the_demo() -> None:
    """But for what the documentation names; whoever changes the one decides about the other."""
    demo, own = preset("demo"), ("prompts", "prior.dtype", "micro_batch", "sampler.max_shift")
    shared = {k: v for k, v in FIXED.items() if k not in own}
    assert {k: demo[k.split(".")[0]][k.split(".")[1]] for k in shared} == shared


def test_what_is_learnable_is_measured_on_unseen_samples() -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(400, 5, generator=g, dtype=torch.float64)
    truth, noise = X.sum(dim=1), torch.randn(400, generator=g, dtype=torch.float64)
    assert correlation(X, truth, 32, (5,)) > 0.99
    # with noise of the signal's variance the best predictor correlates .71; 368 pairs know that to about .03
    assert correlation(X, truth + 5**0.5 * noise, 200, (5,)) == pytest.approx(0.5**0.5, abs=0.08)
    prompts = [str(i % 40) for i in range(400)]
    level = torch.tensor([float(p) for p in prompts], dtype=torch.float64)
    level = level / level.std()
    assert between_prompts(noise, prompts) == pytest.approx(0.0, abs=0.1)
    assert between_prompts(level + noise, prompts) == pytest.approx(0.5, abs=0.1)
