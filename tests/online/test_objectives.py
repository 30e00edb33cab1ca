"""Runs of several objectives: told whole or not at all, kept through everything, and a front that is found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from botorch.models.model import Model
from PIL import Image
from torch import Tensor

from benchmarks.pareto import ENDS, answers, plain, search, share
from tests.fakes.engine import CONFIG, FakeEngine, features_of, points, to_image
from tests.online.test_team import processes, read
from tiltopt import cli
from tiltopt.errors import ConfigError, RewardError, StoreError
from tiltopt.online import loop
from tiltopt.online.commands.import_table import import_measurements, read_measurements
from tiltopt.online.commands.inspect import status, surrogate_text
from tiltopt.online.engine.potential import aim, fit_several, model_of
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import Ask, Drawn, Objective, Observations, Plan
from tiltopt.online.report.front import front_numbers, merits, on_front
from tiltopt.online.report.pages import write_report
from tiltopt.online.report.record import load_run, summarise
from tiltopt.online.report.text import round_table
from tiltopt.online.seeds import generator
from tiltopt.online.settings.objectives import objectives_of, outcomes_of
from tiltopt.online.settings.run import Settings
from tiltopt.online.settings.validation import validated
from tiltopt.online.team import Team
from tiltopt.rewards.base import Answer, FunctionReward
from tiltopt.surrogates.several import hypervolume

A, B = ENDS
REFERENCE = (-1.0, -1.0)
TWO = CONFIG | {
    "objectives": "near, far",
    "acquisition": {"name": "chebyshev", "beta": 0.5},
    "sampler": {"alpha": 0.02},
    "answer_noise": 0.0,
    "reference_point": REFERENCE,
}


class SeveralEngine(FakeEngine):
    """The toy prior with squares of its numbers among the features, and many draws of the prior to choose from."""

    feature_id = "squares"
    num_features = 8

    def __init__(self, settings: dict[str, Any], particles: int = 256, team: Team | None = None) -> None:
        super().__init__(team)
        self.settings, self.particles = Settings.from_config(settings), particles

    def _drawn(self, *given: Any) -> Drawn:
        drawn = super()._drawn(*given)
        return replace(drawn, features=squares(drawn.image))

    def features(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.stack([squares(image) for image in images])

    def fit(self, data: Observations, round_: int) -> Model:
        self.seen.append(data)
        return fit_several("linear", data, generator(self.seed, "fit", round_))

    def draw(
        self, model: Model, data: Observations, asks: Sequence[Ask], plan: Plan, on_step: Any = None
    ) -> list[Drawn]:
        out = []
        for place, ask in self.team.share(asks):
            wanted = self.settings.acquisition.name
            acquisition, feasible = aim(
                wanted, model, data, beta=plan.beta, generator=generator(self.seed, "acquisition"), turn=ask.number
            )
            images = [to_image(p) for p in points(ask.seed, self.particles)]
            X = torch.stack([squares(image) for image in images]).double()
            with torch.no_grad():
                log_w = acquisition(X.unsqueeze(-2)) / plan.alpha + (feasible(X) if feasible else 0.0)
            i = int(torch.multinomial(log_w.softmax(0), 1, generator=generator(ask.seed, "select")))
            part = model_of(model, data.objectives)
            known = {}
            if part.num_outputs == 1:
                posterior: Any = part.posterior(X[i : i + 1].unsqueeze(-2))
                known = {"predicted": float(posterior.mean), "predicted_sd": float(posterior.variance.sqrt())}
            out.append((place, Drawn(images[i], X[i].float(), **known)))
        return self.team.collect(out, len(asks))


def squares(image: Image.Image) -> Tensor:
    x = features_of(image)
    return torch.cat([x, x**2])


def both(image: Image.Image) -> dict[str, float]:
    """Minus the squared distances from two points: the front is what lies between them."""
    x = features_of(image).double()
    return {"near": -float((x - A).square().sum()), "far": -float((x - B).square().sum())}


def box(answer: Any = both) -> FunctionReward:
    return FunctionReward("both", "", 1, lambda images, _: [answer(image) for image in images])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    with Optimizer.create(folder, TWO, engine=SeveralEngine(TWO)) as run:
        assert loop.run(run, box()).complete
    return folder


# ---- telling


def test_an_answer_is_told_whole_or_not_at_all(tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "run", TWO, engine=SeveralEngine(TWO)) as run:
        first, second = run.ask(2)
        for answer, said in (
            ({"near": 1.0}, "without far"),
            (1.0, "an answer is a mapping"),
            ({"near": 1.0, "far": float("nan")}, "`far` to be a finite number"),
        ):
            with pytest.raises(RewardError, match=said):
                run.tell(first.id, answer)
        with pytest.raises(RewardError, match="by objective"):
            run.tell(first.id, {"near": 1.0, "far": 2.0}, 0.1)
        assert [q.id for q in run.pending()] == [first.id, second.id]
        run.tell(first.id, {"far": 2.0, "near": 1.0, "besides": 7.0}, {"far": 0.5})
        frame = run.queries()
        assert frame.loc[0, ["value", "near", "far"]].tolist() == [1.0, 1.0, 2.0]
        assert frame["far"].isna().tolist() == [False, True]
        data = run.store.data(objectives_of(run.settings))
        assert data.Y.tolist() == [[1.0, 2.0]]
        assert data.sem is not None
        assert data.sem.tolist() == [[0.0, 0.5]]
        run.undo(first.id)
        assert run.queries()[["near", "far"]].isna().all(axis=None)
        assert run.store.outcomes() == {}


def test_one_number_is_no_answer_of_several_nor_the_reverse(tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "one", CONFIG, engine=FakeEngine()) as run:
        (query,) = run.ask(1)
        with pytest.raises(RewardError, match="one finite number"):
            run.tell(query.id, {"near": 1.0})


def test_a_black_box_that_forgets_an_objective_fails_that_query(tmp_path: Path) -> None:
    def forgetful(image: Image.Image) -> Any:
        seen.append(1)
        return {"near": 1.0} if len(seen) == 2 else both(image)

    seen: list[int] = []
    with Optimizer.create(tmp_path / "run", TWO | {"rounds": 0}, engine=SeveralEngine(TWO)) as run:
        assert loop.run(run, box(forgetful)).complete
        frame = run.queries()
        failed = frame[frame["state"] == "failed"]
        assert len(failed) == 1
        assert "without far" in failed["error"].iloc[0]
        assert json.loads(run.store.get(2).raw) == {"near": 1.0}, "what was said is kept"


# ---- a run


def test_what_is_learnt_is_every_objective_of_every_answer(finished: Path) -> None:
    with Optimizer.open(finished, read_only=True) as run:
        frame, images = run.queries(), {n: run.image(n) for n in run.queries()["id"]}
        data = run.store.data(objectives_of(run.settings))
    expected = [both(images[n]) for n in frame["id"]]
    assert frame["near"].tolist() == pytest.approx([e["near"] for e in expected])
    assert frame["far"].tolist() == pytest.approx([e["far"] for e in expected])
    assert data.Y.tolist() == frame[["near", "far"]].to_numpy().tolist()


def test_a_run_that_is_cut_short_ends_as_if_it_had_not_been(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies(folder: Path, store: Any, round_: int, measured: Any) -> Any:
        if round_ == 1:
            raise Killed
        return write(folder, store, round_, measured)

    write = loop.write_round_summary
    with monkeypatch.context() as m:
        m.setattr(loop, "write_round_summary", dies)
        with pytest.raises(Killed), Optimizer.create(tmp_path / "cut", TWO, engine=SeveralEngine(TWO)) as run:
            loop.run(run, box())
    with Optimizer.open(tmp_path / "cut", engine=SeveralEngine(TWO)) as run:
        assert loop.run(run, box()).complete
        cut = run.queries()
    with Optimizer.open(finished, read_only=True) as run:
        assert cut.drop(columns="error").equals(run.queries().drop(columns="error"))


def test_answers_that_wait_for_the_database_keep_their_objectives(tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "run", TWO, engine=SeveralEngine(TWO)) as run:
        (query,) = run.ask(1)
        found = outcomes_of(objectives_of(run.settings), {"near": 1.0, "far": 2.0})
        run.store.spool.put(
            {"query": query.id, "value": 1.0, "sem": None, "raw": None, "error": None,
             "outcomes": json.dumps({name: list(known) for name, known in found.items()})}
        )  # fmt: skip
    with Optimizer.open(tmp_path / "run") as run:
        assert run.queries().loc[0, ["near", "far"]].tolist() == [1.0, 2.0]


def test_the_summary_tells_the_front_and_its_volume(finished: Path) -> None:
    record = load_run(finished)
    assert record.reference is None, "no plain samples were scored"
    found = summarise(record)
    table = record.queries
    Y = torch.tensor(table[["near", "far"]].to_numpy())
    nothing_beats = [not any((y >= Y[i]).all() and (y > Y[i]).any() for y in Y) for i in range(len(Y))]
    assert found["pareto"]["front"] == table["id"][nothing_beats].tolist()
    until = [Y[torch.tensor((table["round"] <= n).to_numpy())] for n in (0, 1, 2)]
    expected = [hypervolume(y, torch.tensor(REFERENCE, dtype=torch.float64)) for y in until]
    assert found["pareto"]["hypervolume"] == pytest.approx(expected)
    assert [row["hypervolume"] for row in found["rounds"]] == pytest.approx(expected)
    assert found["unit"] == "merit"
    assert record.reference is None, "the reference point is no reference sample"
    assert found["prior"]["mean"] == pytest.approx(table["value"][table["round"] == 0].mean())
    first = Y[(table["round"] == 0).to_numpy()]
    shares = ((Y - first.amin(0)) / (first.amax(0) - first.amin(0))).amin(1)
    assert table["value"].tolist() == pytest.approx(shares.tolist())
    written = json.loads((finished / "round_001" / "summary.json").read_text())
    assert written["mean"] == pytest.approx(float(shares[(table["round"] == 1).to_numpy()].mean()))
    assert set(written["previous_surrogate"] or {}) <= {"objectives", "round"}
    scored = json.loads((finished / "round_002" / "summary.json").read_text())["previous_surrogate"]
    assert set(scored["objectives"]) == {"near", "far"}
    assert status(finished)["summary"]["pareto"]["feasible"] == len(Y)


def test_the_surrogate_tells_how_it_predicts_each_objective(finished: Path) -> None:
    text = surrogate_text(finished / "round_001")
    assert "kind           several" in text
    assert [line.split()[:3] for line in text.splitlines() if line.startswith(("1 ", "2 "))] == [
        ["1", "near", "3"], ["1", "far", "3"], ["2", "near", "3"], ["2", "far", "3"],
    ]  # fmt: skip


def test_the_page_shows_the_front(finished: Path) -> None:
    page = write_report(finished).read_text()
    assert "Several objectives" in page
    assert 'class="front"' in page


def test_export_and_import_keep_every_objective(finished: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    assert cli.main(["export", str(finished), "--csv", str(table)]) == 0
    written = pd.read_csv(table)
    rows = written[["image", "prompt", "near", "far"]].assign(image=[str(finished / name) for name in written["image"]])
    rows.to_csv(tmp_path / "again.csv", index=False)
    with Optimizer.create(tmp_path / "run", TWO, engine=SeveralEngine(TWO)) as run:
        found = read_measurements(tmp_path / "again.csv", Settings(objectives="near, far"))
        assert import_measurements(run, found, "again.csv") == len(rows)
        assert run.queries()[["near", "far"]].equals(written[["near", "far"]])
        with pytest.raises(ConfigError, match="near"):
            read_measurements(tmp_path / "again.csv")
    with (
        Optimizer.create(tmp_path / "one", CONFIG, engine=FakeEngine()) as run,
        pytest.raises(StoreError, match="near"),
    ):
        import_measurements(run, found, "again.csv")


# ---- conditions


LIMITED = TWO | {"objectives": "near, far > -0.3", "reference_point": (), "acquisition": {"name": "ucb", "beta": 0.5}}


def test_as_high_as_possible_where_a_condition_is_met(tmp_path: Path) -> None:
    settings = LIMITED | {"rounds": 4, "batch_size": 8, "initial_batch_size": 16, "sampler": {"alpha": 0.005}}
    with Optimizer.create(tmp_path / "run", settings, engine=SeveralEngine(settings)) as run:
        assert loop.run(run, box()).complete
        frame = run.queries()
    last = frame[frame["round"] == 4]
    apart = float((A - B).norm())
    best = -((apart - 0.3**0.5) ** 2)  # where the condition just holds, on the line between the two points
    met = frame[frame["far"] >= -0.3]
    assert (last["far"] >= -0.3).mean() >= 0.5
    assert met["near"].max() > best - 0.1
    plain = frame[frame["round"] == 0]
    assert (plain["far"] >= -0.3).mean() < 0.5
    record = load_run(tmp_path / "run")
    assert record.queries["value"].isna().tolist() == (frame["far"] < -0.3).tolist()
    assert record.front["feasible"] == len(met)
    assert write_report(tmp_path / "run").is_file()


def test_the_front_leaves_out_what_breaks_a_condition() -> None:
    objectives = (Objective("a"), Objective("b"), Objective("c", 0.25))
    table = pd.DataFrame({"id": [1, 2, 3, 4], "round": [0, 0, 0, 1], "a": [1.0, 3.0, 0.0, np.nan],
                          "b": [1.0, 3.0, 2.0, np.nan], "c": [0.25, 0.2, 1.0, np.nan]})  # fmt: skip
    assert on_front(table, objectives).tolist() == [True, False, True, False]
    reference = torch.zeros(2, dtype=torch.float64)
    found = front_numbers(table, objectives, reference, [0])
    assert (found["front"], found["hypervolume"], found["feasible"]) == ([1, 3], [1.0], 2)
    far = front_numbers(table, objectives, reference + 9, [0])
    assert "lower `reference_point`" in far["note"]
    assert merits(table, objectives, table["round"] == 0).round(6).tolist()[:3] == pytest.approx(
        [0.0, float("nan"), 0.0], nan_ok=True
    )


def test_a_price_means_the_same_in_every_round() -> None:
    """What makes objectives comparable are the first answers: later ones, however far they lie, change no unit."""
    x = plain(0, 20)
    far = torch.cat([answers(x), torch.tensor([[3.0, -9.0], [-9.0, 3.0]], dtype=torch.float64)])
    features = torch.cat([torch.cat([x, x**2], 1), torch.zeros(2, 8, dtype=torch.float64)])
    known = Observations(features[:20], answers(x), None, features[:0], objectives=(Objective("a"), Objective("b")),
                         reference=torch.tensor(REFERENCE, dtype=torch.float64), first=answers(x))  # fmt: skip
    model = fit_several("linear", known, generator(0, "fit"))
    later = replace(known, X=features, Y=far)
    values = [
        aim("chebyshev", model, data, beta=0.5, generator=generator(0, "w")).acquisition(features[:20].unsqueeze(-2))
        for data in (known, later)
    ]
    assert torch.equal(*values)


# ---- finding a known front


def test_a_known_front_is_found_within_sixty_queries() -> None:
    """On 10 of 10 seeds by `python -m benchmarks.pareto`; on two of them here."""
    for seed in (0, 1):
        found = share(search("chebyshev", seed, pool=2048))
        assert found >= 0.95
        assert share(answers(plain(seed, 60))) < 0.9


def test_the_gain_of_hypervolume_leads_to_the_front() -> None:
    found = share(search("qlog_nehvi", 0, rounds=1, batch=8, pool=64))
    assert found > share(answers(plain(0, 80))), "which are three times as many"


def whole_run_of_objectives(team: Team, folder: Path) -> Any:
    with Optimizer.create(folder / "run", TWO, engine=SeveralEngine(TWO, 16, team)) as run:
        return loop.run(run, box() if team.is_main else None).complete


def test_objectives_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    results = {size: processes(size, whole_run_of_objectives, tmp_path / str(size)) for size in (1, 2, 3)}
    assert results == {size: [True] * size for size in (1, 2, 3)}
    runs = {size: read(tmp_path / str(size)) for size in (1, 2, 3)}
    assert runs[1] == runs[2] == runs[3]


# ---- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objectives": "near"}, "two or more"),
        ({"objectives": "near, near"}, "each name once"),
        ({"objectives": "near > 1, far > 2"}, "conditions alone"),
        ({"objectives": "2 near, far"}, "weights and options"),
        ({"reference_point": (1.0,)}, "each of the 2 maximised"),
        ({"acquisition": {"name": "ucb"}}, "chebyshev, qlog_nehvi for 2 maximised objectives"),
        ({"objectives": "", "reference_point": ()}, "got 'chebyshev'"),
        ({"model": {"name": "pairwise"}}, "surrogate of values"),
        ({"acquisition": {"name": "chebyshev", "adapt": True}}, "acquisition.adapt"),
        ({"reference_samples": 4}, "reference_samples"),
        ({"reward": {"name": "symmetry"}}, "says nothing of near, far"),
        ({"reward": {"name": "weighted", "parts": "symmetry, colorfulness"}}, "only of symmetry, colorfulness"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validated(Settings.from_config(TWO | change))


def test_a_reference_point_that_no_answer_is_above_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    with Optimizer.create(tmp_path / "run", TWO | {"reference_point": (9.0, 9.0)}, engine=SeveralEngine(TWO)) as run:
        assert loop.run(run, box(both)).complete
    summary = summarise(load_run(tmp_path / "run"))
    found = summary["pareto"]
    assert found["hypervolume"][-1] == 0.0
    assert found["note"] in round_table(summary)
    assert found["note"].startswith("no answer is above the reference point (9.0, 9.0)")
    assert len(found["front"]) > 0, "the front itself needs no reference point"


def test_a_composed_reward_brings_its_parts(tmp_path: Path) -> None:
    answer = Answer(3.0, raw={"near": 1.0, "far": 2.0, "sem": {"far": 0.5}})
    with Optimizer.create(tmp_path / "run", TWO | {"rounds": 0}, engine=SeveralEngine(TWO)) as run:
        loop.run(run, box(lambda image: answer))
        assert run.store.outcomes()[1] == {"near": [1.0, None], "far": [2.0, 0.5]}


def test_a_standard_error_that_is_none_costs_no_objective(tmp_path: Path) -> None:
    said = {"near": 1.5, "far": 1.5, "sem": {"near": -1.0, "far": 0.5}}
    with Optimizer.create(tmp_path / "run", TWO | {"rounds": 0}, engine=FakeEngine()) as opt:
        assert loop.run(opt, FunctionReward("lab", "", 1, lambda images, prompts: [said])).complete
        assert opt.store.outcomes()[1] == {"near": [1.5, None], "far": [1.5, 0.5]}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_design_of_which_one_objective_cannot_be_measured_is_infeasible(tmp_path: Path, value: float) -> None:
    """An answer, which is not asked for again, in whichever place it stands."""
    said = iter([{"near": 1.0, "far": value}, {"near": value, "far": 1.0}] + [{"near": 1.0, "far": 2.0}] * 3)
    with Optimizer.create(tmp_path / "run", TWO | {"rounds": 0}, engine=FakeEngine()) as opt:
        assert loop.run(opt, FunctionReward("lab", "", 1, lambda images, prompts: [next(said)])).complete
        assert [row.failure for row in opt.store.in_state("failed")] == ["infeasible"] * 2
        assert len(opt.store.data(objectives_of(opt.settings)).failed) == 2
        assert loop.ask_again(opt) == 0


@pytest.mark.parametrize("value", [10**400, True, "1", math.nan, None])
def test_numbers_of_an_objective_are_checked_as_single_answers_are(value: object) -> None:
    two = (Objective("a"), Objective("b"))
    with pytest.raises(RewardError, match="`b`"):
        outcomes_of(two, {"a": 1.0, "b": value})
    with pytest.raises(RewardError, match="`sem of b`"):
        outcomes_of(two, {"a": 1.0, "b": 2.0}, {"b": -0.1})
