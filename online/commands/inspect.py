"""What the console commands `status`, `export` and `surrogate` say, as text made from a run's files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from botorch.models.model import Model

from tiltopt.designs import IMAGES, DesignType, design_type
from tiltopt.errors import ConfigError, StoreError, SurrogateError
from tiltopt.online.commands.import_table import csv_of
from tiltopt.online.places import place_of
from tiltopt.online.report.numbers import STATES
from tiltopt.online.report.pages import PER_ROUND, write_comparison, write_report
from tiltopt.online.report.record import RunRecord, judged_record, load_run, summarise
from tiltopt.online.report.text import cell, round_table, table
from tiltopt.online.report.thurstone import tallies
from tiltopt.online.store.files import design_path, existing, query_design, read_json, write_atomic
from tiltopt.online.store.rows import COLUMNS
from tiltopt.online.store.run_folder import reading
from tiltopt.surrogates.calibration import calibration

if TYPE_CHECKING:
    from tiltopt.surrogates.preference import PairwiseModel


STDOUT = "-"


def status(folder: str | Path) -> dict[str, Any]:
    """Where a run stands.

    Returns:
        `folder`, `settings` (reward, prior, sampler, surrogate, acquisition), `rounds` {`drawn`, `planned`}, `queries`
        (number in each state), `comparisons` (number of each outcome), `complete`, and `summary` (as in
        `summary.json`, for what is there), `answers` (who gives them; None where that is unknown) and `go_on` (how the
        run goes on, in words; empty when it is complete).

    Raises:
        ConfigError: not the folder of a run. StoreError: one of its files is damaged.
    """
    record = load_run(folder)
    settings, states = record.settings, record.queries["state"].astype(str)
    counts = {state: int((states == state).sum()) for state in STATES}
    return {
        "folder": str(record.folder),
        "answers": None if record.source is None else str(record.source),
        "go_on": record.go_on,
        "settings": {
            "reward": settings["reward"]["name"],
            "prior": settings["prior"]["path"],
            "sampler": settings["sampler"]["name"],
            "surrogate": settings["model"]["name"],
            "acquisition": settings["acquisition"]["name"],
        },
        "rounds": {"drawn": record.drawn, "planned": record.planned},
        "queries": counts,
        "comparisons": record.comparisons["outcome"].value_counts().to_dict() if len(record.comparisons) else {},
        "complete": record.complete,
        "summary": summarise(record),
    }


def status_text(found: dict[str, Any]) -> str:
    """`status` for people."""
    counts = found["queries"]
    number = sum(counts.values())
    lines = [f"{key:<12} {value}" for key, value in {"run": found["folder"], **found["settings"]}.items()]
    detail = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    lines.append(f"{'answers':<12} {found['answers'] or 'unknown'}")
    lines.append(f"{'rounds':<12} {found['rounds']['drawn']} of {found['rounds']['planned']} drawn")
    lines.append(f"{'queries':<12} {number}" + (f": {detail}" if detail else ""))
    if found["comparisons"]:
        lines.append(f"{'comparisons':<12} " + ", ".join(f"{n} {what}" for what, n in found["comparisons"].items()))
    if found["complete"]:
        lines.append(f"{'state':<12} complete")
    else:
        waiting = f"{counts['asked']} queries wait for an answer; " if counts["asked"] else ""
        lines.append(f"{'state':<12} not complete: {waiting}{found['go_on']}")
    if found["summary"]["rounds"]:
        lines += ["", round_table(found["summary"])]
    return "\n".join(lines)


def report(folders: Sequence[str | Path], per_round: int = PER_ROUND, out: str | Path | None = None) -> Path:
    """Writes `report.html` into the folder of a run; of several runs, a page that compares them.

    The judge looks at rounds that it has not seen (of a run that was asked and told, or of an earlier version);
    summaries of rounds that cannot be read are made again, from store and images.

    Args:
        folders: one run, or two and more.
        per_round: images shown of each round of one run.
        out: the page that compares; by default `comparison.html` beside the first run.

    Returns:
        The path of the page.

    Raises:
        ConfigError: not the folder of a run, or runs that cannot be compared. StoreError: a file of a run is damaged,
            or the page cannot be written.
    """
    records = [judged_record(load_run(folder)) for folder in folders]
    if len(records) == 1:
        return write_report(records[0].folder, records[0], per_round=per_round)
    return write_comparison(records, records[0].folder.parent / "comparison.html" if out is None else Path(out))


def export(folder: str | Path, target: str | Path, kind: str) -> int:
    """Writes the queries of a run as a table, with the place of each image relative to the run's folder.

    In a run of comparisons the table has the columns `utility`, `wins`, `losses`, `ties` too, and the comparisons go
    into a second file beside it, `<name>_comparisons`. In a CSV file, text that a spreadsheet would run as a formula
    begins with an apostrophe, which `tiltopt import` takes off.

    Args:
        folder: of the run.
        target: the file to write; it is replaced when it is there. `-` is the standard output, for the queries alone.
        kind: "csv" or "parquet".

    Returns:
        The number of queries.

    Raises:
        ConfigError: not a run, or no package that writes parquet. StoreError: the file cannot be written.
    """
    target = Path(target)
    if kind == "parquet" and not any(importlib.util.find_spec(name) for name in ("pyarrow", "fastparquet")):
        raise ConfigError(
            "parquet: expected the package pyarrow, got none. `pip install pyarrow`, or export with --csv."
        )
    record = load_run(folder)
    frame = record.queries.reindex(columns=[*COLUMNS, *(objective.name for objective in record.objectives)])
    if len(record.comparisons):
        with reading(record.folder) as store:  # the surrogate's own predictions
            frame = store.frame()
        frame["utility"] = record.queries["value"]
        frame = pd.concat([frame, tallies(frame["id"].tolist(), record.comparisons)], axis=1)
    frame["image"] = [str(record.image(int(number)).relative_to(record.folder)) for number in frame["id"]]
    designs = design_type(record.settings.get("design", "image"))
    if designs is not IMAGES:
        frame["design"] = [_cell(record.folder, int(number), designs) for number in frame["id"]]
    _write_table(frame, target, kind)
    if len(record.comparisons) and str(target) != STDOUT:
        _write_table(record.comparisons, target.with_name(f"{target.stem}_comparisons{target.suffix}"), kind)
    return len(frame)


def _cell(folder: Path, number: int, kind: DesignType) -> str:
    """A design as text where it can be written so, else its file; empty where it cannot be read."""
    try:
        return kind.text(query_design(folder, number, kind)) if kind.written else _named(folder, number, kind)
    except StoreError:
        return ""


def _named(folder: Path, number: int, kind: DesignType) -> str:
    return str(design_path(folder, number, kind).relative_to(folder))


def _write_table(frame: pd.DataFrame, target: Path, kind: str) -> None:
    if kind == "csv":
        content = csv_of(frame)
    else:  # text is text also in a column that happens to be empty, whose type could not be told
        objects = [name for name in frame if frame[name].dtype == object]
        text = [name for name in objects if all(isinstance(value, str) for value in frame[name].dropna())]
        content = frame.astype(dict.fromkeys(text, "string")).to_parquet(index=False)
    if str(target) == STDOUT:
        sys.stdout.buffer.write(content)
    else:
        write_atomic(target, lambda file: file.write(content))


def surrogate_text(folder: str | Path) -> str:
    """What a saved surrogate is: its kind, settings, features, data, versions, and how it predicted later answers.

    Args:
        folder: of the surrogate (`checkpoints/<run>/round_NNN`).

    Raises:
        SurrogateError: no surrogate there, or a damaged one.
    """
    from tiltopt.surrogates import io
    from tiltopt.surrogates.preference import PairwiseModel

    folder = place_of(folder)
    if not (folder / "surrogate.json").is_file():
        near = sorted(str(p.parent) for p in folder.glob("*/surrogate.json"))
        hint = f" Saved surrogates in it: {', '.join(near)}." if near else ""
        got = "a folder without a surrogate.json" if folder.is_dir() else "no such folder"
        raise SurrogateError(f"{folder}: expected the folder of a saved surrogate, got {got}.{hint}")
    known = io.describe(folder)
    model = io.load(folder)
    lines = [f"{'surrogate':<14} {folder}", f"{'kind':<14} {known['class']}", f"{'features':<14} {known['features']}"]
    lines.append(f"{'fitted to':<14} data {str(known['data'])[:16] or 'unknown'}{_data_of(folder)}")
    lines += [f"{'setting':<14} {key} = {_short(value)}" for key, value in sorted(known["settings"].items())]
    lines += [f"{'tensor':<14} {name} {tuple(shape)}" for name, shape in known["shapes"].items()]
    versions = known.get("versions") or {}
    lines.append(f"{'versions':<14} " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    if known.get("choice_report"):
        lines += ["", "chosen among the models because:", str(known["choice_report"])]
    if isinstance(model, PairwiseModel):
        lines += _later_comparisons(folder, model)
        return "\n".join(lines)
    checks = _later_rounds(folder, model)
    if checks:
        header = ["round", "answers", "NLL", "in 90 %", "Kendall", "bias"]
        lines += [
            "",
            "predictions for answers that came later (bias: mean of predicted - answer):",
            table(header, checks),
        ]
    return "\n".join(lines)


def _run_of(folder: Path) -> RunRecord | None:
    """The run whose round `folder` is, or None for a surrogate that lies elsewhere."""
    try:
        return load_run(existing(folder.resolve().parent))
    except (ConfigError, StoreError):
        return None


def _data_of(folder: Path) -> str:
    record, number = _run_of(folder), _number_of(folder)
    if record is None or number is None:
        return ""
    if len(record.comparisons):
        used = record.comparisons[record.comparisons["round"] < number]
        return f", {int((used['outcome'] != 'failed').sum())} comparisons of the rounds before round {number}"
    earlier = record.queries[(record.queries["round"] < number) & (record.queries["state"] == "answered")]
    return f", {len(earlier)} answers of the rounds before round {number}"


def _number_of(folder: Path) -> int | None:
    number = read_json(folder / "summary.json", {}).get("round")
    if isinstance(number, int):
        return number
    digits = folder.name.removeprefix("round_")
    return int(digits) if digits.isdigit() else None


def _later_rounds(folder: Path, model: Model) -> list[list[str]]:
    """One row per round whose answers came after the surrogate was fitted, none of which it has seen; of several
    objectives, one for each."""
    record, number = _run_of(folder), _number_of(folder)
    if record is None or number is None:
        return []
    with reading(record.folder) as store:
        if record.objectives:
            X, Y, _ = store.outcomes_since(number, record.objectives)
        else:
            X, Y = store.answers_since(number)
    later = record.queries[(record.queries["round"] >= number) & (record.queries["state"] == "answered")]
    if not len(X) or len(X) != len(later):
        return []
    with torch.no_grad():
        posterior: Any = model.posterior(X.unsqueeze(-2))
        means, sds = posterior.mean[:, 0].numpy(), posterior.variance.clamp_min(0).sqrt()[:, 0].numpy()
    names = [f" {objective.name}" for objective in record.objectives] or [""]
    rows = []
    for round_ in sorted(later["round"].unique()):
        here = (later["round"] == round_).to_numpy()
        for i, name in enumerate(names):
            found = calibration(Y[:, i].numpy()[here], means[here, i], sds[here, i])
            cover = "-" if found["coverage90"] is None else f"{100 * found['coverage90']:.0f} %"
            numbers = [cell(found[key]) for key in ("nll", "kendall_tau", "mean_gap")]
            rows.append([f"{round_}{name}", str(found["n"]), numbers[0], cover, numbers[1], numbers[2]])
    return rows


def _later_comparisons(folder: Path, model: PairwiseModel) -> list[str]:
    """How the surrogate predicted the comparisons that came after it was fitted, none of which it has seen."""
    record, number = _run_of(folder), _number_of(folder)
    if record is None or number is None:
        return []
    from tiltopt.online.rounds import score_comparisons

    rows = []
    with reading(record.folder) as store:
        later = [row for row in store.comparisons.rows() if row.round >= number]
        for round_ in sorted({row.round for row in later}):
            found = score_comparisons(store, model, [row for row in later if row.round == round_])
            if found is not None:
                share = f"{100 * found['agreement']:.0f} %"
                rows.append([str(round_), str(found["comparisons"]), share, cell(found["nll"])])
    if not rows:
        return []
    told = "comparisons that came later (NLL 0.693 = knows nothing):"
    return ["", told, table(["round", "comparisons", "agreed", "NLL"], rows)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
