"""The frontier benchmark: fine-tuning finds known optima, costs are what they are said to be, nothing is run twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier.cells import TUNING, TUNING_SEED, Cell, Workshop, run_job
from benchmarks.frontier.finetune import Training, backpropagation, evaluations_per_update, policy_gradient
from benchmarks.frontier.lora import LoRAPolicy
from benchmarks.frontier.methods import EVALUATIONS, METHODS, evaluations, learning, particles, sampler_of
from benchmarks.frontier.table import aggregate, at_reward, text
from benchmarks.query_efficiency.cells import read
from tests.fakes.counted import counted
from tests.fakes.tiny import tiny_clip, tiny_pipeline
from tiltopt.online.seeds import generator, query_seed
from tiltopt.samplers import BestOfN
from tiltopt.samplers.diffusers_prior import DiffusersPrior, load_prior

# ---- a toy with a known optimum

A, S, K = 0.9, 0.6, 4


class Linear:
    """x_{k+1} ~ N(A x + a_k x + b_k, S^2) from x_0 ~ N(0, 1), one dimension, with a_k and b_k to be trained."""

    num_steps = K

    def __init__(self) -> None:
        self.a, self.b = (torch.zeros(K, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def parameters(self) -> Sequence[Tensor]:
        return [self.a, self.b]

    def initial(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def noise(self, like: Tensor, generator: Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    def std(self, k: int) -> float:
        return S

    def mean(self, k: int, x: Tensor, cond: Any) -> Tensor:
        return (A + self.a[k]) * x + self.b[k]

    def reference(self, k: int, x: Tensor, cond: Any) -> Tensor:
        return A * x


def best(target: float, width: float, alpha: float) -> tuple[list[float], list[float]]:
    """a_k and b_k of the optimum for the reward -(x - target)^2 / (2 width) at `alpha` per nat, by Riccati's recursion:
    the value of a state is -P x^2 / 2 + q x nats, and the best shift maximises it less the shift's own nats."""
    P, q = 1 / (width * alpha), target / (width * alpha)
    a, b = [], []
    for _ in range(K):
        a.append(-(S**2) * P * A / (1 + S**2 * P))
        b.append(S**2 * q / (1 + S**2 * P))
        P, q = A**2 * P / (1 + S**2 * P), A * q / (1 + S**2 * P)
    return a[::-1], b[::-1]


@pytest.mark.parametrize(
    ("method", "training", "updates"),
    [
        (backpropagation, Training(rate=0.03, batch=512, kl=0.5, clip=1e9, fall=0.02, fall_over=400), 400),
        (policy_gradient, Training(rate=0.03, batch=2048, kl=0.5, clip=1e9, fall=0.01, fall_over=600), 600),
    ],
)
def test_training_with_a_divergence_finds_the_optimum_of_a_quadratic_reward(
    method: Callable[..., Iterator[int]], training: Training, updates: int
) -> None:
    policy, generator = Linear(), Generator().manual_seed(0)
    steps = method(policy, lambda x, cond: -((x[:, 0] - 1.5) ** 2) / 2, itertools.repeat(None), training, generator)
    for _ in range(updates):
        next(steps)
    a, b = best(1.5, 1.0, 0.5)
    assert policy.a.tolist() == pytest.approx(a, abs=0.03)
    assert policy.b.tolist() == pytest.approx(b, abs=0.03)
    assert max(b) > 0.3  # far enough from where it began for the tolerance to mean something


def test_the_policy_gradient_is_the_gradient() -> None:
    """Of the standardised linear reward x_K: d E[x_K] / d b_k = A^(K-1-k), over the deviation of x_K."""
    policy, n = Linear(), 200_000
    next(policy_gradient(policy, lambda x, cond: x[:, 0], itertools.repeat(None), Training(batch=n, clip=1e9),
                         Generator().manual_seed(1)))  # fmt: skip
    sd = np.sqrt(A ** (2 * K) + S**2 * sum(A ** (2 * j) for j in range(K)))
    expected = [-(A ** (K - 1 - k)) / sd for k in range(K)]
    error = 4 * np.sqrt(3) / S / np.sqrt(n)  # the score has deviation 1 / S, and the square of an advantage moves by 3
    assert policy.b.grad is not None
    assert policy.b.grad.tolist() == pytest.approx(expected, abs=error)


# ---- the LoRA, and what everything costs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline(folder / "pipeline")
    tiny_clip(folder / "clip")
    return folder


@pytest.fixture
def prior(parts: Path) -> DiffusersPrior:
    return load_prior(parts / "pipeline", num_steps=3, guidance_scale=4.0)


@pytest.fixture
def shop(parts: Path, tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, str(parts / "pipeline"), str(parts / "clip"), num_steps=3, dtype="float32", prompts=2,
                    pictures=2)  # fmt: skip


def brightness(prior: DiffusersPrior) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, cond: prior.decode(x).mean((1, 2, 3))


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(
    ("method", "depth"), [(policy_gradient, None), (backpropagation, None), (backpropagation, 1), (backpropagation, 2)]
)
def test_training_costs_what_it_says(prior: DiffusersPrior, method: Any, depth: int | None, kl: float) -> None:
    policy = LoRAPolicy(prior, 2, Generator().manual_seed(0))
    conds = itertools.repeat(prior.encode(["a cat"] * 3))
    training = Training(batch=3, kl=kl, depth=depth)
    steps = method(policy, brightness(prior), conds, training, Generator().manual_seed(1))
    with counted(prior) as seen:
        next(steps)
        spent = next(steps)
    assert seen["network"] + 2 * seen["network_backward"] == 2 * spent  # two rows for an evaluation with guidance
    if method is backpropagation:
        assert spent == 2 * evaluations_per_update(training, 3)


def test_a_lora_begins_as_the_prior_moves_and_can_be_left_out(prior: DiffusersPrior, parts: Path) -> None:
    plain = load_prior(parts / "pipeline", num_steps=3, guidance_scale=4.0)
    before = torch.random.get_rng_state()
    policy = LoRAPolicy(prior, 2, Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before), "nothing is drawn from the global generator"
    x, cond = plain.initial(2, Generator().manual_seed(2)), plain.encode(["a cat", "a dog"])
    expected = plain.reverse(1, x, cond).mean
    torch.testing.assert_close(policy.mean(1, x, cond), expected)
    reward = brightness(prior)
    training = Training(rate=0.02, batch=4, depth=1)
    steps = backpropagation(policy, reward, itertools.repeat(prior.encode(["a cat"] * 4)), training,
                            Generator().manual_seed(1))  # fmt: skip
    for _ in range(15):
        next(steps)
    with torch.no_grad():
        assert not torch.allclose(policy.mean(1, x, cond), expected, atol=1e-4)
        torch.testing.assert_close(policy.reference(1, x, cond), expected)
        assert not torch.allclose(policy.mean(1, x, cond), expected, atol=1e-4), "and is there again afterwards"


# ---- cells


def cell(method: str, strength: float, variant: str | None = None, reward: str = "colorfulness") -> Cell:
    return Cell(reward, method, 0, strength, next(iter(METHODS[method].variants)) if variant is None else variant, "w")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_its_pictures_within_the_evaluations(
    shop: Workshop, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 3 steps instead of 12 a quarter of the evaluations buys the same particles."""
    monkeypatch.setattr("benchmarks.frontier.methods.EVALUATIONS", EVALUATIONS // 4)
    monkeypatch.setattr("benchmarks.frontier.cells.EVALUATIONS", EVALUATIONS // 4)
    strengths = METHODS[method].strengths[::4] if METHODS[method].together else METHODS[method].strengths[-1:]
    rows = list(run_job([cell(method, s) for s in strengths], shop))
    assert [row["strength"] for row in rows] == list(strengths)
    for row in rows:
        assert set(row["rewards"]) == {"planted", "colorfulness", "clip"}
        assert all(np.isfinite(value) for value in row["rewards"].values())
        assert row["pictures"] == 4
        json.dumps(row, allow_nan=False)
    if METHODS[method].kind == "train":
        assert rows[0]["evaluations"] < rows[1]["evaluations"]
        assert rows[0]["evaluations"] >= strengths[0] * (EVALUATIONS // 4)
    elif method not in ("das", "demon"):  # whose pilot, or grid, is not made for so short a chain
        assert rows[-1]["evaluations"] <= EVALUATIONS // 4
    again = next(iter(run_job([cell(method, strengths[0])], shop)))
    assert again["rewards"] == rows[0]["rewards"]


def test_samplers_spend_no_more_than_agreed_on_the_real_chain() -> None:
    prior = load_prior("embedded", num_steps=12, guidance_scale=4.0)
    spent = {}
    for name, method in METHODS.items():
        if method.kind in ("price", "chains", "noises"):
            for variant in method.variants:
                sampler = sampler_of(name, variant, method.strengths[-1])
                number = particles(name, method.strengths[-1], sampler, prior, 12)
                spent[name] = learning(sampler, prior) / 12 + number * evaluations(sampler.work(prior), prior)
                assert number >= 1
    assert max(spent.values()) <= EVALUATIONS
    assert min(spent.values()) > 0.9 * EVALUATIONS
    assert particles("das_published", 0.01, sampler_of("das_published", "", 0.01), prior, 12) == 3, "which resamples"


def test_cells_are_remembered_and_settings_chosen_on_cells_of_their_own(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "frontier.jsonl"
    monkeypatch.setattr(frontier, "weights_id", lambda: "w")
    monkeypatch.setattr(frontier, "Workshop", lambda folder: shop)
    few = ["--methods", "prior", "best_of_n", "fk_steering", "das", "--rewards", "colorfulness", "--seeds", "0"]
    files = ["--results", str(results), "--work", str(tmp_path), "--picture", str(tmp_path / "frontier.png")]
    monkeypatch.setattr("benchmarks.frontier.methods.EVALUATIONS", 12)
    assert frontier.main([*files, *few, "--tune"]) == 0
    tuned = read(results)
    assert {row["reward"] for row in tuned} == {TUNING}
    assert {row["seed"] for row in tuned} == {TUNING_SEED}
    assert {row["variant"] for row in tuned if row["method"] == "fk_steering"} == set(METHODS["fk_steering"].variants)
    assert frontier.main([*files, *few, "--minutes", "0"]) == 3
    assert frontier.main([*files, *few]) == 0
    assert len(read(results)) == len(tuned) + 1 + 3 * 5
    assert frontier.main([*files, *few, "--estimate"]) == 0
    assert "16 of 16 cells are in; the others take about 0.0 processor hours" in capsys.readouterr().out
    monkeypatch.setattr(frontier, "run_job", lambda *asked: pytest.fail("run again"))
    assert frontier.main([*files, *few]) == 0
    pytest.importorskip("matplotlib")
    assert frontier.main([*files, "--table"]) == 0
    assert "at the rewards of FK steering, DAS() keeps more by" in capsys.readouterr().out
    record = json.loads(results.with_suffix(".json").read_text())
    assert [len(points) for points in record["blocks"][0]["methods"].values()] == [1, 5, 5, 5]
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_a_job_that_fails_is_told_and_left(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(job: Sequence[Cell], shop: Workshop) -> Iterator[dict[str, Any]]:
        for cell in job:
            if cell.strength == 9:
                raise RuntimeError("out of paint")
            line = row(cell.method, 0, cell.strength, 0.0, 1.0) | {
                "budget": cell.key[3],
                "prior": "w",
                "reward": "clip",
            }
            yield line

    monkeypatch.setattr(frontier, "run_job", broken)
    cells = [Cell("clip", "best_of_n", 0, s, "", "w") for s in METHODS["best_of_n"].strengths]
    results = tmp_path / "frontier.jsonl"
    assert frontier.work(cells, shop, results, 9) == 1
    assert "FAILED clip best_of_n 0 2/: out of paint" in capsys.readouterr().err
    assert len(read(results)) == 4


def test_the_hours_that_are_left_follow_from_what_is_in() -> None:
    """108 evaluations of 12 pictures in 72 s; a training of 8 x 108 costs as much as eight samplers' cells."""
    done = row("das", 0, 0.5, 0.0, 1.0) | {"seconds": 72.0, "pictures": 12, "budget": "0.5/", "prior": "w"}
    others = [Cell("clip", "tds", 0, s, "", "w") for s in METHODS["tds"].strengths]
    others += [Cell("clip", "backpropagation", 0, s, "last_1e-3", "w") for s in METHODS["backpropagation"].strengths]
    cells = [Cell("clip", "das", 0, 0.5, "", "w"), *others]
    assert "1 of 11 cells are in; the others take about 0.3 processor" in frontier.estimate(cells, [done])  # 13 x 72 s
    slow = row("backpropagation", 0, 8.0, 0.0, 1.0) | {"pictures": 12, "budget": "8/last_1e-3", "prior": "w"}
    slow |= {"evaluations": 8 * 108.0, "seconds": 8 * 720.0, "variant": "last_1e-3"}
    told = frontier.estimate(cells, [done, slow])  # five cells at the mean rate, four checkpoints at the training's own
    assert f"about {(5 * (72 + 8 * 720) / 9 + 4 / 5 * 8 * 720) / 3600:.1f} processor" in told
    assert "run one" in frontier.estimate(cells, [])


def row(method: str, seed: int, strength: float, reward: float, fidelity: float) -> dict[str, Any]:
    return {
        "method": method, "reward": "clip", "seed": seed, "strength": strength, "variant": "", "fidelity": fidelity,
        "rewards": {"clip": reward, "planted": 0.0, "colorfulness": 0.0}, "diversity": 0.5, "ess": None,
        "evaluations": 108.0, "seconds": 1.0,
    }  # fmt: skip


def test_methods_are_compared_at_equal_reward_within_a_seed() -> None:
    rows = []
    for seed, worse in ((0, 0.1), (1, 0.3)):
        rows += [row("prior", seed, 0.0, 0.0, 1.0), row("das", seed, 0.1, 1.0, 0.8), row("das", seed, 0.01, 2.0, 0.4)]
        rows += [row("tds", seed, 0.1, 1.5, 0.85 - worse), row("tds", seed, 0.01, 3.0, 0.1)]
    (block,) = aggregate(rows)
    found = block["against"]["tds"]
    assert found["fidelity"]["mean"] == pytest.approx(0.6 - 0.65)
    assert found["fidelity"]["half_width"] == pytest.approx(12.706 * np.std([0.1, 0.3], ddof=1) / np.sqrt(2), rel=1e-3)
    assert (found["fidelity"]["beyond"], found["fidelity"]["points"]) == (2, 4)
    assert found["diversity"]["mean"] == 0.0
    assert [point["strength"] for point in block["methods"]["das"]] == [0.1, 0.01], "the weak tilt first"
    assert "2 of its 4 points lie beyond" in text([block])


def test_a_rivals_points_below_its_own_frontier_count_as_its_frontier() -> None:
    """Both sides are read off their upper lines: a bad point of the rival's is no gain of the default's."""
    rows = [row("prior", 0, 0.0, 0.0, 1.0), row("das", 0, 0.01, 2.0, 0.5)]
    rows += [row("tds", 0, 0.1, 1.0, 0.0), row("tds", 0, 0.01, 2.0, 0.5)]
    assert aggregate(rows)[0]["against"]["tds"]["fidelity"]["mean"] == pytest.approx(0.0)


def test_best_of_n_is_the_best_of_the_first_n_chains(shop: Workshop) -> None:
    strengths = METHODS["best_of_n"].strengths
    rows = list(run_job([cell("best_of_n", s) for s in strengths], shop))
    scores = [row["rewards"]["colorfulness"] for row in rows]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]
    assert [row["evaluations"] for row in rows] == [3 * s for s in strengths]
    prior, prompts = shop.prior, shop.words(0)
    gens = [generator(query_seed(0, 0, i), "sample") for i in range(len(prompts))]
    chains = BestOfN().sample(
        prior, lambda x, cond: x.mean((1, 2, 3)), prior.encode(prompts), num_particles=strengths[-1], generators=gens
    )
    for number, score in zip(strengths, scores, strict=True):
        values = [shop.rewards["colorfulness"](x[:number], [""] * number).max() for x in chains.designs]
        assert score == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


def test_what_is_kept_at_a_reward_is_the_upper_line() -> None:
    points = [(0.0, 1.0), (1.0, 0.2), (2.0, 0.6)]
    assert at_reward(points, 1.0) == pytest.approx(0.8)  # between the first and the last, above the middle one
    assert at_reward(points, 2.0) == 0.6
    assert at_reward(points, -1.0) == 1.0
    assert at_reward(points, 2.1) is None
