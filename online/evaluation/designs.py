"""Sets of pictures held against each other: reward, rewards not optimised, fidelity, diversity, and nats spent.

found = evaluate_designs(load_sets(["checkpoints/das", "checkpoints/best_of_n"]), Request(rewards=("colorfulness",)))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tiltopt.designs import to_designs
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online.evaluation.diversity import GROUPS, TRUNCATION, jackknife, pairwise_distance, truncated_entropy
from tiltopt.online.evaluation.diversity import vendi_score as vendi
from tiltopt.online.evaluation.judge import Judge, scored
from tiltopt.online.evaluation.lpips import LPIPS, mean_distance
from tiltopt.online.evaluation.picture_sets import PictureSet
from tiltopt.online.runner import Runner
from tiltopt.online.store.files import read_image
from tiltopt.online.team import Team
from tiltopt.rewards import make_reward, validate
from tiltopt.rewards.base import Answer
from tiltopt.vision import CLIPVision

BATCH = 16
"""Pictures looked at together."""
RESAMPLES = 2000
TARGET, FIDELITY, NATS = "target", "fidelity", "nats"
OF_A_SET = ("entropy", "pairwise_distance", "vendi", "lpips")
"""Numbers of a whole set; all others are means over pictures."""


@dataclass(frozen=True)
class Request:
    """What is wanted of every set.

    Args:
        rewards: names of black boxes to be asked about every picture.
        options: of each reward.
        clip: CLIP model for fidelity and diversity; None for that of the first run, else the embedded one.
        diversity: whether diversity is wanted.
        fidelity: "judge", "clip", "none", or "auto": the judge where all pictures come from the embedded prior, else
            CLIP where every picture has a prompt.
        lpips: weight files of LPIPS' backbone and of its heads; None leaves it out.
    """

    rewards: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clip: str | None = None
    diversity: bool = False
    fidelity: str = "auto"
    lpips: tuple[str, str] | None = None


@dataclass(frozen=True)
class Measured:
    """One set with its numbers: `columns` of each picture (NaN: unknown) and, where wanted, `embeddings` (n, d)."""

    pictures: PictureSet
    columns: Mapping[str, np.ndarray]
    embeddings: Tensor | None


def check(sets: Sequence[PictureSet], request: Request) -> None:
    """Refuse what can be known to fail before a model is loaded.

    Raises:
        ConfigError: unknown reward or option, or prompts that fidelity needs and a set lacks.
    """
    for name in request.rewards:
        validate(name, request.options.get(name, {}))
    strange = sorted(set(request.options) - set(request.rewards))
    if strange:
        asked = ", ".join(request.rewards) or "none"
        raise ConfigError(f"`--option`: expected options of the rewards asked ({asked}), got one of {strange[0]!r}.")
    if request.fidelity in ("clip", "judge"):
        for found in sets:
            _need_prompts(found, f"fidelity by {request.fidelity}")


def evaluate_designs(sets: Sequence[PictureSet], request: Request, team: Team | None = None) -> dict[str, Any]:
    """Every number of every set, with its 95 % interval, and the differences to the first set. Collective.

    Means of pictures have bootstrap intervals (percentiles of `RESAMPLES` resamples), measures of a set those of a
    jackknife. Measures of a set are taken of as many pictures in every set, the first ones, since they grow with them.

    Returns:
        `methods`: of each set its `name`, `folder`, `pictures`, `groups` (all, and where known seen and held_out:
        number of `pictures` and of `prompts`, and `metrics`: name -> {mean, low, high, n}), and `prompts` (the same
        numbers of each prompt, without intervals). `differences`: rows {name, metric, group, mean, low, high, pairs,
        by}, paired by prompt and seed where these are shared, else by prompt. `target`, `fidelity_by`, `clip`,
        `diversity`: what was measured, and how.

    Raises:
        ConfigError: see `check`. RewardError: a reward cannot be built, or needs prompts that are not there.
    """
    check(sets, request)
    team = team if team is not None else Team()
    by = _fidelity_by(sets, request.fidelity)
    clip = request.clip or next((found.clip for found in sets if found.clip), None) or "embedded"
    tower = CLIPVision.load(clip, device=team.device) if request.diversity or by == "clip" else None
    judge = Judge.load() if by == "judge" else None
    boxes = {name: Runner(make_reward(name, **_options(request, name, clip))) for name in request.rewards}
    distance = LPIPS.load(*request.lpips).to(team.device) if request.lpips else None
    measured = [_measure(found, tower, judge, boxes, team) for found in sets]
    size = min(map(len, sets))
    truncation = max(1, min(TRUNCATION, size - math.ceil(size / GROUPS) - 1))
    measures = _measures(truncation) if request.diversity else {}
    methods = []
    for found in measured:
        groups = {}
        for name, rows in _groups(found.pictures).items():
            metrics = _means(found, rows)
            if found.embeddings is not None and name == "all":
                chosen = found.embeddings[:size]
                metrics |= {key: _of_set(measure, chosen) for key, measure in measures.items()}
            if distance is not None and name == "all":
                images = [read_image(path) for path in found.pictures.files[:size]]
                metrics["lpips"] = _number(mean_distance(distance, images), n=len(images))
            asked = {found.pictures.prompts[i] for i in rows}
            groups[name] = {"pictures": len(rows), "prompts": len(asked - {None}), "metrics": metrics}
        methods.append(
            {
                "name": found.pictures.name,
                "folder": str(found.pictures.folder),
                "pictures": len(found.pictures),
                "groups": groups,
                "prompts": _per_prompt(found, measures),
            }
        )
    same = {found.reward for found in sets}
    return {
        "kind": "designs",
        "target": {"name": sets[0].reward, "unit": sets[0].unit} if len(same) == 1 and sets[0].reward else None,
        "rewards": {name: runner.black_box.unit for name, runner in boxes.items()},
        "fidelity_by": by,
        "clip": tower.id if tower is not None else None,
        "diversity": {"pictures": size, "truncation": truncation} if request.diversity else None,
        "methods": methods,
        "differences": [row for other in measured[1:] for row in _differences(measured[0], other)],
    }


# ---- measuring


def _fidelity_by(sets: Sequence[PictureSet], wanted: str) -> str | None:
    if wanted != "auto":
        return None if wanted == "none" else wanted
    if any(prompt is None for found in sets for prompt in found.prompts):
        return None
    return "judge" if all(found.embedded is not False for found in sets) and any(f.embedded for f in sets) else "clip"


def _options(request: Request, name: str, clip: str) -> dict[str, Any]:
    """Those asked for; the CLIP score looks through the CLIP model of this evaluation unless another is named."""
    given = dict(request.options.get(name, {}))
    return {"clip": clip} | given if name == "clip" else given


def _measure(
    found: PictureSet, tower: CLIPVision | None, judge: Judge | None, boxes: Mapping[str, Runner], team: Team
) -> Measured:
    """All of a set's pictures, looked at in batches that are dealt to the processes."""
    batches = [range(i, min(i + BATCH, len(found))) for i in range(0, len(found), BATCH)]
    texts = _texts(found, tower) if tower is not None and judge is None else None
    mine = []
    for place, rows in team.share(batches):
        images = [read_image(found.files[i]).convert("RGB") for i in rows]
        prompts = [found.prompts[i] for i in rows]
        seen: dict[str, list[float]] = {name: _scores(box, images, prompts, found) for name, box in boxes.items()}
        embedded = _embed(tower, images) if tower is not None else None
        if judge is not None:
            seen[FIDELITY] = _judged(judge, images, prompts)
        elif texts is not None and embedded is not None:
            seen[FIDELITY] = _zero_shot(embedded, texts, [found.words.get(str(p), str(p)) for p in prompts])
        mine.append((place, (seen, embedded)))
    parts = team.collect(mine, len(batches))
    names = parts[0][0]
    whole = {TARGET: np.array(found.values, dtype=float)}
    whole |= {name: np.array([v for part, _ in parts for v in part[name]], dtype=float) for name in names}
    whole[NATS] = np.array(found.nats, dtype=float)
    kept = {name: column for name, column in whole.items() if np.isfinite(column).any()}
    embeddings = None if tower is None else torch.cat([part for _, part in parts if part is not None])
    return Measured(found, kept, embeddings)


def _scores(
    runner: Runner, images: Sequence[Image.Image], prompts: Sequence[str | None], found: PictureSet
) -> list[float]:
    """What a reward says of the pictures; NaN where it fails.

    Raises:
        RewardError: it cannot be used, or is dead.
    """
    answers: dict[Any, Answer] = {}
    items = [(i, image, prompt or "") for i, (image, prompt) in enumerate(zip(images, prompts, strict=True))]
    try:
        stop = runner.run(items, answers.__setitem__)
    except RewardError as error:
        missing = "" if all(prompts) else f" {_where_prompts(found)}"
        raise RewardError(f"{found.folder}: {error}{missing}") from error
    if stop is not None:
        raise RewardError(f"{found.folder}: {stop.message}")
    return [float(answers[i]) for i in range(len(images))]


def _embed(tower: CLIPVision, images: Sequence[Image.Image]) -> Tensor:
    """(n, p) float64 normalised embeddings, on the CPU; pictures of any sizes."""
    rows = []
    with torch.no_grad():
        for image in images:
            rows.append(tower(to_designs([image]).to(tower.device)).projection)
    return F.normalize(torch.cat(rows).double().cpu(), dim=-1)


def _texts(found: PictureSet, tower: CLIPVision) -> tuple[list[str], Tensor]:
    """The entries of the prompt list, and the normalised embedding of a prompt of each."""
    _need_prompts(found, "fidelity by clip")
    said = {word: prompt for prompt, word in reversed(list(found.words.items()))}
    said |= {str(prompt): str(prompt) for prompt in found.prompts if prompt not in found.words}
    with torch.no_grad():
        rows = [F.normalize(tower.text([prompt]).double().cpu(), dim=-1) for prompt in said.values()]
    return list(said), torch.cat(rows)


def _zero_shot(embedded: Tensor, texts: tuple[list[str], Tensor], asked: Sequence[str]) -> list[float]:
    """1 where, of all entries of the prompt list, the asked one is nearest to the picture; else 0."""
    words, table = texts
    best = (embedded @ table.T).argmax(-1).tolist()
    return [float(words[i] == word) for i, word in zip(best, asked, strict=True)]


def _judged(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str | None]) -> list[float]:
    """1 where the judge sees what was asked for, 0 where not, NaN where it knows no such subject."""
    texts = [prompt or "" for prompt in prompts]
    right, known = judge.correct(images, texts).tolist(), scored(texts).tolist()
    return [float(r) if k else math.nan for r, k in zip(right, known, strict=True)]


def _need_prompts(found: PictureSet, what: str) -> None:
    missing = sum(prompt is None for prompt in found.prompts)
    if missing:
        raise ConfigError(
            f"{found.folder}: {what} needs the prompt of every picture, and {missing} of {len(found)} have none. "
            f"{_where_prompts(found)}"
        )


def _where_prompts(found: PictureSet) -> str:
    return (
        f"Write them into {found.folder / 'prompts.txt'}, a line per picture in the order of their names, or into "
        "metadata.jsonl with `file_name` and `prompt`."
    )


# ---- numbers


def _groups(found: PictureSet) -> dict[str, list[int]]:
    rows = list(range(len(found)))
    if found.seen is None:
        return {"all": rows}
    seen = [i for i in rows if found.prompts[i] in found.seen]
    groups = {"all": rows, "seen": seen, "held_out": [i for i in rows if i not in set(seen)]}
    return {name: chosen for name, chosen in groups.items() if chosen}


def _means(found: Measured, rows: Sequence[int]) -> dict[str, dict[str, Any]]:
    return {name: bootstrap(column[list(rows)]) for name, column in found.columns.items()}


def bootstrap(values: np.ndarray) -> dict[str, Any]:
    """Mean with its 95 % interval by percentiles of `RESAMPLES` resamples, always the same ones; NaN is left out.

    Returns:
        `mean`, `low`, `high` (None where undefined), `n`.
    """
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return _number(float(x[0]) if len(x) else math.nan, n=len(x))
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.percentile(x[draws].mean(axis=1), [2.5, 97.5])
    return _number(float(x.mean()), float(low), float(high), len(x))


def _number(mean: float, low: float | None = None, high: float | None = None, n: int = 0) -> dict[str, Any]:
    return {"mean": mean if math.isfinite(mean) else None, "low": low, "high": high, "n": n}


def _measures(truncation: int) -> dict[str, Callable[[Tensor], float]]:
    return {
        "entropy": functools.partial(truncated_entropy, k=truncation),
        "pairwise_distance": pairwise_distance,
        "vendi": vendi,
    }


def _of_set(measure: Callable[[Tensor], float], embeddings: Tensor) -> dict[str, Any]:
    if len(embeddings) < 2:
        return _number(math.nan, n=len(embeddings))
    return _number(*jackknife(measure, embeddings), n=len(embeddings))


def _per_prompt(found: Measured, measures: Mapping[str, Callable[[Tensor], float]]) -> list[dict[str, Any]]:
    """Means of each prompt's pictures, and how different they are among themselves."""
    pictures, rows = found.pictures, []
    for prompt in dict.fromkeys(prompt for prompt in pictures.prompts if prompt is not None):
        mine = [i for i, other in enumerate(pictures.prompts) if other == prompt]
        numbers = {}
        for name, column in found.columns.items():
            finite = column[mine][np.isfinite(column[mine])]
            numbers[name] = float(finite.mean()) if len(finite) else None
        if found.embeddings is not None and len(mine) > 1:
            for name in ("pairwise_distance", "vendi"):
                if name in measures:
                    numbers[name] = measures[name](found.embeddings[mine])
        seen = None if pictures.seen is None else prompt in pictures.seen
        rows.append({"prompt": prompt, "seen": seen, "pictures": len(mine), "metrics": numbers})
    return rows


def _differences(first: Measured, other: Measured) -> list[dict[str, Any]]:
    """How much higher the other set's numbers are, picture by picture or prompt by prompt."""
    a, b = first.pictures, other.pictures
    keys = [[(p, s) for p, s in zip(of.prompts, of.seeds, strict=True)] for of in (a, b)]
    shared = set(keys[0]) & set(keys[1])
    exact = len(shared) > 1 and all(p is not None and s is not None for p, s in shared)
    rows: list[dict[str, Any]] = []
    for metric in first.columns:
        if metric not in other.columns or (metric == TARGET and a.reward != b.reward):
            continue
        means = []
        for of, found, key in ((a, first, keys[0]), (b, other, keys[1])):
            by = key if exact else list(of.prompts)
            sums: dict[Any, list[float]] = {}
            for at, value in zip(by, found.columns[metric], strict=True):
                if at is not None and math.isfinite(value):
                    sums.setdefault(at, []).append(float(value))
            means.append({at: sum(values) / len(values) for at, values in sums.items()})
        for group, member in _members(a, b, exact).items():
            both = [at for at in means[0] if at in means[1] and member(at)]
            if len(both) > 1:
                found_ = bootstrap(np.array([means[1][at] - means[0][at] for at in both]))
                how = "prompt and seed" if exact else "prompt"
                row = {"name": b.name, "metric": metric, "group": group, **found_, "pairs": found_["n"], "by": how}
                rows.append({key: value for key, value in row.items() if key != "n"})
    return rows


def _members(a: PictureSet, b: PictureSet, exact: bool) -> dict[str, Callable[[Any], bool]]:
    """Of each group that both sets have, whether a pair belongs to it."""
    groups: dict[str, Callable[[Any], bool]] = {"all": lambda at: True}
    seen = a.seen if a.seen is not None else b.seen
    if seen is not None:
        prompt = (lambda at: at[0]) if exact else (lambda at: at)
        groups["seen"] = lambda at: prompt(at) in seen
        groups["held_out"] = lambda at: prompt(at) not in seen
    return groups
