"""Numbers of a run over its rounds: `metrics.jsonl` in its folder always, and a tracker that is asked for."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from tiltopt.online.hooks import Hook
from tiltopt.online.places import at_address, local_folder, place_of
from tiltopt.online.report.record import DIRECT, load_run
from tiltopt.online.settings.run import flat
from tiltopt.online.settings.validation import check_tracker
from tiltopt.online.store.address import shown
from tiltopt.online.store.files import (
    cannot_write,
    jsonable,
    read_image,
    read_json,
    round_folder,
    write_atomic,
    write_json,
)

SECRET = re.compile(r"(^|_)(api_?key|access_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
HIDDEN = "(hidden)"

WANDB, TRACKIO = "wandb.json", "trackio.json"
"""Files of a run in which the ids are kept that these trackers know it by."""

SHOWN = ("id", "prompt", "value", "predicted", "predicted_sd", "state", "seed")
"""Columns of the table of a round's queries, beside the image."""

MOST = 256
"""Queries of a round that a tracker is given."""


class MetricsFile(Hook):
    """`metrics.jsonl`: one line of JSON per finished round, flushed to disk before the next round starts.

    On opening, a torn last line (a killed process, a full disk) and all but the newest line of a round are dropped.
    `missing` says which rounds have no line, so that a resumed run continues the file as if it had never stopped.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = place_of(path)
        self._lines: dict[int, str] = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            number = _round_of(line)
            if number is not None:
                self._lines[number] = line
        if text != self._text():
            self._rewrite()

    def missing(self, rounds: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Of these summaries of rounds, those that have no line."""
        return [summary for summary in rounds if int(summary["round"]) not in self._lines]

    def on_round_end(self, summary: Mapping[str, Any]) -> None:
        if int(summary["round"]) < 0:  # the reference samples are no round
            return
        line = json.dumps(jsonable(summary), allow_nan=False)
        number = int(summary["round"])
        whole = at_address(self.path) or number in self._lines or not self._lines or number < max(self._lines)
        self._lines[number] = line
        if whole:
            self._rewrite()
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _text(self) -> str:
        return "".join(self._lines[number] + "\n" for number in sorted(self._lines))

    def _rewrite(self) -> None:
        text = self._text().encode("utf-8")
        write_atomic(self.path, lambda file: file.write(text))


class TrackerHook(Hook):
    """Hands the numbers of each round to one of accelerate's trackers, with the round as the step.

    Args:
        tracker: a started `accelerate.tracking.GeneralTracker`.
    """

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def on_round_end(self, summary: Mapping[str, Any]) -> None:
        number = int(summary["round"])
        if number < 0:
            return
        with unharmed():
            self.tracker.log(scalars(summary), step=number)
        with unharmed():
            self.show(number, summary)

    def show(self, number: int, summary: Mapping[str, Any]) -> None:
        """What a tracker is given of a round beside its numbers."""

    def close(self) -> None:
        with unharmed(), silence():
            self.tracker.finish()


class WandbHook(TrackerHook):
    """wandb shows of each round its queries as a table with pictures, and histograms of answers and predictions.

    It keeps three kinds of artifacts, each of which says what it was made from: the `queries` so far, the `surrogate`
    that drew a round (from the queries of the rounds before), and what an `evaluation` found (of a surrogate). Where
    the run is not offline, wandb is told the same as the input of the run, which it draws as lineage.

    Args:
        tracker: a started `WandBTracker`.
        folder: of the run.
    """

    def __init__(self, tracker: Any, folder: Path) -> None:
        super().__init__(tracker)
        self.folder = folder

    def show(self, number: int, summary: Mapping[str, Any]) -> None:
        import wandb

        if not any((self.folder / name).exists() for name in ("queries.sqlite", "store.json", DIRECT)):
            return
        record = load_run(self.folder)
        rows = record.queries[record.queries["round"] == number].head(MOST)
        table = wandb.Table(columns=["image", *SHOWN])
        for _, row in rows.iterrows():
            place = record.image(int(row["id"]))
            caption = f"{row['prompt']} | {row['value']:.4g}"
            image = wandb.Image(read_image(place), caption=caption) if place.is_file() else None
            table.add_data(image, *(row[name] for name in SHOWN))
        found = {"media/queries": table}
        for name, column in (("media/answers", "value"), ("media/predicted", "predicted")):
            values = rows[column].astype(float).dropna()
            if len(values):
                found[name] = wandb.Histogram(values.tolist())
        self.tracker.log(found, step=number)
        if "evaluation" in summary:
            self._keep_evaluation(number, summary, dict(record.settings["evaluate"]))
            return
        self._keep_surrogate(number, summary)
        asked = record.queries[record.queries["round"] <= number]
        told = {"round": number, "queries": len(asked)}
        self._keep("queries", number, told, {"queries.csv": asked.to_csv(index=False).encode()})

    def _keep_surrogate(self, number: int, summary: Mapping[str, Any]) -> None:
        place, run = round_folder(self.folder, number), self.tracker.tracker
        if not (place / "surrogate.json").is_file():
            return
        told = {"round": number, "queries": summary.get("queries"), **(summary.get("surrogate") or {})}
        files = {name: (place / name).read_bytes() for name in ("surrogate.json", "surrogate.safetensors")}
        self._keep("surrogate", number, told, files, made_from=f"queries-{run.id}:round-{number - 1}")

    def _keep_evaluation(self, number: int, summary: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
        """What was found of a surrogate, which another run of wandb may have kept."""
        place, of_round = place_of(evaluated["surrogate"]), int(summary["surrogate_round"])
        known = [read_json(folder / WANDB, {}).get("id") for folder in (place, place.parent)]
        own = next((id for id in known if id), None)
        made_from = str(place) if own is None else f"surrogate-{own}:round-{of_round}"
        text = json.dumps(jsonable(summary["evaluation"]), indent=1).encode()
        told = {"round": of_round, **scalars(summary["evaluation"])}
        self._keep("evaluation", number, told, {"evaluation.json": text}, made_from=made_from, use=own is not None)

    def _keep(
        self,
        kind: str,
        number: int,
        told: Mapping[str, Any],
        files: Mapping[str, bytes],
        *,
        made_from: str = "",
        use: bool = True,
    ) -> None:
        """Log an artifact of a round.

        Args:
            kind: its type, and the beginning of its name.
            told: its metadata.
            files: name -> content.
            made_from: name and alias of the artifact that it was made from; "" for none.
            use: whether wandb may know that one.
        """
        import wandb

        run = self.tracker.tracker
        if made_from and use and not run.offline:
            with unharmed():
                run.use_artifact(made_from)
        source = {"made_from": made_from} if made_from else {}
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata={**told, **source})
        for name, content in files.items():
            with artifact.new_file(name, "wb") as file:
                file.write(content)
        logged = run.log_artifact(artifact, aliases=[f"round-{number}"])
        if kind == "queries" and not run.offline:
            logged.wait()  # the next round's surrogate names it


def silence() -> contextlib.AbstractContextManager[Any]:
    """Inside, what a tracker prints of itself is not shown."""
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def unharmed() -> Iterator[None]:
    """A tracker that fails says so, and stops nothing."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"the tracker failed, and the run goes on: {type(error).__name__}: {error}", stacklevel=2)


class Tracked(Protocol):
    """Settings of anything that trackers are told of."""

    @property
    def tracker(self) -> str: ...

    @property
    def project(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


def make_tracking(
    settings: Tracked, folder: str | Path, *, rounds: Iterable[Mapping[str, Any]] = (), main: bool = True
) -> list[Hook]:
    """The hooks that record a run's numbers; none on processes other than the main one.

    A round that ended and was not recorded, because the process was killed just then, is recorded now. The file is
    written last, so that what has a line has gone everywhere.

    wandb runs offline unless WANDB_API_KEY or WANDB_MODE is set, and a resumed run continues the same wandb run
    (its id is in `wandb.json`); trackio keeps a database of its own (`TRACKIO_DIR`). Secrets are hidden from whatever
    is sent.

    Args:
        settings: of the run; `tracker` and `project` are used.
        folder: of the run.
        rounds: summaries of the rounds that have ended; see `tiltopt.online.report.record.ended`.
        main: whether this process writes.

    Raises:
        ConfigError: the tracker's package is not installed. One that cannot be started is told of in a warning.
    """
    if not main:
        return []
    folder = place_of(folder)
    metrics = MetricsFile(folder / "metrics.jsonl")
    hooks: list[Hook] = []
    if settings.tracker != "none":
        check_tracker(settings.tracker)
        with unharmed():
            tracker = _start(settings.tracker, settings.project, folder, settings.to_dict())
            hooks.append(WandbHook(tracker, folder) if settings.tracker == "wandb" else TrackerHook(tracker))
    hooks.append(metrics)
    for summary in metrics.missing(rounds):
        for hook in hooks:
            hook.on_round_end(summary)
    return hooks


def scalars(tree: Mapping[str, Any], path: str = "") -> dict[str, float | int]:
    """The finite numbers of a tree; those of nested mappings under `outer/inner`."""
    found: dict[str, float | int] = {}
    for key, value in jsonable(tree).items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{path}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{path}{key}"] = value
    return found


def hide_secrets(tree: Any, key: str = "") -> Any:
    """The same tree with values of keys such as `api_key` or `password`, and passwords in URLs, hidden."""
    if isinstance(tree, Mapping):
        return {k: hide_secrets(v, str(k)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [hide_secrets(v, key) for v in tree]
    if not isinstance(tree, str) or not tree:
        return tree
    if SECRET.search(key):
        return HIDDEN
    return shown(tree) if "://" in tree else tree


def log_once(name: str, project: str, folder: Path, config: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    """Tell a tracker the numbers of something that has no rounds.

    Args:
        name: of the tracker; "none" for none.
        project: of the tracker.
        folder: where the tracker's files go; made if missing.
        config: what led to the numbers.
        numbers: nested; the finite ones are told, under `outer/inner`.

    Raises:
        ConfigError: the tracker's package is not installed.
    """
    if name == "none":
        return
    check_tracker(name)
    local_folder(folder).mkdir(parents=True, exist_ok=True)
    with unharmed():
        tracker = _start(name, project, folder, config)
        tracker.log(scalars(numbers), step=0)
        TrackerHook(tracker).close()


def _start(name: str, project: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """A started tracker of accelerate, which says in one line where its numbers go."""
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's trackers ask it which process they are in
    if name == "wandb":
        tracker: Any = tracking.WandBTracker(project, **wandb_options(folder))
    elif name == "trackio":
        options = {"name": f"{folder.name}-{identity(folder / TRACKIO)}", "resume": "allow"}
        tracker = tracking.TrackioTracker(project, **options)
    else:
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=str(local_folder(folder)))
    with silence():
        tracker.start()
        tracker.store_init_configuration(_told(hide_secrets(config)))
    tqdm.write(_where(name, project, folder, tracker))  # above the bars of a terminal
    return tracker


def _where(name: str, project: str, folder: Path, tracker: Any) -> str:
    """Where a tracker's numbers go, and how they are looked at."""
    if name == "trackio":
        return f"trackio: project {project!r}; `trackio show --project {project}` shows it"
    if name == "tensorboard":
        return f"tensorboard: `tensorboard --logdir {local_folder(folder)}` shows it"
    if tracker.tracker.offline:
        return f"wandb: offline; `wandb sync {Path(tracker.tracker.dir).parent}` uploads it"
    return f"wandb: {tracker.tracker.url}"


def identity(path: Path, given: str | None = None) -> str:
    """The id under which a tracker knows a run, kept in a file of it.

    Args:
        path: of the file; made when it is not there.
        given: the id that somebody else chose.
    """
    known = read_json(path, {}).get("id")
    if not known or (given and given != known):
        known = given or uuid.uuid4().hex[:12]
        write_json(path, {"id": known})
    return str(known)


def wandb_options(folder: Path) -> dict[str, Any]:
    """Arguments of `wandb.init`: the id of a resumed run or of one of a sweep, offline without an account, files in the
    folder."""
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None  # by the agent of a sweep
    options: dict[str, Any] = {
        "id": identity(folder / WANDB, given),
        "name": folder.name,
        "dir": str(local_folder(folder)),
        "resume": "allow",
        "settings": {"console": "off", "silent": True},
    }
    if not any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID")):
        options["mode"] = "offline"
    return options


def _round_of(line: str) -> int | None:
    """The round of a line, or None for a torn or foreign one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    number = record.get("round") if isinstance(record, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _told(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings as trackers take them: one level, plain scalars."""
    return {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in flat(settings).items()}
