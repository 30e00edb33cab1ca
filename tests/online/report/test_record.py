"""A run's folder as a reader sees it, and the run in numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.contracts.stores import new_queries
from tests.fakes.run import made_queries, make_store
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.queries import RoundRecord
from tiltopt.online.report.numbers import best_of_n
from tiltopt.online.report.record import (
    RunRecord,
    load_run,
    summarise,
    without_summary,
    write_reference_summary,
    write_round_summary,
)
from tiltopt.online.report.text import round_table
from tiltopt.online.store import run_folder
from tiltopt.online.store.store import Store


def new_run(folder: Path, **config: object) -> Store:
    folder.mkdir(exist_ok=True)
    return run_folder.create(folder, config, None)[0]


def reference(folder: Path, values: list[float | None], fidelity: float | None = None) -> None:
    (folder / "reference").mkdir()
    (folder / "reference" / "values.json").write_text(json.dumps({"values": values, "fidelity": fidelity}))


@pytest.fixture
def small(tmp_path: Path) -> RunRecord:
    """Two plain answers and a failure, then two tilted answers that were predicted."""
    store = new_run(tmp_path / "run", batch_size=2, rounds=1, sampler={"num_particles": 4})
    plain = RoundRecord(0, "plain", 3, ask_seconds=0.75, answer_seconds=0.25)
    store.add_round(plain, new_queries(1, 3), "toy", {1: (1.0, None), 2: (3.0, None)})
    store.fail(3, "plate broken")
    tilted = [
        dataclasses.replace(new, predicted=mean, predicted_sd=1.0, acquired=mean + 0.5, ess=ess, log_z=-0.25)
        for new, mean, ess in zip(new_queries(4, 2), (4.5, 5.0), (2.0, 4.0), strict=True)
    ]
    known = RoundRecord(1, "tilted", 2, alpha=0.1, nats=52.5, ask_seconds=2.0)
    store.add_round(known, tilted, "toy", {4: (4.0, None), 5: (6.0, None)})
    store.close()
    reference(tmp_path / "run", [0.0, 1.0, None, 2.0], 0.9)
    (tmp_path / "run" / "round_001").mkdir()
    (tmp_path / "run" / "round_001" / "summary.json").write_text('{"round": 1, "fidelity": 0.5}')
    return load_run(tmp_path / "run")


def test_a_summary_holds_every_key_and_counts_queries_so_far(small: RunRecord) -> None:
    got = summarise(small, unit="kB", seconds=3.5, peak_memory_mb=12.0)
    nothing = dict.fromkeys(("predicted_mean", "mass_lift", "fidelity", "ess_mean", "ess_median", "nats_mean", "alpha"))
    first = {"round": 0, "kind": "plain", "queries": 3, "mean": 2.0, "best": 3.0, "seconds": 1.0}
    assert got["rounds"][0] == first | nothing
    second = {"round": 1, "kind": "tilted", "queries": 5, "mean": 5.0, "best": 6.0, "seconds": 2.0, "alpha": 0.1}
    second |= {
        "mass_lift": None,
        "predicted_mean": 4.75,
        "fidelity": 0.5,
        "ess_mean": 3.0,
        "ess_median": 3.0,
        "nats_mean": 52.5,
    }
    assert got["rounds"][1] == second
    assert (got["prior"]["mean"], got["prior"]["samples"], got["prior"]["fidelity"]) == (1.0, 3, 0.9)
    assert got["best_of_n"] == pytest.approx(best_of_n([0.0, 1.0, 2.0], 4, 2))
    assert (got["answered"], got["failed"], got["abandoned"]) == (4, 1, 0)
    assert got["calibration"][1]["n"] == 2
    assert got["calibration"][1]["coverage90"] == 1.0
    assert (got["unit"], got["seconds"], got["peak_memory_mb"], got["complete"]) == ("kB", 3.5, 12.0, True)
    for key in ("reward", "versions", "settings"):
        assert key in got


def test_what_is_not_known_now_stays_as_it_was_written(small: RunRecord) -> None:
    written = summarise(small, unit="kB", seconds=3.5, peak_memory_mb=12.0) | {"describe": {"model": "toy"}}
    (small.folder / "summary.json").write_text(json.dumps(written))
    assert summarise(load_run(small.folder)) == written


def test_what_a_price_means_is_told_with_the_rounds(small: RunRecord) -> None:
    summary = summarise(small, unit="kB")
    meaning = "α 0.1 kB per nat: so much more must be hoped for to go a nat further from the prior"
    assert f"{meaning}; the last queries went 52.5 nats, 48 are allowed" in round_table(summary)
    priced = summary | {"settings": {"sampler": {"budget_nats": None}, "acquisition": {"name": "log_ei"}}}
    told = round_table(priced)
    assert "α 0.1 nats of the acquisition per nat" in told
    assert "are allowed" not in told, "this run was priced by hand"
    assert "per nat" not in round_table(summary | {"rounds": summary["rounds"][:1]})


def test_the_unit_is_known_as_soon_as_a_round_is_summarised(small: RunRecord) -> None:
    """Before the run ends and writes it into its own summary."""
    assert summarise(small)["unit"] == ""
    (small.folder / "round_001" / "summary.json").write_text('{"round": 1, "unit": "kB"}')
    assert summarise(load_run(small.folder))["unit"] == "kB"


def test_reference_samples_of_the_store_describe_the_prior_and_are_no_round(small: RunRecord) -> None:
    """They stand in the store since version 0.2, and beside it before."""
    (small.folder / "reference" / "values.json").unlink()
    store, _ = run_folder.reopen(small.folder, None, None, None, read_only=False, recover=False)
    new = [dataclasses.replace(q, number=-q.number) for q in new_queries(1, 3)]
    known = RoundRecord(-1, "reference", 3, ask_seconds=2.0, answer_seconds=0.5)
    store.add_round(known, new, "toy", {-1: (10.0, None), -2: (20.0, None)})
    store.fail(-3, "plate broken")
    told = write_reference_summary(small.folder, store, {"fidelity": 0.75})
    assert (told["round"], told["kind"], told["queries"], told["mean"]) == (-1, "reference", 3, 15.0)
    store.close()
    record = load_run(small.folder)
    assert [summary["round"] for summary in record.rounds] == [0, 1]
    assert (record.queries["id"] > 0).all()
    prior = summarise(record)["prior"]
    assert (prior["mean"], prior["samples"], prior["fidelity"], prior["seconds"]) == (15.0, 2, 0.75, 2.5)
    text = round_table(summarise(record, unit="kB", seconds=10.0))
    assert "(2 reference samples, fidelity 0.75; 2.5 s, 25 % of the time)" in text


def test_without_reference_samples_the_first_plain_round_describes_the_prior(tmp_path: Path) -> None:
    store = new_run(tmp_path, batch_size=1)
    store.add_round(RoundRecord(0, "plain", 2), new_queries(1, 2), "toy", {1: (1.0, None), 2: (3.0, None)})
    store.add_round(RoundRecord(1, "tilted", 1), new_queries(3, 1), "toy", {3: (9.0, None)})
    assert write_round_summary(tmp_path, store, 0, {"fidelity": 1.0})["mean"] == 2.0
    store.close()
    got = summarise(load_run(tmp_path))
    assert (got["prior"]["mean"], got["prior"]["fidelity"]) == (2.0, 1.0)


def test_imported_answers_are_no_plain_samples_of_the_prior(tmp_path: Path) -> None:
    store = new_run(tmp_path, batch_size=2)
    answers = {number: (100.0 + number, None) for number in range(1, 5)}
    store.add_round(RoundRecord(0, "imported", 4), new_queries(1, 4), "toy", answers)
    record = load_run(tmp_path, store)
    assert (record.drawn, summarise(record)["prior"]["mean"], summarise(record)["best_of_n"]) == (0, None, None)
    store.add_round(RoundRecord(1, "plain", 2), new_queries(5, 2), "toy", {5: (1.0, None), 6: (3.0, None)})
    record = load_run(tmp_path, store)
    assert (record.drawn, summarise(record)["prior"]["mean"]) == (1, 2.0)
    store.close()


def test_a_damaged_round_summary_is_told_and_its_numbers_come_from_the_store(small: RunRecord) -> None:
    place = small.folder / "round_001" / "summary.json"
    place.write_text(place.read_text()[:-9])
    after = load_run(small.folder)
    assert list(after.damaged) == [1]
    assert "round_001/summary.json: expected a readable JSON file" in after.damaged[1]
    assert after.rounds[1] == {key: value for key, value in small.rounds[1].items() if key != "fidelity"}
    with run_folder.reading(small.folder) as store:
        assert without_summary(small.folder, store) == [0, 1]


def test_a_damaged_summary_of_the_run_is_named(small: RunRecord) -> None:
    (small.folder / "summary.json").write_text('{"rounds": [')
    with pytest.raises(StoreError, match=r"summary\.json"):
        load_run(small.folder)


def test_not_a_run_says_what_was_expected_and_names_runs_nearby(small: RunRecord, tmp_path: Path) -> None:
    expected = r"expected the folder of a run, with a config.json in it, got no such folder"
    with pytest.raises(ConfigError, match=expected) as caught:
        load_run(tmp_path / "nowhere")
    assert str(small.folder) in str(caught.value)


def test_reading_writes_nothing_and_needs_no_right_to(tmp_path: Path) -> None:
    make_store(tmp_path / "run", made_queries(rounds=1))
    lock = run_folder.lock(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert len(load_run(tmp_path / "run").queries) == 32
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in after} - {path.name for path in before} <= {
        "queries.sqlite-shm",
        "queries.sqlite-wal",
    }
    assert after[tmp_path / "run" / "config.json"] == before[tmp_path / "run" / "config.json"]
    lock.release()


def test_the_round_table_shows_rounds_prior_and_trouble(small: RunRecord) -> None:
    text = round_table(summarise(small, unit="kB"))
    shown = "round queries mean best predicted ESS of 4 nats α fidelity seconds"  # no round has a lift
    assert text.splitlines()[0].split() == shown.split()
    assert "prior: mean 1.000, 95th percentile 1.900 kB (3 plain samples, fidelity 0.90)" in text
    assert "best-of-N with as many queries:" in text
    assert "queries without an answer: 1 failed" in text
    assert "takes 60 plain answers: --config.initial_batch_size=60" in text
    assert "nan" not in text.lower()


def test_the_lift_of_a_round_is_held_against_the_reference_samples(small: RunRecord) -> None:
    """Of 60 reference samples from 0 to 59 the 95th percentile is 56.05, far above the round's two answers, 4 and 6."""
    for shift, expected in ((0.0, 0.0), (-51.5, 10.0), (-100.0, 20.0)):
        told = {"values": [i + shift for i in range(60)]}  # in a file of their own, as version 0.1 kept them
        (small.folder / "reference" / "values.json").write_text(json.dumps(told))
        after = load_run(small.folder)
        assert [row["mass_lift"] for row in after.rounds] == [None, pytest.approx(expected)]
    assert "lift 20.0: 100 % of the last round lies above the prior's 95th percentile" in round_table(summarise(after))
