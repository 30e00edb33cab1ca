"""What a run costs when processes are killed, databases refuse, disks fill and clocks jump, by the black box's book.

`python -m tests.fakes.faults --each 200 --seed 7` does more of the same; `benchmarks/results/faults.json` is what it
said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import bucket, postgres
from tests.fakes.faults.book import Line
from tests.fakes.faults.faults import Fault
from tests.fakes.faults.runs import CONCURRENCY, KINDS, Plain, Seen
from tests.fakes.faults.trial import Attempt, Trial
from tiltopt.online.queries import Spent

ROOT = Path(__file__).parents[2]


def storm(*arguments: str) -> dict[str, Any]:
    """What the command prints of one kind; a fresh interpreter, because it forks."""
    command = [sys.executable, "-m", "tests.fakes.faults", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.stdout, done.stderr[-3000:]
    (found,) = json.loads(done.stdout)["kinds"].values()
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bucket"])
def test_twenty_faults_lose_no_answer_and_overspend_nothing(kind: str) -> None:
    if kind == "shared" and postgres.missing():
        pytest.skip(postgres.missing())
    found = storm("--kinds", kind, "--each", "20", "--seed", "1")
    assert found["wrong"] == []
    assert sum(found["faults"].values()) >= 20


def test_a_run_killed_at_every_third_write_boundary_ends_as_if_it_had_not_been() -> None:
    found = storm("--kinds", "plain", "--sweep", "3")
    assert found["wrong"] == []
    assert found["boundaries"] > 200
    assert found["struck"]["killed"] > 0.9 * found["boundaries"] / 3


def test_a_run_in_a_bucket_that_is_killed_ends_as_if_it_had_not_been() -> None:
    if bucket.missing():
        pytest.skip(bucket.missing())
    found = storm("--kinds", "bucket", "--sweep", "25")
    assert found["wrong"] == []
    assert found["struck"]["killed"] >= 2


# ---- that the harness would have seen it


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Two processes, the first of which was killed; nothing has been asked yet."""
    made = Trial(Plain(tmp_path), tmp_path / "run")
    made.generations = [
        [Attempt(0, Fault("kill", 5), "killed", kept=set())],
        [Attempt(1, Fault(), "complete", kept={"a"}, spent={"queries": 2, "calls": 2, "seconds": 0.0})],
    ]
    made.end = Seen(("a", "b"), Spent(2, 2, 0.0))
    return made


def write(trial: Trial, *lines: tuple[int, str, str]) -> list[str]:
    """What is wrong when the black box wrote this."""
    for line in lines:
        trial.book.write(Line(*line))
    return trial.wrong(None)


FIRST = ((0, "asked", "a"), (0, "answered", "a"))
SECOND = ((1, "asked", "b"), (1, "answered", "b"))


def test_nothing_wrong_is_nothing(trial: Trial) -> None:
    assert write(trial, *FIRST, *SECOND) == []


def test_a_query_that_was_answered_and_kept_is_not_asked_again(trial: Trial) -> None:
    trial.end = Seen(("a", "b"), Spent(3, 3, 0.0))
    again = ((1, "asked", "a"), (1, "answered", "a"))
    assert write(trial, *FIRST, *SECOND, *again) == [
        "1 queries that the next process had an answer of were asked again"
    ]


def test_what_a_neighbour_asked_before_the_other_looked_was_not_asked_again(trial: Trial) -> None:
    late = Attempt(2, Fault(), "complete", kept={"a"}, spent={"queries": 2, "calls": 2, "seconds": 0.0})
    trial.generations[1] = [late]
    trial.end = Seen(("a", "b"), Spent(2, 2, 0.0))
    assert write(trial, (1, "asked", "a"), (1, "answered", "a"), *SECOND) == []


def test_one_in_flight_at_a_kill_is(trial: Trial) -> None:
    trial.end = Seen(("a", "b"), Spent(3, 3, 0.0))
    assert write(trial, *FIRST, (0, "asked", "b"), *SECOND) == []


def test_but_not_more_of_them_than_were_in_flight(trial: Trial) -> None:
    lost = [(0, "asked", f"x{i}") for i in range(CONCURRENCY + 1)]
    trial.end = Seen(("a", "b"), Spent(7, 7, 0.0))
    assert write(trial, *FIRST, *lost, *SECOND) == [
        f"{CONCURRENCY + 1} calls were of unknown fate when process 0 was killed"
    ]


@pytest.mark.parametrize("ending", ["interrupted", "refused", "complete"])
def test_an_answer_is_lost_by_nothing_but_a_kill(trial: Trial, ending: str) -> None:
    trial.generations[0][0].ending = ending
    trial.generations[0][0].fault = Fault("refuse", 3)
    trial.end = Seen(("a", "b"), Spent(3, 3, 0.0))
    assert write(trial, *FIRST, (0, "asked", "c"), (0, "answered", "c"), *SECOND) == ["processes [0] lost 1 answers"]


def test_budgets_are_exact_by_both_books(trial: Trial) -> None:
    trial.terms = {"max_queries": 1}
    trial.generations[1][0].ending = "stopped"
    assert write(trial, *FIRST, *SECOND) == [
        "2 queries were made, 1 allowed",
        "it stopped at 2 queries, 1 were allowed",
    ]


def test_a_call_that_is_not_in_the_runs_book_is_seen(trial: Trial) -> None:
    trial.end = Seen(("a", "b"), Spent(2, 1, 0.0))
    assert write(trial, *FIRST, *SECOND) == ["the run's book says 1 calls, the black box's 2"]


def test_two_processes_at_once_do_not_ask_the_same(trial: Trial) -> None:
    for made in trial.attempts:
        made.ending = "complete"
    trial.generations = [[*trial.attempts]]
    assert write(trial, *FIRST, *SECOND, (1, "asked", "a"), (1, "answered", "a")) == [
        "1 queries were answered twice while processes [0, 1] were at work",
        "the run's book says 2 calls, the black box's 3",
        "the run's book says 2 queries, the black box's 3",
    ]


@pytest.mark.parametrize("ending", ["wrong", "hung"])
def test_a_process_that_ends_badly_is_reported_with_what_it_said(trial: Trial, ending: str) -> None:
    trial.generations[0][0].ending = ending
    trial.generations[0][0].words = "KeyError: 'x'"
    assert f"process 0 ended {ending}: KeyError: 'x'" in write(trial, *FIRST, *SECOND)
