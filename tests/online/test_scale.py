"""What a round costs beside drawing and fitting must not grow with what is stored: rows and statements are counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import event

from tests.contracts.stores import new_queries
from tests.fakes.engine import CONFIG, FakeEngine
from tiltopt.designs import IMAGES
from tiltopt.errors import StoreError
from tiltopt.online import rounds
from tiltopt.online.engine.price import next_price
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import RoundRecord
from tiltopt.online.settings.run import Settings
from tiltopt.online.store import features, files
from tiltopt.online.store.database import Database
from tiltopt.online.store.features import unpack
from tiltopt.online.store.store import Store

ROUND = 4


def made_store(folder: Path, number_of_rounds: int) -> Store:
    """Rounds of `ROUND` answered queries, each with its score."""
    store = Store.create(Database(folder / "queries.sqlite", create=True), "run", {})
    for round_ in range(number_of_rounds):
        first = 1 + ROUND * round_
        answers: Any = {first + i: (float(first + i), None) for i in range(ROUND)}
        store.add_round(RoundRecord(round_, "tilted", ROUND), new_queries(first, ROUND), "toy", answers)
    return store


class Unpacked:
    """How many stored vectors were read."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, vectors: list[bytes]) -> np.ndarray:
        self.count += len(vectors)
        return unpack(vectors)


def test_a_stored_vector_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Unpacked()
    monkeypatch.setattr(features, "unpack", seen)
    monkeypatch.setattr(features, "_PART", 3)  # several parts, the last one not full
    store = made_store(tmp_path, 5)
    seen.count = 0  # each was looked at when it was written
    before = store.data()
    assert seen.count == 5 * ROUND
    store.add_round(RoundRecord(5, "tilted", 3), new_queries(21, 3), "toy")
    seen.count = 0
    store.answer(22, 7.0)
    store.fail(21, "plate broken")
    after = store.data()
    assert seen.count == 3
    fresh = Store.open(store.database, "run").data()
    assert torch.equal(after.X, fresh.X)
    assert torch.equal(after.X[:-1], before.X)
    assert after.X[:, 0].tolist() == [*range(1, 21), 22]
    assert after.Y.flatten().tolist() == [*range(1, 21), 7]
    assert after.pending[:, 0].tolist() == [23]


def test_growing_does_not_change_what_was_handed_out(tmp_path: Path) -> None:
    store = made_store(tmp_path, 1)
    handed = [store.data().X]
    for round_ in range(1, 12):
        answers: Any = {1 + ROUND * round_ + i: (0.0, None) for i in range(ROUND)}
        new = new_queries(1 + ROUND * round_, ROUND)
        store.add_round(RoundRecord(round_, "tilted", ROUND), new, "toy", answers)
        handed.append(store.data().X)
    for i, X in enumerate(handed):
        assert X[:, 0].tolist() == list(range(1, ROUND * (i + 1) + 1))


def test_vectors_of_different_lengths_are_refused(tmp_path: Path) -> None:
    store = made_store(tmp_path, 1)
    store.data()
    wrong = [type(q)(**(vars(q) | {"vector": q.vector[:8]})) for q in new_queries(5, 2)]
    with pytest.raises(StoreError, match="query 5 has 2 features, expected 3"):
        store.add_round(RoundRecord(1, "tilted", 2), wrong, "toy")
    assert store.data().X.shape == (4, 3), "the run goes on"


class Statements:
    """SQL statements sent by an optimizer's database."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.count = 0
        event.listen(optimizer.store.database._engine, "before_cursor_execute", self._tick)

    def _tick(self, *_: Any) -> None:
        self.count += 1


def test_the_statements_of_a_round_do_not_depend_on_how_many_there_were(tmp_path: Path) -> None:
    counts = []
    with Optimizer.create(tmp_path / "run", CONFIG | {"initial_batch_size": 2}, engine=FakeEngine()) as opt:
        statements = Statements(opt)
        for round_ in range(12):
            before = statements.count
            for query in opt.ask(2):
                opt.tell(query.id, float(query.id % 5))
            if round_ in (3, 11):
                counts.append(statements.count - before)
    assert counts[0] == counts[1]


def test_the_price_looks_at_each_score_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    adjust = rounds.adjust

    def counted(alpha: float, beta: float, report: Any, **options: Any) -> Any:
        looked_at.append(report)
        return adjust(alpha, beta, report, **options)

    monkeypatch.setattr(rounds, "adjust", counted)
    hopeful = {"n": 16, "nll": 1.0, "coverage90": 0.5, "kendall_tau": 0.1, "mean_gap": 1.0, "mean_gap_se": 0.1}
    sober = hopeful | {"mean_gap": 0.0}
    settings = Settings.from_config({"sampler": {"alpha": 0.1}, "acquisition": {"adapt": True, "beta": 2.0}})
    plan = rounds.plan_of(settings, [hopeful, hopeful, sober] * 10)
    assert len(looked_at) == 30
    assert plan.alpha == pytest.approx(0.1 * (1.5 * 1.5 * 0.9) ** 10)
    assert plan.beta == pytest.approx(2.0 * (0.5 * 0.5 * 1.2) ** 10)
    spending = Settings.from_config({"sampler": {"budget_nats": 40.0}, "acquisition": {"adapt": True, "beta": 2.0}})
    last = RoundRecord(3, "tilted", 16, alpha=0.2, nats=30.0)
    plan = rounds.plan_of(spending, [hopeful], [RoundRecord(0, "plain", 16), last])
    assert plan.budget == pytest.approx(40.0 / 1.5)
    assert plan.alpha == pytest.approx(next_price(0.2, 30.0, 40.0 / 1.5))
    assert "budget 40 -> 26.7 nats" in plan.notes[0]


def test_images_of_a_round_wait_for_the_disk_once_each_and_for_their_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fsync = os.fsync

    def counted(handle: int) -> None:
        calls.append(handle)
        fsync(handle)

    monkeypatch.setattr("tiltopt.online.store.files.os.fsync", counted)
    images = {tmp_path / "images" / f"{i}.png": Image.new("L", (4, 4), 10 * i) for i in range(20)}
    files.write_designs(images, IMAGES)
    assert len(calls) == 20 + 1
    for path, image in images.items():
        with Image.open(path) as written:
            assert written.tobytes() == image.tobytes()
    assert len(list((tmp_path / "images").iterdir())) == 20


def test_an_image_that_cannot_be_written_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    files.write_image(first, Image.new("L", (4, 4), 1))
    (tmp_path / "2.png.part").mkdir()  # where the second would be written
    with pytest.raises(StoreError, match=r"2\.png"):
        files.write_designs({first: Image.new("L", (4, 4), 9), second: Image.new("L", (4, 4), 9)}, IMAGES)
    with Image.open(first) as kept:
        assert kept.getpixel((0, 0)) == 1
