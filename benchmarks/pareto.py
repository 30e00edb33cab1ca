"""Several objectives: how much of a known front's hypervolume a search finds, and whether it beats weighted sums.

    python -m benchmarks.pareto [--seeds 10] [--acquisition chebyshev]      # a toy whose front is known
    python -m benchmarks.pareto --demo --seeds 3                            # the embedded prior against weighted sums

The objectives are minus the squared distances from two points of the unit cube in four dimensions, so that the front
is what lies between them. A search has the parts of a run (surrogates, aim, price) and, in the place of a diffusion
model, one of many plain samples by weight; 20 plain answers, then rounds of 8.

On the embedded prior (file size against colourfulness) both sides are runs of the public loop with as many answers:
60 plain ones that they share, and 45 tilted ones, either three rounds of 15 of `config/pareto.py:demo`, or three
rounds of 3 for each of five weights of a sum of both, in standard deviations. The hypervolume is of all answers, above
the reference point that the plain ones imply. Each run has a folder and goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.query_efficiency.measure import weights_id
from benchmarks.query_efficiency.plain import CachedPlain
from tiltopt.online.engine.potential import aim, fit_several
from tiltopt.online.loop import run
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.queries import Objective, Observations
from tiltopt.online.seeds import generator
from tiltopt.online.settings.commandline import parse
from tiltopt.online.settings.run import Settings
from tiltopt.rewards import make_reward
from tiltopt.surrogates.several import hypervolume, reference_point

ENDS = torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.8, 0.8, 0.5, 0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([-1.0, -1.0], dtype=torch.float64)
ALPHA = {"chebyshev": 2.5e-3, "qlog_nehvi": 0.2}


def answers(x: Tensor) -> Tensor:
    """(n, 4) -> (n, 2)."""
    return torch.stack([-(x - end).square().sum(dim=1) for end in ENDS], dim=1)


def share(Y: Tensor) -> float:
    """Of the front's hypervolume."""
    line = ENDS[0] + torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None] * (ENDS[1] - ENDS[0])
    return hypervolume(Y, REFERENCE) / hypervolume(answers(line), REFERENCE)


def plain(seed: int, n: int) -> Tensor:
    """(n, 4) samples of the prior."""
    return torch.rand(n, 4, generator=generator(seed, "plain"), dtype=torch.float64)


def search(acquisition: str, seed: int, *, rounds: int = 5, batch: int = 8, pool: int = 4096) -> Tensor:
    """Answers (20 + rounds * batch, 2), in the order of asking."""
    x = plain(seed, 20)
    objectives = (Objective("first"), Objective("second"))
    for round_ in range(rounds):
        features = torch.cat([x, x**2], dim=1)
        data = Observations(
            features, answers(x), None, features[:0], objectives=objectives, reference=REFERENCE, first=answers(x[:20])
        )
        model = fit_several("linear", data, generator(seed, "fit", round_))
        for i in range(batch):
            own = generator(seed, "acquisition")
            wanted = aim(acquisition, model, data, beta=0.25, generator=own, turn=len(x)).acquisition
            near = torch.rand(pool, 4, generator=generator(seed, "pool", round_, i), dtype=torch.float64)
            with torch.no_grad():
                log_w = wanted(torch.cat([near, near**2], dim=1).unsqueeze(-2)) / ALPHA[acquisition]
            chosen = torch.multinomial(log_w.softmax(0), 1, generator=generator(seed, "select", round_, i))
            x = torch.cat([x, near[chosen]])
    return answers(x)


# ---- the embedded prior

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("jpeg_compressibility", "colorfulness")
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the first objective; the other one has the rest."""
ROUNDS, TOGETHER, APART = 3, 15, 3
"""Rounds after the plain one, and queries of each: of the front's run, and of each weight's."""
SEARCHES = ("front", "weighted")


def settings_of(weight: float | None, seed: int, folder: Path, overrides: Sequence[str] = ()) -> Settings:
    """Of the run after the front, or of the one after a weighted sum.

    Args:
        weight: of the first objective; None for the front.
        overrides: further changes, as `key=value`.
    """
    changes = [f"run_dir={folder}", f"seed={seed}", f"rounds={ROUNDS}", "free_reference_samples=0", *overrides]
    changes += ["acquisition.adapt=False", f"batch_size={TOGETHER if weight is None else APART}"]
    file = "pareto.py" if weight is None else "ucb.py"
    if weight is not None:
        parts = f"{weight:g} {OBJECTIVES[0]}, {1 - weight:g} {OBJECTIVES[1]}"
        changes += ["reward.name=weighted", f"reward.parts={parts}", "reward.standardise=True"]
    flags = [f"--config.{change}" for change in changes]
    return Settings.from_config(parse(["--config", f"{ROOT / 'config' / file}:demo", *flags]))


def both(optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    """Of a run both objectives of every plain query, and of every tilted one, (n, 2)."""
    frame = optimizer.queries()
    images, prompts = [optimizer.image(i) for i in frame["id"]], list(frame["prompt"])
    columns = [[float(v) for v in make_reward(name)(images, prompts)] for name in OBJECTIVES]
    Y = torch.tensor(columns, dtype=torch.float64).mT
    plain_ = torch.from_numpy((frame["round"] == 0).to_numpy(copy=True))
    return Y[plain_], Y[~plain_]


def searched(search_: str, seed: int, work: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One search on the embedded prior, or the rest of one that was interrupted; its line for the results."""
    started, tilted, first = time.process_time(), [], None
    for weight in (None,) if search_ == "front" else WEIGHTS:
        folder = work / f"{search_}_{seed}{'' if weight is None else f'_{weight:g}'}"
        settings = settings_of(weight, seed, folder, overrides)
        engine = CachedPlain(settings, work / "plain", weights_id(settings.prior.path, settings.features.path))
        exists = Optimizer.exists(folder)
        opening = Optimizer.open if exists else Optimizer.create
        with opening(folder, config=settings, engine=engine) as optimizer:
            run(optimizer, make_reward(settings.reward.name, **settings.reward.options))
            first, own = both(optimizer)
        tilted.append(own)
    assert first is not None
    reference, Y = reference_point(first), torch.cat([first, *tilted])
    return {
        "search": search_,
        "seed": seed,
        "answers": len(Y),
        "hypervolume": hypervolume(Y, reference),
        "hypervolume_plain": hypervolume(first, reference),
        "reference_point": reference.tolist(),
        "processor_seconds": round(time.process_time() - started, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def demo(seeds: int, work: Path, results: Path, overrides: Sequence[str] = ()) -> None:
    """The searches that have no line in the results, seed by seed."""
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    for seed in range(seeds):
        for search_ in SEARCHES:
            row = next((row for row in known if (row["search"], row["seed"]) == (search_, seed)), None)
            if row is None:
                row = searched(search_, seed, work, overrides)
                known.append(row)
                results.parent.mkdir(parents=True, exist_ok=True)
                results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            told = {key: row[key] for key in ("search", "seed", "answers", "processor_seconds")}
            shares = {key: round(row[key], 4) for key in ("hypervolume", "hypervolume_plain")}
            print(json.dumps(told | shares), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--acquisition", choices=tuple(ALPHA), default="chebyshev", help="of the toy")
    parser.add_argument("--demo", action="store_true", help="the embedded prior against weighted sums")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "pareto.json")
    parser.add_argument("--work", type=Path, default=ROOT / "checkpoints" / "pareto_benchmark")
    options = parser.parse_args()
    if options.demo:
        torch.set_num_threads(1)
        demo(options.seeds, options.work, options.results)
        return
    for seed in range(options.seeds):
        pool = 4096 if options.acquisition == "chebyshev" else 256
        found = search(options.acquisition, seed, pool=pool)
        reached = next((n for n in range(20, len(found) + 1) if share(found[:n]) >= 0.95), None)
        row = {"seed": seed, "share": round(share(found), 4), "queries_to_95": reached}
        print(json.dumps(row | {"plain": round(share(answers(plain(seed, 60))), 4)}), flush=True)


if __name__ == "__main__":
    main()
