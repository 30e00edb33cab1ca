"""Ask and tell: what is drawn, what may be told, what is refused, and what survives."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fakes.engine import CONFIG, FakeEngine, features_of, points, to_image, truth
from tiltopt.errors import ConfigError, RewardError, StoreError, SurrogateError
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import NewQuery, Query, RoundRecord
from tiltopt.online.seeds import generator, query_seed
from tiltopt.online.settings.prompts import prompt_of
from tiltopt.online.store import address
from tiltopt.online.store.database import Database
from tiltopt.online.store.store import Store
from tiltopt.surrogates import io


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def opt(folder: Path) -> Any:
    with Optimizer.create(folder, CONFIG, engine=FakeEngine()) as opt:
        yield opt


def answer_all(opt: Optimizer, queries: list[Query]) -> None:
    for query in queries:
        opt.tell(query.id, truth(query.image))


# ---- asking


def test_the_first_queries_are_plain_samples_named_by_number_prompt_and_seed(opt: Optimizer) -> None:
    got = opt.ask(3) + opt.ask(2)
    settings = opt.settings
    assert [q.id for q in got] == [1, 2, 3, 4, 5]
    assert [q.round for q in got] == [0, 0, 0, 1, 1]
    assert [q.prompt for q in got] == [prompt_of(settings, n) for n in range(1, 6)]
    assert [q.seed for q in got] == [query_seed(3, *place) for place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    for q in got:
        assert q.predicted is None
        assert q.image.tobytes() == to_image(points(q.seed, 1)[0]).tobytes()
    assert [r.kind for r in opt.store.rounds()] == ["plain", "plain"]


def test_every_image_lies_in_the_run_folder_without_prompt_text_in_its_name(opt: Optimizer, folder: Path) -> None:
    got = opt.ask(3)
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["000001.png", "000002.png", "000003.png"]
    for q in got:
        with Image.open(folder / "images" / f"{q.id:06d}.png") as image:
            assert image.tobytes() == q.image.tobytes()


def test_after_the_initial_batch_queries_follow_a_surrogate_of_all_answers(opt: Optimizer, folder: Path) -> None:
    first = opt.ask(5)
    answer_all(opt, first)
    second = opt.ask(3)
    engine = opt.engine
    assert isinstance(engine, FakeEngine)
    (data,) = engine.seen
    assert torch.equal(data.X, torch.stack([features_of(q.image) for q in first]).double())
    assert data.Y.flatten().tolist() == [truth(q.image) for q in first]
    model = io.load(folder / "round_001", feature_id="toy")
    for q in second:
        posterior = model.posterior(features_of(q.image).double()[None])
        assert q.predicted == posterior.mean.item()
        assert q.predicted_sd == posterior.variance.sqrt().item()
    record = opt.store.rounds()[1]
    assert (record.kind, record.alpha, record.beta) == ("tilted", 0.2, 0.5)
    frame = opt.queries()
    assert frame["predicted"].tolist()[5:] == [q.predicted for q in second]


def test_asking_while_answers_are_outstanding_knows_what_is_pending(opt: Optimizer) -> None:
    first = opt.ask(6)
    answer_all(opt, first[:3])
    opt.fail(4, "broken")
    opt.abandon(5, "unsafe")
    opt.ask(2)
    engine = opt.engine
    assert isinstance(engine, FakeEngine)
    (data,) = engine.seen
    assert len(data.Y) == 3, "failed and abandoned queries teach nothing"
    assert torch.equal(data.pending, features_of(first[5].image).double()[None])
    images = [q.image.tobytes() for q in opt.pending()]
    assert len(images) == 3
    assert images[0] == first[5].image.tobytes()


def test_a_measured_standard_error_reaches_the_surrogate(opt: Optimizer) -> None:
    for i, q in enumerate(opt.ask(5)):
        opt.tell(q.id, truth(q.image), sem=0.1 * i if i else None)
    opt.ask(1)
    engine = opt.engine
    assert isinstance(engine, FakeEngine)
    assert engine.seen[0].sem is not None
    assert engine.seen[0].sem.flatten().tolist() == [0.0, 0.1, 0.2, 0.1 * 3, 0.4]


@pytest.mark.parametrize("values", [[], [1.0], [2.5, 2.5, 2.5]])
def test_without_two_different_answers_plain_samples_are_drawn_with_a_note(opt: Optimizer, values: list[float]) -> None:
    first = opt.ask(5)
    for q, value in zip(first, values, strict=False):
        opt.tell(q.id, value)
    with pytest.warns(UserWarning, match="2 different answers"):
        second = opt.ask(2)
    assert [q.predicted for q in second] == [None, None]
    record = opt.store.rounds()[1]
    assert record.kind == "plain"
    assert "drawn without a surrogate" in record.notes[0]


@pytest.mark.parametrize("error", [SurrogateError("no option `kernl`"), TypeError("fit() got kernl")])
def test_a_fit_that_fails_is_told_and_draws_no_plain_samples(folder: Path, error: Exception) -> None:
    class Refusing(FakeEngine):
        def fit(self, data: Any, round_: int) -> Any:
            raise error

    with Optimizer.create(folder, CONFIG, engine=Refusing()) as opt:
        answer_all(opt, opt.ask(5))
        with pytest.raises(type(error), match="kernl"):
            opt.ask(1)
        assert len(opt.store.rounds()) == 1
        assert opt.store.counts()["answered"] == 5


def test_the_previous_surrogate_is_scored_on_the_new_answers_before_refitting(opt: Optimizer, folder: Path) -> None:
    answer_all(opt, opt.ask(5))
    second = opt.ask(4)
    answer_all(opt, second)
    opt.ask(1)
    score = opt.store.rounds()[2].score
    assert score is not None
    assert score["round"] == 1
    beta = CONFIG["acquisition"]["beta"]
    gaps = [q.predicted + beta * q.predicted_sd - truth(q.image) for q in second]
    assert score["optimism_gap"] == pytest.approx(np.mean(gaps), abs=1e-12)
    assert opt.store.rounds()[1].score is None


def test_a_damaged_surrogate_is_passed_over_named_and_kept(opt: Optimizer, folder: Path) -> None:
    answer_all(opt, opt.ask(5))
    answer_all(opt, opt.ask(2))
    answer_all(opt, opt.ask(2))
    damaged = folder / "round_002" / "surrogate.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    opt.ask(2)
    record = opt.store.rounds()[3]
    assert record.kind == "tilted"
    assert record.score is not None
    assert record.score["round"] == 1
    assert "surrogate of round 2 cannot be read" in record.notes[0]
    assert damaged.stat().st_size == 100


def test_the_same_answers_give_the_same_queries_to_the_last_bit(tmp_path: Path) -> None:
    def play(name: str, *, reopen: bool) -> list[Any]:
        opt = Optimizer.create(tmp_path / name, CONFIG, engine=FakeEngine())
        for n in (5, 3, 3):
            answer_all(opt, opt.ask(n))
            if reopen:
                opt.close()
                opt = Optimizer.open(tmp_path / name, engine=FakeEngine())
        frame = opt.queries()
        opt.close()
        return [*frame["value"], *frame["predicted"][5:], *frame["seed"]]

    assert play("one", reopen=False) == play("two", reopen=True)


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", None, True])
def test_an_impossible_number_of_queries_is_refused(opt: Optimizer, n: Any) -> None:
    with pytest.raises(ConfigError, match="integer >= 1"):
        opt.ask(n)
    assert opt.store.next() == (0, 1)


# ---- telling


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "1.0", None, True, [1.0], np.ones(2), np.ones(1), torch.ones(1), torch.tensor(1.0)],
    ids=str,
)
def test_what_is_not_a_finite_number_is_refused_and_nothing_is_lost(opt: Optimizer, value: Any) -> None:
    opt.ask(2)
    opt.tell(1, 0.5)
    with pytest.raises(RewardError, match="expected `value`"):
        opt.tell(2, value)
    assert opt.queries()["state"].tolist() == ["answered", "asked"]
    opt.tell(2, 0.25)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.float64(1), np.int64(1)])
def test_any_real_number_is_an_answer(opt: Optimizer, value: Any) -> None:
    opt.ask(1)
    opt.tell(1, value)
    assert opt.queries()["value"].tolist() == [1.0]


@pytest.mark.parametrize("value", [10**400, -(10**400), Fraction(10**400, 3)], ids=["big", "small", "fraction"])
def test_a_number_beyond_all_floats_is_refused(opt: Optimizer, value: Any) -> None:
    opt.ask(1)
    with pytest.raises(RewardError, match="expected `value` to be a finite number"):
        opt.tell(1, value)


@pytest.mark.parametrize("n", [10_001, 10**9, 10**40])
def test_too_many_queries_are_refused(opt: Optimizer, n: int) -> None:
    with pytest.raises(ConfigError, match="at most 10000 queries"):
        opt.ask(n)


@pytest.mark.parametrize("sem", [math.nan, math.inf, -0.1, "0.1", np.ones(2)], ids=str)
def test_an_impossible_standard_error_is_refused(opt: Optimizer, sem: Any) -> None:
    opt.ask(1)
    with pytest.raises(RewardError, match="`sem`"):
        opt.tell(1, 0.5, sem=sem)
    assert opt.queries()["state"].tolist() == ["asked"]


@pytest.mark.parametrize("id", [0, 3, -1, 2**70, 1.0, "1", None, True])
def test_an_unknown_id_is_refused(opt: Optimizer, id: Any) -> None:
    opt.ask(2)
    for action in (lambda: opt.tell(id, 0.5), lambda: opt.fail(id, "x"), lambda: opt.abandon(id, "x")):
        with pytest.raises(StoreError, match="unknown query"):
            action()


def test_answers_come_in_any_order_and_once(opt: Optimizer) -> None:
    opt.ask(3)
    opt.tell(3, 3.0)
    opt.tell(1, 1.0)
    with pytest.raises(StoreError, match=r"query 3 is answered \(its answer is 3.0\) and cannot become answered"):
        opt.tell(3, 4.0)
    assert opt.queries()["value"].tolist()[::2] == [1.0, 3.0]
    opt.fail(2, "plate broken")
    with pytest.raises(StoreError, match=r"query 2 is failed \(plate broken\).*retry it"):
        opt.tell(2, 1.0)
    again = opt.retry(2)
    assert (again.id, opt.store.get(2).attempt) == (2, 2)
    opt.tell(2, 2.0)
    opt.undo(2)
    opt.abandon(2, "unsafe")
    with pytest.raises(StoreError, match="query 2 is abandoned"):
        opt.retry(2)


# ---- folders


def test_a_second_run_in_one_folder_is_refused(opt: Optimizer, folder: Path) -> None:
    opt.ask(1)
    opt.close()
    with pytest.raises(StoreError, match="already holds this run"):
        Optimizer.create(folder, CONFIG, engine=FakeEngine())
    assert Optimizer.exists(folder)
    assert not Optimizer.exists(folder / "nothing")
    with pytest.raises(StoreError, match="no query store"):
        Optimizer.open(folder / "nothing")


def test_impossible_settings_are_refused_before_anything_is_made(folder: Path) -> None:
    for config in ({"rounds": -1}, {"nonsense": 1}, {"prompts": "no such list"}):
        with pytest.raises(ConfigError):
            Optimizer.create(folder, config, engine=FakeEngine())
    assert not folder.exists()


def test_a_changed_config_is_refused_by_key_until_it_is_allowed(opt: Optimizer, folder: Path) -> None:
    opt.close()
    changed = CONFIG | {"rounds": 9, "acquisition": {"beta": 2.0}}
    for allow in (None, False, [], ["rounds"]):
        with pytest.raises(ConfigError, match=r"acquisition.beta: 0.5 -> 2.0(.|\n)*--allow-change") as caught:
            Optimizer.open(folder, config=changed, allow_change=allow, engine=FakeEngine())
        assert ("rounds: 2 -> 9" in str(caught.value)) == (allow != ["rounds"])
    with Optimizer.open(folder, config=changed, allow_change=True, engine=FakeEngine()) as again:
        assert again.settings.rounds == 9
        assert again.store.changes() == ["acquisition.beta: 0.5 -> 2.0", "rounds: 2 -> 9"]
    assert json.loads((folder / "config.json").read_text())["rounds"] == 9
    with Optimizer.open(folder, config=changed, engine=FakeEngine()) as again:
        assert again.settings.acquisition.beta == 2.0


def test_an_edited_config_file_counts_as_a_change(opt: Optimizer, folder: Path) -> None:
    opt.close()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"seed": 4}))
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        Optimizer.open(folder)
    for torn in ("{", "[1]"):
        path.write_text(torn)
        with pytest.raises(StoreError, match=r"config\.json is not readable JSON"):
            Optimizer.open(folder)
    path.unlink()
    Optimizer.open(folder).close()
    assert json.loads(path.read_text()) == config, "it is written again from the store"


def test_a_run_may_be_moved(opt: Optimizer, folder: Path) -> None:
    opt.ask(1)
    opt.close()
    moved = folder.with_name("elsewhere")
    shutil.move(folder, moved)
    with Optimizer.open(moved, engine=FakeEngine()) as again:
        assert again.settings.run_dir == str(moved)
        assert len(again.pending()) == 1


def test_features_of_another_map_are_refused_before_drawing(opt: Optimizer, folder: Path) -> None:
    opt.ask(1)
    opt.close()
    engine = FakeEngine()
    engine.feature_id = "another"
    with (
        Optimizer.open(folder, engine=engine) as again,
        pytest.raises(StoreError, match="'toy', but the engine's are 'another'"),
    ):
        again.ask(1)


def test_answers_and_tables_need_no_models(opt: Optimizer, folder: Path) -> None:
    opt.ask(2)
    opt.close()
    code = (
        "import sys\n"
        "from tiltopt.online.optimizer import Optimizer\n"
        "with Optimizer.open(sys.argv[1]) as opt:\n"
        "    opt.tell(1, 0.5); print(opt.queries()['value'][0])\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('diffusers', 'transformers')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.5", "[]"]


def test_the_second_writer_is_refused_and_a_reader_is_not(opt: Optimizer, folder: Path) -> None:
    opt.ask(1)
    with pytest.raises(StoreError, match=rf"another process \(pid {os.getpid()}\)"):
        Optimizer.open(folder)
    with Optimizer.open(folder, read_only=True) as reader:
        assert len(reader.queries()) == 1
        with pytest.raises(StoreError, match="read_only=True"):
            reader.tell(1, 0.5)
    opt.tell(1, 0.5)


def test_an_image_that_cannot_be_read_blocks_no_other(opt: Optimizer, folder: Path) -> None:
    opt.ask(3)
    place = folder / "images" / "000001.png"
    content = place.read_bytes()
    place.write_bytes(b"\x89PNG but not really")
    (folder / "images" / "000002.png").unlink()
    with pytest.raises(StoreError, match=r"image of query 1 cannot be read from .*000001.png"):
        opt.image(1)
    with pytest.warns(UserWarning, match=r"image of query [12] cannot be read"):
        assert [q.id for q in opt.pending()] == [3]
    assert opt.store.counts()["asked"] == 3, "looking changes nothing"
    with pytest.warns(UserWarning, match=r"query [12] has failed: the image"):
        assert [q.id for q in opt.claim("ann", 9)] == [3]
    assert opt.queries()["state"].tolist() == ["failed", "failed", "asked"]
    place.write_bytes(content)
    assert opt.retry(1).id == 1


def test_an_absurd_image_is_refused_before_it_is_decoded(opt: Optimizer, folder: Path) -> None:
    opt.ask(1)
    place = folder / "images" / "000001.png"
    content = bytearray(place.read_bytes())
    for side in (9000, 2**31 - 1):
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        place.write_bytes(content)
        with pytest.raises(StoreError, match="cannot be read"):
            opt.image(1)


def test_threads_that_ask_at_once_get_rounds_of_their_own(opt: Optimizer) -> None:
    got: list[list[Query]] = []
    threads = [threading.Thread(target=lambda: got.append(opt.ask(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asked = [query for queries in got for query in queries]
    assert sorted(query.id for query in asked) == [1, 2, 3, 4]
    for query in asked:
        assert opt.image(query.id).tobytes() == query.image.tobytes() == to_image(points(query.seed, 1)[0]).tobytes()


def test_who_lost_the_right_to_ask_writes_nothing(opt: Optimizer, folder: Path) -> None:
    class Overtaken(FakeEngine):
        def draw_plain(self, *args: Any) -> Any:
            other = Store.open(Database(folder / "queries.sqlite"), "run")  # as on a network disk that knows no locks
            other.take_over("somebody else")
            other.close()
            return super().draw_plain(*args)

    opt._engine = Overtaken()
    with pytest.raises(StoreError, match="another writer has been here"):
        opt.ask(2)
    assert not (folder / "images").exists()
    assert opt.store.next() == (0, 1)


def test_a_shared_database_keeps_runs_apart_and_passwords_out_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/team.db"
    for name in ("a", "b"):
        with Optimizer.create(tmp_path / name, CONFIG, engine=FakeEngine(), store_url=url) as opt:
            opt.ask(2)
            opt.tell(1, 1.0 if name == "a" else 2.0)
    assert not (tmp_path / "a" / "queries.sqlite").exists()
    with pytest.raises(StoreError, match="TILTOPT_STORE_URL"):
        Optimizer.open(tmp_path / "a")
    monkeypatch.setenv("TILTOPT_STORE_URL", url)
    for name, value in (("a", 1.0), ("b", 2.0)):
        with Optimizer.open(tmp_path / name, engine=FakeEngine()) as opt:
            assert opt.queries()["value"][0] == value
    assert "hunter2" not in address.shown("postgresql+psycopg://me:hunter2@host/db")


def test_workers_of_a_shared_database_answer_one_run_together(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/team.db"
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine(), store_url=url) as asker:
        asker.ask(5)
        with (
            Optimizer.open(tmp_path / "run", store_url=url) as ann,
            Optimizer.open(tmp_path / "run", engine=FakeEngine(), store_url=url) as bob,
        ):
            for name, worker in (("ann", ann), ("bob", bob), ("ann", ann)):
                for query in worker.claim(name, 2):
                    worker.tell(query.id, truth(query.image))
            assert (ann.claim("ann", 2), bob.heartbeat("bob")) == ([], 0)
            with pytest.raises(StoreError, match="another process"):
                bob.ask(1)
        assert asker.store.counts()["answered"] == 5
        assert asker.ask(2)[0].predicted is not None


def test_a_read_only_folder_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Optimizer.create(folder, CONFIG, engine=FakeEngine()).close()

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with Optimizer.open(folder, engine=FakeEngine()) as opt, monkeypatch.context() as m:
        m.setattr("tiltopt.online.store.files.os.replace", refuse)
        with pytest.raises(StoreError, match=r"cannot write .*000001.png: Permission denied"):
            opt.ask(2)
        assert opt.store.next() == (0, 1), "no row without its image"
    with Optimizer.open(folder, engine=FakeEngine()) as opt:
        assert [q.id for q in opt.ask(2)] == [1, 2]


def test_asking_costs_little_at_a_hundred_thousand_queries(folder: Path) -> None:
    n = 100_000
    Optimizer.create(folder, CONFIG, engine=FakeEngine()).close()
    store = Store.open(Database(folder / "queries.sqlite"), "run")
    answers = {i: (float(i % 97), None) for i in range(1, n + 1)}
    vectors = torch.rand(n, 4, generator=generator(0, "features")).numpy().astype("<f4")
    new = [NewQuery(i + 1, i, "a cat", i, vectors[i].tobytes()) for i in range(n)]
    store.add_round(RoundRecord(0, "imported", n), new, "toy", answers)
    store.close()
    started = time.process_time()
    with Optimizer.open(folder, engine=FakeEngine()) as opt:
        opened = time.process_time()
        opt.ask(2)
        asked = time.process_time()
    assert opened - started < 2.0
    assert asked - opened < 2.0


def test_a_run_from_python_is_drawn_on_the_device_of_its_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line: "auto" is the accelerator where there is one."""
    for n, (name, accelerator, device) in enumerate(
        [("auto", None, "cpu"), ("auto", "cuda", "cuda"), ("cpu", "cuda", "cpu"), ("cuda:1", "cuda", "cuda:1")]
    ):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=accelerator: there is not None)
        found = None if accelerator is None else torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found: found)
        with Optimizer.create(folder / str(n), CONFIG | {"device": name}) as opt:
            assert opt.engine.team.device == torch.device(device)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with Optimizer.open(folder / "3") as opt, pytest.raises(ConfigError, match=r"`device`: .* got 'cuda:1'"):
        opt.ask(1)
