"""From a command line to a configuration: `--config FILE[:PRESET] --config.KEY=VALUE`, refused early, in one line."""

from __future__ import annotations

import ast
import importlib.resources
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from tiltopt.errors import ConfigError
from tiltopt.online.settings.known import check_known
from tiltopt.online.settings.renamed import FILES, refuse_old_names
from tiltopt.online.settings.run import INSTEAD, Settings, flat, plain
from tiltopt.options import did_you_mean, unknown_key

OPEN_SECTIONS = tuple(name for name, section in vars(Settings()).items() if hasattr(section, "options"))
"""Sections whose further keys are options of the reward, the surrogate and the sampler."""

SHAPES = ("prior.size",)
"""Keys that take a pair as well as a number, where a flag has one type."""

USAGE = "usage: --config FILE.py[:PRESET] [--config.KEY=VALUE ...], for example --config config/ucb.py:demo"


def parse(argv: Sequence[str]) -> ConfigDict:
    """The configuration that a command line names, with its overrides applied, locked.

    `--config.KEY=None` takes back the number that a preset gives.

    Args:
        argv: arguments without the program's name.

    Raises:
        ConfigError: no or unknown file, unknown preset, unknown key, or a value of the wrong type.
    """
    source, overrides = _split(argv)
    config = _flagged(source, [])
    known: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for key, text in overrides:
        section, _, rest = key.partition(".")
        is_option = (
            section in OPEN_SECTIONS and rest and "." not in rest and section in config and rest not in config[section]
        )
        (options if is_option else known).append((key, text))
    shapes = {key: literal(text) for key, text in known if key in SHAPES and isinstance(literal(text), (tuple, list))}
    for key, text in known:
        default = _default(config, key)
        if key not in shapes:
            _check_kind(key, default, text)
    emptied = [key for key, text in known if text == "None"]
    by_hand = {key for key, text in known if text != "None"}
    emptied += [other for key, other in INSTEAD.items() if key in by_hand and other not in dict(known)]
    flagged = [(key, text) for key, text in known if text != "None" and key not in shapes]
    config = _flagged(source, [f"--config.{key}={text}" for key, text in flagged])
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(shapes)
        for key in emptied:  # flags cannot take a number back; whether nothing is allowed, the settings say
            section, _, last = key.rpartition(".")
            (config[section] if section else config)[last] = None
        for key, text in options:
            section, _, option = key.partition(".")
            config[section][option] = literal(text)
    refuse_old_names(plain(config))
    check_known(plain(config))
    return config.lock()


def _split(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """`FILE[:PRESET]` and the (key, value) overrides of an argument list."""
    source, overrides, rest = None, [], list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not (name == "config" or name.startswith("config.")):
            raise ConfigError(f"unexpected argument {argument!r}; {USAGE}.")
        if not equals:
            if not rest:
                raise ConfigError(f"{argument} needs a value; {USAGE}.")
            value = rest.pop(0)
        if name == "config":
            source = value
        else:
            overrides.append((name.removeprefix("config."), value))
    if source is None:
        raise ConfigError(f"no configuration was given; {USAGE}.")
    file, colon, preset = source.partition(":")
    return f"{_find(file)}{colon}{preset}", overrides


def shipped_files() -> list[Path]:
    """The configuration files that come with the package."""
    return sorted(Path(str(importlib.resources.files("tiltopt.config"))).glob("[a-z]*.py"))


def shipped_presets() -> dict[str, tuple[str, dict[str, str]]]:
    """`config/ucb.py` -> (what the file is in a line, {preset: what it is in a line}), of all that are shipped."""
    found = {}
    for file in shipped_files():
        content = runpy.run_path(str(file))
        lines = {name: _first_line(make.__doc__) for name, make in content["PRESETS"].items()}
        found[f"config/{file.name}"] = (_first_line(content["__doc__"]), lines)
    return found


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def job_of(config: ConfigDict) -> str:
    """What a configuration is of: "loop", or "direct" for one that says so."""
    return str(config.get("job", "loop"))


def _find(file: str) -> Path:
    """The file itself, or the shipped one of the same name when `config/NAME.py` is not in the working directory."""
    path = Path(file)
    if path.is_file():
        return path
    shipped = next((found for found in shipped_files() if found.name == path.name), path)
    if path.parent.name == "config" and shipped.is_file():
        return shipped
    if path.name in FILES:
        raise ConfigError(f"`--config`: config/{path.name} is called config/{FILES[path.name]} now; write that.")
    names = ", ".join(f"config/{found.name}" for found in shipped_files())
    meant = did_you_mean(path.stem, [found.stem for found in shipped_files()])
    raise ConfigError(
        f"`--config`: expected a configuration file, got {file!r}, which does not exist.{meant} Shipped: {names}."
    )


def _flagged(source: str, overrides: list[str]) -> ConfigDict:
    values = flags.FlagValues()
    argv = ["tiltopt", f"--config={source}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.IllegalFlagValueError as error:
        # ml_collections writes the traceback of a configuration file into the message; its last line says what is wrong
        last = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise ConfigError(re.sub(r"^[\w.]*(Error|Exception): |^flag --config\.", "", last)) from None
    config = values["config"].value
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"`--config`: {source} must define get_config(name) that returns a ConfigDict.")
    return config


def _default(config: ConfigDict, key: str) -> Any:
    """The value that a configuration has for a dotted key. Raises ConfigError for one that it lacks."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            refuse_old_names({key: None})
            raise unknown_key(key, flat(plain(config)))
        node = node[part]
    return node


def _check_kind(key: str, default: Any, text: str) -> None:
    """Raises ConfigError for a text that is no number where one is the default."""
    kinds = {int: "an integer", float: "a number"}
    if text == "None" or type(default) not in kinds:
        return
    try:
        type(default)(text)
    except ValueError:
        raise ConfigError(f"`{key}`: expected {kinds[type(default)]}, got {text!r}.") from None


def literal(text: str) -> Any:
    """A Python literal where `text` is one (numbers, lists, true, false), else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
