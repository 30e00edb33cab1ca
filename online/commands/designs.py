"""The command `tiltopt evaluate FOLDER...`: pictures held against each other on the screen, in files, on a page."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tiltopt.errors import ConfigError
from tiltopt.online.commands.import_table import csv_of
from tiltopt.online.evaluation.designs import OF_A_SET, Request, evaluate_designs
from tiltopt.online.evaluation.picture_sets import load_sets
from tiltopt.online.places import place_of
from tiltopt.online.report.designs_page import write_designs
from tiltopt.online.report.text import cell, table
from tiltopt.online.report.tracking import log_once
from tiltopt.online.settings.commandline import literal
from tiltopt.online.settings.validation import check_tracker
from tiltopt.online.store.files import write_atomic, write_json
from tiltopt.online.team import Team, on_main


def evaluate_folders(options: argparse.Namespace) -> None:
    """Evaluate the pictures of `options.folders` as the other options say, and print, write and draw what came out.

    Raises:
        ConfigError: impossible options, folders without pictures, missing prompts or models.
        RewardError: a reward cannot be built or asked.
    """
    request = Request(
        rewards=tuple(dict.fromkeys(name.strip() for name in options.rewards.split(",") if name.strip())),
        options=_options_of(options.option),
        clip=options.clip,
        diversity=options.diversity,
        fidelity=options.fidelity,
        lpips=None if options.lpips is None else tuple(options.lpips),
    )
    check_tracker(options.tracker)
    sets = load_sets(options.folders, options.seen)
    team = Team.from_accelerate()
    found = evaluate_designs(sets, request, team)

    def told() -> None:
        if options.json:
            write_json(Path(options.json), found)
        if options.csv:
            content = csv_of(long_table(found))
            write_atomic(Path(options.csv), lambda file: file.write(content))
        print(designs_text(found))
        numbers = {m["name"]: {name: g["metrics"] for name, g in m["groups"].items()} for m in found["methods"]}
        page = Path(options.out) if options.out else place_of(options.folders[0]).resolve().parent / "evaluation.html"
        print(f"\nreport: {write_designs(found, sets, page)}", flush=True)
        asked = {"folders": [str(folder) for folder in options.folders], **dataclasses.asdict(request)}
        log_once(options.tracker, options.project, page.with_suffix(""), asked, numbers)

    on_main(team, told)
    team.leave()


def _options_of(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`NAME.KEY=VALUE` texts as options by reward. Raises ConfigError."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        path, equals, value = text.partition("=")
        name, dot, key = path.partition(".")
        if not (equals and dot and name and key):
            raise ConfigError(f"`--option`: expected NAME.KEY=VALUE, such as clip.clip=openai/clip-vit-large-patch14, "
                              f"got {text!r}.")  # fmt: skip
        found.setdefault(name, {})[key] = literal(value)
    return found


def designs_text(found: Mapping[str, Any]) -> str:
    """A table for people: of each set and group the number of pictures, and every metric with its 95 % interval."""
    metrics = list(dict.fromkeys(key for m in found["methods"] for key in m["groups"]["all"]["metrics"]))
    rows = []
    for method in found["methods"]:
        for name, group in method["groups"].items():
            label = method["name"] if name == "all" else f"  {name.replace('_', ' ')}"
            numbers = [_with_interval(group["metrics"].get(key)) for key in metrics]
            rows.append([label, str(group["pictures"]), *numbers])
    lines = [table(["pictures of", "n", *(_title(found, key) for key in metrics)], rows)]
    if found["differences"]:
        shown = [
            [row["name"], row["metric"], row["group"], _with_interval(row), str(row["pairs"]), row["by"]]
            for row in found["differences"]
        ]
        header = ["difference to the first", "metric", "prompts", "mean", "pairs", "paired by"]
        lines += ["", table(header, shown)]
    notes = ["", "intervals of 95 %: bootstrap over pictures (over pairs, for differences)"]
    if found["diversity"]:
        n, k = found["diversity"]["pictures"], found["diversity"]["truncation"]
        notes.append(f"diversity of {n} pictures of each set (jackknife); entropy of the {k} widest directions, nats")
    return "\n".join(lines + notes)


def long_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """One row per method, group, prompt ("" for all of the group) and metric: mean, low, high, n."""
    rows: list[dict[str, Any]] = []
    for method in found["methods"]:
        for group, numbers in method["groups"].items():
            for metric, value in numbers["metrics"].items():
                rows.append({"method": method["name"], "group": group, "prompt": "", "metric": metric, **value})
        for prompt in method["prompts"]:
            group = "all" if prompt["seen"] is None else "seen" if prompt["seen"] else "held_out"
            own = {"method": method["name"], "group": group, "prompt": prompt["prompt"]}
            rows += [
                own | {"metric": metric, "mean": value, "low": None, "high": None, "n": prompt["pictures"]}
                for metric, value in prompt["metrics"].items()
            ]
    return pd.DataFrame(rows, columns=["method", "group", "prompt", "metric", "mean", "low", "high", "n"])


def _title(found: Mapping[str, Any], key: str) -> str:
    if key == "target" and found["target"]:
        return f"target: {found['target']['name']}"
    if key == "fidelity":
        return f"fidelity ({found['fidelity_by']})"
    return key.replace("_", " ") if key in OF_A_SET else key


def _with_interval(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return "-"
    if value["low"] is None:
        return cell(value["mean"])
    return f"{cell(value['mean'])} [{cell(value['low'])}, {cell(value['high'])}]"
