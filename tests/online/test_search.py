"""Where queries start from: refining one by hand, and the operators, parents and levels that a loop chooses."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.fakes import engine
from tests.fakes.engine import FakeEngine, features_of, points, to_image, truth
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online import loop
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.report.pages import write_report
from tiltopt.online.report.record import load_run
from tiltopt.online.search import Arm, choose, rank_weights, start_queries, tally
from tiltopt.online.seeds import query_seed
from tiltopt.online.settings.run import Settings
from tiltopt.online.settings.source import Source
from tiltopt.online.store.latents import FILE
from tiltopt.rewards.base import FunctionReward

CONFIG = engine.CONFIG | {"answer_noise": 0.0}
SEARCH = {"operators": "global+restart+pool", "low_strength": 0.2, "high_strength": 0.6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def one_prompt(tmp_path: Path) -> dict[str, Any]:
    """Settings with a single prompt."""
    (tmp_path / "cats.txt").write_text("a cat\n")
    return CONFIG | {"prompts": str(tmp_path / "cats.txt"), "prompt_template": "{}"}


@pytest.fixture
def opt(folder: Path) -> Any:
    """A run of which round 0 is answered."""
    with Optimizer.create(folder, CONFIG, engine=FakeEngine()) as opt:
        for query in opt.ask(5):
            opt.tell(query.id, truth(query.image))
        yield opt


def reward() -> FunctionReward:
    return FunctionReward("toy", "points", 1, lambda images, prompts: [truth(image) for image in images])


# ---- by hand


def test_refining_without_a_surrogate_mixes_the_design_with_noise(folder: Path) -> None:
    with Optimizer.create(folder, CONFIG, engine=FakeEngine()) as opt:
        parent = opt.ask(3)[1]
        children = opt.refine(parent.id, strength=0.3, n=2)
        z = points(parent.seed, 1).half().float()
        for i, child in enumerate(children):
            expected = 0.7 * z + 0.3 * points(query_seed(3, 1, i), 1)
            assert child.image.tobytes() == to_image(expected[0]).tobytes()
            assert (child.id, child.prompt, child.round) == (4 + i, parent.prompt, 1)
            assert (child.operator, child.parents, child.k0) == ("restart", (2,), 7)
        assert "restart of #2" in repr(children[0])
        assert "of #" not in repr(parent)
        assert opt.queries()["parents"].tolist() == ["", "", "", "2", "2"]
        assert [query.parents for query in opt.pending()] == [(), (), (), (2,), (2,)]
        assert opt.store.rounds()[1].kind == "refined"


def test_refinements_are_queries_like_any_other(opt: Optimizer) -> None:
    (child,) = opt.refine(2, strength=0.5)
    assert child.predicted is not None, "they follow the surrogate once there is one"
    assert opt.store.rounds()[1].fingerprint
    opt.tell(child.id, 2.5)
    opt.ask(1)
    assert opt.engine.seen[-1].Y.flatten().tolist()[-1] == 2.5  # type: ignore[attr-defined]


def test_a_strength_of_one_is_a_fresh_sample(folder: Path) -> None:
    with Optimizer.create(folder, CONFIG, engine=FakeEngine()) as opt:
        opt.ask(2)
        (child,) = opt.refine(1, strength=1)
        assert child.image.tobytes() == to_image(points(query_seed(3, 1, 0), 1)[0]).tobytes()
        assert (child.parents, child.k0) == ((1,), 0)


def test_latents_survive_the_process_and_the_image_stands_in_for_them(folder: Path) -> None:
    drawn: dict[str, bytes] = {}
    for name in ("at once", "reopened", "from the image"):
        place = folder / name
        with Optimizer.create(place, CONFIG, engine=FakeEngine()) as opt:
            opt.ask(3)
            if name == "at once":
                drawn[name] = opt.refine(3, strength=0.01)[0].image.tobytes()
                continue
        if name == "from the image":
            (place / "round_000" / FILE).unlink()
        with Optimizer.open(place, engine=FakeEngine()) as opt:
            drawn[name] = opt.refine(3, strength=0.01)[0].image.tobytes()
    assert drawn["at once"] == drawn["reopened"]
    assert max(abs(a - b) for a, b in zip(drawn["at once"], drawn["from the image"], strict=True)) <= 1


@pytest.mark.parametrize("damaged", [True, False])
def test_a_parent_whose_latents_and_image_are_gone_is_named_and_nothing_is_lost(opt: Optimizer, damaged: bool) -> None:
    kept = opt.folder / "round_000" / FILE
    kept.write_bytes(b"no tensors") if damaged else kept.unlink()
    opt.image(2)
    (opt.folder / "images" / "000002.png").unlink()
    with pytest.raises(StoreError, match=r"query 2 cannot be started from: .*latents.safetensors.*000002.png.*Nothing"):
        opt.refine(2)
    assert len(opt.queries()) == 5
    assert opt.refine(3)[0].id == 6, "others still can"


def test_impossible_refinements_are_refused(opt: Optimizer) -> None:
    for strength in (0, -0.5, 1.01, math.nan, 10**400, "0.5", None, True):
        with pytest.raises(ConfigError, match=r"`strength` in \(0, 1\]"):
            opt.refine(1, strength)  # type: ignore[arg-type]
    for n in (0, -1, 2.5):
        with pytest.raises(ConfigError, match="number of queries"):
            opt.refine(1, 0.5, n)  # type: ignore[arg-type]
    for id in (99, 0, -7):
        with pytest.raises(StoreError, match=f"unknown query {id}: the run has queries 1 to 5"):
            opt.refine(id)
    opt.ask(1)
    opt.abandon(6, "no")
    with pytest.raises(StoreError, match="query 6 is abandoned; expected one that is asked or answered"):
        opt.refine(6)
    assert len(opt.queries()) == 6


def test_a_refinement_takes_no_round_from_the_loop(folder: Path) -> None:
    with Optimizer.create(folder, CONFIG, engine=FakeEngine()) as opt:
        opt.ask(5)
        opt.refine(1, n=2)
        result = loop.run(opt, reward())
        record = load_run(opt.folder, opt.store)
    assert result.complete
    assert [r["kind"] for r in result.rounds] == ["plain", "refined", "tilted", "tilted"]
    assert len(record.queries) == 5 + 2 + 2 * 3
    assert record.complete
    assert (record.drawn, record.planned) == (3, 3)
    assert len(record.plain[0]) == 5, "refinements are no plain samples"
    assert "restart of #1 at step 5" in write_report(folder, record).read_text(encoding="utf-8")


# ---- which operator


def test_operators_are_held_against_the_prior_of_their_prompt() -> None:
    rows = [(0, "a", 1.0, "global"), (0, "a", 3.0, "global"), (0, "b", 8.0, "global"), (1, "a", 9.0, "restart"),
            (1, "b", 9.0, "global"), (1, "c", 5.0, "pool"), (2, "a", 50.0, "restart")]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["round", "prompt", "value", "operator"])
    a, b, c = (1 + 3 + 4) / 3, (8 + 4) / 2, 4.0  # shrunk to the mean of all by one answer's worth
    off = [1 - a, 3 - a, 8 - b]
    mean = sum(off) / 3
    sd = math.sqrt(sum((x - mean) ** 2 for x in off) / 3)
    scores = {"restart": (9 - a) / sd, "global": (9 - b) / sd, "pool": (5 - c) / sd}
    middle = sum(scores.values()) / 3
    arms = tally(frame, {0: "plain", 1: "tilted", 2: "refined"}, ["global", "restart", "pool", "other"])
    assert [arm.count for arm in arms] == [1, 1, 1, 0], "what was asked for by hand is no lesson"
    shrunk = [(scores[name] + middle) / 2 for name in ("global", "restart", "pool")]
    assert [arm.mean for arm in arms] == pytest.approx([*shrunk, middle])


def test_operators_are_chosen_as_often_as_they_may_be_the_best() -> None:
    arms = [Arm("global", 0.0, 3), Arm("restart", 0.5, 1)]
    rng, n = torch.Generator().manual_seed(0), 4000
    seen = Counter(choose(arms, 0.1, rng) for _ in range(n))
    better = 0.5 * (1 + math.erf(0.5 / math.sqrt(1 / 4 + 1 / 2) / math.sqrt(2)))  # of two Gaussians
    p = 0.2 / 2 + 0.8 * better
    assert abs(seen["restart"] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    hopeless = [Arm("global", 0.0, 400), Arm("restart", -9.0, 400)]
    seen = Counter(choose(hopeless, 0.1, rng) for _ in range(n))
    assert abs(seen["restart"] / n - 0.1) < 4 * math.sqrt(0.09 / n), "the floor"


# ---- which parents


def test_weights_fall_with_the_rank() -> None:
    w = rank_weights(torch.tensor([1.0, 5.0, 5.0, -2.0]))
    assert w.sum() == pytest.approx(1.0)
    assert w[1] == w[2] > w[0] > w[3]
    assert float(w[0] / w[1]) == pytest.approx(math.exp(-2 / 3))


def prepared(opt: Optimizer, n: int = 60) -> tuple[Any, list[str]]:
    """Asks of a round with what they start from, and the notes."""
    from tiltopt.online import rounds

    job, _ = rounds.prepare(opt.store, opt.engine, opt.settings, opt.folder, n, lambda *_: None)
    return job.asks, list(job.record.notes)


def test_parents_are_answered_designs_of_the_prompt_by_rank(folder: Path, one_prompt: dict[str, Any]) -> None:
    config = one_prompt | {"search": SEARCH}
    with Optimizer.create(folder, config, engine=FakeEngine()) as opt:
        for query in opt.ask(5):
            opt.tell(query.id, float(-query.id))
        asks, notes = prepared(opt)
        again, _ = prepared(opt)
    assert notes == []
    begun = [ask.start for ask in asks if ask.start]
    operators = Counter(ask.start.operator if ask.start else "global" for ask in asks)
    assert min(operators[name] for name in ("global", "restart", "pool")) > 8, "nothing is known of them yet"
    for start in begun:
        assert start.parents == (1, 2, 3, 4, 5)
        assert torch.tensor(start.weights).log().diff().tolist() == pytest.approx([-1 / 3] * 4, rel=1e-5)
        assert 4 <= start.k0 <= 8, "10 steps, strength .2 to .6"
    assert len({start.k0 for start in begun}) >= 4
    assert [a.start and a.start.key() for a in again] == [a.start and a.start.key() for a in asks]


def test_without_answers_to_the_prompt_a_query_starts_from_noise(folder: Path) -> None:
    config = CONFIG | {"search": SEARCH | {"operators": "restart"}}
    with Optimizer.create(folder, config, engine=FakeEngine()) as opt:
        first = opt.ask(5)
        for query in first:
            opt.tell(query.id, truth(query.image))
        asks, _ = prepared(opt)
        prompt_of = {query.id: query.prompt for query in first}
        for ask in asks:
            mine = [id for id, prompt in prompt_of.items() if prompt == ask.prompt]
            assert (list(ask.start.parents) if ask.start else []) == mine
        assert 0 < sum(ask.start is not None for ask in asks) < len(asks)


def test_parents_that_are_gone_are_left_out_and_named(folder: Path, one_prompt: dict[str, Any]) -> None:
    config = one_prompt | {"search": SEARCH | {"operators": "restart"}}
    with Optimizer.create(folder, config, engine=FakeEngine()) as opt:
        for query in opt.ask(5):
            opt.tell(query.id, float(-query.id))
        (opt.folder / "round_000" / FILE).unlink()
        for number in (1, 4):
            (opt.folder / "images" / f"{number:06d}.png").unlink()
        asks, notes = prepared(opt)
        assert all(ask.start.parents == (2, 3, 5) for ask in asks)
        assert torch.tensor(asks[0].start.weights).log().diff().tolist() == pytest.approx([-1 / 3, -2 / 3], rel=1e-5)
        assert any("2 queries (1, 4)" in note for note in notes)
        assert len(opt.ask(2)) == 2


def test_thompson_takes_a_parent_as_often_as_it_may_be_the_best(folder: Path, one_prompt: dict[str, Any]) -> None:
    config = one_prompt | {"search": SEARCH | {"operators": "restart", "parents": "thompson"}}
    with Optimizer.create(folder, config, engine=FakeEngine()) as opt:
        for query in opt.ask(5):
            opt.tell(query.id, truth(query.image))
        model = opt.engine.fit(opt.store.data(), 1)
        asks, n = prepared(opt, 400)[0], 400
    posterior = model.posterior(opt_features(asks, model))
    draws = torch.distributions.MultivariateNormal(
        posterior.mean.flatten(), posterior.distribution.covariance_matrix + 1e-9 * torch.eye(5)
    ).sample((20_000,))
    want = Counter((draws.argmax(1) + 1).tolist())
    seen = Counter(ask.start.parents[0] for ask in asks)
    for number in range(1, 6):
        p = want[number] / 20_000
        assert abs(seen[number] / n - p) < 4 * math.sqrt(max(p * (1 - p), 1e-4) / n), number


def opt_features(asks: Any, model: Any) -> torch.Tensor:
    """Features of the five designs of round 0, in order."""
    known = {ask.start.parents[0]: ask.start.latents[0] for ask in asks}
    drawn = [known.get(i + 1, points(query_seed(3, 0, i), 1)[0]) for i in range(5)]
    return torch.stack([features_of(to_image(z)) for z in drawn]).double()


# ---- in a loop


def whole(folder: Path, config: dict[str, Any]) -> pd.DataFrame:
    with Optimizer.create(folder, config, engine=FakeEngine()) as opt:
        assert loop.run(opt, reward()).complete
        return opt.queries()


def test_a_resumed_run_starts_its_queries_where_the_uninterrupted_one_does(
    folder: Path, one_prompt: dict[str, Any]
) -> None:
    config = one_prompt | {"search": SEARCH, "rounds": 4, "batch_size": 6}
    plain = whole(folder / "whole", config)
    assert set(plain["operator"]) == {"global", "restart", "pool"}
    assert (plain["parents"] != "").sum() >= 8
    with Optimizer.create(folder / "cut", config, engine=FakeEngine()) as opt:
        for query in opt.ask(5):
            opt.tell(query.id, truth(query.image), source=Source.of_box("toy", opt.settings.reward))
        opt.ask(6)
    for _ in range(2):
        with Optimizer.open(folder / "cut", engine=FakeEngine()) as opt:
            result = loop.run(opt, reward())
    assert result.complete
    with Optimizer.open(folder / "cut", read_only=True) as opt:
        cut = opt.queries()
    pd.testing.assert_frame_equal(plain, cut)


def test_the_default_starts_every_query_from_noise(folder: Path, one_prompt: dict[str, Any]) -> None:
    assert set(whole(folder, one_prompt)["operator"]) == {"global"}
    assert start_queries(None, None, Settings(), folder, None, ()) == ((), [])  # type: ignore[arg-type]


def digest(image: Any) -> float:
    """A reward that the features of the fake engine, the means of the quadrants, do not show; in [0, 1]."""
    return hashlib.sha256(image.tobytes()).digest()[0] / 255


@pytest.mark.parametrize(("fallback", "steps"), [(True, 25), (False, 25), (True, 1)])
def test_where_guidance_turns_out_to_be_blind_queries_start_from_the_best_and_from_noise(
    folder: Path, one_prompt: dict[str, Any], fallback: bool, steps: int
) -> None:
    config = one_prompt | {
        "rounds": 6,
        "batch_size": 6,
        "search": {"fallback": fallback},
        "prior": {"num_steps": steps},
    }
    with Optimizer.create(folder, config, engine=FakeEngine()) as opt:
        box = FunctionReward("toy", "points", 1, lambda images, prompts: [digest(image) for image in images])
        assert loop.run(opt, box).complete
        table, notes = opt.queries(), {record.round: " ".join(record.notes) for record in opt.store.rounds()}
    assert set(table[table["round"] <= 4]["operator"]) == {"global"}, "24 guided answers come first"
    later = table[table["round"] == 5]
    if not fallback or steps == 1:  # a chain of one step can be entered nowhere but at its noise
        assert set(later["operator"]) == {"global"}
        assert "features do not show" not in notes[5]
        return
    assert set(later["operator"]) == {"pool"}
    assert [parents != "" for parents in later["parents"]] == [True, False] * 3
    assert "24 guided answers are" in notes[5]
    assert "the features do not show what is rewarded" in notes[5]


def test_where_the_features_show_the_reward_guidance_goes_on(folder: Path, one_prompt: dict[str, Any]) -> None:
    table = whole(folder, one_prompt | {"rounds": 6, "batch_size": 6})
    assert set(table["operator"]) == {"global"}


@pytest.mark.parametrize(
    ("search", "key"),
    [
        ({"operators": "global+restrat"}, "search.operators"),
        ({"operators": ""}, "search.operators"),
        ({"operators": "restart+restart"}, "search.operators"),
        ({"low_strength": 0}, "search.low_strength"),
        ({"low_strength": 0.8, "high_strength": 0.5}, "search.low_strength"),
        ({"high_strength": 1.5}, "search.high_strength"),
        ({"pool": 0}, "search.pool"),
        ({"floor": -0.1}, "search.floor"),
        ({"operators": "global+restart+pool", "floor": 0.4}, "search.floor"),
        ({"parents": "best"}, "search.parents"),
    ],
)
def test_impossible_searches_name_their_key(search: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        Settings.from_config({"search": search})


def test_a_run_of_comparisons_has_no_answers_to_rank_parents_by(folder: Path) -> None:
    config = CONFIG | {"model": {"name": "pairwise"}, "answer_noise": 0.0, "search": {"operators": "restart"}}
    with pytest.raises(ConfigError, match=r"`search\.operators`"):
        Optimizer.create(folder, config, engine=FakeEngine())
