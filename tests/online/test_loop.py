"""The run as a whole: rounds, resuming in the middle, failures, budgets, summaries, hooks, several processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes.engine import CONFIG, FakeEngine, LoggedReward, truth
from tiltopt.errors import RewardError
from tiltopt.online import loop
from tiltopt.online.hooks import Hook
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.runner import CallPolicy
from tiltopt.online.seeds import generator
from tiltopt.online.settings.source import Source
from tiltopt.online.store.database import Database, UnavailableError
from tiltopt.online.store.rows import REFERENCE
from tiltopt.rewards.base import Answer, FunctionReward
from tiltopt.surrogates.calibration import adjust


class Ear(Hook):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_round_start(self, round: int, queries_planned: int) -> None:
        self.heard.append(("start", round, queries_planned))

    def on_progress(self, kind: str, done: int, total: int) -> None:
        self.heard.append((kind, done, total))

    def on_answer(self, id: int, value: float | None) -> None:
        self.heard.append(("answer", id, value))

    def on_round_end(self, record: Any) -> None:
        self.heard.append(("end", record["round"]))


def reward(function: Any = truth, batch_size: int = 1) -> FunctionReward:
    """A black box of one image at a time."""
    return FunctionReward("toy", "points", batch_size, lambda images, prompts: [function(image) for image in images])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def start(folder: Path, **changes: Any) -> Optimizer:
    return Optimizer.create(folder, CONFIG | changes, engine=FakeEngine())


def again(folder: Path, **changes: Any) -> Optimizer:
    config = CONFIG | changes if changes else None
    return Optimizer.open(folder, config=config, allow_change=True, engine=FakeEngine())


def test_a_run_asks_every_round_and_summarises_it(folder: Path) -> None:
    with start(folder) as opt:
        ear = Ear()
        result = loop.run(opt, reward(), hooks=ear)
        frame = opt.queries()
    assert result.complete
    assert result.stop is None
    assert frame["round"].tolist() == [0] * 5 + [1] * 3 + [2] * 3
    assert set(frame["state"]) == {"answered"}
    for number, summary in enumerate(result.rounds):
        batch = frame[frame["round"] == number]
        assert summary["queries"] == [5, 8, 11][number]
        assert summary["mean"] == pytest.approx(batch["value"].mean(), rel=1e-14)
        assert summary["best"] == batch["value"].max()
        assert summary["size"] == len(batch)
        assert summary["states"]["answered"] == len(batch)
        assert json.loads((folder / f"round_{number:03d}" / "summary.json").read_text()) == summary
        assert summary["seconds"] > 0
    assert result.rounds[0]["ess_mean"] is None
    assert 1 <= result.rounds[1]["ess_mean"] <= 6
    assert result.rounds[1]["predicted_mean"] == pytest.approx(frame["predicted"][5:8].mean(), rel=1e-14)
    assert result.rounds[2]["previous_surrogate"]["round"] == 1
    marks = [event for event in ear.heard if event[0] in ("start", "end")]
    assert marks == [("start", 0, 5), ("end", 0), ("start", 1, 3), ("end", 1), ("start", 2, 3), ("end", 2)]
    assert [e[1] for e in ear.heard if e[0] == "answer"] == list(range(1, 12))
    assert ("black box", 5, 5) in ear.heard
    assert {e[0] for e in ear.heard} == {"start", "end", "answer", "black box", "denoise", "fit"}


def test_answers_carry_the_noise_that_their_number_names(folder: Path) -> None:
    with start(folder) as opt:
        loop.run(opt, reward())
        for number, value in zip(opt.queries()["id"], opt.queries()["value"], strict=True):
            noise = torch.randn((), generator=generator(3, "noise", number), dtype=torch.float64).item()
            assert value == truth(opt.image(number)) + 0.1 * noise


def test_a_finished_run_does_nothing_when_it_is_run_again(folder: Path) -> None:
    with start(folder) as opt:
        first = loop.run(opt, reward())
    with again(folder) as opt:
        assert loop.run(opt, reward(lambda image: 1 / 0)) == first


def test_more_rounds_can_be_added(folder: Path) -> None:
    with start(folder, rounds=1) as opt:
        loop.run(opt, reward())
    with again(folder, rounds=2) as opt:
        extended = loop.run(opt, reward())
    with start(folder.with_name("whole"), rounds=2) as opt:
        whole = loop.run(opt, reward())
    assert [r["mean"] for r in extended.rounds] == [r["mean"] for r in whole.rounds]


def test_a_budget_of_queries_stops_cleanly_and_more_budget_goes_on(folder: Path) -> None:
    log = folder.with_name("calls")
    with start(folder, reward={"max_queries": 6}) as opt:
        result = loop.run(opt, LoggedReward(log))
        assert not result.complete
        assert result.stop is not None
        assert result.stop.reason == "max_queries"
        assert opt.store.counts() == {"asked": 2, "failed": 0, "answered": 6, "abandoned": 0}
        assert [r["round"] for r in result.rounds] == [0]
    with again(folder) as opt:
        assert loop.run(opt, LoggedReward(log)).stop is not None, "the budget is of the whole run"
    with again(folder, reward={"max_queries": 8}) as opt:
        result = loop.run(opt, LoggedReward(log))
        assert result.stop is not None
        assert "8" in result.stop.message
        assert opt.store.next() == (2, 9), "no round is drawn that nothing can answer"
    with again(folder, reward={"max_queries": None}) as opt:
        assert loop.run(opt, LoggedReward(log)).complete
    calls = log.read_text().splitlines()
    assert len(calls) == len(set(calls)) == 11, "nothing was asked twice"


def test_a_budget_of_seconds_counts_the_whole_run(folder: Path) -> None:
    with start(folder, reward={"max_seconds": 0.001}) as opt:
        result = loop.run(opt, reward())
        assert result.stop is not None
        assert result.stop.reason == "max_seconds"
    with again(folder, reward={"max_seconds": 1000.0}) as opt:
        assert loop.run(opt, reward()).complete


def test_failed_evaluations_are_recorded_and_teach_nothing(folder: Path) -> None:
    calls: dict[bytes, int] = {}

    def flaky(image: Image.Image) -> float | Answer:
        tries = calls[image.tobytes()] = calls.get(image.tobytes(), 0) + 1
        number = len(calls)
        if number == 2:
            raise RuntimeError("out of plates")
        if number == 3 and tries == 1:
            raise RuntimeError("try me again")
        if number == 4:
            return math.nan
        if number == 5:
            return Answer(1.0, sem=0.5, raw={"said": "one"})
        return truth(image)

    ear = Ear()
    with start(folder, reward={"retries": 1, "backoff_s": 0.0}, initial_batch_size=6) as opt:
        result = loop.run(opt, reward(flaky), hooks=ear)
        frame = opt.queries()
        engine = opt.engine
        assert opt.store.get(5).raw == '{"said": "one"}'
        assert opt.store.get(5).sem == 0.5
    assert result.complete
    assert frame["state"].tolist()[:6] == ["answered", "failed", "answered", "failed", "answered", "answered"]
    assert "out of plates" in frame["error"][1]
    assert "NaN" in frame["error"][3] or "nan" in frame["error"][3]
    assert isinstance(engine, FakeEngine)
    assert len(engine.seen[0].Y) == 4
    assert torch.isfinite(engine.seen[0].Y).all()
    assert ("answer", 2, None) in ear.heard
    assert result.rounds[0]["states"]["failed"] == 2


def test_a_black_box_that_breaks_the_rules_stops_the_run_without_losing_answers(folder: Path) -> None:
    seen: list[int] = []

    def wrong(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        seen.append(1)
        return [truth(images[0])] * (1 if len(seen) < 4 else 2)

    with start(folder) as opt:
        result = loop.run(opt, FunctionReward("toy", "points", 1, wrong))
        assert result.stop is not None
        assert result.stop.reason == "stop_after"
        assert "expected 1 values, got 2" in result.stop.message
        assert len(seen) == 3 + 5
    with again(folder) as opt:
        assert opt.store.counts()["answered"] == 3
        assert loop.ask_again(opt) == 5
        assert loop.run(opt, reward()).complete
        assert opt.store.counts()["answered"] == len(opt.queries()) == 11


def test_ctrl_c_keeps_what_was_answered(folder: Path) -> None:
    class Impatient(Hook):
        def on_answer(self, id: int, value: float | None) -> None:
            if id == 3:
                raise KeyboardInterrupt

    with start(folder) as opt, pytest.raises(KeyboardInterrupt):
        loop.run(opt, reward(), hooks=Impatient())
    with again(folder) as opt:
        assert opt.store.counts()["answered"] == 3
        assert loop.run(opt, reward()).complete


def test_some_may_have_been_answered_in_the_meantime(folder: Path) -> None:
    with start(folder) as opt:
        for query in opt.ask(5)[:2]:
            opt.tell(query.id, 1.5, source=Source("reward", "toy"))
        opt.fail(3, "broken")
        opt.abandon(4, "unsafe")
        assert loop.run(opt, reward()).complete
        frame = opt.queries()
    assert frame["value"].tolist()[:2] == [1.5, 1.5]
    assert frame["state"].tolist()[:5] == ["answered", "answered", "failed", "abandoned", "answered"]


def test_further_numbers_are_measured_into_the_summary(folder: Path) -> None:
    def fidelity(opt: Optimizer, round_: int) -> dict[str, float]:
        return {"fidelity": np.float32(0.5) * (1 + (opt.queries()["round"] == round_).sum() * 0)}

    with start(folder, rounds=0) as opt:
        assert loop.run(opt, reward(), measure=fidelity).rounds[0]["fidelity"] == 0.5


def test_adapting_follows_every_score_so_far(folder: Path) -> None:
    def worse_and_worse(image: Image.Image) -> float:
        return truth(image) if len(seen) < 5 else -5.0 - 0.1 * len(seen)

    seen: list[Image.Image] = []

    def answer(image: Image.Image) -> float:
        value = worse_and_worse(image)
        seen.append(image)
        return value

    with start(folder, acquisition={"beta": 0.5, "adapt": True}, rounds=3) as opt:
        loop.run(opt, reward(answer))
        records = opt.store.rounds()
    assert [(r.alpha, r.beta) for r in records[:2]] == [(None, None), (0.2, 0.5)]
    assert (records[2].alpha, records[2].beta) == (pytest.approx(0.3), 0.25)
    assert "over-optimisation" in records[2].notes[0]
    alpha, beta = 0.2, 0.5
    scores = [r.score for r in records if r.score is not None]
    assert len(scores) == 2
    for score in scores:
        alpha, beta, _ = adjust(alpha, beta, score, alpha_floor=0.2, beta_ceiling=0.5)
    assert (records[3].alpha, records[3].beta) == (alpha, beta)


# ---- money


def logged(folder: Path) -> list[str]:
    log = folder.with_name("calls")
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(("limit", "reference"), [(3, 0), (5, 0), (8, 3), (100, 12)])
def test_reference_samples_come_last_and_count_in_the_budget(folder: Path, limit: int, reference: int) -> None:
    with start(folder, rounds=0, reference_samples=12, reward={"max_queries": limit}) as opt:
        result = loop.run(opt, LoggedReward(folder.with_name("calls")))
        assert result.complete == (limit == 100)
        assert len(logged(folder)) == min(limit, 5 + 12) == opt.store.spent().queries
        assert opt.store.counts(REFERENCE)["answered"] == reference
        assert opt.queries()["id"].tolist() == [1, 2, 3, 4, 5]
        frame = opt.queries(kind="reference")
        answered = frame[frame["state"] == "answered"]
        assert answered["id"].tolist() == [-i - 1 for i in range(reference)]
        assert answered["value"].tolist() == [truth(opt.image(i)) for i in answered["id"]], (
            "as they come, without noise"
        )
    assert (folder / "reference" / "summary.json").exists() == (limit == 100)


def test_reference_samples_are_kept_one_by_one_and_are_those_of_an_uninterrupted_run(folder: Path) -> None:
    class Impatient(LoggedReward):
        def __call__(self, images: Any, prompts: Any) -> list[float]:
            if len(logged(folder)) == 5 + 4:
                raise RewardError("the lab is closed")
            return super().__call__(images, prompts)

    config = {"rounds": 0, "reference_samples": 7}
    with start(folder, **config) as opt, pytest.raises(RewardError):
        loop.run(opt, Impatient(folder.with_name("calls")))
    with again(folder) as opt:
        assert opt.store.counts(REFERENCE)["answered"] == 4
        assert loop.run(opt, LoggedReward(folder.with_name("calls"))).complete
        found = opt.queries(kind="reference")
    assert len(logged(folder)) == 5 + 7
    with start(folder.with_name("whole"), **config) as opt:
        loop.run(opt, reward())
        assert opt.queries(kind="reference").equals(found)


def test_reference_samples_teach_nothing_and_more_of_them_can_be_asked_for(folder: Path) -> None:
    with start(folder, reference_samples=4) as opt:
        loop.run(opt, reward())
        assert [len(data.Y) for data in opt.engine.seen] == [5, 8]  # type: ignore[attr-defined]
    with again(folder, reference_samples=6) as opt:
        assert loop.run(opt, reward()).complete
        assert opt.store.counts(REFERENCE)["answered"] == 6
        assert [r.kind for r in opt.store.rounds()] == ["plain", "tilted", "tilted"]
        assert opt.pending() == []


def test_a_summary_of_reference_samples_that_a_kill_prevented_is_written_when_the_run_goes_on(folder: Path) -> None:
    with start(folder, rounds=0, reference_samples=4) as opt:
        loop.run(opt, LoggedReward(folder.with_name("calls")))
    (folder / "reference" / "summary.json").rename(folder / "whole.json")
    with again(folder) as opt:
        assert loop.run(opt, LoggedReward(folder.with_name("calls"))).complete
    made, whole = (
        json.loads(path.read_text()) for path in (folder / "reference" / "summary.json", folder / "whole.json")
    )
    passing = dict.fromkeys(("seconds", "answer_seconds"))  # looking again takes time
    assert made | passing == whole | passing
    assert len(logged(folder)) == 5 + 4


def test_reference_samples_of_version_0_1_are_not_paid_for_again(folder: Path) -> None:
    with start(folder, rounds=0, reference_samples=4) as opt:
        (folder / "reference").mkdir()
        (folder / "reference" / "values.json").write_text('{"values": [1.0, 2.0, 3.0, 4.0]}')
        assert loop.run(opt, LoggedReward(folder.with_name("calls"))).complete
    assert len(logged(folder)) == 5


@pytest.mark.parametrize("pairwise", [False, True])
def test_calls_of_unknown_fate_count_as_spent_and_are_asked_again_within_the_budget(
    folder: Path, pairwise: bool
) -> None:
    config: dict[str, Any] = {"rounds": 0, "initial_batch_size": 6, "reward": {"max_queries": 5}}
    config |= {"model": {"name": "pairwise"}} if pairwise else {}
    with start(folder, **config) as opt:
        opt.ask(6)
        if pairwise:
            opt.store.comparisons.hand_out([(a.id, b.id) for a, b in opt.pairs()[:2]])  # and the process dies
        else:
            opt.store.hand_out([1, 2])
    with again(folder) as opt:
        result = loop.run(opt, LoggedReward(folder.with_name("calls")))
        assert result.stop is not None
        assert result.stop.reason == "max_queries"
        assert opt.store.spent().queries == 5
        assert len(logged(folder)) == (3 * 2 if pairwise else 3)
        if not pairwise:
            assert opt.queries()["state"].tolist() == ["answered"] * 3 + ["asked"] * 3


def test_calls_of_unknown_fate_may_be_left_to_retry(folder: Path) -> None:
    config = {"rounds": 0, "reward": {"on_unknown": "leave"}}
    with start(folder, **config) as opt:
        opt.ask(5)
        opt.store.hand_out([1, 2])
    with again(folder) as opt:
        assert loop.run(opt, LoggedReward(folder.with_name("calls"))).complete
        assert opt.queries()["state"].tolist() == ["failed"] * 2 + ["answered"] * 3
        assert "tiltopt retry" in opt.queries()["error"][0]
        assert loop.ask_again(opt) == 2
        result = loop.run(opt, LoggedReward(folder.with_name("calls")))
        assert result.rounds[0]["states"]["answered"] == 5, "its summary was written again"
    assert len(logged(folder)) == len(set(logged(folder))) == 5


def test_pairs_of_an_earlier_round_whose_fate_is_unknown_are_judged_by_retry(folder: Path) -> None:
    """As a kill leaves them: all four pairs of round 0 were handed out; the rounds after it went on without them."""
    config = {"initial_batch_size": 4, "rounds": 2, "batch_size": 2, "reward": {"on_unknown": "leave"}}
    with start(folder, model={"name": "pairwise"}, **config) as opt:
        opt.ask(4)
        pairs = [(a.id, b.id) for a, b in opt.pairs()]
        opt.store.comparisons.hand_out(pairs)
    with again(folder) as opt:
        assert loop.run(opt, LoggedReward(folder.with_name("calls"))).complete
        assert opt.queries()["state"].tolist() == ["failed"] * 4 + ["answered"] * 4
        assert loop.ask_again(opt) == len(pairs)
        assert loop.run(opt, LoggedReward(folder.with_name("calls"))).complete
        assert set(opt.queries()["state"]) == {"answered"}


def test_the_book_of_seconds_holds_what_the_run_has_worked(folder: Path) -> None:
    def slow(image: Image.Image) -> float:
        time.sleep(0.05)
        return truth(image)

    started = time.monotonic()
    with start(folder, rounds=0) as opt:
        loop.run(opt, reward(slow))
        assert 0.25 <= opt.store.spent().seconds <= time.monotonic() - started


@pytest.mark.parametrize("error", [ConnectionError("no route to the lab"), TypeError("score() takes no image")])
def test_a_dead_black_box_is_left_alone_and_mended_by_retry(folder: Path, error: Exception) -> None:
    calls: list[int] = []

    def dead(image: Image.Image) -> float:
        calls.append(1)
        raise error

    with start(folder, initial_batch_size=40, reward={"backoff_s": 0.0}) as opt:
        result = loop.run(opt, reward(dead))
        assert len(calls) == 5
        assert not result.complete
        assert str(error) in result.trouble
        assert "test_loop.py" in result.trouble
        failed = opt.store.counts()["failed"]
        assert failed == (1 if isinstance(error, ConnectionError) else 5)
        assert "in dead" in opt.store.get(1).raw
        assert len(opt.store.data().failed) == 0, "it says nothing about the designs"
        assert loop.ask_again(opt) == failed
        assert loop.run(opt, reward()).complete
        assert opt.store.counts()["answered"] == 46


def test_a_run_without_one_answer_is_in_trouble(folder: Path) -> None:
    with start(folder, rounds=0) as opt:
        result = loop.run(opt, reward(lambda image: math.nan))
        assert result.complete
        assert "nothing was answered: 5 queries failed" in result.trouble
        assert opt.store.spent().queries == opt.store.spent().calls == 5
        assert opt.store.data().failed.shape == (5, 4), "what cannot be measured teaches where not to go"
        assert loop.ask_again(opt) == 0, "it was answered"


def test_sigterm_loses_nothing_that_is_in_flight(folder: Path) -> None:
    out = threading.Barrier(8)

    def slow(image: Image.Image) -> float:
        if out.wait(10) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return truth(image)

    with start(folder, initial_batch_size=24, reward={"concurrency": 8}) as opt, pytest.raises(KeyboardInterrupt):
        loop.run(opt, reward(slow))
    with again(folder) as opt:
        assert opt.store.counts()["answered"] == 8
        assert opt.store.unknown() == []


def test_an_image_that_is_gone_fails_its_query_and_no_other(folder: Path) -> None:
    with start(folder, rounds=0) as opt:
        opt.ask(5)
        (folder / "images" / "000002.png").unlink()
        assert loop.run(opt, reward()).complete
        assert opt.queries()["state"].tolist() == ["answered", "failed", "answered", "answered", "answered"]


# ---- others at work


def test_what_another_worker_holds_is_left_to_it(folder: Path) -> None:
    seen: list[float] = []

    def slow(image: Image.Image) -> float:
        seen.append(truth(image))
        return truth(image)

    with start(folder, rounds=0) as opt:
        opt.ask(5)
        held = opt.claim("ann", 2)

        def ann() -> None:
            for query in held:
                opt.tell(query.id, truth(query.image), source=Source("reward", "toy"))

        timer = threading.Timer(1.0, ann)
        timer.start()
        assert loop.run(opt, reward(slow)).complete
        timer.join()
        assert len(seen) == 3
        assert not {truth(query.image) for query in held} & set(seen)


def test_two_runs_of_one_database_pay_for_each_query_once(tmp_path: Path) -> None:
    url, log = f"sqlite:///{tmp_path / 'team.sqlite'}", tmp_path / "calls"
    folder = tmp_path / "run"
    Optimizer.create(folder, CONFIG | {"reward": {"concurrency": 2}}, store_url=url, engine=FakeEngine()).close()
    ends: list[Any] = []

    class Slow(LoggedReward):
        def __call__(self, images: Any, prompts: Any) -> list[float]:
            time.sleep(0.02)
            return super().__call__(images, prompts)

    def work() -> None:
        try:
            with Optimizer.open(folder, store_url=url, engine=FakeEngine()) as opt:
                ends.append(loop.run(opt, Slow(log)).complete)
        except BaseException as error:
            ends.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == [True, True]
    calls = log.read_text().splitlines()
    assert len(calls) == len(set(calls)) == 11


def test_a_signal_that_the_interpreter_swallows_while_a_round_is_drawn_still_ends_the_run(folder: Path) -> None:
    class Deaf(Hook):
        def on_progress(self, kind: str, done: int, total: int) -> None:
            if kind == "denoise":
                with contextlib.suppress(KeyboardInterrupt):  # as a finalizer or a callback of the collector does
                    os.kill(os.getpid(), signal.SIGTERM)

    with start(folder, rounds=3) as opt, pytest.raises(KeyboardInterrupt):
        loop.run(opt, reward(), hooks=Deaf())
    with again(folder) as opt:
        assert len(opt.store.rounds()) == 1


@pytest.mark.parametrize("model", ["linear", "pairwise"])
def test_answers_that_wait_for_the_database_are_neither_asked_again_nor_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """The last answers of a round come while the database refuses, for longer than the store tries by itself."""
    writing, refuses_until, shown = Database.writing, [0.0], []

    @contextmanager
    def refusing(database: Database) -> Iterator[Any]:
        if time.monotonic() < refuses_until[0]:
            raise UnavailableError("locked", passing=True)
        with writing(database) as c:
            yield c

    def function(image: Image.Image) -> float:
        shown.append(image.tobytes())
        if len(shown) == last:
            refuses_until[0] = time.monotonic() + 0.5
        return truth(image)

    monkeypatch.setattr(Database, "writing", refusing)
    last = 4 if model == "linear" else 2  # two pictures are scored for the one comparison of two queries
    config = {"rounds": 0, "initial_batch_size": last, "model": {"name": model}, "reward": {"max_seconds": 20.0}}
    with start(folder, **config) as opt:
        opt.store.database.patience_s = 0.05
        assert loop.run(opt, reward(function)).complete
        assert opt.store.counts()["answered"] == last
    assert len(shown) == last
    assert not (folder / "spool.jsonl").exists()


# ---- what is said beside a value


class Odd:
    """Cannot be read in any way."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    __repr__ = __str__ = lambda self: 1 / 0  # type: ignore[assignment,return-value]


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


SAID: dict[str, Any] = {
    "picture": {"picture": Image.new("RGB", (1, 1))},
    "bytes": b"bytes",
    "set": {1, 2},
    "circle": circle(),
    "long": 10**5000,
    "odd": Odd(),
    "half": {"half": "\ud83d\0"},
}


@pytest.mark.parametrize("raw", SAID.values(), ids=SAID)
def test_nothing_that_is_said_beside_a_value_costs_the_value(folder: Path, raw: Any) -> None:
    with start(folder, rounds=0, answer_noise=0.0) as opt:
        assert loop.run(opt, reward(lambda image: Answer(truth(image), raw=raw))).complete
        assert opt.queries()["value"].tolist() == [truth(opt.image(i)) for i in range(1, 6)]
        assert all(row.raw for row in opt.store.in_state("answered"))


def test_nor_does_a_reason_that_is_no_text_while_the_database_is_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(folder, rounds=0) as opt:
        queries = opt.ask(5)
        refused = []

        def refuse(number: int, *args: Any, **kwargs: Any) -> None:
            refused.append(number)
            raise UnavailableError("away", passing=False)

        monkeypatch.setattr(opt.store, "_move", refuse)
        reason = Answer(math.nan, error=ValueError("broken"))  # type: ignore[arg-type]
        with pytest.raises(UnavailableError):
            loop.run(opt, reward(lambda image: reason), policy=CallPolicy(grace_s=0.0))
        assert len(refused) >= len(queries)
        monkeypatch.undo()
    with again(folder) as opt:
        assert [row.error for row in opt.store.in_state("failed")] == ["broken"] * 5


@pytest.mark.parametrize("what", ["on_answer", "on_progress"])
def test_a_listener_that_breaks_ends_the_run_and_loses_nothing_that_is_in_flight(folder: Path, what: str) -> None:
    all_asked = threading.Barrier(5)

    def together(image: Image.Image) -> float:
        all_asked.wait(10)
        return truth(image)

    class Broken(Hook):
        pass

    def broken(self: Hook, *told: Any) -> None:
        if what == "on_answer" or told[0] == "black box":
            raise OSError("the terminal is gone")

    setattr(Broken, what, broken)
    with start(folder, rounds=0) as opt:
        with pytest.raises(OSError, match="the terminal is gone"):
            loop.run(opt, reward(together), hooks=Broken(), policy=CallPolicy(concurrency=5))
        assert opt.store.counts()["answered"] == 5
