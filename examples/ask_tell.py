"""Drive a run from your own code: ask for designs, measure them your way, tell the results. Stop it whenever you like.

    python examples/ask_tell.py [FOLDER]      # a temporary one by default; give it again to go on where it was left

Uses the embedded prior, needs no network and about a minute on two CPU cores.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
from PIL import Image

import tiltopt

CONFIG = {
    "prompts": "simple_animals",
    "initial_batch_size": 16,  # plain samples of the prior, before there is anything to learn from
    "prior": {"num_steps": 10},
    "model": {"name": "linear"},
    "sampler": {"num_particles": 4, "budget_nats": 16.0},  # how far a query may go from the prior
    "acquisition": {"name": "ucb", "beta": 1.0},
}


def my_lab(image: Image.Image) -> float:
    """Stands for whatever measures your designs; here: how red a picture is, in grey levels."""
    red, green, blue = np.asarray(image.convert("RGB"), dtype=float).reshape(-1, 3).mean(axis=0)
    return float(red - (green + blue) / 2)


def main(folder: str) -> None:
    """Three batches of questions and answers."""
    print(f"run {folder}")
    exists = tiltopt.Optimizer.exists(folder)
    with tiltopt.Optimizer.open(folder) if exists else tiltopt.Optimizer.create(folder, CONFIG) as opt:
        for query in opt.pending():  # asked before the last stop, never answered
            opt.tell(query.id, my_lab(query.image))
        for size in (16, 4, 4):
            queries = opt.ask(size)
            for query in queries:
                opt.tell(query.id, my_lab(query.image))
            answers = opt.queries().tail(size)
            predicted = answers["predicted"].mean()
            promise = "" if np.isnan(predicted) else f", predicted {predicted:.1f}"
            print(f"round {queries[0].round}: mean {answers['value'].mean():.1f}{promise}")
        best = opt.queries().sort_values("value").iloc[-1]
        print(f"best: {best['prompt']!r}, {best['value']:.1f}: {folder}/images/{best['id']:06d}.png")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tiltopt-"))
