"""The runner against black boxes that misbehave; clocks are injected, nothing sleeps for real beyond milliseconds."""

import math
import os
import random
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tiltopt.errors import ConfigError, RewardError, StoreError
from tiltopt.online.queries import Spent
from tiltopt.online.runner import CallPolicy, Fault, Purse, Runner, Stop, Window
from tiltopt.online.signals import Pulse
from tiltopt.online.store.database import UnavailableError
from tiltopt.rewards.base import Answer, FunctionReward, Retry
from tiltopt.rewards.composition import Composition, Part
from tiltopt.rewards.pairs import PairBox
from tiltopt.rewards.replies import read_reply


class Clock:
    """Time that passes only when somebody sleeps or advances it."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def advance(self, seconds):
        self.now += seconds


class Record:
    """What was delivered, in which order and thread."""

    def __init__(self):
        self.answers = {}
        self.order = []
        self.threads = set()

    def __call__(self, id_, answer):
        if id_ in self.answers:
            raise StoreError(f"{id_} is already answered")
        self.answers[id_] = answer
        self.order.append(id_)
        self.threads.add(threading.get_ident())

    def values(self):
        return {key: answer.value for key, answer in self.answers.items()}


def items(n):
    """Item i is an image i + 1 pixels wide, so that a black box can tell which one it sees."""
    return [(f"q{i}", Image.new("RGB", (i + 1, 1)), f"prompt {i}") for i in range(n)]


def indices(images):
    return [image.size[0] - 1 for image in images]


def box(function, batch_size=1):
    return FunctionReward("fake", "points", batch_size, function)


def make(function, *, batch_size=1, clock=None, ledger=None, rng=None, **policy):
    clock = clock or Clock()
    policy = CallPolicy(**{"stop_after": 1000} | policy)
    return Runner(box(function, batch_size), policy, ledger, rng=rng, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (4, 1), (3, 4), (100, 2)])
def test_every_item_is_answered_once_in_the_callers_thread(batch_size, concurrency):
    seen, progress = Record(), []
    runner = make(lambda x, p: [float(i) for i in indices(x)], batch_size=batch_size, concurrency=concurrency)
    assert runner.run(items(10), seen, lambda done, total: progress.append((done, total))) is None
    assert seen.values() == {f"q{i}": float(i) for i in range(10)}
    assert seen.threads == {threading.get_ident()}
    assert progress == [(i, 10) for i in range(1, 11)]
    assert runner.ledger.spent().queries == 10
    if concurrency == 1:
        assert seen.order == [f"q{i}" for i in range(10)]


def test_no_items_is_no_call():
    def never(images, prompts):
        raise AssertionError("called")

    assert make(never).run([], Record()) is None


def test_prompts_stay_with_their_images():
    runner = make(lambda x, p: [float(t.split()[1]) - i for t, i in zip(p, indices(x), strict=True)], batch_size=3)
    seen = Record()
    runner.run(items(7), seen)
    assert set(seen.values().values()) == {0.0}


def test_calls_run_at_once_up_to_the_concurrency():
    barrier, most, active, lock = threading.Barrier(3), [0], [0], threading.Lock()

    def together(images, prompts):
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        barrier.wait(timeout=5)  # passes only if three calls are under way at once
        with lock:
            active[0] -= 1
        return [1.0]

    seen = Record()
    make(together, concurrency=3).run(items(9), seen)
    assert len(seen.answers) == 9
    assert most[0] == 3


def test_an_answer_is_delivered_before_the_next_one_is_there():
    seen, release = Record(), threading.Event()

    def slow_second(images, prompts):
        if indices(images) == [1]:
            assert release.wait(5)
        return [0.0]

    def on_answer(id_, answer):
        seen(id_, answer)
        release.set()  # the second call ends only after the first answer was delivered

    make(slow_second, concurrency=2).run(items(2), on_answer)
    assert seen.order == ["q0", "q1"]


def test_retries_back_off_exponentially_with_the_jitter_of_the_given_generator():
    tries, clock, seen = [], Clock(), Record()

    def third_time(images, prompts):
        tries.append(clock.now)
        if len(tries) < 3:
            raise ConnectionError("down")
        return [7.0]

    make(third_time, clock=clock, retries=2, backoff_s=2.0, rng=random.Random(5)).run(items(1), seen)
    jitter = random.Random(5)
    waits = [2.0 * 2**k * (1 + jitter.random() / 2) for k in range(2)]
    assert np.diff(tries) == pytest.approx(waits)
    assert seen.values() == {"q0": 7.0}


def test_used_up_retries_become_a_failed_answer_and_the_rest_goes_on():
    count, seen = [0], Record()

    def first_is_broken(images, prompts):
        if indices(images) == [0]:
            count[0] += 1
            raise ValueError("bad plate")
        return [1.0]

    assert make(first_is_broken, retries=3).run(items(3), seen) is None
    assert count == [4]
    assert seen.order == ["q0", "q1", "q2"]
    assert seen.answers["q0"].failed
    assert seen.answers["q0"].error == "ValueError: bad plate (after 4 tries)"
    assert math.isnan(seen.answers["q0"].value)
    assert not seen.answers["q1"].failed


def test_one_bad_image_does_not_fail_its_batch():
    calls, seen = [], Record()

    def poisoned(images, prompts):
        calls.append(indices(images))
        if 2 in indices(images):
            raise ValueError("no")
        return [float(i) for i in indices(images)]

    make(poisoned, batch_size=4, retries=1).run(items(6), seen)
    assert calls == [[0, 1, 2, 3], [0], [1], [2], [3], [4, 5]]
    assert [key for key, answer in seen.answers.items() if answer.failed] == ["q2"]
    assert seen.order == [f"q{i}" for i in range(6)]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_design_that_cannot_be_measured_is_an_answer_that_costs_one_call_and_is_no_sign_of_death(value):
    seen = Record()
    assert make(lambda x, p: [value], stop_after=1).run(items(3), seen) is None
    assert [(answer.failed, answer.infeasible) for answer in seen.answers.values()] == [(True, True)] * 3
    assert str(value) in seen.answers["q0"].reason


def test_answers_pass_through_with_sem_error_and_raw():
    reply = [Answer(1.5, sem=0.1, raw={"why": "nice"}), Answer.failure("refused", raw="no")]
    seen = Record()
    make(lambda x, p: reply, batch_size=2).run(items(2), seen)
    assert seen.answers["q0"] == reply[0]
    assert (seen.answers["q1"].error, seen.answers["q1"].raw) == ("refused", "no")


@pytest.mark.parametrize("sem", [-1.0, math.nan, 10**400, "small", object()])
def test_a_standard_error_that_is_none_costs_no_value(sem, caplog):
    seen = Record()
    make(lambda x, p: [Answer(2.0, sem=sem, raw="said")]).run(items(1), seen)
    assert seen.answers["q0"] == Answer(2.0, raw="said")
    assert "kept without its standard error" in caplog.text


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([1.0], "expected 2 values, got 1"),
        ([1.0, 2.0, 3.0], "expected 2 values, got 3"),
        ("12", "expected 2 values, got str"),
        (1.0, "expected 2 values, got float"),
        (None, "expected 2 values, got NoneType"),
        ({0: 1.0, 1: 2.0}, "expected 2 values, got dict"),
        (np.zeros((2, 1)), "expected 2 values, got ndarray"),
        ([math.inf, math.inf], "below infinity for image 1 of 2, got float 'inf'"),
    ],
)
def test_a_reply_that_cannot_be_read_fails_its_queries_and_too_many_in_a_row_end_the_asking(reply, message):
    def wrong_from_the_second_call_on(images, prompts):
        calls.append(1)
        return reply if len(calls) > 1 else [float(i) for i in indices(images)]

    seen, calls = Record(), []
    stop = make(wrong_from_the_second_call_on, batch_size=2, stop_after=3).run(items(20), seen)
    assert stop.reason == "stop_after"
    assert stop.failed
    assert re.search(message, stop.message)
    assert len(calls) == 4, "nothing more is paid for"
    assert {key: answer.value for key, answer in seen.answers.items() if not answer.failed} == {"q0": 0.0, "q1": 1.0}
    assert re.search(message, seen.answers["q2"].error)
    assert [isinstance(answer, Fault) for answer in seen.answers.values()] == [False] * 2 + [True] * 6


def test_a_wrong_entry_keeps_its_neighbours():
    seen = Record()
    assert make(lambda x, p: [1.0, "2", 3.0, [4.0], None], batch_size=5, stop_after=1).run(items(5), seen) is None
    assert {key: a.value for key, a in seen.answers.items() if not a.failed} == {"q0": 1.0, "q2": 3.0}
    assert "image 2 of 5, got str '2'" in seen.answers["q1"].error
    assert "image 5 of 5, got NoneType" in seen.answers["q4"].error


def test_calls_under_way_are_awaited_when_the_black_box_is_found_dead():
    wrong_is_out, seen = threading.Event(), Record()

    def function(images, prompts):
        if indices(images) == [0]:
            wrong_is_out.set()
            return "oops"
        assert wrong_is_out.wait(5)
        time.sleep(0.02)
        return [1.0]

    stop = make(function, concurrency=2, stop_after=1).run(items(2), seen)
    assert "oops" in stop.message
    assert seen.values()["q1"] == 1.0


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ([1, True], [1.0, 1.0]),
        (np.array([1.5, 2.5]), [1.5, 2.5]),
        (torch.tensor([1.5, 2.5], requires_grad=True), [1.5, 2.5]),
        ((np.float32(0.5), torch.tensor(2.0)), [0.5, 2.0]),
    ],
)
def test_numbers_of_every_usual_kind_are_read(reply, expected):
    answers, problems = read_reply("fake", reply, 2)
    assert problems == []
    assert [answer.value for answer in answers] == expected


def test_an_error_that_says_the_reward_is_unusable_is_not_retried():
    calls, seen = [], Record()

    def no_token(images, prompts):
        calls.append(1)
        raise RewardError("the token was refused")

    with pytest.raises(RewardError, match="the token was refused"):
        make(no_token, retries=5).run(items(3), seen)
    assert len(calls) == 1
    assert seen.answers == {}


def test_retry_after_holds_every_call():
    starts, clock, seen = [], Clock(), Record()

    def limited(images, prompts):
        starts.append((indices(images), clock.now))
        if len(starts) == 1:
            raise Retry(33.0, "429")
        return [0.0 for _ in images]

    make(limited, clock=clock, retries=1, backoff_s=0.5, batch_size=2, concurrency=2).run(items(4), seen)
    assert len(seen.answers) == 4
    late = [when for _, when in starts if when >= 133.0]
    assert len(starts) - len(late) <= 2  # the call that was refused, and at most one that was under way beside it
    assert [0, 1] in [who for who, when in starts if when >= 133.0]  # the batch stays whole


def test_silence_times_out_is_retried_and_then_fails():
    clock, hang, seen, tries = Clock(), threading.Event(), Record(), []

    def silent(images, prompts):
        tries.append(1)
        clock.advance(61.0)
        hang.wait(5)
        return [1.0]

    runner = make(silent, clock=clock, timeout_s=60.0, retries=1)
    assert runner.run(items(1), seen) is None
    hang.set()
    assert len(tries) == 2
    assert seen.answers["q0"].error == "no answer within 60 s (after 2 tries)"


def test_a_late_answer_is_used_when_it_comes_before_the_retry():
    clock, seen, late, tries = Clock(), Record(), threading.Event(), []

    def slow(images, prompts):
        tries.append(threading.current_thread())
        if len(tries) == 1:
            clock.advance(61.0)
            assert late.wait(5)
            return [42.0]
        late.set()
        tries[0].join(5)  # the first call answers meanwhile
        return [0.0]

    make(slow, clock=clock, timeout_s=60.0, retries=1).run(items(1), seen)
    assert seen.values() == {"q0": 42.0}


def test_query_budget_stops_cleanly_and_spans_runs():
    seen, calls = Record(), []
    runner = make(lambda x, p: calls.append(len(x)) or [0.0] * len(x), batch_size=4, max_queries=10)
    assert runner.run(items(6), seen) is None
    again = Record()
    stop = runner.run(items(8), again)
    assert isinstance(stop, Stop)
    assert stop.reason == "max_queries"
    assert stop.remaining == ("q4", "q5", "q6", "q7")
    assert list(again.answers) == ["q0", "q1", "q2", "q3"]
    assert sum(calls) == runner.ledger.spent().queries == 10
    assert runner.used_up() == "max_queries"
    assert runner.run(items(1), Record()).remaining == ("q0",)
    used = Purse()
    used.hand_out(["earlier", "too"])
    assert make(lambda x, p: [0.0], max_queries=3, ledger=used).run(items(2), Record()).remaining == ("q1",)


def test_a_retry_does_not_count_against_the_query_budget():
    tries, seen = [], Record()

    def flaky(images, prompts):
        tries.append(1)
        if len(tries) % 2:
            raise OSError("again")
        return [1.0]

    assert make(flaky, max_queries=3).run(items(3), seen) is None
    assert len(tries) == 6
    assert len(seen.answers) == 3


def test_wall_clock_budget_stops_cleanly():
    clock, seen = Clock(), Record()

    def minute(images, prompts):
        clock.advance(60.0)
        return [0.0]

    runner = make(minute, clock=clock, max_seconds=150.0)
    stop = runner.run(items(10), seen)
    assert stop.reason == "max_seconds"
    assert seen.order == ["q0", "q1", "q2"]  # the third began in time and is not thrown away
    assert stop.remaining == tuple(f"q{i}" for i in range(3, 10))


def test_wall_clock_budget_cuts_a_backoff_short():
    clock = Clock()

    def down(images, prompts):
        raise OSError("down")

    stop = make(down, clock=clock, backoff_s=1000.0, max_seconds=30.0).run(items(1), Record())
    assert stop.reason == "max_seconds"
    assert stop.remaining == ("q0",)
    assert clock.now - 100.0 == pytest.approx(30.0)


def test_a_call_that_hangs_is_given_up_after_the_grace():
    clock, hang, seen = Clock(), threading.Event(), Record()

    def function(images, prompts):
        if indices(images) == [1]:
            clock.advance(200.0)
            hang.wait(5)
        return [0.0]

    ticking = threading.Event()

    def tick():
        while not ticking.wait(0.005):
            if clock.now >= 300.0:
                clock.advance(1.0)

    ticker = threading.Thread(target=tick)
    ticker.start()
    stop = make(function, clock=clock, max_seconds=150.0, grace_s=10.0).run(items(2), seen)
    ticking.set()
    hang.set()
    ticker.join()
    assert stop.reason == "max_seconds"
    assert stop.remaining == ("q1",)
    assert list(seen.answers) == ["q0"]


@pytest.mark.parametrize(("per_minute", "calls", "seconds"), [(6.0, 13, 120.0), (0.5, 3, 240.0)])
def test_requests_per_minute(per_minute, calls, seconds):
    clock, starts = Clock(), []
    runner = make(lambda x, p: starts.append(clock.now) or [0.0], clock=clock, requests_per_minute=per_minute)
    runner.run(items(calls), Record())
    assert starts[-1] - starts[0] == pytest.approx(seconds)
    window = 60.0 if per_minute >= 1 else 60.0 / per_minute
    for first in starts:
        assert sum(first <= s < first + window - 1e-9 for s in starts) <= max(1, per_minute)


def test_window_without_a_limit_is_always_free():
    window = Window(None)
    window.start(5.0)
    assert window.free_at() == -math.inf


def test_keyboard_interrupt_delivers_what_has_arrived():
    both, seen = threading.Barrier(3), Record()

    def function(images, prompts):
        both.wait(5)
        return [float(indices(images)[0])]

    def on_answer(id_, answer):
        seen(id_, answer)
        if len(seen.answers) == 1:
            for worker in threading.enumerate():
                if worker.name.startswith("black-box-"):
                    worker.join(5)  # the other two answers lie ready when the delivery is cut off
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(function, concurrency=3).run(items(3), on_answer)
    assert seen.values() == {"q0": 0.0, "q1": 1.0, "q2": 2.0}


def test_an_answer_that_was_cut_off_before_it_was_stored_is_delivered_again():
    seen, cut = Record(), []

    def on_answer(id_, answer):
        if not cut:
            cut.append(id_)
            raise KeyboardInterrupt
        seen(id_, answer)

    with pytest.raises(KeyboardInterrupt):
        make(lambda x, p: [5.0]).run(items(2), on_answer)
    assert seen.values() == {"q0": 5.0}


def test_a_budget_that_ends_with_the_last_answer_is_no_stop():
    clock = Clock()

    def hour(images, prompts):
        clock.advance(3600.0)
        return [1.0]

    runner = make(hour, clock=clock, max_seconds=3600.0)
    assert runner.run(items(1), Record()) is None
    assert runner.used_up() == "max_seconds"


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"retries": -1},
        {"backoff_s": -0.5},
        {"timeout_s": 0},
        {"requests_per_minute": 0},
        {"max_queries": 0},
        {"max_calls": 0},
        {"max_seconds": -1},
        {"stop_after": 0},
        {"grace_s": -1},
        {"on_unknown": "guess"},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(lambda x, p: [0.0], **options)


def test_real_clock_overhead_is_small():
    runner, seen = Runner(box(lambda x, p: [0.0])), Record()
    start = time.perf_counter()
    runner.run(items(200), seen)
    assert len(seen.answers) == 200
    assert time.perf_counter() - start < 4.0  # 20 ms a query is the promise


# ---- a dead black box


def raising(error, after=0):
    calls = []

    def function(images, prompts):
        calls.append(indices(images))
        if len(calls) > after:
            raise error
        return [0.0] * len(images)

    return function, calls


@pytest.mark.parametrize(("error", "per_query"), [(ConnectionError("down"), 3), (TypeError("no such argument"), 1)])
def test_a_black_box_that_always_raises_is_left_alone_after_so_many_calls_in_a_row(error, per_query):
    function, calls = raising(error, after=2)
    seen = Record()
    stop = make(function, stop_after=5).run(items(40), seen)
    assert len(calls) == 2 + 5
    assert (stop.reason, stop.failed) == ("stop_after", True)
    assert len(stop.remaining) == 40 - 2 - 5 // per_query
    assert str(error) in stop.message
    assert "test_runner.py" in stop.message, "the file of the user's code"
    assert re.search(r"line \d+, in function", stop.message)
    assert "online/runner.py" not in stop.message


def test_a_programming_error_is_not_tried_again_and_keeps_its_traceback():
    function, calls = raising(KeyError("score"))
    seen = Record()
    assert make(function, retries=5).run(items(2), seen) is None
    assert calls == [[0], [1]]
    assert seen.answers["q0"].error == "KeyError: 'score'"
    assert isinstance(seen.answers["q0"], Fault)
    assert "in function" in seen.answers["q0"].raw


def test_a_programming_error_that_one_image_brings_about_does_not_fail_its_batch():
    def narrow(images, prompts):
        return [1.0 / (i - 2) for i in indices(images)]

    seen = Record()
    make(narrow, batch_size=4).run(items(4), seen)
    assert [key for key, answer in seen.answers.items() if answer.failed] == ["q2"]


def test_an_answer_ends_the_row_of_dead_calls():
    calls = []

    def every_fifth(images, prompts):
        calls.append(1)
        if len(calls) % 5:
            raise OSError("flaky")
        return [1.0]

    seen = Record()
    assert make(every_fifth, retries=4, stop_after=5).run(items(6), seen) is None
    assert seen.values() == {f"q{i}": 1.0 for i in range(6)}


def test_being_asked_to_wait_is_no_sign_of_death_unless_it_never_ends():
    calls = []

    def busy(images, prompts):
        calls.append(1)
        raise Retry(1.0, "429")

    stop = make(busy, retries=2, stop_after=2).run(items(10), Record())
    assert stop.reason == "stop_after"
    assert len(calls) == 6


def test_silence_counts_as_dead():
    clock, hang = Clock(), threading.Event()

    def silent(images, prompts):
        clock.advance(61.0)
        hang.wait(5)

    stop = make(silent, clock=clock, timeout_s=60.0, retries=0, stop_after=3).run(items(10), Record())
    hang.set()
    assert stop.reason == "stop_after"
    assert len(stop.remaining) == 7
    assert "no answer within 60 s" in stop.message


# ---- the book


class Book(Purse):
    """A ledger that knows what is out, and can be told to refuse."""

    def __init__(self):
        super().__init__()
        self.out, self.log, self.refuses = [], [], False

    def hand_out(self, ids, **limits):
        if self.refuses:
            raise StoreError("disk full")
        out = super().hand_out(ids, **limits)
        self.out += out
        self.log.append(("out", *out))
        return out

    def came_back(self, ids):
        super().came_back(ids)
        self.out = [i for i in self.out if i not in ids]
        self.log.append(("back", *ids))


def test_every_call_is_entered_before_it_is_made():
    book, at_call = Book(), []
    make(lambda x, p: at_call.append(list(book.out)) or [0.0], ledger=book).run(items(3), Record())
    assert at_call == [["q0"], ["q0", "q1"], ["q0", "q1", "q2"]]


def test_what_a_book_says_keeps_its_class_whatever_that_takes():
    class Refusing(Book):
        def hand_out(self, ids, **limits):
            raise UnavailableError("disk full", passing=False)

    with pytest.raises(UnavailableError, match="disk full") as caught:
        make(lambda images, prompts: [1.0], ledger=Refusing()).run(items(5), Record())
    assert caught.value.passing is False


def test_a_call_that_the_book_refuses_is_not_made():
    book, calls, seen = Book(), [], Record()

    def function(images, prompts):
        calls.append(1)
        book.refuses = len(calls) == 2
        return [1.0]

    with pytest.raises(StoreError, match="disk full"):
        make(function, ledger=book).run(items(5), seen)
    assert len(calls) == 2
    assert len(seen.answers) == 2


def test_a_retry_is_one_more_call_and_no_further_query():
    book, calls = Book(), []

    def flaky(images, prompts):
        calls.append(1)
        if len(calls) % 2:
            raise OSError("again")
        return [1.0]

    runner = make(flaky, ledger=book, max_queries=3)
    assert runner.run(items(3), Record()) is None
    assert book.spent() == Spent(3, 6)
    assert book.log[:3] == [("out", "q0"), ("back", "q0"), ("out", "q0")]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_budget_of_calls_counts_retries_and_is_exact(concurrency, batch_size):
    calls, lock = [], threading.Lock()

    def flaky(images, prompts):
        with lock:
            calls.extend(indices(images))
            odd = len(calls) % 2
        if odd:
            raise OSError("again")
        return [1.0] * len(images)

    runner = make(flaky, batch_size=batch_size, concurrency=concurrency, max_calls=7)
    stop = runner.run(items(20), Record())
    assert stop.reason == "max_calls"
    assert len(calls) == runner.ledger.spent().calls == 7
    assert runner.used_up() == "max_calls"
    assert runner.run(items(1), Record()).remaining == ("q0",)


def test_a_retry_keeps_its_place_in_the_budget_of_queries():
    shown, lock, first = set(), threading.Lock(), threading.Event()

    def flaky(images, prompts):
        (i,) = indices(images)
        with lock:
            shown.add(i)
        if i == 0 and not first.is_set():
            first.set()
            raise OSError("again")
        return [1.0]

    clock, seen = Clock(), Record()
    stop = make(flaky, clock=clock, concurrency=2, max_queries=3, backoff_s=5.0).run(items(9), seen)
    assert stop.reason == "max_queries"
    assert shown == {0, 1, 2}
    assert set(seen.answers) == {"q0", "q1", "q2"}


def test_what_somebody_else_has_answered_meanwhile_is_passed_over():
    class Shared(Purse):
        def hand_out(self, ids, **limits):
            return [i for i in super().hand_out(ids, **limits) if i != "q1"]

    seen = Record()
    assert make(lambda x, p: [1.0], ledger=Shared()).run(items(3), seen) is None
    assert seen.order == ["q0", "q2"]


def test_seconds_of_earlier_processes_count():
    class Old(Purse):
        def spent(self):
            return Spent(seconds=100.0)

    clock = Clock()

    def minute(images, prompts):
        clock.advance(60.0)
        return [0.0]

    seen = Record()
    stop = make(minute, clock=clock, ledger=Old(), max_seconds=200.0).run(items(10), seen)
    assert stop.reason == "max_seconds"
    assert seen.order == ["q0", "q1"]


def test_a_pulse_makes_up_for_a_beat_that_was_refused():
    beats = []

    def beat(seconds):
        beats.append(seconds)
        if len(beats) == 1:
            raise StoreError("locked")

    start = time.monotonic()
    with Pulse(beat, every_s=0.01):
        time.sleep(0.05)
    whole = time.monotonic() - start
    assert sum(beats[1:]) == pytest.approx(whole, abs=0.02)
    assert beats[1] > beats[0]


def test_a_refused_answer_does_not_lose_its_neighbours():
    both, seen = threading.Barrier(3), Record()

    def function(images, prompts):
        both.wait(5)
        return [float(indices(images)[0])]

    def on_answer(id_, answer):
        if id_ == "q1":
            raise StoreError("q1 is answered already")
        seen(id_, answer)

    with pytest.raises(StoreError, match="q1 is answered already"):
        make(function, concurrency=3).run(items(3), on_answer)
    assert seen.values() == {"q0": 0.0, "q2": 2.0}


# ---- signals


def signalled(numbers, grace_s=30.0):
    """A run of which all eight calls are in flight when the signals come; what was delivered, and how it ended."""
    all_out, done, seen, calls = threading.Barrier(9), threading.Event(), Record(), []

    def function(images, prompts):
        calls.append(1)
        all_out.wait(10)
        assert done.wait(10)
        return [float(indices(images)[0])]

    def kill():
        all_out.wait(10)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        done.set()

    runner = Runner(box(function), CallPolicy(concurrency=8, grace_s=grace_s))
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run(items(20), seen)
    finally:
        done.set()
        killer.join()
    return seen, calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_is_in_flight_its_grace_and_hands_out_nothing_more(number):
    before = signal.getsignal(number)
    seen, calls = signalled([number])
    assert seen.values() == {f"q{i}": float(i) for i in range(8)}
    assert len(calls) == 8
    assert signal.getsignal(number) is before


def test_a_launcher_that_passes_the_signal_on_is_not_a_second_wish():
    seen, _ = signalled([signal.SIGINT, signal.SIGTERM])
    assert len(seen.answers) == 8


def test_a_second_signal_ends_at_once():
    seen, _ = signalled([signal.SIGINT, signal.SIGINT])
    assert seen.answers == {}


def test_a_signal_cuts_a_backoff_short():
    def down(images, prompts):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise OSError("down")

    runner = Runner(box(down), CallPolicy(backoff_s=3600.0))
    with pytest.raises(KeyboardInterrupt):
        runner.run(items(1), Record())


def test_a_question_without_an_answer_is_an_error_where_one_is_needed():
    assert [a.value for a in make(lambda x, p: [2.0] * len(x), batch_size=2).ask([1, 2, 3], "abc")] == [2.0] * 3
    with pytest.raises(RewardError, match="`max_queries` = 2"):
        make(lambda x, p: [2.0], max_queries=2).ask([1, 2, 3], "abc")


def test_a_reply_that_a_part_gave_and_nobody_can_read_is_no_answer_and_no_end():
    """As when the black box itself had given it: it fails its query, and so many in a row are a dead one."""
    parts = iter([[1.0], "nonsense", [2.0], [3.0]])
    part = FunctionReward("part", "", 1, lambda images, prompts: next(parts))
    box = Composition("weighted", [(Part("part", 2.0), part)], sum, 1)
    seen = Record()
    assert Runner(box, CallPolicy(retries=2, stop_after=2)).run(items(4), seen) is None
    assert [seen.answers[f"q{i}"].value for i in (0, 2, 3)] == [2.0, 4.0, 6.0]
    assert "expected 1 values, got str 'nonsense'" in seen.answers["q1"].error
    pairs = PairBox(FunctionReward("lab", "", 1, lambda images, prompts: "nonsense"))
    stop = Runner(pairs, CallPolicy(stop_after=2)).run([(i, ((i, i)), ("a", "b")) for i in range(4)], Record())
    assert stop.failed
    assert len(stop.remaining) == 2
