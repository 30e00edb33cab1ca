"""What a run amounts to, in numbers: `summary.json` at the run's root, which machines read.

Every function here goes from data to plain Python values; nothing loads a model. A number that does not exist is null
in the file, never NaN.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from tiltopt.online.queries import RoundRecord
from tiltopt.online.store.files import jsonable
from tiltopt.surrogates.calibration import calibration

TAIL = 0.05
"""Share of plain samples in the tail whose weight `mass_lift` tells."""
PLAIN_NEEDED = 60
"""Plain answers from which the prior's 95th percentile can be told: some three of them lie above."""
STATES = ("asked", "answered", "failed", "abandoned")
PACKAGES = ("tiltopt", "torch", "diffusers", "transformers", "accelerate", "botorch", "gpytorch", "numpy", "pillow")


def prior_statistics(values: Iterable[float], fidelity: float | None = None) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1), 95th percentile (linear interpolation) of plain samples' rewards.

    Args:
        values: rewards of plain samples of the prior, reward units; failed ones (NaN) are left out.
        fidelity: share of them that the judge recognises, in [0, 1], or None.
    """
    x = _finite(values)
    return {
        "mean": _mean(x),
        "std": float(x.std(ddof=1)) if len(x) > 1 else None,
        "p95": float(np.percentile(x, 95)) if len(x) else None,
        "fidelity": _number(fidelity),
    }


def best_of_n(values: Iterable[float], n: int, k: int) -> float | None:
    r"""Expected mean of the k best among n plain samples, estimated from M scored ones; exact, no resampling.

    With x_1 >= ... >= x_M sorted, S_i(j) = P(at least i of the n drawn are among x_1 ... x_j) and
    E[x_(i)] = sum_j x_j (S_i(j) - S_i(j-1)); the result is the mean of E[x_(i)] over i = 1 ... k. For n <= M the n are
    a random subset (hypergeometric); for n > M they are drawn with replacement (binomial), which can show nothing
    better than the best of the M.

    Args:
        values: rewards of M plain samples; NaN is left out.
        n: queries spent.
        k: how many of the best count; cut to n.

    Returns:
        The expected mean, reward units, or None when there are no values, n < 1 or k < 1.
    """
    x = np.sort(_finite(values))[::-1]
    m, k = len(x), min(k, n)
    if m == 0 or k < 1:
        return None
    top = np.arange(0, m + 1)[None, :]
    at_least = np.arange(k)[:, None]  # sf(i - 1) = P(count >= i)
    reached = stats.hypergeom.sf(at_least, m, top, n) if n <= m else stats.binom.sf(at_least, n, top / m)
    return float((np.diff(reached, axis=1) @ x).mean())


def mass_lift(values: Iterable[float], plain: Iterable[float]) -> float | None:
    """How much more often answers lie in the prior's best twentieth than plain samples do.

    Args:
        values: answers, reward units; NaN is left out.
        plain: rewards of plain samples of the prior; NaN is left out.

    Returns:
        Share of the answers above the 95th percentile of `plain`, over 0.05: 1 for the prior, at most 20. None without
        answers or with fewer than 60 plain samples.
    """
    x, known = _finite(values), _finite(plain)
    if not len(x) or len(known) < PLAIN_NEEDED:
        return None
    return float((x > np.percentile(known, 100 * (1 - TAIL))).mean()) / TAIL


def interval(differences: Iterable[float], level: float = 0.95) -> dict[str, float | int | None]:
    """Mean of paired differences and its confidence interval by Student's t; NaN is left out.

    Returns:
        `mean`, `low`, `high` (None where undefined: fewer than one or two pairs), `pairs`.
    """
    x = _finite(differences)
    n = len(x)
    reach = float(stats.t.ppf(0.5 + level / 2, n - 1) * x.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    mean = _mean(x)
    ends = (None, None) if mean is None or reach is None else (mean - reach, mean + reach)
    return {"mean": mean, "low": ends[0], "high": ends[1], "pairs": n}


def round_summary(
    record: RoundRecord, batch: pd.DataFrame, asked: int, comparisons: pd.DataFrame, plain: Iterable[float] = ()
) -> dict[str, Any]:
    """What a round amounts to, as plain JSON values: the content of its `summary.json`, less what was measured besides.

    Args:
        record: what the store knows of the round.
        batch: its queries: columns `state value predicted predicted_sd`, and `acquired ess log_z` where the engine
            told. In a run of comparisons `value` is the utility (`tiltopt.online.report.thurstone.with_utilities`).
        asked: queries asked up to the end of the round, over the run.
        comparisons: of the run; those of the round are counted.
        plain: rewards of plain samples, which the round is held against.

    Returns:
        The keys are explained in `docs/report.md`.
    """
    answered = batch[batch["state"] == "answered"]
    x = _finite(answered["value"])
    ess, log_z = (_mean(_finite(answered.get(name, ()))) for name in ("ess", "log_z"))
    known = _finite(answered.get("ess", ()))
    own = comparisons[comparisons["round"] == record.round] if len(comparisons) else comparisons
    return jsonable(
        {
            "round": record.round,
            "queries": asked,
            "mean": _mean(x),
            "best": float(x.max()) if len(x) else None,
            "mass_lift": mass_lift(x, plain) if record.kind != "plain" else None,
            "predicted_mean": _mean(_finite(batch["predicted"])),
        }
        | ({"comparisons": own["outcome"].value_counts().to_dict()} if len(comparisons) else {})
        | {
            "kind": record.kind,
            "size": record.size,
            "states": {state: int((batch["state"] == state).sum()) for state in STATES},
            "ess_mean": ess,
            "ess_median": float(np.median(known)) if len(known) else None,
            "log_z_mean": log_z,
            "nats_mean": record.nats,
            "alpha": record.alpha,
            "beta": record.beta,
            "calibration": calibration(
                answered["value"], answered["predicted"], answered["predicted_sd"], answered.get("acquired")
            ),
            "previous_surrogate": record.score,
            "notes": list(record.notes),
            "ask_seconds": record.ask_seconds,
            "answer_seconds": record.answer_seconds,
            "seconds": record.ask_seconds + record.answer_seconds,
            "surrogate": None if record.fingerprint is None else {"fingerprint": record.fingerprint},
        }
    )


def peak_memory_mb() -> float:
    """Largest resident set of this process, or of its largest finished child, so far; MiB."""
    scale = 1024.0 if sys.platform != "darwin" else 1024.0**2  # Linux counts in KiB, macOS in bytes
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / scale


def peak_memory(device: torch.device) -> dict[str, float]:
    """`peak_memory_mb`, and `gpu_peak_memory_mb` of a CUDA device: the most that its tensors took so far, MiB."""
    found = {"peak_memory_mb": peak_memory_mb()}
    if device.type == "cuda":
        found["gpu_peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def own_peak_memory_mb() -> float:
    """Largest resident set of this process since it began its program; MiB.

    On Linux `getrusage` begins with what the parent held when it started the process, so a small child of a large
    parent would show the parent's size; the kernel's own high-water mark does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024.0 if sys.platform != "darwin" else 1024.0**2)


def software_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Python and the installed ones of `packages`, without importing them."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _finite(values: Iterable[Any]) -> np.ndarray:
    x = np.asarray([math.nan if v is None else float(v) for v in values], dtype=float)
    return x[np.isfinite(x)]


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)
