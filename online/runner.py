"""The one door to a black box that is slow, flaky and costs money: threads, time-outs, retries, rate limit, budgets.

    runner = Runner(make_reward("http", url=...), CallPolicy(concurrency=4, timeout_s=60, max_queries=500), ledger)
    stop = runner.run([(q.id, q.image, q.prompt) for q in queries], on_answer=store.deliver)

What is about to be asked is entered in the ledger before the black box is called, so that a budget holds across kills.
Everything happens in the caller's thread; worker threads do nothing but call the black box and ring a bell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tiltopt.errors import ConfigError, RewardError, TiltoptError
from tiltopt.online.hooks import OnStep
from tiltopt.online.queries import Spent
from tiltopt.online.signals import patient
from tiltopt.rewards.base import Answer, BlackBox, Retry
from tiltopt.rewards.replies import ReplyError, read_reply

log = logging.getLogger(__name__)

Item = tuple[Hashable, Any, Any]
"""(id, image, prompt); what the two last are is between the caller and the black box."""

Limit = Literal["max_queries", "max_calls", "max_seconds"]

PROGRAMMING_ERRORS = (
    TypeError, NameError, AttributeError, ImportError, SyntaxError, AssertionError, LookupError, ZeroDivisionError,
    NotImplementedError, RecursionError, ReplyError,
)  # fmt: skip
"""Errors of the function that was called, not of the world around it: the same call would raise them again."""

POLL_S = 0.05  # clock and signals are looked at this often


@dataclass(frozen=True, kw_only=True)
class CallPolicy:
    """How a black box is called, and how much of it may be spent.

    Args:
        concurrency: calls in flight, at least 1; with 1, answers are delivered in the order of the items.
        timeout_s: seconds for one call; None waits for ever. A call that timed out cannot be interrupted: it no longer
            counts as in flight, and if it answers before its retry does, that is used.
        retries: further tries after a call that raised or timed out, at least 0.
        backoff_s: seconds before the first retry, at least 0; doubles, times a jitter in [1, 1.5).
        requests_per_minute: calls started per minute, retries included; None for no limit.
        max_queries: queries handed out over the whole run, those of unknown fate included; None for no limit. A retry
            does not count again.
        max_calls: the same with every retry counted; a call with n images counts n.
        max_seconds: seconds of work on the run after which nothing more is handed out; None for no limit.
        grace_s: seconds for which calls in flight are still awaited after a stop, and answers that the disk refuses are
            kept in memory.
        stop_after: so many calls in a row that raised, timed out or gave an unreadable reply end the asking.
        on_unknown: what a resumed run does with queries that were handed out to a process that died: "ask" them again,
            or "leave" them failed.

    Raises:
        ConfigError: an impossible value.
    """

    concurrency: int = 1
    timeout_s: float | None = None
    retries: int = 2
    backoff_s: float = 1.0
    requests_per_minute: float | None = None
    max_queries: int | None = None
    max_calls: int | None = None
    max_seconds: float | None = None
    grace_s: float = 30.0
    stop_after: int = 5
    on_unknown: Literal["ask", "leave"] = "ask"

    def __post_init__(self) -> None:
        for name, low in (("concurrency", 1), ("retries", 0), ("backoff_s", 0), ("grace_s", 0), ("stop_after", 1)):
            if not getattr(self, name) >= low:
                raise ConfigError(f"`{name}` must be at least {low}, got {getattr(self, name)!r}; change it.")
        for name in ("timeout_s", "requests_per_minute", "max_queries", "max_calls", "max_seconds"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ConfigError(f"`{name}` must be > 0, or None for no limit, got {limit!r}; change it.")
        if self.on_unknown not in ("ask", "leave"):
            raise ConfigError(f'`on_unknown` must be "ask" or "leave", got {self.on_unknown!r}; change it.')

    @classmethod
    def from_reward(cls, reward: Any) -> CallPolicy:
        """The policy that a configuration's section `reward` asks for."""
        return cls(**{field.name: getattr(reward, field.name) for field in dataclasses.fields(cls)})

    def used_up(self, spent: Spent, promised: int = 0) -> Limit | None:
        """The budget that is used up, or None while something may still be asked.

        Args:
            spent: so far.
            promised: queries that are to be handed out again and have their place in the budget.
        """
        if self.max_seconds is not None and spent.seconds >= self.max_seconds:
            return "max_seconds"
        if self.max_queries is not None and spent.queries + promised >= self.max_queries:
            return "max_queries"
        if self.max_calls is not None and spent.calls >= self.max_calls:
            return "max_calls"
        return None


class Ledger(Protocol):
    """The book of what a run spends, durable: the store's, or a `Purse` where nothing is kept."""

    def spent(self) -> Spent:
        """What was spent over the whole run."""
        ...

    def hand_out(
        self, ids: Sequence[Any], *, max_queries: int | None = None, max_calls: int | None = None
    ) -> Sequence[Any]:
        """Enter that the black box is about to be asked about these.

        Returns:
            Those of `ids` for which the budgets, of the whole run, have room, and which still want an answer.
        """
        ...

    def came_back(self, ids: Sequence[Any]) -> None:
        """Enter that a call about these ended without an answer: until they are handed out again it was no query."""
        ...


class Purse:
    """A ledger for as long as the process lives."""

    def __init__(self, spent: Spent | None = None) -> None:
        self._spent = spent if spent is not None else Spent()

    def spent(self) -> Spent:
        return self._spent

    def hand_out(
        self, ids: Sequence[Any], *, max_queries: int | None = None, max_calls: int | None = None
    ) -> Sequence[Any]:
        room = [len(ids)]
        room += [] if max_queries is None else [max_queries - self._spent.queries]
        room += [] if max_calls is None else [max_calls - self._spent.calls]
        n = max(0, min(room))
        self._spent = replace(self._spent, queries=self._spent.queries + n, calls=self._spent.calls + n)
        return ids[:n]

    def came_back(self, ids: Sequence[Any]) -> None:
        self._spent = replace(self._spent, queries=self._spent.queries - len(ids))


@dataclass(frozen=True)
class Fault(Answer):
    """No answer: the call raised, timed out or gave an unreadable reply. It says nothing about the design.

    `raw` is the traceback from the user's own code on, where there is one.
    """


@dataclass(frozen=True)
class Stop:
    """Why a `Runner` ended before every item was answered.

    Args:
        reason: the budget that ran out, or "stop_after": the black box is dead.
        remaining: ids that have no answer yet; they can be handed to a later run.
        message: for people.
    """

    reason: Limit | Literal["stop_after"]
    remaining: tuple[Hashable, ...]
    message: str

    @property
    def failed(self) -> bool:
        """Whether the run went wrong, rather than to the end of its budget."""
        return self.reason == "stop_after"


class Runner:
    """Hands images to a black box and delivers each answer the moment it arrives.

    A call that raises, or gives nothing in time, is tried again; the last try of a batch hands its images over one by
    one, so that one bad image does not fail its neighbours. When retries are used up the item's answer is a `Fault`.
    A programming error fails its query at once (a batch is handed over one by one first), and so does a reply that
    cannot be read. NaN and -inf are answers: the design cannot be measured.

    Args:
        black_box: what is called, `black_box.batch_size` images at a time, from worker threads.
        policy: how.
        ledger: the run's book; one for the life of this object when None.
        rng: source of the jitter.
        clock: monotonic seconds. sleep: waits so many seconds.
    """

    def __init__(
        self,
        black_box: BlackBox,
        policy: CallPolicy | None = None,
        ledger: Ledger | None = None,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.black_box = black_box
        self.policy = policy if policy is not None else CallPolicy()
        self.ledger: Ledger = ledger if ledger is not None else Purse()
        self.rng = rng if rng is not None else random.Random(0)
        self.clock, self.sleep = clock, sleep
        self.started = clock() - self.ledger.spent().seconds
        limit = self.policy.max_seconds
        self.ends_at = float("inf") if limit is None else self.started + limit
        self.window = Window(self.policy.requests_per_minute)
        self.dead_calls = 0  # in a row, over all calls of `run`
        self.first_trouble = ""  # of that row

    def used_up(self, promised: int = 0) -> Limit | None:
        """See `CallPolicy.used_up`; by this object's clock."""
        spent = replace(self.ledger.spent(), seconds=self.clock() - self.started)
        return self.policy.used_up(spent, promised)

    def run(
        self,
        items: Sequence[Item],
        on_answer: Callable[[Any, Answer], None],
        on_progress: OnStep | None = None,
    ) -> Stop | None:
        """Gets an answer for every item.

        In the main thread, the first SIGINT or SIGTERM ends the handing out and leaves calls in flight their grace; the
        second ends at once.

        Args:
            items: what to ask about.
            on_answer: called in this thread with (id, answer), once per answered item, as soon as it is there, and
                again when an interrupt cut it short. What it raises ends the asking.
            on_progress: called with (answered so far, items) after each.

        Returns:
            None when every item was answered (or failed for good), else the `Stop`.

        Raises:
            RewardError: the black box said that it cannot be used at all. StoreError: from the ledger or `on_answer`.
                Everything else that was asked is delivered before; items without an answer can be asked again. So it
                is with whatever else `on_answer` and `on_progress` raise.
            KeyboardInterrupt: after a signal, when what was in flight has been delivered.
        """
        calls = _Calls(self, items, on_answer, on_progress)
        with patient(calls.interrupt):
            return calls.loop()

    def ask(self, images: Sequence[Any], prompts: Sequence[Any]) -> list[Answer]:
        """One answer per image, in order.

        Raises:
            RewardError: a budget ended, or the black box is dead.
        """
        found: dict[Any, Answer] = {}
        items = [(i, image, prompt) for i, (image, prompt) in enumerate(zip(images, prompts, strict=True))]
        stop = self.run(items, found.__setitem__)
        if stop is not None:
            raise RewardError(stop.message)
        return [found[i] for i in range(len(images))]


@dataclass(frozen=True)
class _Raised:
    """A call that raised instead of answering."""

    error: BaseException


@dataclass(frozen=True)
class _Job:
    """One call to make: positions of its items among all items, how often it was tried, when it is due."""

    positions: tuple[int, ...]
    attempt: int = 0
    due: float = 0.0


@dataclass
class _Flight:
    """A call under way."""

    job: _Job
    deadline: float


class _Silence(Exception):
    """A call that gave nothing in time."""


@dataclass
class _Calls:
    """One `Runner.run`: what is fresh, waiting for a retry, under way, late, answered."""

    runner: Runner
    items: Sequence[Item]
    on_answer: Callable[[Any, Answer], None]
    on_progress: OnStep | None
    fresh: deque[_Job] = field(default_factory=deque)
    waiting: list[_Job] = field(default_factory=list)
    flights: dict[int, _Flight] = field(default_factory=dict)
    late: dict[int, _Job] = field(default_factory=dict)
    arrivals: deque[tuple[int, Any]] = field(default_factory=deque)
    bell: threading.Event = field(default_factory=threading.Event)
    resolved: set[int] = field(default_factory=set)
    problems: list[Exception] = field(default_factory=list)
    stopped: Limit | Literal["stop_after"] | None = None
    death: str = ""
    interrupted: bool = False
    give_up_at: float = float("inf")
    tokens: int = 0

    # ---- the whole

    def loop(self) -> Stop | None:
        """Starts, awaits and settles calls until nothing is left to do."""
        size = max(1, int(self.runner.black_box.batch_size))
        positions = range(len(self.items))
        self.fresh.extend(_Job(tuple(positions[i : i + size])) for i in range(0, len(self.items), size))
        try:
            while True:
                self.check_clock()
                self.start_due()
                if self.flights:
                    self.receive(self.wait_s(POLL_S))
                    self.expire()
                elif self.fresh or self.waiting:
                    self.runner.sleep(self.wait_s(POLL_S))
                else:
                    break
            self.drain()
        except KeyboardInterrupt:
            self.drain()
            raise
        return self.end()

    def interrupt(self) -> None:
        """Ends the asking; called from a signal handler, between any two instructions of the run's thread."""
        self.interrupted = True

    def end(self) -> Stop | None:
        """What the caller is told when nothing is left to do."""
        if self.interrupted:
            raise KeyboardInterrupt
        if self.problems:
            more = f" (and {len(self.problems) - 1} more like it)" if len(self.problems) > 1 else ""
            first = self.problems[0]
            if isinstance(first, TiltoptError):
                first.args = (f"{first}{more}",)  # of any class, whatever else it takes
            raise first
        remaining = tuple(item[0] for i, item in enumerate(self.items) if i not in self.resolved)
        if self.stopped == "stop_after":
            return Stop("stop_after", remaining, self.death)
        if self.stopped is None or not remaining:
            return None
        limit = getattr(self.runner.policy, self.stopped)
        message = f"the budget `{self.stopped}` = {limit:g} is used up, {len(remaining)} queries have no answer yet"
        return Stop(self.stopped, remaining, message)

    def check_clock(self) -> None:
        """Ends the asking when time ran out or something is wrong; gives up on calls in flight after the grace."""
        now, grace = self.runner.clock(), self.runner.policy.grace_s
        if now >= self.runner.ends_at and self.stopped != "stop_after" and (self.fresh or self.waiting or self.flights):
            self.stopped = "max_seconds"
        if self.stopped in ("max_seconds", "stop_after") or self.interrupted or self.problems:
            if self.give_up_at == float("inf") and self.flights:
                log.warning("waiting up to %g s for %d calls under way", grace, len(self.flights))
            self.fresh.clear()
            self.waiting.clear()
            self.give_up_at = min(self.give_up_at, now + grace)
        if now >= self.give_up_at:
            self.drain()
            self.flights.clear()

    def wait_s(self, longest: float) -> float:
        """Seconds until the next thing that could happen without an arrival, at most `longest`."""
        runner, now = self.runner, self.runner.clock()
        times = [now + longest, self.give_up_at, *(flight.deadline for flight in self.flights.values())]
        if self.stopped is None:
            times.append(runner.ends_at)
        if len(self.flights) < runner.policy.concurrency and (self.fresh or self.waiting):
            alone = runner.policy.concurrency == 1
            head = min(self.waiting, key=lambda job: job.positions).due if self.waiting else now
            earliest = head if alone or not self.waiting else min(job.due for job in self.waiting)
            earliest = now if self.fresh and not alone else earliest
            times.append(max(earliest, runner.window.free_at()))
        return max(0.0, min(times) - now)

    # ---- handing out

    def start_due(self) -> None:
        """Starts calls while there is room, something is due, and the limits allow it."""
        runner = self.runner
        while (
            len(self.flights) < runner.policy.concurrency
            and runner.clock() >= runner.window.free_at()
            and not self.interrupted
            and not self.problems
        ):
            job = self.next_job()
            if job is None:
                return
            job = self.entered(tuple(i for i in job.positions if i not in self.resolved), job)
            if job.positions:
                self.launch(job)

    def next_job(self) -> _Job | None:
        """The next call that is due, retries before new ones; None if there is none."""
        now, alone = self.runner.clock(), self.runner.policy.concurrency == 1
        due = sorted((job for job in self.waiting if job.due <= now), key=lambda job: job.positions)
        if due and (not alone or due[0].positions == min(job.positions for job in self.waiting)):
            self.waiting.remove(due[0])
            return due[0]
        if not self.fresh or (alone and self.waiting):
            return None
        return self.fresh.popleft()

    def entered(self, positions: tuple[int, ...], job: _Job) -> _Job:
        """As much of a call as the ledger takes; the budget that has no room for more ends the asking."""
        runner, promised = self.runner, sum(len(other.positions) for other in self.waiting)
        limit = runner.policy.max_queries
        limits = {"max_queries": None if limit is None else limit - promised, "max_calls": runner.policy.max_calls}
        try:
            out = set(runner.ledger.hand_out([self.items[i][0] for i in positions], **limits))
        except TiltoptError as error:
            self.problems.append(error)
            return replace(job, positions=())
        chosen = tuple(i for i in positions if self.items[i][0] in out)
        if len(chosen) < len(positions):
            self.stopped = runner.used_up(promised) or self.stopped
            if self.stopped is None:  # somebody else has answered them
                self.resolved.update(set(positions) - set(chosen))
            else:
                self.fresh.clear()
            if self.stopped == "max_calls":
                self.waiting.clear()
        return replace(job, positions=chosen)

    def launch(self, job: _Job) -> None:
        """Calls the black box in a new daemon thread, so that a call that hangs cannot keep the process alive."""
        runner = self.runner
        now, token = runner.clock(), self.tokens
        self.tokens += 1
        runner.window.start(now)
        limit = runner.policy.timeout_s
        self.flights[token] = _Flight(job, float("inf") if limit is None else now + limit)
        images = [self.items[i][1] for i in job.positions]
        prompts = [self.items[i][2] for i in job.positions]

        def work() -> None:
            reply: Any
            try:
                reply = runner.black_box(images, prompts)
            except BaseException as error:  # a worker has no caller to raise to: the run's thread settles it
                reply = _Raised(error)
            self.arrivals.append((token, reply))
            self.bell.set()

        threading.Thread(target=work, name=f"black-box-{token}", daemon=True).start()

    # ---- taking in

    def receive(self, timeout_s: float) -> None:
        """Waits until something arrives, and settles it."""
        self.bell.wait(max(timeout_s, 1e-4))
        self.bell.clear()
        self.drain()

    def drain(self) -> None:
        """Settles everything that has arrived; an arrival is forgotten only once it is settled."""
        while self.arrivals:
            self.settle(*self.arrivals[0])
            self.arrivals.popleft()

    def settle(self, token: int, reply: Any) -> None:
        """Delivers the answers of a call, or sees to its retry."""
        flight = self.flights.get(token)
        job = flight.job if flight is not None else self.late.get(token)
        if job is not None and not isinstance(reply, _Raised):
            self.read(job, reply, in_time=flight is not None)
        elif job is not None and flight is not None:
            self.failed(job, reply.error)
        self.flights.pop(token, None)

    def read(self, job: _Job, reply: Any, in_time: bool) -> None:
        """Delivers what a reply says; what cannot be read of it fails, unless a retry is under way."""
        answers, problems = read_reply(self.runner.black_box.name, reply, len(job.positions))
        if all(answer is None for answer in answers):
            if not in_time:
                return
            self.dead(problems[0])
        else:
            self.runner.dead_calls = 0
        missing = [position for position, answer in zip(job.positions, answers, strict=True) if answer is None]
        for position, answer in zip(job.positions, answers, strict=True):
            if answer is not None:
                self.deliver(position, answer)
        if in_time:  # one problem per entry, or one for the whole reply
            texts = problems if len(problems) == len(missing) else problems * len(missing)
            for position, text in zip(missing, texts, strict=True):
                self.deliver(position, Fault.failure(text, raw=str(reply)[:500]))

    def expire(self) -> None:
        """Treats calls past their deadline as failed; should they answer after all, `settle` still uses it."""
        now = self.runner.clock()
        for token in [token for token, flight in self.flights.items() if now >= flight.deadline]:
            job = self.flights.pop(token).job
            self.late[token] = job
            self.failed(job, _Silence(f"no answer within {self.runner.policy.timeout_s:g} s"))

    def failed(self, job: _Job, error: BaseException) -> None:
        """A call raised: an error of ours ends the asking, a `Retry` holds everybody, a programming error fails the
        query, anything else is tried again."""
        if isinstance(error, TiltoptError) and not isinstance(error, ReplyError):
            self.problems.append(error)
            self.back(job)
            return
        if isinstance(error, Retry):
            window = self.runner.window
            window.held_until = max(window.held_until, self.runner.clock() + error.after_s)
            self.again(job, str(error), "", error.after_s)
            if job.attempt >= self.runner.policy.retries:  # being asked to wait is no sign of death, for ever is
                self.dead(str(error))
            return
        if isinstance(error, _Silence):
            text, told = str(error), ""
        else:
            text, told = f"{type(error).__name__}: {error}", traceback_of(error)
        self.dead(told or text)
        if not isinstance(error, PROGRAMMING_ERRORS):
            self.again(job, text, told, split=True)
        elif len(job.positions) > 1 and job.attempt < self.runner.policy.retries:
            self.wait(job, self.runner.policy.retries, 0.0, split=True)
        else:
            for position in job.positions:
                self.deliver(position, Fault.failure(text, raw=told))

    def again(self, job: _Job, text: str, told: str, after_s: float = 0.0, split: bool = False) -> None:
        """Puts the call on the waiting list, or delivers its error when all retries are used up."""
        runner, attempt = self.runner, job.attempt + 1
        if attempt > runner.policy.retries:
            tries = f"{attempt} tries" if attempt > 1 else "1 try"
            for position in job.positions:
                self.deliver(position, Fault.failure(f"{text} (after {tries})", raw=told or None))
            return
        delay = max(after_s, runner.policy.backoff_s * 2**job.attempt * (1 + runner.rng.random() / 2))
        log.warning("reward `%s`: %s; trying again in %.1f s", runner.black_box.name, text, delay)
        self.wait(job, attempt, delay, split and attempt == runner.policy.retries)

    def wait(self, job: _Job, attempt: int, delay: float, split: bool) -> None:
        """Puts a call that ended without an answer on the waiting list."""
        self.back(job)
        groups = [(i,) for i in job.positions] if split else [job.positions]
        self.waiting.extend(_Job(group, attempt, self.runner.clock() + delay) for group in groups)

    def back(self, job: _Job) -> None:
        """Tells the ledger that a call ended without an answer; a refusal ends the asking."""
        try:
            self.runner.ledger.came_back([self.items[i][0] for i in job.positions])
        except TiltoptError as error:
            self.problems.append(error)

    def dead(self, trouble: str) -> None:
        """Counts a call that gave nothing; too many in a row end the asking."""
        runner = self.runner
        runner.first_trouble = trouble if runner.dead_calls == 0 else runner.first_trouble
        runner.dead_calls += 1
        if runner.dead_calls >= runner.policy.stop_after and self.stopped != "stop_after":
            self.stopped = "stop_after"
            self.death = (
                f"{runner.dead_calls} calls in a row of the reward `{runner.black_box.name}` raised, timed out or gave "
                f"an unreadable reply. The first of them:\n{runner.first_trouble}"
            )

    # ---- delivering

    def deliver(self, position: int, answer: Answer) -> None:
        """Hands one answer to the caller; again if an interrupt cut the caller off, who may then say it has it."""
        if position in self.resolved:
            return
        self.resolved.add(position)
        id_ = self.items[position][0]
        try:
            self.on_answer(id_, answer)
            if self.on_progress is not None:
                self.on_progress(len(self.resolved), len(self.items))
        except Exception as error:  # of a listener, too: what others have been asked is awaited all the same
            self.problems.append(error)
        except KeyboardInterrupt:
            with contextlib.suppress(TiltoptError):
                self.on_answer(id_, answer)
            if self.interrupted:
                raise
            self.interrupted = True


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


def traceback_of(error: BaseException) -> str:
    """The traceback of an error that a worker caught, from the black box's own code on."""
    inside = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return "".join(traceback.format_exception(type(error), error, inside, chain=False)).rstrip()


__all__ = ["CallPolicy", "Fault", "Item", "Ledger", "Purse", "Runner", "Stop", "Window"]
