"""Calling a black box that is slow, flaky and costs money: threads, time-outs, retries, rate limit, budget.

runner = Runner(make_reward("http", url=...), concurrency=4, timeout_s=60, requests_per_minute=30, max_queries=500)
stop = runner.run([(q.id, q.image, q.prompt) for q in queries], on_answer=store.answer)
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tiltopt.errors import ConfigError
from tiltopt.online.calls import Calls, Item, Stop
from tiltopt.rewards.base import Answer, BlackBox

__all__ = ["Item", "Runner", "Stop"]


class Runner:
    """Hands images to a black box and delivers each answer the moment it arrives.

    A call that raises, or gives nothing within `timeout_s`, is tried again after backoff_s * 2^attempt seconds times
    a jitter in [1, 1.5); the last try of a batch hands its images over one by one, so that one bad image does not
    fail its neighbours. When retries are used up the item's `Answer` carries the error. Budgets, the rate limit and
    the wall clock span all calls of `run`; the wall clock starts at construction.

    Args:
        black_box: what is called, `black_box.batch_size` images at a time, from worker threads.
        concurrency: calls in flight, at least 1; with 1, answers are delivered in the order of the items. A call that
            timed out cannot be interrupted: it no longer counts, and if it answers before its retry, that is used.
        timeout_s: seconds for one call; None waits for ever.
        retries: further tries after the first, at least 0.
        backoff_s: seconds before the first retry, at least 0.
        requests_per_minute: calls started per minute, retries included; None for no limit.
        max_queries: items handed out in all; None for no limit. A retry of an item is not counted again.
        max_seconds: seconds after which nothing more is handed out; None for no limit.
        grace_s: seconds for which calls in flight are still awaited after a stop.
        spent: items already handed out earlier, for a resumed run.
        rng: source of the jitter.
        clock: monotonic seconds. sleep: waits so many seconds.

    Raises:
        ConfigError: an impossible value.
    """

    def __init__(
        self,
        black_box: BlackBox,
        *,
        concurrency: int = 1,
        timeout_s: float | None = None,
        retries: int = 2,
        backoff_s: float = 1.0,
        requests_per_minute: float | None = None,
        max_queries: int | None = None,
        max_seconds: float | None = None,
        grace_s: float = 30.0,
        spent: int = 0,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _at_least("concurrency", concurrency, 1)
        for name, low in (("retries", retries), ("backoff_s", backoff_s), ("grace_s", grace_s), ("spent", spent)):
            _at_least(name, low, 0)
        for name, limit in (
            ("timeout_s", timeout_s),
            ("requests_per_minute", requests_per_minute),
            ("max_queries", max_queries),
            ("max_seconds", max_seconds),
        ):
            if limit is not None and not limit > 0:
                raise ConfigError(f"`{name}` must be > 0, or None for no limit, got {limit!r}; change it.")
        self.black_box = black_box
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self.retries, self.backoff_s, self.grace_s = retries, backoff_s, grace_s
        self.max_queries, self.max_seconds = max_queries, max_seconds
        self.spent = spent
        self.rng = rng if rng is not None else random.Random(0)
        self.clock, self.sleep = clock, sleep
        self.started = clock()
        self.window = Window(requests_per_minute)

    def budget_left(self) -> Literal["max_queries", "max_seconds"] | None:
        """The budget that is used up, or None while something may still be asked."""
        if self.max_seconds is not None and self.clock() - self.started >= self.max_seconds:
            return "max_seconds"
        if self.max_queries is not None and self.spent >= self.max_queries:
            return "max_queries"
        return None

    def run(
        self,
        items: Sequence[Item],
        on_answer: Callable[[Any, Answer], None],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Stop | None:
        """Gets an answer for every item.

        Args:
            items: (id, image, prompt).
            on_answer: called in this thread with (id, answer), once per answered item, as soon as it is there. Only
                if a keyboard interrupt hits the call itself, it is made a second time, and a `TiltoptError` by which
                it then refuses is ignored.
            on_progress: called with (answered so far, items) after each.

        Returns:
            None when every item was answered (or failed for good), else the `Stop`.

        Raises:
            RewardError: the black box answered in a form that cannot be used, or said that it cannot be used at all.
                Everything else that was asked is delivered before; items without an answer can be asked again.
            KeyboardInterrupt: passed on after what had arrived was delivered.
        """
        return Calls(self, items, on_answer, on_progress).loop()


class Window:
    """A limit of so many starts in any minute, and a hold that a black box may impose on everybody."""

    def __init__(self, per_minute: float | None) -> None:
        self.capacity = None if per_minute is None else max(1, int(per_minute))
        self.seconds = 0.0 if per_minute is None or self.capacity is None else 60.0 * self.capacity / per_minute
        self.starts: deque[float] = deque(maxlen=self.capacity)
        self.held_until = float("-inf")

    def free_at(self) -> float:
        """The earliest time of the next start."""
        if self.capacity is None or len(self.starts) < self.capacity:
            return self.held_until
        return max(self.held_until, self.starts[0] + self.seconds)

    def start(self, now: float) -> None:
        """Records a start."""
        if self.capacity is not None:
            self.starts.append(now)


def _at_least(name: str, value: float, low: float) -> None:
    """Raises `ConfigError` unless value >= low."""
    if not value >= low:
        raise ConfigError(f"`{name}` must be at least {low}, got {value!r}; change it.")
