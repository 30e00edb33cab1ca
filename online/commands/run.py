"""The main job: start a run, carry one on, evaluate a saved surrogate."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltopt.errors import ConfigError, StoreError, SurrogateError
from tiltopt.online.answering import in_trouble, trouble_of
from tiltopt.online.commands.preflight import check_trust, start_line
from tiltopt.online.engine.saved import newest_surrogate
from tiltopt.online.evaluation.judge import judge_of, judged
from tiltopt.online.hooks import Hooks, Progress
from tiltopt.online.loop import Result, ask_again, run
from tiltopt.online.loop import work as answer_for_others
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.places import place_of
from tiltopt.online.queries import EXTRA_KINDS, maximised
from tiltopt.online.report.front import UNIT as MERIT
from tiltopt.online.report.gain import curve_table, evaluation_table
from tiltopt.online.report.numbers import peak_memory, peak_memory_mb
from tiltopt.online.report.pages import write_report
from tiltopt.online.report.record import ended, load_run, summarise
from tiltopt.online.report.text import round_table
from tiltopt.online.report.thurstone import UNIT
from tiltopt.online.report.tracking import make_tracking
from tiltopt.online.settings.objectives import objectives_of
from tiltopt.online.settings.prompts import load_prompts
from tiltopt.online.settings.run import Settings, differences
from tiltopt.online.settings.source import Source, how_to_go_on, presumed, refusal
from tiltopt.online.settings.validation import validated
from tiltopt.online.signals import terminated_as_interrupted
from tiltopt.online.store.files import is_run, write_json
from tiltopt.online.store.run_folder import database_of
from tiltopt.online.team import Kept, Team, on_main
from tiltopt.rewards import make_reward
from tiltopt.rewards.base import BlackBox

if TYPE_CHECKING:
    from tiltopt.online.evaluation.judge import Judge


@terminated_as_interrupted()
def start(settings: Settings, *, named: bool = True) -> None:
    """Run what the settings say, or evaluate the surrogate that they name.

    Args:
        named: whether somebody chose `run_dir`; else a taken folder is passed by for the next free number.

    Raises:
        ConfigError: before anything is loaded. RewardError: nothing was answered, or the black box is dead.
    """
    settings = validated(settings)
    source = Source.of(settings.reward)
    team = Team.from_accelerate(settings.device)
    settings = dataclasses.replace(settings, run_dir=on_main(team, lambda: _free_folder(settings, named)))
    started = time.monotonic()
    if settings.evaluate.surrogate:
        _evaluate(settings, team)
        team.leave()
        return
    with Optimizer.create(settings.run_dir, settings, team=team) as optimizer:
        on_main(team, lambda: optimizer.answers_from(source))
        _carry_on(optimizer, started, 0.0)
    team.leave()


@terminated_as_interrupted()
def resume(
    folder: str | Path,
    *,
    reward: str | None = None,
    allow_change: bool = False,
    recover: bool = False,
    trust: bool = False,
    again: bool = False,
) -> None:
    """Carry on the run, or the evaluation, in `folder`.

    Args:
        reward: the reward that answers; needed once for a run that does not know who answered so far.
        allow_change: go on although config.json was changed.
        recover: keep a damaged store aside and go on from the newest whole round.
        trust: execute the code of a reward although the folder that names it is not the user's own.
        again: ask everything again that failed.

    Raises:
        ConfigError: the answers come from somebody else, or the folder is not trusted.
        RewardError: nothing was answered, or the black box is dead.
    """
    folder, team, started = place_of(folder), Team.from_accelerate(), time.monotonic()
    if recover:
        on_main(team, lambda: Optimizer.open(folder, recover=True, allow_change=allow_change or None).close())
    wanted = on_main(team, lambda: _answered_by(folder, reward))
    permitted = allow_change or [line.split(":")[0] for line in wanted.changes]
    config = wanted.settings if wanted.changes else None
    with Optimizer.open(folder, team=team, config=config, allow_change=permitted or None) as optimizer:
        on_main(team, lambda: _check_code(folder, optimizer.settings, reward, trust))
        settings = validated(optimizer.settings)
        if settings.prior.fingerprint:
            raise ConfigError(
                f"the prior of {folder} was handed over in Python, and only Python can go on with it: "
                f"Optimizer.open({str(folder)!r}, prior=pipe)."
            )
        source = Source.of(settings.reward)
        on_main(team, lambda: optimizer.answers_from(source, allow_change=allow_change))
        if again:
            print(f"{on_main(team, lambda: ask_again(optimizer))} of {folder} are asked again", flush=True)
        if not settings.evaluate.surrogate:
            earlier = on_main(team, lambda: optimizer.store.spent().seconds)
            _carry_on(optimizer, started, earlier)
    if settings.evaluate.surrogate:
        _evaluate(settings, team)
    team.leave()


def work(folder: str | Path, *, reward: str | None = None, trust: bool = False) -> None:
    """Answer what is asked of the run in `folder`, beside others, until it is complete.

    Args:
        reward: the run's own, said for certainty.
        trust: see `resume`.

    Raises:
        ConfigError: see `tiltopt.online.loop.work`; or the answers come from somebody else.
        RewardError: nothing was answered, or the black box is dead.
    """
    folder = place_of(folder)
    settings = _answered_by(folder, reward).settings
    source = Source.of(settings.reward)
    _check_code(folder, settings, reward, trust)
    black_box = make_reward(settings.reward.name, **settings.reward.options)
    progress = Progress(settings.rounds + 1, unit=black_box.unit)
    with Optimizer.open(folder) as optimizer:
        print(f"answering what is asked of {folder} by {source}", flush=True)
        try:
            stop = answer_for_others(optimizer, black_box, hooks=progress)
        finally:
            progress.close()
        trouble = trouble_of(optimizer.store, stop)
    if trouble:
        raise in_trouble(trouble, folder)
    print("stopped early: " + stop.message if stop is not None else f"{folder} is complete", flush=True)


def _check_code(folder: Path, settings: Settings, reward: str | None, trust: bool) -> None:
    """`check_trust` for the reward of a run; code that the user names is trusted."""
    own = settings.reward
    check_trust(folder, own.name, own.options, trust=trust or (":" in own.name and reward == own.name))


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Settings under which a run goes on, and what they change."""

    settings: Settings
    changes: list[str]


def _answered_by(folder: Path, reward: str | None) -> _Wanted:
    """The settings of the run in `folder` with the reward that is to answer.

    Raises:
        ConfigError: the answers so far come from somebody else, or nobody knows from whom.
    """
    with Optimizer.open(folder, read_only=True) as optimizer:
        recorded, told, settings = optimizer.source(), optimizer.told(), optimizer.settings
    wanted = settings
    if reward is not None and reward != settings.reward.name:
        wanted = dataclasses.replace(settings, reward=dataclasses.replace(settings.reward, name=reward, options={}))
    if recorded is None and told and reward is None:
        raise refusal(None, Source.of(settings.reward), folder)
    if recorded is not None and recorded.kind != "reward":
        raise ConfigError(
            f"the answers of {folder} come from {recorded}, not from a reward; {how_to_go_on(recorded, folder)}."
        )
    if recorded is not None and reward is not None and reward != recorded.name:
        raise refusal(recorded, Source("reward", reward), folder)
    return _Wanted(wanted, differences(settings, wanted))


def _free_folder(settings: Settings, named: bool) -> str:
    """The run's folder; a preset's own folder gets the next free number when it is taken."""
    folder = place_of(settings.run_dir)
    database_of(folder, None)
    if not is_run(folder):
        return str(folder)
    if named:
        raise ConfigError(
            f"`run_dir`: {folder} holds a run already. Continue it with `tiltopt resume {folder}`, or name another "
            "folder."
        )
    number = 2
    while is_run(folder.with_name(f"{folder.name}-{number}")):
        number += 1
    return str(folder.with_name(f"{folder.name}-{number}"))


def _carry_on(optimizer: Optimizer, started: float, earlier_seconds: float) -> None:
    """Black box and judge of the settings, and the run with them. Collective."""
    settings, team = optimizer.settings, optimizer.team
    if team.is_main:
        print(start_line(settings, optimizer.folder, str(Source.of(settings.reward))), flush=True)
    black_box = on_main(team, lambda: Kept(make_reward(settings.reward.name, **settings.reward.options))).or_none
    carry_on(optimizer, black_box, judge_of(settings.prior.path), started, earlier_seconds)


def carry_on(
    optimizer: Optimizer, black_box: BlackBox | None, judge: Judge | None, started: float, earlier_seconds: float = 0.0
) -> None:
    """Reference samples, the loop, summary, report and table: all of a run that is left. Collective.

    Args:
        optimizer: a new or reopened run.
        black_box: what answers; needed on rank 0 only.
        judge: recognises subjects, for the report; None leaves that out.
        started: `time.monotonic()` when this process began with the run.
        earlier_seconds: spent on the run before that.

    Raises:
        RewardError: nothing was answered, or the black box is dead; what was answered is stored.
    """
    settings, team, folder = optimizer.settings, optimizer.team, optimizer.folder
    unit = black_box.unit if black_box is not None else ""
    if settings.pairwise:
        unit = UNIT
    if len(maximised(objectives_of(settings))) > 1:
        unit = MERIT
    earlier = ended(folder, optimizer.store) if team.is_main else ()
    extra = sum(summary["kind"] in EXTRA_KINDS for summary in earlier)
    progress = Progress(
        settings.rounds + 1 + extra,
        done=len(earlier),
        unit=unit,
        particles=settings.sampler.num_particles,
        main=team.is_main,
    )
    hooks = Hooks([progress, *make_tracking(settings, folder, rounds=earlier, main=team.is_main)])

    def measure(optimizer: Optimizer, round_: int) -> Mapping[str, Any]:
        rows = optimizer.store.frame(round_)
        images = [optimizer.image(i) for i in rows["id"]]
        seen = judged(judge, list(rows["id"]), images, list(rows["prompt"]))
        return {**seen, "unit": unit, "particles": settings.sampler.num_particles, **peak_memory(team.device)}

    try:
        result = run(optimizer, black_box, hooks=hooks, measure=measure)
    except KeyboardInterrupt:
        told = f"every answer so far is stored; {optimizer.go_on()}." if team.is_main else ""
        raise KeyboardInterrupt(told) from None
    finally:
        hooks.close()
    on_main(team, lambda: _finish(optimizer, result, unit, earlier_seconds + time.monotonic() - started))


def _finish(optimizer: Optimizer, result: Result, unit: str, seconds: float) -> None:
    folder = optimizer.folder
    record = load_run(folder, optimizer.store)
    summary = summarise(record, unit=unit, seconds=seconds, peak_memory_mb=peak_memory_mb())
    if summary.get("sight", {}).get("blind"):
        summary["sight"]["best_kind"] = _best_kind(optimizer)
    write_json(folder / "summary.json", summary)
    report = write_report(folder, dataclasses.replace(record, summary=summary))
    print()
    print(round_table(summary))
    if result.stop is not None and not result.trouble:
        print(f"\nstopped early: {result.stop.message}; {optimizer.go_on()}.")
    print(f"\nreport: {report}", flush=True)
    if result.trouble:
        raise in_trouble(result.trouble, folder)


def _best_kind(optimizer: Optimizer) -> str | None:
    """The features that predict the run's answers best; None where it has no images to look at, or too few answers."""
    from tiltopt.online.engine.diffusion import DiffusionEngine
    from tiltopt.online.evaluation.feature_ranking import rank

    if not isinstance(optimizer.engine, DiffusionEngine):
        return None
    try:
        return str(rank(optimizer.folder, engine=optimizer.engine)[0]["kind"])
    except (StoreError, SurrogateError):
        return None


def evaluate(
    surrogate: str | Path,
    settings: Settings | None = None,
    *,
    rounds: str | None = None,
    seeds: int | None = None,
    trust: bool = False,
) -> None:
    """Evaluate saved surrogates.

    Args:
        surrogate: the folder of one, or that of a run.
        settings: under which; None for those of its run, on held-out animals and on the run's own prompts.
        rounds: of the run's surrogates, as `evaluate.rounds`; None for what the settings say.
        seeds: independent sets of pairs, as `evaluate.seeds`; likewise.
        trust: see `resume`.

    Raises:
        ConfigError: no such surrogates.
    """
    newest = newest_surrogate(place_of(surrogate))
    if settings is None:
        own = _taught_by(newest.parent)
        check_trust(newest.parent, own.reward.name, own.reward.options, trust=trust)
        place, held_out = own.run_dir.rstrip("/") + "_evaluate", "held_out_animals"
        taught = set(load_prompts(own.prompts))
        seen = own.prompts if taught.isdisjoint(load_prompts(held_out)) else ""
        evaluated = dataclasses.replace(own.evaluate, seen=seen)
        settings = dataclasses.replace(own, run_dir=place, prompts=held_out, reference_samples=0, evaluate=evaluated)
    given = {key: value for key, value in (("rounds", rounds), ("seeds", seeds)) if value is not None}
    evaluated = dataclasses.replace(settings.evaluate, surrogate=str(surrogate), **given)  # type: ignore[arg-type]
    start(dataclasses.replace(settings, evaluate=evaluated), named=False)


def _taught_by(folder: Path) -> Settings:
    """The settings of a run whose surrogates are to be evaluated by the reward that taught them.

    Raises:
        ConfigError: no reward did, or nobody knows which.
    """
    with Optimizer.open(folder, read_only=True) as optimizer:
        settings = optimizer.settings
        source = presumed(optimizer.source(), optimizer.told() > 0, settings.reward)
    if source is None or source.kind != "reward":
        raise ConfigError(
            f"the answers of {folder} come from {source or 'an unknown source'}, not from a reward that could be asked "
            "about new pictures. Name one that measures the same with --config FILE.py:PRESET "
            "--config.reward.name=NAME."
        )
    return settings


def _evaluate(settings: Settings, team: Team) -> None:
    """Saved surrogates, on the prompts of the settings. Collective."""
    from tiltopt.online.engine.diffusion import DiffusionEngine
    from tiltopt.online.evaluation.evaluate import check_evaluation, evaluate, evaluation_settings, layout_of

    settings = evaluation_settings(settings)
    on_main(team, lambda: len(check_evaluation(settings, settings.run_dir)))
    black_box = on_main(team, lambda: Kept(make_reward(settings.reward.name, **settings.reward.options))).or_none
    progress = Progress(settings.rounds + 1, unit=getattr(black_box, "unit", ""), main=team.is_main)
    engine = DiffusionEngine(settings, team)
    if team.is_main:
        layout, seen = layout_of(settings), f" and on {settings.evaluate.seen}" if settings.evaluate.seen else ""
        print(
            f"evaluating {settings.rounds} surrogate{'s' if settings.rounds > 1 else ''} of "
            f"{settings.evaluate.surrogate} on {settings.prompts}{seen}, {layout.seeds} seed"
            f"{'s' if layout.seeds > 1 else ''}, {layout.size} pictures plain and as many by each: at most "
            f"{(settings.rounds + 1) * layout.size} answers, into {settings.run_dir}",
            flush=True,
        )
    try:
        summary = evaluate(settings, engine, judge_of(settings.prior.path), settings.run_dir, black_box, hooks=progress)
    finally:
        progress.close()
    if team.is_main:
        print()
        print(evaluation_table(summary))
        print()
        print(curve_table(summary["curve"]))
        print(f"\nreport: {place_of(settings.run_dir) / 'report.html'}", flush=True)
