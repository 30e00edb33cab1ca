"""Ask and tell: draw queries, take their answers, lose nothing.

with Optimizer.create("checkpoints/mine", config) as opt:        # or Optimizer.open(folder) to continue
    for query in opt.ask(16):
        opt.tell(query.id, my_lab(query.image))                  # any order, any time, partial batches
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from botorch.models.model import Model
from PIL import Image

from tiltopt.errors import StoreError
from tiltopt.online import asking, copies, files, runfolder
from tiltopt.online.answers import batch_size, finite, query_number, spread
from tiltopt.online.asking import Job, Progress
from tiltopt.online.comparing import Comparing
from tiltopt.online.engine import Engine
from tiltopt.online.prompts import load_prompts
from tiltopt.online.settings import Settings
from tiltopt.online.store import Store
from tiltopt.online.team import Team
from tiltopt.online.together import on_main, with_peers


@dataclass(frozen=True)
class Query:
    """A design whose reward is wanted.

    Args:
        id: its number in the run, from 1.
        prompt: the text it was drawn for.
        seed: of its noise; the same seed and settings give the same image.
        image: what to measure.
        predicted: the surrogate's mean, reward units; None for plain samples.
        predicted_sd: the surrogate's standard deviation, reward units; None for plain samples.
        round: the `ask` it came from, from 0.
    """

    id: int
    prompt: str
    seed: int
    image: Image.Image
    predicted: float | None
    predicted_sd: float | None
    round: int


class Optimizer(Comparing):
    """A run that can be stopped at any instant and continued; see `create` and `open`.

    In a team of processes every rank holds one and calls `ask`; rank 0 alone has the store.
    """

    def __init__(
        self, folder: Path, settings: Settings, team: Team, engine: Engine | None, store: Store | None, lock: Any
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.team = team
        self._engine = engine
        self._store = store
        self._lock = lock
        self._copied = -math.inf  # changes up to then are in the rounds' copies

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: Mapping[str, Any] | Settings,
        *,
        engine: Engine | None = None,
        team: Team | None = None,
        store_url: str | None = None,
    ) -> Optimizer:
        """Start a run in `folder`.

        Args:
            config: settings; absent keys take their defaults (see `tiltopt.online.settings`).
            engine: what draws and fits; None for the diffusion model that the settings name, loaded when first needed.
            team: the processes of the run; None for those of the engine, or this one alone.
            store_url: SQLAlchemy URL of a shared database; None for `queries.sqlite` in the folder.

        Raises:
            ConfigError: impossible settings. StoreError: the folder holds a run already, or cannot be written.
        """
        place = Path(folder)
        load_prompts(Settings.from_config(config).prompts)
        return cls._start(place, engine, team, False, lambda: runfolder.create(place, config, store_url))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | Settings | None = None,
        allow_change: bool | Collection[str] | None = None,
        engine: Engine | None = None,
        team: Team | None = None,
        store_url: str | None = None,
        read_only: bool = False,
        recover: bool = False,
    ) -> Optimizer:
        """Continue the run in `folder`.

        Args:
            config: the settings wanted now; None for those in `config.json`.
            allow_change: True to go on under changed settings, or the dotted keys that may change.
            read_only: only look; works while another process writes, and in a folder without write permission.
            recover: should the store be damaged, keep it aside and go on from the newest whole round.

        Raises:
            ConfigError: the settings changed. StoreError: no run here, a damaged one, or another process writes it.
        """
        place = Path(folder)
        opening = lambda: runfolder.reopen(place, config, allow_change, store_url, read_only, recover)  # noqa: E731
        return cls._start(place, engine, team, read_only, opening)

    @staticmethod
    def exists(folder: str | Path, *, store_url: str | None = None) -> bool:
        """Whether `folder` holds a run to `open`."""
        return runfolder.exists(Path(folder), store_url)

    @classmethod
    def _start(
        cls,
        folder: Path,
        engine: Engine | None,
        team: Team | None,
        read_only: bool,
        opening: Callable[[], tuple[Store, Settings]],
    ) -> Optimizer:
        team = team if team is not None else (engine.team if engine is not None else Team())
        held: dict[str, Any] = {"store": None, "lock": None}

        def start() -> Settings:
            if not read_only and not runfolder.is_shared(folder):
                held["lock"] = runfolder.lock(folder)
            try:
                held["store"], settings = opening()
            except BaseException:
                if held["lock"] is not None:
                    held["lock"].release()
                raise
            return settings

        settings = on_main(team, start)
        return cls(folder, settings, team, engine, held["store"], held["lock"])

    # ---- asking

    def ask(self, n: int, progress: Progress | None = None) -> list[Query]:
        """Draw the next round: `n` new queries, stored with their images before they are returned.

        Plain samples of the prior until `initial_batch_size` queries have been asked over the run, then samples of the
        prior tilted towards what a surrogate fitted to every answer finds promising, given what is still pending. Where
        no surrogate can be fitted (fewer than 2 different answers), plain samples again, with a warning and a note.

        Collective: every rank calls it and gets the same queries.
        """
        n = batch_size(n)
        started = time.monotonic()
        tell = progress if progress is not None else (lambda kind, done, total: None)
        held: list[Model | None] = [None]

        def prepare() -> Job:
            if self._lock is None:  # a shared database takes answers from many, but rounds from one at a time
                self._lock = runfolder.lock(self.folder)
            self.checkpoint()
            job, held[0] = asking.prepare(self.store, self.engine, self.settings, self.folder, n, tell)
            return job

        job = on_main(self.team, prepare)
        drawn, model = with_peers(self.team, lambda: asking.draw(self.engine, job, held[0], tell))
        on_main(self.team, lambda: asking.commit(self.store, self.engine, self.folder, job, drawn, model, started))
        return [
            Query(a.number, a.prompt, a.seed, d.image, d.predicted, d.predicted_sd, a.round)
            for a, d in zip(job.asks, drawn, strict=True)
        ]

    def checkpoint(self) -> None:
        """Copy the rows of every round that changed into its folder; see `tiltopt.online.copies`."""
        if not runfolder.is_shared(self.folder):
            self._copied = copies.copy_rounds(self.folder, self._copied)

    # ---- telling

    def tell(self, id: int, value: float, sem: float | None = None) -> None:
        """Store the answer of a query, durable when this returns.

        Args:
            id: the query.
            value: its reward, higher is better; a finite number.
            sem: standard error of `value`, same unit, >= 0; None when unknown.

        Raises:
            StoreError: unknown query, one that cannot be answered in its state, or a run of comparisons.
            RewardError: not a finite number.
        """
        self.takes_values()
        self.store.answer(query_number(id), finite(value), None if sem is None else spread(sem))

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
        """Take an answer back, as long as no later round has been asked."""
        self.takes_values()
        self.store.undo(query_number(id))
        return self._query(self.store.get(id))

    # ---- looking

    def queries(self) -> pd.DataFrame:
        """Every query: columns id, round, prompt, seed, state, value, sem, predicted, predicted_sd, error."""
        return self.store.frame()

    def pending(self) -> list[Query]:
        """Queries that are asked and have no answer yet, with their images."""
        return [self._query(row) for row in self.store.in_state("asked")]

    def claim(self, worker: str, n: int, patience_s: float = 300.0) -> list[Query]:
        """Take up to `n` outstanding queries for `worker`; no other worker is handed them meanwhile.

        Those of a worker without a sign of life (`claim`, `heartbeat`) for `patience_s` seconds are handed out again.

        Raises:
            StoreError: in a run of comparisons, whose work is handed out by `pairs`.
        """
        self.takes_values()
        return [self._query(row) for row in self.store.claim(worker, batch_size(n), patience_s)]

    def heartbeat(self, worker: str) -> int:
        """Sign of life of `worker`; returns how many queries it still holds."""
        return self.store.heartbeat(worker)

    def _query(self, row: Any) -> Query:
        image = self.image(row.number)
        return Query(row.number, row.prompt, row.seed, image, row.predicted, row.predicted_sd, row.round)

    def image(self, id: int) -> Image.Image:
        """The image of a query.

        Raises:
            StoreError: its file is missing or damaged.
        """
        path = files.image_path(self.folder, query_number(id))
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except OSError as error:
            raise StoreError(
                f"the image of query {id} cannot be read from {path} ({error}); abandon the query."
            ) from error

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
            from tiltopt.online.diffusion_engine import DiffusionEngine

            self._engine = DiffusionEngine(self.settings, self.team)
        return self._engine

    def close(self) -> None:
        """Release the store and the right to write. What was told is already safe."""
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
