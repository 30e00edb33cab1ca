"""What saved surrogates are worth on prompts they were not fitted on: draw with their posterior means, ask, compare.

Every prompt is drawn from the same seed plainly and tilted by the posterior mean of each surrogate, and all pictures
are scored by the black box: plain and tilted ones have cost as many answers. An evaluation is a run in a folder of its
own, whose round 0 is the plain samples and whose further rounds are the tilted ones, one for each surrogate: it has a
run's durability, budgets and resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from botorch.models.model import Model

from tiltopt.designs import design_type
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online import rounds
from tiltopt.online.answering import SCALE, Answering, in_trouble, trouble_of
from tiltopt.online.engine.base import Engine
from tiltopt.online.engine.saved import chosen_surrogates
from tiltopt.online.evaluation.curve import HELD_OUT, SEEN, Layout, curve, long_table
from tiltopt.online.evaluation.judge import Fidelity, fidelity
from tiltopt.online.hooks import Hook
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.places import place_of
from tiltopt.online.queries import Ask, Drawn, Observations, Plan, RoundRecord
from tiltopt.online.report.gain import evaluation_numbers
from tiltopt.online.report.numbers import peak_memory_mb
from tiltopt.online.report.pages import write_report
from tiltopt.online.report.record import load_run, summarise, write_round_summary
from tiltopt.online.report.tracking import make_tracking
from tiltopt.online.runner import CallPolicy, Stop
from tiltopt.online.seeds import derive
from tiltopt.online.settings.prompts import load_prompts, prompt_of
from tiltopt.online.settings.run import NEWEST, AcquisitionSettings, Settings
from tiltopt.online.settings.source import Source
from tiltopt.online.signals import terminated_as_interrupted
from tiltopt.online.store import files, run_folder
from tiltopt.online.team import Kept, on_main
from tiltopt.rewards.base import BlackBox
from tiltopt.rewards.composition import Composition
from tiltopt.surrogates import io
from tiltopt.surrogates.several import SeveralModel

PLAIN = 0
"""The first round of an evaluation; each of the others is of one surrogate."""
CURVE = "curve.csv"
"""The curve over rounds, for spreadsheets."""


# ---- before anything is loaded


def evaluation_settings(settings: Settings) -> Settings:
    """The settings under which surrogates are evaluated: the same ones, with the posterior mean as acquisition, answers
    as they come, and a round for each surrogate, which are named one by one, since a run may go on and have more.

    Raises:
        ConfigError: no such surrogates.
    """
    chosen = chosen_surrogates(settings.evaluate)
    named = str(next(iter(chosen.values()))), NEWEST
    if settings.evaluate.rounds != NEWEST:
        named = settings.evaluate.surrogate, ", ".join(map(str, chosen))
    return dataclasses.replace(
        settings,
        acquisition=AcquisitionSettings(name="mean", beta=0.0),
        answer_noise=0.0,
        rounds=len(chosen),
        reference_samples=0,
        evaluate=dataclasses.replace(settings.evaluate, surrogate=named[0], rounds=named[1]),
    )


def layout_of(settings: Settings) -> Layout:
    """How the pictures of a round lie."""
    return Layout(settings.batch_size, settings.evaluate.seeds, bool(settings.evaluate.seen))


def check_evaluation(settings: Settings, out_dir: str | Path) -> dict[int, Path]:
    """{round: folder} of the surrogates, after everything that can be checked before a model is loaded.

    Raises:
        ConfigError: no such folder, no surrogate in it, or `out_dir` holds a run that would be mixed up with this.
    """
    of_one = settings.evaluate.rounds == NEWEST
    chosen = {0: place_of(settings.evaluate.surrogate)} if of_one else chosen_surrogates(settings.evaluate)
    for folder in chosen.values():
        _check_surrogate(folder)
    if of_one:
        chosen = chosen_surrogates(settings.evaluate)
    holds = "an evaluation by version 0.1" if (place_of(out_dir) / "queries.csv").exists() else ""
    if Optimizer.exists(out_dir):
        with run_folder.reading(out_dir) as store:
            known = run_folder.stored_settings(place_of(out_dir), store)
        holds = "" if known.evaluate.surrogate else "a run"
    if holds:
        raise ConfigError(
            f"`run_dir`: expected a folder of its own for the evaluation, got {str(out_dir)!r}, which holds {holds}; "
            "set --config.run_dir to another folder."
        )
    return chosen


def _check_surrogate(folder: Path) -> None:
    missing = [name for name in ("surrogate.json", "surrogate.safetensors") if not (folder / name).is_file()]
    if not missing:
        if files.read_json(folder / "surrogate.json").get("class") == SeveralModel.kind:
            raise ConfigError(
                f"`evaluate.surrogate`: expected a surrogate of one number per answer, got {str(folder)!r}, which is "
                "of several objectives; a round's summary says how each was predicted."
            )
        return
    got = f"no {' and no '.join(missing)} in it" if folder.is_dir() else "no such folder"
    near = sorted(str(p.parent) for p in (folder if folder.is_dir() else folder.parent).glob("*/surrogate.json"))
    hint = f" Saved surrogates nearby: {', '.join(near)}." if near else ""
    raise ConfigError(
        f"`evaluate.surrogate`: expected the folder of a saved surrogate such as checkpoints/<run>/round_004, got "
        f"{str(folder)!r}: {got}.{hint}"
    )


# ---- the evaluation


def evaluate(
    settings: Settings,
    engine: Engine,
    judge: Fidelity | None,
    out_dir: str | Path,
    black_box: BlackBox | None,
    *,
    policy: CallPolicy | None = None,
    hooks: Hook | None = None,
) -> dict[str, Any]:
    """Evaluates the surrogates of `settings.evaluate` over `settings.prompts`. Collective.

    One that was cut short goes on where it was: what is drawn stays, and what is answered is not asked again.

    Args:
        settings: see `evaluation_settings`; the engine must have been built from the same ones.
        engine: draws the images; its feature map must be the surrogate's.
        judge: for the fidelity; None leaves it out.
        out_dir: the folder of the evaluation: that of a run, with `summary.json` and `report.html`.
        black_box: answers; needed on rank 0 only.
        policy: how it is called; that of the settings when None.
        hooks: who is told about progress.

    Returns:
        The content of `summary.json`: the keys of a run's, and `kind`, `surrogate`, `surrogates`, `gain`, `prompts`
        (of the last surrogate), and `curve` (see `tiltopt.online.evaluation.curve.curve`).

    Raises:
        ConfigError: not a surrogate's folder. SurrogateError: saved for other features, or damaged.
        RewardError: the black box cannot be used, is dead, or answered nothing; what was answered is stored.
    """
    started, out_dir, team = time.monotonic(), place_of(out_dir), engine.team
    told = hooks if hooks is not None and team.is_main else Hook()

    chosen = on_main(team, lambda: {number: str(at) for number, at in check_evaluation(settings, out_dir).items()})
    loaded = on_main(
        team, lambda: Kept([io.load(place_of(at), feature_id=engine.feature_id) for at in chosen.values()])
    ).or_none
    models = [engine.share_model(loaded[i] if loaded is not None else None) for i in range(len(chosen))]
    exists = on_main(team, lambda: Optimizer.exists(out_dir))
    opening = Optimizer.open if exists else Optimizer.create
    with opening(out_dir, config=settings, engine=engine) as run, terminated_as_interrupted() as wish:
        answering = on_main(team, lambda: Kept(_answering(run, black_box, told, policy)))
        with answering.value.pulse() if team.is_main else contextlib.nullcontext():
            for round_ in range(on_main(team, lambda: run.store.next()[0]), len(models) + 1):
                told.on_round_start(round_, layout_of(settings).size)
                _draw(run, models[round_ - 1], round_, told)  # of the plain round the predictions of the last one
                wish.check()
            stop = on_main(team, lambda: _answer(run, answering.value))
            numbers = on_main(team, lambda: _numbers(run, chosen, models))
            return on_main(
                team, lambda: _finish(run, judge, black_box, stop, numbers, time.monotonic() - started, told)
            )


def _answering(run: Optimizer, black_box: BlackBox | None, hooks: Hook, policy: CallPolicy | None) -> Answering:
    if black_box is None:
        raise RewardError("expected a black box on rank 0, got None; make one with tiltopt.rewards.make_reward.")
    place = place_of(run.settings.evaluate.surrogate)
    scale = (place.parent if (place / "surrogate.json").is_file() else place) / SCALE
    if isinstance(black_box, Composition) and black_box.standardise:
        if not scale.is_file():
            raise ConfigError(
                f"`reward.standardise`: expected {scale}, the scale of the run that the surrogate learnt from, which "
                "is not there; weigh the parts in their own units."
            )
        black_box = black_box.with_scale(files.read_json(scale))
    run.answers_from(Source.of_box(black_box.name, run.settings.reward))
    return Answering(run.store, run.folder, run.settings, black_box, hooks, policy)


def evaluation_round(settings: Settings, round_: int) -> rounds.Job:
    """One of the rounds: the same prompts and seeds, plain or tilted by nothing but a surrogate."""
    layout = layout_of(settings)
    of_group = {HELD_OUT: settings, SEEN: dataclasses.replace(settings, prompts=settings.evaluate.seen or "-")}
    prompts = {name: load_prompts(own.prompts) for name, own in of_group.items() if own.prompts != "-"}
    asks = []
    for i in range(layout.size):
        name = layout.group(i)
        prompt = prompt_of(of_group[name], layout.place(i) + 1, prompts[name])
        asks.append(Ask(1 + round_ * layout.size + i, round_, i, prompt, derive(settings.seed, "evaluate", i)))
    if round_ == PLAIN:
        return rounds.Job(RoundRecord(PLAIN, "plain", layout.size), tuple(asks), Plan(None, 0.0), None)
    nothing = torch.zeros(0, 0, dtype=torch.float64)
    plan = Plan(alpha=settings.sampler.alpha, beta=0.0, budget=settings.sampler.budget_nats)
    record = RoundRecord(round_, "tilted", layout.size, alpha=plan.alpha, beta=0.0)
    return rounds.Job(record, tuple(asks), plan, Observations(nothing, nothing, None, nothing))


def _draw(run: Optimizer, model: Model, round_: int, hooks: Hook) -> None:
    """Draw and store a round, with the surrogate's prediction of every picture. Collective."""
    started, job = time.monotonic(), evaluation_round(run.settings, round_)
    drawn, _ = rounds.draw(run.engine, job, model, hooks.on_progress)
    predicted = _predicted(model, drawn)
    kind = design_type(run.settings.design)
    on_main(run.team, lambda: rounds.commit(run.store, run.engine, run.folder, kind, job, predicted, None, started))


def _predicted(model: Model, drawn: Sequence[Drawn]) -> list[Drawn]:
    X = torch.stack([d.features for d in drawn]).double()
    with torch.no_grad():
        posterior: Any = model.posterior(X.unsqueeze(-2))
    mean, sd = posterior.mean.flatten().tolist(), posterior.variance.clamp_min(0).sqrt().flatten().tolist()
    return [dataclasses.replace(d, predicted=m, predicted_sd=s) for d, m, s in zip(drawn, mean, sd, strict=True)]


def _answer(run: Optimizer, answering: Answering) -> Stop | None:
    try:
        return answering.answer()
    finally:
        run.checkpoint()


def _numbers(run: Optimizer, chosen: Mapping[int, str], models: Sequence[Model]) -> list[dict[str, Any]]:
    """The curve over the surrogates, from what is answered. Rank 0 only."""
    frames = [run.store.frame(number) for number in range(len(models) + 1)]
    X = {number: run.store.vectors_of(list(frame["id"])) for number, frame in enumerate(frames)}
    tables = [frame.assign(value=frame["value"].where(frame["state"] == "answered")) for frame in frames]
    return curve(layout_of(run.settings), tables[0], dict(zip(chosen, tables[1:], strict=True)), X, models)


def _finish(
    run: Optimizer,
    judge: Fidelity | None,
    black_box: BlackBox | None,
    stop: Stop | None,
    rows: list[dict[str, Any]],
    seconds: float,
    hooks: Hook,
) -> dict[str, Any]:
    """Summaries, the curve, trackers and the report, of what there is. Rank 0 only."""
    evaluated = chosen_surrogates(run.settings.evaluate)
    written = []
    for round_ in range(len(evaluated) + 1):
        pictures = run.store.frame(round_)
        shown = fidelity(judge, [run.image(number) for number in pictures["id"]], list(pictures["prompt"]))
        own: dict[str, Any] = {"fidelity": shown}
        if round_ != PLAIN:
            number = list(evaluated)[round_ - 1]
            own |= {"surrogate_round": number, "evaluation": {r["group"]: r for r in rows if r["round"] == number}}
        written.append(write_round_summary(run.folder, run.store, round_, own))
        hooks.on_round_end(written[-1])
    record = load_run(run.folder, run.store)
    unit = black_box.unit if black_box is not None else ""
    summary = summarise(record, unit=unit, seconds=seconds, peak_memory_mb=peak_memory_mb())
    summary |= evaluation_numbers(record.queries) | {
        "kind": "evaluation",
        "best_of_n": None,
        "surrogate": str(list(evaluated.values())[-1]),
        "surrogates": [{"round": number, "folder": str(folder)} for number, folder in evaluated.items()],
        "curve": rows,
        "complete": stop is None,
        "describe": run.engine.describe(),
    }
    files.write_json(run.folder / "summary.json", summary)
    table = long_table(rows).to_csv(index=False).encode("utf-8")
    files.write_atomic(run.folder / CURVE, lambda file: file.write(table))
    write_report(run.folder, load_run(run.folder, run.store))
    if stop is None:  # what is in the store is all there will be
        for hook in make_tracking(run.settings, run.folder, rounds=written):
            hook.close()
    trouble = trouble_of(run.store, stop)
    if trouble:
        raise in_trouble(trouble, run.folder)
    return summary
