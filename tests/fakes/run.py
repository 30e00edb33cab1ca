"""A synthetic run folder for the tests of everything that reads one."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

from tiltopt.online.queries import NewQuery, RoundRecord
from tiltopt.online.store import run_folder
from tiltopt.online.store.features import pack

NASTY = '<script>alert("x")</script> & a "cat"'


def made_queries(initial: int = 24, batch: int = 8, rounds: int = 3, seed: int = 0) -> pd.DataFrame:
    """Round 0 from a Gaussian prior around -3, then rounds that improve; two queries without an answer."""
    rng = np.random.default_rng(seed)
    animals = ["a cat", "a dog", "an octopus", NASTY, "a bee"]
    rows = []
    for number in range(rounds + 1):
        for _ in range(initial if number == 0 else batch):
            value = rng.normal(-3 + 0.25 * number, 0.3 / (1 + 0.3 * number))
            sd = rng.uniform(0.1, 0.3)
            guess = value + rng.normal(0, sd) if number else math.nan
            rows.append((number, value, guess, sd if number else math.nan))
    frame = pd.DataFrame(rows, columns=["round", "value", "predicted", "predicted_sd"])
    frame["id"] = range(1, len(frame) + 1)
    frame["prompt"] = [animals[i % len(animals)] for i in range(len(frame))]
    frame["seed"] = frame["id"] * 1000
    frame["state"] = "answered"
    frame["sem"] = math.nan
    frame["error"] = None
    for row, state, reason in (
        (2, "failed", "ValueError: <b>plate</b> broken"),
        (len(frame) - 1, "abandoned", "unsafe"),
    ):
        frame.loc[row, "state"] = state
        frame.loc[row, "value"] = math.nan
        frame.loc[row, "error"] = reason
    return frame["id round prompt seed state value sem predicted predicted_sd error".split()]


def picture(seed: int, side: int = 64) -> Image.Image:
    """A drawing with a background, a blob and two eyes."""
    rng = np.random.default_rng(seed)
    back, body = (tuple(int(v) for v in rng.integers(60, 255, 3)) for _ in range(2))
    image = Image.new("RGB", (side, side), back)
    draw = ImageDraw.Draw(image)
    draw.ellipse([side * 0.2, side * 0.25, side * 0.8, side * 0.85], fill=body)
    for x in (0.38, 0.58):
        draw.ellipse([side * x, side * 0.4, side * (x + 0.08), side * 0.48], fill=(20, 20, 20))
    return image


def make_store(folder: Path, queries: pd.DataFrame) -> None:
    """The store and config.json of a run with these queries, all rounds but the first tilted."""
    folder.mkdir(parents=True, exist_ok=True)
    last = int(queries["round"].max()) if len(queries) else 0
    config = {"batch_size": 8, "initial_batch_size": 24, "rounds": last, "run_dir": str(folder)}
    store, _ = run_folder.create(folder, config, None)
    for number, batch in queries.groupby("round"):
        new, answers = [], {}
        for place, row in enumerate(batch.itertuples()):
            guess, sd = (None if math.isnan(v) else v for v in (row.predicted, row.predicted_sd))
            tilt = {} if guess is None else {"predicted": guess, "predicted_sd": sd, "acquired": guess, "ess": 2.9}
            new.append(NewQuery(row.id, place, row.prompt, row.seed, pack(torch.zeros(2)), **tilt))
            if row.state == "answered":
                answers[row.id] = (row.value, None)
        notes = ("alpha raised to 0.03: predictions were too high",) if number == 2 else ()
        kind = "tilted" if number else "plain"
        paid = {"alpha": 0.04, "nats": 1.5} if number else {}
        times = {"ask_seconds": 20.0, "answer_seconds": 1.5}
        record = RoundRecord(int(number), kind, len(batch), notes=notes, **times, **paid)
        store.add_round(record, new, "toy", answers)
    for row in queries[queries["state"] == "failed"].itertuples():
        store.fail(row.id, row.error)
    for row in queries[queries["state"] == "abandoned"].itertuples():
        store.abandon(row.id, row.error)
    store.close()


def make_run(folder: Path, queries: pd.DataFrame | None = None, side: int = 64) -> pd.DataFrame:
    """A run with a store that holds `queries`, images, round summaries and reference samples; returns the queries."""
    queries = made_queries() if queries is None else queries
    (folder / "images").mkdir(parents=True)
    make_store(folder, queries)
    for number in queries["id"]:
        picture(int(number), side).save(folder / "images" / f"{number:06d}.png")
    for number in sorted(queries["round"].unique()):
        place = folder / f"round_{number:03d}"
        place.mkdir()
        measured = {"fidelity": 0.9, "particles": 4, "peak_memory_mb": 900.0, "gpu_peak_memory_mb": 5000.0}
        (place / "summary.json").write_text(json.dumps({"round": int(number)} | measured))
    (folder / "reference").mkdir()
    values = np.random.default_rng(5).normal(-3, 0.3, 128).tolist()
    (folder / "reference" / "values.json").write_text(json.dumps({"values": [*values, None], "fidelity": 0.95}))
    return queries
