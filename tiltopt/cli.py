"""The console command `tiltopt`. Heavy packages are imported by the subcommand that needs them, after its arguments
were checked: a misspelt key is told at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiltopt import __version__
from tiltopt.errors import ConfigError, TiltoptError
from tiltopt.options import did_you_mean

if TYPE_CHECKING:
    from tiltopt.online.optimizer import Optimizer
    from tiltopt.online.settings.run import Settings

TRUST = "execute the code of the run's own reward, although the folder is not yours; remembered for it"
RUN, OF = "a run", "folder of the run"
SURROGATE = "a run or the folder of a saved surrogate, such as checkpoints/<run>/round_004"
Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments without the program's name; those of the process when None.

    Returns:
        0 done, 1 failed, 2 bad usage or configuration, 130 interrupted.
    """
    arguments = _joined(list(sys.argv[1:] if argv is None else argv))
    parser = make_parser()
    try:
        commands = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        named = next((word for word in arguments if not word.startswith("-")), None)
        if named is not None and named not in commands:
            parser.error(f"unknown command {named!r}.{did_you_mean(named, commands)} `tiltopt --help` lists all.")
        options, rest = parser.parse_known_args(arguments)
        if rest and not (options.configured and rest[0].startswith("--config")):
            meant = did_you_mean(rest[0].partition("=")[0], commands[options.command]._option_string_actions)
            parser.error(f"unrecognized arguments: {' '.join(rest)}.{meant}")
    except SystemExit as stop:  # argparse has said what is wrong, or printed its help
        return int(stop.code or 0)
    options.rest = rest
    return guarded(lambda: _called(options), debug=options.debug)


def _called(options: argparse.Namespace) -> int:
    """Run the command, after a look at the folders that it reads: nothing heavy is imported for a misspelt one."""
    from tiltopt.online.store.files import existing, folder_there

    for name, what in (("folder", options.reads), ("folders", options.reads), ("surrogate", SURROGATE)):
        given = getattr(options, name, None) or []
        for folder in [given] if isinstance(given, str) else given:
            if what == RUN and not options.rest:  # with --config it is made when it is not there
                existing(folder)
            elif what not in (RUN, ""):
                folder_there(folder, what, near="*/surrogate.json" if what == SURROGATE else None)
    return options.call(options)


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`, whose value nothing takes for a folder."""
    rest, out = list(arguments), []
    while rest:
        word = rest.pop(0)
        alone = "=" not in word and (word == "--config" or word.startswith("--config."))
        out.append(f"{word}={rest.pop(0)}" if alone and rest else word)
    return out


def launch(script: str) -> int:
    """What the scripts `online/main.py` and `samplers/main.py` are: `tiltopt run` with their arguments.

    Python puts a script's folder in front of everything that can be imported, and a user's own `report.py` would be
    shadowed by ours; so the folder is taken out again.
    """
    here = Path(script).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    return main(["run", *sys.argv[1:]])


def guarded(action: Callable[[], int | None], *, debug: bool = False) -> int:
    """`action()`'s exit code, with errors told in one message on stderr instead of a traceback (unless `debug`, or the
    environment says TILTOPT_DEBUG)."""
    debug = debug or bool(os.environ.get("TILTOPT_DEBUG"))
    try:
        return action() or 0
    except TiltoptError as error:
        if debug:
            traceback.print_exc()
        print(f"tiltopt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:  # a run says how it goes on
        print("tiltopt: interrupted" + "".join(f"; {text}" for text in stop.args if text), file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else "; run it again with --debug to see where"
        print(f"tiltopt: unexpected {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """A subcommand's; its help may end with every key of a configuration."""

    lists_keys = False

    def format_help(self) -> str:
        if not self.lists_keys:
            return super().format_help()
        from tiltopt.online.settings.described import help_text

        return f"{super().format_help()}\n{help_text()}\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line: one subparser per command, each with `call`, a function of the parsed options."""
    parser = argparse.ArgumentParser(
        prog="tiltopt", description="Optimise a black box over designs drawn from a diffusion model."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"tiltopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, call: Command, help: str, configured: bool = False, reads: str = "", one: str = "") -> _Parser:
        """`configured`: takes --config too. `reads`: what its folders must hold. `one`: its folder, in words."""
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        command.set_defaults(call=call, configured=configured, reads=reads)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if one:
            command.add_argument("folder", help=one)
        return command

    run = add("run", _run, "start a run: --config FILE.py:PRESET [--config.KEY=VALUE ...]", configured=True)
    run.usage = "tiltopt run [--dry-run] --config FILE.py[:PRESET] [--config.KEY=VALUE ...]"
    run.lists_keys = True
    run.add_argument("--dry-run", action="store_true", help="say what the run would cost, and do nothing else")

    resume = add("resume", _resume, "carry on a run that was stopped", reads=RUN, one=OF)
    resume.add_argument(
        "--reward", metavar="NAME", help="who answers, for a run that does not know who answered so far"
    )
    resume.add_argument("--allow-change", action="store_true", help="go on although config.json was changed")
    resume.add_argument(
        "--recover", action="store_true", help="keep a damaged store aside and go on from the newest whole round"
    )
    resume.add_argument("--trust", action="store_true", help=TRUST)

    hold = "hold the pictures of runs and folders against each other, or put a saved surrogate to the test"
    evaluate = add("evaluate", _evaluate, hold, configured=True, reads="the folder of a run, or one of images")
    evaluate.usage = (
        "tiltopt evaluate RUN|FOLDER ... [--rewards A,B] [--option A.KEY=VALUE] [--diversity] [--clip MODEL]\n"
        "                        [--lpips BACKBONE HEADS] [--fidelity HOW] [--seen LIST]\n"
        "                        [--json FILE] [--csv FILE] [--out FILE] [--tracker NAME]\n"
        "       tiltopt evaluate --surrogate RUN|FOLDER [--rounds newest|all|N,N] [--seeds N]\n"
        "                        [--config FILE.py[:PRESET] [--config.KEY=VALUE ...]]"
    )
    evaluate.add_argument(
        "folders", nargs="*", metavar="folder", help="a run (its last round), <run>/round_NNN, or a folder of images"
    )
    evaluate.add_argument("--rewards", default="", metavar="A,B", help="rewards to ask about every picture")
    evaluate.add_argument(
        "--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="an option of one of these rewards"
    )
    evaluate.add_argument("--diversity", action="store_true", help="entropy, distances, Vendi score of CLIP embeddings")
    evaluate.add_argument("--clip", metavar="MODEL", help="for fidelity and diversity (default: that of the first run)")
    evaluate.add_argument(
        "--lpips", nargs=2, metavar=("BACKBONE", "HEADS"), help="weight files of LPIPS, for diversity"
    )
    evaluate.add_argument(
        "--fidelity", choices=("auto", "judge", "clip", "none"), default="auto", help="who says what a picture shows"
    )
    evaluate.add_argument("--seen", default="", metavar="LIST", help="prompt list or file of what was trained on")
    evaluate.add_argument("--json", metavar="FILE", help="every number, for machines")
    evaluate.add_argument("--csv", metavar="FILE", help="every number, a row each")
    evaluate.add_argument("--out", metavar="FILE", help="the page (default: evaluation.html beside the first folder)")
    trackers = ("none", "wandb", "tensorboard", "trackio")
    evaluate.add_argument("--tracker", choices=trackers, default="none", help="is told every number too")
    evaluate.add_argument("--project", default="tiltopt", metavar="NAME", help="of the tracker (default tiltopt)")
    evaluate.add_argument("--surrogate", metavar="RUN|FOLDER", help="checkpoints/<run>[/round_NNN]: test this one")
    evaluate.add_argument("--rounds", metavar="WHICH", help="of a run's surrogates: newest (default), all, or 1,2,4")
    evaluate.add_argument(
        "--seeds", type=_count, metavar="N", help="sets of pairs; intervals are over them (default 1)"
    )
    evaluate.add_argument("--trust", action="store_true", help=TRUST)

    add("presets", _presets, "list every shipped configuration with a line each")

    retry = add("retry", _retry, "ask everything again that failed, and carry the run on", reads=RUN, one=OF)
    retry.add_argument("--trust", action="store_true", help=TRUST)

    refine = add("refine", _refine, "ask for new designs near one of a run", reads=RUN, one=OF)
    refine.add_argument("id", type=int, help="the query to start from")
    refine.add_argument("--strength", type=float, default=0.5, help="near 0 keeps it, 1 is a fresh sample (default .5)")
    refine.add_argument("--n", type=_count, default=1, help="how many (default 1)")

    work = add(
        "work", _work, "answer what others ask of a run whose queries are in a shared database; draw nothing", reads=RUN
    )
    work.add_argument("folder", help="folder of the run, with its images")
    work.add_argument("--reward", metavar="NAME", help="the run's own reward, such as my_lab.py:score")
    work.add_argument("--trust", action="store_true", help=TRUST)

    report = add(
        "report", _report, "write report.html into the folder of a run, or a page that compares several runs", reads=RUN
    )
    report.add_argument("folders", nargs="+", metavar="folder", help="folder of the run; several are compared")
    report.add_argument("--out", metavar="FILE", help="the page that compares (default: comparison.html beside them)")
    report.add_argument("--per-round", type=_count, default=24, metavar="N", help="images per round (default 24)")

    status = add("status", _status, "say where a run stands", reads=RUN, one=OF)
    status.add_argument("--json", action="store_true", help="for machines")

    export = add("export", _export, "write the queries of a run as a table", reads=RUN, one=OF)
    kind = export.add_mutually_exclusive_group(required=True)
    kind.add_argument("--csv", metavar="FILE", help="comma-separated values; - for the standard output")
    kind.add_argument("--parquet", metavar="FILE", help="Apache Parquet (needs pyarrow)")

    take = add("import", _import, "take earlier measurements into a run, as a warm start", configured=True, reads=RUN)
    take.usage = "tiltopt import RUN FILE.csv [--config FILE.py[:PRESET] [--config.KEY=VALUE ...]]"
    take.add_argument("folder", help="folder of the run; with --config it is made when it is not there")
    take.add_argument(
        "table", help="a CSV file with `value`, `image` or `f0`, `f1`, ..., and optionally `prompt`, `sem`"
    )

    rating = "serve a page on which a person rates the images of a run, or picks the better of two"
    rate = add("rate", _rate, rating, configured=True, reads=RUN)
    options = "[--pairs] [--port N] [--low X] [--high X] [--config FILE.py[:PRESET] [--config.KEY=VALUE ...]]"
    rate.usage = f"tiltopt rate RUN {options}"
    rate.add_argument("folder", help="folder of the run; with --config it is made when it is not there")
    rate.add_argument("--port", type=_count, default=0, help="on 127.0.0.1 (default: any free one)")
    rate.add_argument("--pairs", action="store_true", help="insist on pairs; implied by model.name = pairwise")
    rate.add_argument("--low", type=float, default=0.0, help="what key 0 means (default 0)")
    rate.add_argument("--high", type=float, default=9.0, help="what key 9 means (default 9)")

    serve = add(
        "serve",
        _serve,
        "serve one page over all runs of a folder, which follows them while they go on",
        reads="a folder that holds runs",
    )
    serve.add_argument("folder", nargs="?", default="checkpoints", help="holds runs, or is one (default checkpoints)")
    serve.add_argument("--port", type=_count, default=0, help="on 127.0.0.1 (default: any free one)")

    dashboard = add("dashboard", _dashboard, "build a workspace of wandb for the numbers of a run", reads=RUN)
    dashboard.add_argument("folder", help="folder of the run; dashboard.json is written into it")
    dashboard.add_argument("--entity", default="", metavar="NAME", help="user or team (default: the account's own)")
    dashboard.add_argument("--publish", action="store_true", help="save it at wandb too, which needs an account")

    surrogate = add("surrogate", _surrogate, "say what a saved surrogate is and how well it predicted", reads=SURROGATE)
    surrogate.add_argument("folder", help="folder of the surrogate, checkpoints/<run>/round_NNN")

    features = add("features", _features, "say which features predict the answers of a run best", reads=RUN, one=OF)
    features.add_argument("--kinds", nargs="+", metavar="KIND", help='as features.kind, e.g. "latent_stats+projection"')
    features.add_argument("--prompts", action="store_true", help="each kind with the prompt's embedding too")
    features.add_argument("--json", action="store_true", help="for machines")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return number


def _run(options: argparse.Namespace) -> int:
    from tiltopt.online.settings.commandline import job_of, parse

    config = parse(options.rest)
    from tiltopt.online.direct.settings import DirectSettings
    from tiltopt.online.settings.prompts import load_prompts
    from tiltopt.online.settings.run import Settings

    settings: DirectSettings | Settings
    settings = DirectSettings.from_config(config) if job_of(config) == "direct" else Settings.from_config(config)
    load_prompts(settings.prompts)  # before anything heavy is imported
    if options.dry_run:
        from tiltopt.online.commands.preflight import dry_run

        dry_run(settings)
        return 0
    if isinstance(settings, DirectSettings):
        from tiltopt.online.direct.run import run_direct

        run_direct(settings)
        return 0
    from tiltopt.online.commands.run import start

    start(settings, named=any(a.lstrip("-").startswith("config.run_dir") for a in options.rest))
    return 0


def _resume(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.run import resume

    told = {name: getattr(options, name) for name in ("reward", "trust", "allow_change", "recover")}
    resume(options.folder, **told)
    return 0


def _retry(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.run import resume

    resume(options.folder, trust=options.trust, again=True)
    return 0


def _refine(options: argparse.Namespace) -> int:
    from tiltopt.online.optimizer import Optimizer
    from tiltopt.online.store.files import image_path

    with Optimizer.open(options.folder) as optimizer:
        for query in optimizer.refine(options.id, options.strength, options.n):
            print(f"query {query.id}: {image_path(optimizer.folder, query.id)}")
        print(f"they wait for an answer; {optimizer.go_on()}")
    return 0


def _work(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.run import work

    work(options.folder, reward=options.reward, trust=options.trust)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if bool(options.folders) == bool(options.surrogate):
        raise ConfigError("expected the folders whose pictures to evaluate, or --surrogate RUN, one of the two.")
    _check_belongs(options, "folders" if options.folders else "--surrogate")
    if options.folders:
        if options.rest:
            raise ConfigError("`--config` goes with --surrogate; what pictures are asked is said by --rewards.")
        from tiltopt.online.commands.designs import evaluate_folders

        evaluate_folders(options)
        return 0
    settings = _settings(options.rest) if options.rest else None
    from tiltopt.online.commands.run import evaluate

    evaluate(options.surrogate, settings, rounds=options.rounds, seeds=options.seeds, trust=options.trust)
    return 0


def _check_belongs(options: argparse.Namespace, what: str) -> None:
    """Options of the other way to evaluate are refused, since they would do nothing."""
    of_pictures = ("rewards", "option", "diversity", "clip", "lpips", "seen", "json", "csv", "out")
    strange = ("rounds", "seeds") if what == "folders" else of_pictures
    given = [name for name in strange if getattr(options, name)]
    if what != "folders" and options.tracker != "none":
        raise ConfigError("`--tracker`: with --surrogate it is a setting, --config.tracker.")
    if given:
        hint = "" if what == "folders" else "; every number is in summary.json and curve.csv of the evaluation's folder"
        raise ConfigError(f"`--{given[0]}`: expected no such option with {what}{hint}.")


def _presets(options: argparse.Namespace) -> int:
    from tiltopt.online.settings.commandline import shipped_presets

    for file, (about, presets) in shipped_presets().items():
        print(f"{file}: {about}")
        for name, line in presets.items():
            print(f"    {f'{file}:{name}':<34} {line}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.inspect import report

    if options.out is not None and len(options.folders) == 1:
        raise ConfigError("`--out` names the page that compares several runs, got one run, whose page is report.html.")
    print(report(options.folders, options.per_round, options.out))
    return 0


def _status(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.inspect import status, status_text
    from tiltopt.online.store.files import jsonable

    found = status(options.folder)
    print(json.dumps(jsonable(found), indent=2, ensure_ascii=False) if options.json else status_text(found))
    return 0


def _export(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.inspect import export

    target, kind = (options.csv, "csv") if options.csv else (options.parquet, "parquet")
    number = export(options.folder, target, kind)
    if target != "-":
        print(f"{number} queries written to {target}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.import_table import import_measurements, read_measurements

    found = read_measurements(options.table, _settings_there(options.folder, options.rest))
    with _open_or_create(options.folder, options.rest) as optimizer:
        number = import_measurements(optimizer, found, options.table)
    print(f"{number} measurements imported into {options.folder}")
    return 0


def _rate(options: argparse.Namespace) -> int:
    if not options.low < options.high:
        raise ConfigError(f"expected --low below --high, got {options.low:g} and {options.high:g}.")
    _server_packages()
    from tiltopt.online.rating.server import serve
    from tiltopt.online.rating.session import PairRating, Rating, Scale
    from tiltopt.online.settings.source import PERSON

    with _open_or_create(options.folder, options.rest) as optimizer:
        optimizer.answers_from(PERSON)
        if options.pairs:
            optimizer.takes_comparisons()
        scale = Scale(options.low, options.high)
        serve(PairRating(optimizer) if optimizer.settings.pairwise else Rating(optimizer, scale), options.port)
    return 0


def _serve(options: argparse.Namespace) -> int:
    _server_packages()
    from tiltopt.online.serving.server import serve

    serve(options.folder, options.port)
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from tiltopt.online.report.dashboard import publish, written

    path, workspace = written(options.folder, options.entity)
    print(path, publish(workspace) if options.publish else "(not sent anywhere; --publish saves it at wandb)")
    return 0


def _server_packages() -> None:
    """Raises ConfigError where the packages of a server are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"expected the packages of `pip install tiltopt[server]`, got {error}.") from error


def _settings(configuration: Sequence[str]) -> Settings:
    """The settings that `--config ...` arguments amount to."""
    from tiltopt.online.settings.commandline import parse
    from tiltopt.online.settings.run import Settings

    return Settings.from_config(parse(configuration))


def _settings_there(folder: str, configuration: Sequence[str]) -> Settings:
    """The settings of the run in `folder`, or of the one that `--config ...` arguments describe."""
    from tiltopt.online.optimizer import Optimizer

    if configuration:
        return _settings(configuration)
    with Optimizer.open(folder, read_only=True) as optimizer:
        return optimizer.settings


def _open_or_create(folder: str, configuration: Sequence[str]) -> Optimizer:
    """The run in `folder`, made from `--config ...` arguments when there is none yet."""
    settings = _settings(configuration) if configuration else None
    from tiltopt.online.optimizer import Optimizer

    if settings is None or Optimizer.exists(folder):  # then its settings must be these
        return Optimizer.open(folder, config=settings)
    return Optimizer.create(folder, settings)


def _surrogate(options: argparse.Namespace) -> int:
    from tiltopt.online.commands.inspect import surrogate_text

    print(surrogate_text(options.folder))
    return 0


def _features(options: argparse.Namespace) -> int:
    from tiltopt.online.evaluation.feature_ranking import KINDS, rank, rank_text

    ranked = rank(options.folder, tuple(options.kinds or KINDS), options.prompts)
    print(json.dumps(ranked, indent=1) if options.json else rank_text(ranked))
    return 0
