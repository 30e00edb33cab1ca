"""Options with declared types and ranges, checked in one place: settings, rewards, samplers, surrogates, acquisitions.

A table says what an entry takes, as a mapping of names to `Option`s, written out or read from a frozen dataclass
(`declared`). `check_options` gives the accepted values back, or one `ConfigError` that names the key.

    TAKES = {"members": Option(int, 8, at_least(2)), "member": Option(Literal["linear", "mlp"], "linear")}
    check_options("model", {"members": 4}, TAKES)        # {"members": 4}
    check_options("model", {"member": 4}, TAKES)         # ConfigError: `model.member`: expected one of 'linear', ...
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tiltopt.errors import ConfigError

REQUIRED: Any = dataclasses.MISSING
"""Default of an option that must be given."""


class Range(NamedTuple):
    """Which values of the right type are possible.

    Args:
        holds: value -> whether it is possible; never called with None.
        expected: the same in words, after "expected", for instance "a value > 0".
        names: the possible values, where they are names.
    """

    holds: Callable[[Any], bool]
    expected: str
    names: tuple[str, ...] = ()


def at_least(low: float) -> Range:
    """Finite and >= low."""
    return Range(lambda v: low <= v < math.inf, f"at least {low:g}")


def above(low: float) -> Range:
    """Finite and > low."""
    return Range(lambda v: low < v < math.inf, f"a value > {low:g}")


def between(low: float, high: float) -> Range:
    """In [low, high]."""
    return Range(lambda v: low <= v <= high, f"a value in [{low:g}, {high:g}]")


def one_of(known: Iterable[str]) -> Range:
    """A name of a table that is known only when the program runs; where it is fixed, `Literal[...]` as the type."""
    names = tuple(known)
    return Range(lambda v: v in names, f"one of {', '.join(names)}", names)


@dataclass(frozen=True)
class Option:
    """What one option may be.

    Args:
        type: an annotation: int, float, str, bool, tuple, dict, `Literal[...]`, or a union of these with None.
        default: its value where none is given; `REQUIRED` where one must be.
        range: which values of that type are possible; None: all (NaN never is).
    """

    type: Any
    default: Any = REQUIRED
    range: Range | None = None


def ranged(default: Any, range: Range) -> Any:
    """A dataclass field with a default and the range of its values."""
    return dataclasses.field(default=default, metadata={"range": range})


def declared(cls: type, ranges: Mapping[str, Range] | None = None) -> dict[str, Option]:
    """The options that a dataclass takes: names, types and defaults of the fields of its constructor.

    Fields whose annotation a configuration cannot write (functions, modules, other objects) are left out; in a union
    they are left out of the union.

    Args:
        ranges: of fields that are not declared with `ranged`.
    """
    hints, ranges = typing.get_type_hints(cls), ranges or {}
    found: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        if not field.init or not (writable := _writable(hints[field.name])):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = Option(writable, default, ranges.get(field.name, field.metadata.get("range")))
    return found


def check_options(where: str, given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """`given` as the declared types (an int for a float, a list for a tuple), without the defaults.

    Args:
        where: dotted name of the section, for messages; "" for the whole configuration.
        given: what a user wrote.
        known: what may be written.

    Raises:
        ConfigError: an unknown key, a missing one, a wrong type, or an impossible value; the first of them.
    """
    prefix = f"{where}." if where else ""
    for key in given:
        if key not in known:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known])
    for key, option in known.items():
        if option.default is REQUIRED and key not in given:
            raise ConfigError(f"`{prefix}{key}`: expected {_words(option)}, got nothing; set it.")
    return {key: check_option(f"{prefix}{key}", value, known[key]) for key, value in given.items()}


def check_fields(instance: Any, where: str = "", ranges: Mapping[str, Range] | None = None) -> None:
    """Check what a frozen dataclass was made with, and put the accepted values in its fields; objects stay.

    Args:
        instance: the dataclass.
        where, ranges: as in `check_options` and `declared`.

    Raises:
        ConfigError: a wrong type, or an impossible value; the first of them.
    """
    hints, options = typing.get_type_hints(type(instance)), declared(type(instance), ranges)
    for field in dataclasses.fields(instance):
        key, value = f"{where}.{field.name}" if where else field.name, getattr(instance, field.name)
        objects = _objects(hints[field.name])
        if any(callable(value) if kind is Callable else isinstance(value, kind) for kind in objects):
            continue
        if field.name in options:
            object.__setattr__(instance, field.name, check_option(key, value, options[field.name]))
        elif not (value is None and type(None) in choices_of(hints[field.name])):
            meant = " or ".join("a function" if kind is Callable else f"a {kind.__name__}" for kind in objects)
            raise ConfigError(f"`{key}`: expected {meant}, got {value!r} ({type(value).__name__}).")


def check_option(key: str, value: Any, option: Option) -> Any:
    """`value` as the option's type.

    Raises:
        ConfigError: naming `key`: what was expected, what came.
    """
    for kind in choices_of(option.type):
        fits, taken = _take(value, kind)
        if not fits:
            continue
        if taken is None or option.range is None or option.range.holds(taken):
            return taken
        near = did_you_mean(str(value), option.range.names)
        raise ConfigError(f"`{key}`: expected {option.range.expected}, got {value!r}.{near}")
    near = did_you_mean(str(value), [str(v) for kind in choices_of(option.type) for v in literals_of(kind)])
    raise ConfigError(f"`{key}`: expected {_words(option)}, got {value!r} ({type(value).__name__}).{near}")


def check_name(key: str, value: Any, known: Iterable[str]) -> str:
    """A name of a table.

    Raises:
        ConfigError: with the names there are and the nearest of them.
    """
    names = tuple(known)
    if value in names:
        return str(value)
    raise ConfigError(f"`{key}`: expected one of {', '.join(names)}, got {value!r}.{did_you_mean(str(value), names)}")


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with what may have been meant."""
    names = tuple(known)
    hint = did_you_mean(key, names) or f" Known here: {', '.join(sorted(names)) or 'nothing'}."
    return ConfigError(f"unknown configuration key `{key}`.{hint}")


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """ " Did you mean `x`?", or "" where nothing is near.

    Near is, in this order: the same key in another section (the section was forgotten or confused), a spelling mistake
    in the whole, a spelling mistake in the last part of a dotted key, a part of a longer name.
    """
    names = list(dict.fromkeys(known))
    last = word.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    near = list(by_last.get(last, ()))
    near = near or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    near = near or [
        name for part in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6) for name in by_last[part]
    ]
    near = near or [name for part in by_last if len(last) > 2 and last in part for name in by_last[part]]
    return f" Did you mean {' or '.join(f'`{name}`' for name in near[:most])}?" if near else ""


PLAIN = (int, float, str, bool, tuple, list, dict, type(None))


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _writable(hint: Any) -> Any:
    """The part of an annotation that a configuration can write, as a union; None where there is no such part."""
    kept = [c for c in choices_of(hint) if typing.get_origin(c) is Literal or (typing.get_origin(c) or c) in PLAIN]
    if all(kind is type(None) for kind in kept):
        return None
    return typing.Union[tuple(kept)]  # noqa: UP007  # of a list made here


def _objects(hint: Any) -> list[Any]:
    """The classes of an annotation that a configuration cannot write; `Callable` for any function."""
    kinds = [typing.get_origin(c) or c for c in choices_of(hint)]
    return [kind for kind in kinds if kind is not Literal and kind not in PLAIN]


def literals_of(kind: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, none of any other annotation."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _take(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` fits one member of an annotation, and as what it is taken."""
    if typing.get_origin(kind) is Literal:
        return any(value == v and type(value) is type(v) for v in literals_of(kind)), value
    kind = typing.get_origin(kind) or kind
    if kind is type(None):
        return value is None, None
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == value, _as_float(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind in (str, bool):
        return isinstance(value, kind), value
    if kind in (tuple, list):
        return isinstance(value, (list, tuple)), kind(value) if isinstance(value, (list, tuple)) else value
    if kind is dict:
        return hasattr(value, "items"), dict(value.items()) if hasattr(value, "items") else value
    return False, value


def _as_float(value: int | float) -> float:
    """An integer beyond all floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _words(option: Option) -> str:
    """What is expected, in words."""
    literals = [repr(v) for kind in choices_of(option.type) for v in literals_of(kind)]
    named = [
        (typing.get_origin(kind) or kind).__name__
        for kind in choices_of(option.type)
        if not literals_of(kind) and kind is not type(None)
    ]
    words = [f"one of {', '.join(literals)}"] if literals else []
    words += named
    if option.range is not None:
        words = [", ".join([" or ".join(words), option.range.expected])]
    return " or ".join([*words, "None"] if type(None) in choices_of(option.type) else words)
