"""`tiltopt dashboard`: a workspace of wandb that shows what the tracker is told of a run, by those names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiltopt.errors import ConfigError
from tiltopt.online.store import files, run_folder

FILE = "dashboard.json"

SECTIONS: dict[str, Sequence[tuple[str, Sequence[str]]]] = {
    "Answers": (
        ("answer and prediction, mean of a round", ("mean", "predicted_mean")),
        ("best answer of a round", ("best",)),
        ("designs asked", ("queries",)),
    ),
    "Pictures": (("queries of the newest round", ("media/queries",)), ("fidelity", ("fidelity",))),
    "Is the surrogate to be trusted": (
        ("negative log-likelihood of new answers, nats", ("calibration/nll",)),
        ("share of answers in its 90 % intervals", ("calibration/coverage90",)),
        ("rank correlation with answers", ("calibration/kendall_tau",)),
        ("promise less answer", ("calibration/mean_gap", "calibration/optimism_gap")),
    ),
    "What a round costs": (
        ("effective particles, of how many", ("ess_mean", "ess_median", "particles")),
        ("nats per query", ("nats_mean",)),
        ("memory, MiB", ("peak_memory_mb", "gpu_peak_memory_mb")),
        ("seconds: drawing, answering", ("ask_seconds", "answer_seconds")),
        ("answered, failed", ("states/answered", "states/failed")),
    ),
}
"""Section -> (title, metrics) of its panels; docs/report.md says what each metric is."""

TABLE = "media/queries"


def workspace(project: str, name: str, entity: str = "") -> Any:
    """The workspace, a `wandb_workspaces.workspaces.Workspace`; nothing is sent anywhere.

    Args:
        project: of the tracker.
        name: how the workspace is called.
        entity: user or team; "" for the account's own.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(f'expected the package of `pip install "tiltopt[dashboard]"`, got {error}.') from error

    def panel(title: str, metrics: Sequence[str]) -> Any:
        if TABLE in metrics:
            return panels.WeavePanelSummaryTable(table_name=TABLE)
        return panels.LinePlot(title=title, x="Step", y=list(metrics), title_x="round")

    sections = [
        ws.Section(name=section, panels=[panel(*each) for each in found], is_open=True)
        for section, found in SECTIONS.items()
    ]
    settings = ws.WorkspaceSettings(x_axis="Step", smoothing_type="none")
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def written(folder: str | Path, entity: str = "") -> tuple[Path, Any]:
    """The workspace of a run, and where it was written as wandb keeps it: `dashboard.json` in the run's folder.

    Raises:
        ConfigError: no run there, or the package is not installed.
    """
    place = files.existing(folder)
    with run_folder.reading(place) as store:
        settings = run_folder.stored_settings(place, store)
    made = workspace(settings.project, f"{place.resolve().name} in rounds", entity)
    files.write_json(place / FILE, json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True)))
    return place / FILE, made


def publish(made: Any) -> str:
    """Save a workspace at wandb, which needs an account (WANDB_API_KEY); returns its address."""
    made.save()
    return str(made.url)
