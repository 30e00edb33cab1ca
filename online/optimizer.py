"""Ask and tell: draw queries, take their answers, lose nothing.

with Optimizer.create("checkpoints/mine", config) as opt:        # or Optimizer.open(folder) to continue
    for query in opt.ask(16):
        opt.tell(query.id, my_lab(query.image))                  # any order, any time, partial batches

In a run of comparisons a query is answered once it has won, lost or tied one:

for first, second in opt.pairs():
    opt.compare(first.id, second.id)      # the first is better; any two queries may be compared, in any order
opt.choose(3, [1, 2, 4])                  # the best of several is one answer, too
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any

import pandas as pd
from botorch.models.model import Model
from PIL import Image

from tiltopt.designs import IMAGES, DesignType, design_type
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online import rounds
from tiltopt.online.engine.base import Engine
from tiltopt.online.hooks import Hook, OnProgress
from tiltopt.online.pairs import Pairs
from tiltopt.online.places import place_of
from tiltopt.online.queries import EXTRA_KINDS, Queries, Query, batch_size, finite, query_number, spread, strength_of
from tiltopt.online.report import pages, record
from tiltopt.online.report.front import columns_of
from tiltopt.online.rounds import Job
from tiltopt.online.settings.composed import composed
from tiltopt.online.settings.objectives import objectives_of, outcomes_of
from tiltopt.online.settings.run import MOST, Settings
from tiltopt.online.settings.source import ASK_TELL, Source, how_to_go_on, presumed, refusal
from tiltopt.online.store import backup, files, run_folder
from tiltopt.online.store.rows import origin_of
from tiltopt.online.store.store import Store
from tiltopt.online.team import Kept, Team, device_of, on_main

if TYPE_CHECKING:
    from tiltopt.online.engine.diffusion import DiffusionEngine


class Optimizer:
    """A run that can be stopped at any instant and continued; see `create` and `open`.

    In a team of processes every rank holds one and calls `ask`; rank 0 alone has the store.
    """

    def __init__(
        self, folder: Path, settings: Settings, team: Team | None, engine: Engine | None, store: Store | None, lock: Any
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.team = team if team is not None else Team()
        self._given = team  # None: one process, which draws on the device that the settings name
        self._engine = engine
        self._store = store
        self._lock = lock
        self._one_asks = threading.Lock()
        self._may_ask = False
        self._source: Source | None = None  # who is known to answer, so that it is not looked up for each of them

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: Mapping[str, Any] | Settings | None = None,
        *,
        preset: str | None = None,
        prompts: str | Sequence[str] | None = None,
        reward: str | EllipsisType | None = ...,
        prior: Any = None,
        engine: Engine | None = None,
        team: Team | None = None,
        store_url: str | None = None,
    ) -> Optimizer:
        """Start a run in `folder`; `create(folder, {"rounds": 5}, preset="ucb:demo")` is the run of the command line
        `tiltopt run --config config/ucb.py:demo --config.rounds=5 --config.run_dir=<folder>`.

        Args:
            config: keys laid over the preset (see `tiltopt.online.settings.run`), or complete `Settings`.
            preset: `FILE:PRESET`, as `tiltopt presets` lists them; None for "ucb:demo" without its reward.
            prompts: texts, a file with one a line, or the name of a built-in list.
            reward: the reward's name; None: answers are told, whatever the preset says; absent: as configured.
            prior: one in memory in place of `prior.path`, such as a StableDiffusionPipeline, used as it stands with the
                adapters that are loaded into it. The run records its fingerprint and goes on with no other.
            engine: what draws and fits; None for the diffusion model that the settings name, loaded when first needed.
            team: the processes of the run; None for those of the engine, or this one alone on the settings' device.
            store_url: SQLAlchemy URL of a shared database; None for `queries.sqlite` in the folder.

        Raises:
            ConfigError: unknown or impossible settings. StoreError: the folder holds a run already, or cannot be
                written.
        """
        from tiltopt.online.settings.validation import validated  # its tables are heavy

        place = place_of(folder)
        settings = validated(composed(config, preset=preset, prompts=prompts, reward=reward))
        if prior is None and engine is None and design_type(settings.design) is not IMAGES:
            raise ConfigError(
                f"`design`: priors that `prior.path` loads draw pictures; for {settings.design!r} hand one over, "
                "Optimizer.create(..., prior=my_prior)."
            )
        if prior is not None:
            held = _engine_of(dataclasses.replace(settings, run_dir=str(place)), prior, engine, team)
            engine, settings = held, held.settings
        return cls._start(place, engine, team, False, lambda: run_folder.create(place, settings, store_url))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | Settings | None = None,
        allow_change: bool | Collection[str] | None = None,
        prior: Any = None,
        engine: Engine | None = None,
        team: Team | None = None,
        store_url: str | None = None,
        read_only: bool = False,
        recover: bool = False,
    ) -> Optimizer:
        """Continue the run in `folder`.

        Args:
            config: the settings wanted now, or some of their keys; None for those in `config.json`.
            allow_change: True to go on under changed settings, or the dotted keys that may change.
            prior: the one that the run was created with, where that was handed over.
            read_only: only look; works while another process writes, and in a folder without write permission.
            recover: should the store be damaged, keep it aside and go on from the newest whole round.

        Raises:
            ConfigError: the settings changed. StoreError: no run here, a damaged one, or another process writes it.
        """
        place = place_of(folder)
        opening = lambda: run_folder.reopen(place, config, allow_change, store_url, read_only, recover)  # noqa: E731
        opened = cls._start(place, engine, team, read_only, opening)
        if prior is not None:
            try:
                opened._take(prior, engine, team)
            except BaseException:
                opened.close()
                raise
        return opened

    def _take(self, prior: Any, engine: Engine | None, team: Team | None) -> None:
        """Go on with a prior in memory. Raises ConfigError where it is not the run's own."""
        from tiltopt.online.engine.in_memory import check_same

        held = _engine_of(self.settings, prior, engine, team)
        check_same(self.settings.prior, held.settings.prior, self.folder)
        self._engine, self.team = held, held.team

    @staticmethod
    def exists(folder: str | Path, *, store_url: str | None = None) -> bool:
        """Whether `folder` holds a run to `open`."""
        return run_folder.exists(place_of(folder), store_url)

    @classmethod
    def _start(
        cls,
        folder: Path,
        engine: Engine | None,
        team: Team | None,
        read_only: bool,
        opening: Callable[[], tuple[Store, Settings]],
    ) -> Optimizer:
        team = team if team is not None else (engine.team if engine is not None else None)

        def start() -> tuple[Settings, Kept[Store], Kept[run_folder.Right | None]]:
            lock = None if read_only or run_folder.is_shared(folder) else run_folder.lock(folder)
            try:
                store, settings = opening()
            except BaseException:
                if lock is not None:
                    lock.release()
                raise
            return settings, Kept(store), Kept(lock)

        settings, store, lock = on_main(team or Team(), start)
        return cls(folder, settings, team, engine, store.or_none, lock.or_none)

    # ---- asking

    def ask(self, n: int, progress: OnProgress | None = None) -> list[Query]:
        """Draw the next round: `n` new queries, stored with their images before they are returned.

        Plain samples of the prior until `initial_batch_size` queries have been asked over the run, then samples of the
        prior tilted towards what a surrogate fitted to every answer finds promising, given what is still pending. Where
        no surrogate can be fitted (fewer than 2 different answers), plain samples again, with a warning and a note.

        Collective: every rank calls it and gets the same queries.

        Args:
            n: 1 to 10,000.
            progress: told (kind, done, total) while the round is fitted and drawn.
        """
        n = batch_size(n, MOST)

        def prepare(on_progress: OnProgress) -> tuple[Job, Model | None]:
            return rounds.prepare(self.store, self.engine, self.settings, self.folder, n, on_progress)

        return self._ask(prepare, progress)

    def refine(self, id: int, strength: float = 0.5, n: int = 1, progress: OnProgress | None = None) -> list[Query]:
        """Draw `n` new queries near one that is asked or answered: its design, noised part of the way and denoised.

        What people do by hand with image-to-image. The denoising follows the surrogate of every answer where one can
        be fitted, else the prior. They are queries like any other, of a round of their own, which is none of those that
        `settings.rounds` plans. Collective, like `ask`.

        Args:
            id: the query to start from; its prompt is theirs.
            strength: in (0, 1]: near 0 keeps the design, 1 is a fresh sample.
            n: 1 to 10,000.
            progress: as in `ask`.

        Raises:
            ConfigError: `strength` or `n` out of range. StoreError: an unknown query, one that is failed or abandoned,
                or one of which neither latents nor design are left.
        """
        number, strength, n = query_number(id), strength_of(strength), batch_size(n, MOST)

        def prepare(on_progress: OnProgress) -> tuple[Job, Model | None]:
            wanted = number, strength, n, on_progress
            return rounds.prepare_refined(self.store, self.engine, self.settings, self.folder, *wanted)

        return self._ask(prepare, progress)

    def _ask(
        self, preparation: Callable[[OnProgress], tuple[Job, Model | None]], progress: OnProgress | None
    ) -> list[Query]:
        """Prepare a round, draw it, store it. Collective."""
        started = time.monotonic()
        on_progress = progress or Hook().on_progress

        def prepare() -> tuple[Job, Kept[Model | None]]:
            self._lead()
            self.checkpoint()
            job, model = preparation(on_progress)
            return job, Kept(model)

        def commit() -> None:
            self.store.reserve(job.record, [a.number for a in job.asks])
            rounds.commit(self.store, self.engine, self.folder, self.kind, job, drawn, model, started)
            self.checkpoint()

        with self._one_asks:  # of several threads the second waits, and asks the round after
            job, fitted = on_main(self.team, prepare)
            drawn, model = rounds.draw(self.engine, job, fitted.or_none, on_progress)
            on_main(self.team, commit)
        return Queries(
            Query(
                a.number,
                a.prompt,
                a.seed,
                d.image,
                d.predicted,
                d.predicted_sd,
                a.round,
                design=d.design,
                **vars(d.origin),
            )
            for a, d in zip(job.asks, drawn, strict=True)
        )

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """The right to enter a round, held by one thread of one process at a time. Rank 0 only.

        Raises:
            StoreError: another process has it.
        """
        with self._one_asks:
            self._lead()
            yield

    def _lead(self) -> None:
        """Take the right to ask rounds: a shared database takes answers from many, but rounds from one at a time."""
        if self._lock is None:
            self._lock = run_folder.lock(self.folder, self.store)
        if not self._may_ask:
            self.store.take_over(uuid.uuid4().hex)
            self._may_ask = True

    def leads(self) -> bool:
        """Whether this process has the right to ask rounds; where nobody has it, it is taken. Rank 0 only."""
        try:
            self._lead()
        except files.LockedError:
            return False
        return True

    def checkpoint(self) -> None:
        """Copy the store beside its newest round, if it changed; see `tiltopt.online.store.backup`."""
        if not run_folder.is_shared(self.folder):
            backup.copy_store(self.folder)

    # ---- who answers

    def source(self) -> Source | None:
        """Who answers this run; None where that is not known yet, or was never recorded (version 0.1)."""
        stored = self.store.source()
        return None if stored is None else Source.from_dict(stored)

    def answers_from(self, source: Source, *, allow_change: bool = False) -> None:
        """Record who answers from now on. To be called before the first answer; later it changes nothing.

        Args:
            allow_change: another reward may take over from a reward.

        Raises:
            ConfigError: the answers of this run come from somebody else.
        """
        if source == self._source:
            return
        recorded = self.source()
        takes_over = allow_change and recorded is not None and recorded.kind == source.kind
        if recorded is not None and not recorded.agrees(source) and not takes_over:
            raise refusal(recorded, source, self.folder)
        if recorded is None or (recorded != source and source.options is not None):
            self.store.set_source(source.to_dict())
        self._source = source

    def go_on(self) -> str:
        """How this run goes on, in words."""
        return how_to_go_on(presumed(self.source(), self.told() > 0, self.settings.reward), self.folder)

    def told(self) -> int:
        """How many answers, comparisons included, this run has been given; imported measurements do not count."""
        frame = self.store.frame()
        imported = [record.round for record in self.store.rounds() if record.kind == "imported"]
        answered = (frame["state"] == "answered") & ~frame["round"].isin(imported)
        return int(answered.sum()) + len(self.store.comparisons.frame())

    # ---- telling

    def tell(
        self,
        id: int,
        value: float | Mapping[str, float],
        sem: float | Mapping[str, float] | None = None,
        *,
        source: Source = ASK_TELL,
    ) -> None:
        """Store the answer of a query, durable when this returns.

        Args:
            id: the query.
            value: its reward, higher is better; a finite number. In a run of several `objectives` a number for each,
                by its name.
            sem: standard error of `value`, same unit, >= 0; None when unknown. Of several objectives by name, too.
            source: who says so; a run takes answers of one source.

        Raises:
            StoreError: unknown query, one that cannot be answered in its state, or a run of comparisons.
            RewardError: not a finite number, or an objective is missing.
            ConfigError: the answers of this run come from somebody else.
        """
        self.takes_values()
        self.answers_from(source)
        objectives = objectives_of(self.settings)
        if objectives:
            found = outcomes_of(objectives, value, sem)
            self.store.answer(query_number(id), *found[objectives[0].name], outcomes=found)
            return
        known = None if sem is None else spread(sem)
        self.store.answer(query_number(id), finite(value), known)

    def fail(self, id: int, reason: str) -> None:
        """The measurement went wrong; the query may be asked again with `retry`, and teaches nothing meanwhile."""
        self.store.fail(query_number(id), str(reason))

    def abandon(self, id: int, reason: str) -> None:
        """The query will never be measured."""
        self.store.abandon(query_number(id), str(reason))

    def retry(self, id: int) -> Query:
        """Ask a failed query again."""
        self.store.retry(query_number(id))
        return self._query(self.store.get(id))

    def undo(self, id: int) -> Query:
        """Take an answer back, or the decision to abandon, as long as no later round has been asked."""
        self.takes_values()
        self.store.undo(query_number(id))
        return self._query(self.store.get(id))

    # ---- comparing: for runs with `model.name = "pairwise"`

    def compare(
        self,
        winner_id: int,
        loser_id: int,
        *,
        tie: bool = False,
        rater: str | None = None,
        raw: str | None = None,
        source: Source = ASK_TELL,
    ) -> int:
        """Store that one query is better than another, durable when this returns.

        Args:
            winner_id, loser_id: two different queries, new or old; neither failed nor abandoned.
            tie: neither is better.
            rater: who says so.
            raw: what was said, kept for people.
            source: as in `tell`.

        Returns:
            The number of the comparison, for `undo_comparison`.

        Raises:
            StoreError: unknown queries, one with itself, one that is failed or abandoned, or a run of values.
        """
        self.takes_comparisons()
        self.answers_from(source)
        winner, loser = query_number(winner_id), query_number(loser_id)
        return self.store.comparisons.add(winner, loser, "tie" if tie else "win", rater=rater, raw=raw)

    def choose(
        self,
        best_id: int,
        other_ids: Sequence[int],
        *,
        rater: str | None = None,
        raw: str | None = None,
        source: Source = ASK_TELL,
    ) -> int:
        """Store that one query is the best of several, durable when this returns; one answer, in which the winner beats
        each of the others and they are not compared among themselves.

        Args:
            best_id, other_ids: two or more different queries, as in `compare`.
            rater, raw, source: as in `compare`.

        Returns:
            The number of the choice, for `undo_comparison`.

        Raises:
            StoreError: as `compare`, or a query twice.
        """
        self.takes_comparisons()
        self.answers_from(source)
        best, others = query_number(best_id), [query_number(id) for id in other_ids]
        return self.store.comparisons.choose(best, others, rater=rater, raw=raw)

    def fail_comparison(
        self, first_id: int, second_id: int, reason: str, *, rater: str | None = None, raw: str | None = None
    ) -> int:
        """No verdict could be had of two queries. It teaches nothing, and the pair is not offered again."""
        self.takes_comparisons()
        pair = query_number(first_id), query_number(second_id)
        return self.store.comparisons.add(*pair, "failed", rater=rater, raw=raw, error=str(reason))

    def undo_comparison(self, id: int | None = None) -> int:
        """Take a comparison or a whole choice back, the newest by default, as long as no later round has been asked.

        Returns:
            Its number.
        """
        self.takes_comparisons()
        row = self.store.comparisons.undo(None if id is None else query_number(id))
        return int(row.id if row.choice is None else row.choice)

    def comparisons(self) -> pd.DataFrame:
        """Every comparison that stands: columns id, round, winner, loser, outcome, rater, raw, error, created_at,
        choice (the same for the rows of one choice among several).

        `outcome` is win, tie or failed; of the latter two, winner and loser are merely the first and the second shown.
        """
        return self.store.comparisons.frame()

    def pairs(self) -> list[tuple[Query, Query]]:
        """The pairs that the plan of `tiltopt.online.pairs` wants compared and that were not, with their images."""
        self.takes_comparisons()
        found: dict[int, Query] = {}
        left = Pairs(self.store, self.settings, self.folder).left()
        for number in sorted({number for pair in left for number in pair.key}):
            found[number] = self._query(self.store.get(number))
        return [(found[pair.first], found[pair.second]) for pair in left]

    def takes_values(self) -> None:
        """Refuse values in a run of comparisons.

        Raises:
            StoreError: saying what to call instead.
        """
        if self.settings.pairwise:
            raise StoreError(
                "this run learns from comparisons (model.name = 'pairwise'), not from values; use pairs(), "
                "compare(winner, loser) and undo_comparison(id). Nothing was stored."
            )

    def takes_comparisons(self) -> None:
        """Refuse comparisons in a run of values.

        Raises:
            StoreError: naming the setting.
        """
        if not self.settings.pairwise:
            raise StoreError(
                f"this run learns from values (model.name = {self.settings.model.name!r}), not from comparisons; use "
                "tell(id, value), or a run with model.name = 'pairwise' (config/preference.py). Nothing is stored."
            )

    # ---- looking

    def queries(self, kind: str | None = None) -> pd.DataFrame:
        """Queries: columns id, round, prompt, seed, state, value, sem, predicted, predicted_sd, error, and where each
        started from: operator, parents (ids with spaces between), k0. In a run of several objectives `value` is the
        first, and each has a column of its own after these.

        Args:
            kind: of rounds of this kind (plain, tilted, imported, reference), or "all"; None for all but the reference
                samples, which have the round -1 and the ids -1, -2, ...
        """
        frame = self.store.frame(kind=kind)
        names = [objective.name for objective in objectives_of(self.settings)]
        return frame.join(columns_of(self.store.outcomes(), list(frame["id"]), names)) if names else frame

    def best(self, n: int = 1) -> list[Query]:
        """The `n` queries with the highest answers (or utilities, in a run of comparisons), the best first, each with
        its `value`. Fewer where fewer are answered."""
        answered = record.load_run(self.folder, self.store).queries.dropna(subset="value")
        top = answered[answered["state"] == "answered"].sort_values("value", ascending=False, kind="stable")
        values = top.head(batch_size(n, MOST)).set_index("id")["value"]
        return Queries(
            dataclasses.replace(self._query(self.store.get(int(i))), value=float(v)) for i, v in values.items()
        )

    def summary(self) -> dict[str, Any]:
        """The run in numbers, as `summary.json` holds them."""
        return record.summarise(record.load_run(self.folder, self.store))

    def report(self) -> Path:
        """Write `report.html` into the run's folder, as `tiltopt report` does; returns its path."""
        return pages.write_report(self.folder, record.judged_record(record.load_run(self.folder, self.store)))

    def __repr__(self) -> str:
        if self._store is None:
            return f"Optimizer({str(self.folder)!r}, {'closed' if self.team.is_main else 'without a store'})"
        counts = ", ".join(f"{n} {state}" for state, n in self._store.counts().items() if n) or "nothing asked yet"
        drawn = sum(known.kind not in EXTRA_KINDS for known in self._store.rounds())
        who = self.source() or ("unknown" if self.told() else "nobody yet")
        return (
            f"Optimizer({str(self.folder)!r}, {drawn} of {self.settings.rounds + 1} rounds: {counts}; answers: {who})"
        )

    def _repr_html_(self) -> str:
        if self._store is None:
            return f"<pre>{escape(repr(self))}</pre>"
        return pages.glance(record.load_run(self.folder, self._store), repr(self))

    def pending(self) -> list[Query]:
        """Queries that are asked and have no answer yet, with their designs.

        One whose design cannot be read is left out with a warning that names it.
        """
        found = []
        for row in self.store.in_state("asked"):
            try:
                found.append(self._query(row))
            except StoreError as error:
                warnings.warn(f"{error} Until then it is left out.", stacklevel=2)
        return found

    def claim(self, worker: str, n: int, patience_s: float = 300.0) -> list[Query]:
        """Take up to `n` outstanding queries for `worker`; no other worker is handed them meanwhile.

        Those of a worker without a sign of life (`claim`, `heartbeat`) for `patience_s` seconds are handed out again.
        A query whose design cannot be read has failed, and says so; put the file back and `retry` it.

        Args:
            worker: a name that no other worker has.

        Raises:
            StoreError: no name; or in a run of comparisons, whose work is handed out by `pairs`.
        """
        self.takes_values()
        found = []
        for row in self.store.claim(worker, batch_size(n, MOST), patience_s):
            try:
                found.append(self._query(row))
            except StoreError as error:
                self.store.fail(row.number, str(error))
                warnings.warn(f"query {row.number} has failed: {error}", stacklevel=2)
        return found

    def heartbeat(self, worker: str) -> int:
        """Sign of life of `worker`; returns how many queries it still holds."""
        return self.store.heartbeat(worker)

    def _query(self, row: Any) -> Query:
        design, origin = self.design(row.number), origin_of(row)
        known = row.number, row.prompt, row.seed, self.kind.view(design), row.predicted, row.predicted_sd, row.round
        return Query(*known, design=design, **vars(origin))

    @property
    def kind(self) -> DesignType:
        """What the designs of this run are."""
        return design_type(self.settings.design)

    def design(self, id: int) -> Any:
        """The design of a query, as the black box is handed it: an image, or an array (`tiltopt.designs`).

        Raises:
            StoreError: its file is missing or damaged.
        """
        return files.query_design(self.folder, query_number(id), self.kind)

    def image(self, id: int) -> Image.Image:
        """The picture of a query; of a run of images the design itself.

        Raises:
            StoreError: its file is missing or damaged.
        """
        return files.query_image(self.folder, query_number(id))

    @property
    def store(self) -> Store:
        """The query store. Rank 0 only."""
        if self._store is None:
            what = "this run is closed" if self.team.is_main else "only rank 0 of a team holds the store"
            raise StoreError(f"{what}; ask on every rank, tell on rank 0.")
        return self._store

    @property
    def engine(self) -> Engine:
        """What draws and fits; the models are loaded at the first use."""
        if self._engine is None:
            from tiltopt.online.engine.diffusion import DiffusionEngine

            team = self._given if self._given is not None else Team(device=device_of(self.settings.device))
            self._engine = DiffusionEngine(self.settings, team)
        return self._engine

    def close(self) -> None:
        """Release the store and the right to write. What was told is already safe; the rounds' copy is renewed.

        Raises:
            StoreError: answers that neither the database nor the disk took are lost; it names them.
        """
        store, self._store = self._store, None
        lock, self._lock = self._lock, None
        try:
            if store is not None:
                store.close()
                if lock is not None:
                    self._copy_last()
        finally:
            if lock is not None:
                lock.release()

    def _copy_last(self) -> None:
        try:
            self.checkpoint()
        except StoreError as error:  # nothing is lost: the store itself is whole
            warnings.warn(str(error), stacklevel=3)

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _engine_of(settings: Settings, prior: Any, engine: Engine | None, team: Team | None) -> DiffusionEngine:
    """What draws from a prior in memory. Raises ConfigError beside another engine, or for another sampler's prior."""
    from tiltopt.online.engine.diffusion import DiffusionEngine
    from tiltopt.online.settings.validation import check_sampler

    if engine is not None:
        raise ConfigError("expected `prior` or `engine`, got both: an engine has a prior of its own.")
    held = DiffusionEngine(settings, team, prior)
    check_sampler(held.settings.sampler, held.settings.prior)
    return held
