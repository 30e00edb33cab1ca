"""The folders are the architecture: who may import whom, which room stands above which, and what a file may do.

An import counts wherever it stands: at the top of a module, inside a function, or for type checkers alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"tiltopt": "tiltopt"} | {
    f"tiltopt.{name}": name for name in ("samplers", "surrogates", "rewards", "online", "config")
}
"""Import name -> folder, as in `setup.py`, without the weights and the recipe of the embedded prior."""

SHARED = {"types", "errors", "options", "vision", "digest", "kinds", "notebook", "designs"}
MAY_IMPORT = {
    "tiltopt/types.py": set(),
    "tiltopt/errors.py": set(),
    "tiltopt/digest.py": set(),
    "tiltopt/notebook.py": set(),
    "tiltopt/designs.py": {"errors", "vision"},
    "tiltopt/kinds.py": {"errors"},
    "tiltopt/options.py": {"errors"},
    "tiltopt/vision.py": {"errors", "digest"},
    "samplers": SHARED | {"samplers"},
    "surrogates": SHARED | {"surrogates"},
    "rewards": SHARED | {"rewards"},
    "online": SHARED | {"samplers", "surrogates", "rewards", "online", "embedded"},
    "config": {"online"},
}
"""Of the top-level folders and shared modules: the parts of `tiltopt` that each may import."""

FLOORS = (
    "seeds team hooks queries signals web places",
    "runner",
    "settings",
    "store",
    "engine report.numbers report.thurstone report.front report.sight evaluation.judge",
    "search",
    "rounds answering report",
    "direct",
    "pairs",
    "optimizer",
    "loop evaluation rating",
    "serving",
    "commands",
    "main",
)
"""The rooms of `online`, from the ground up. A room imports only rooms of lower floors."""

UPWARD: set[tuple[str, str]] = set()
"""Arrows between rooms of `online` that are still to go; a line that is no longer true fails the test too."""

LONG: dict[str, str] = {
    "online/optimizer.py": "everything that a user calls on a run, each a few lines under a full description",
    "online/runner.py": "one state machine: what becomes of a call, whoever asks",
    "online/store/store.py": "every change of a run, each of them one transaction",
}
"""Files of more than 500 lines, each with the reason why its subject is that long."""

ONLY_IN = {
    "import difflib": {
        "tiltopt/options.py",
    },
    "from difflib": {"tiltopt/options.py"},
    "sys.path": {"tiltopt/cli.py", "rewards/custom.py"},  # launchers leave their folder; an own reward has its own
    "import pickle": set(),
    "torch.manual_seed(": set(),
    "np.random.seed": set(),
}
"""Text that only these files may hold."""

SCRIPTS = {"online/main.py", "samplers/main.py"}  # launchers: they hand over to the console command


def _modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for name, folder in PLACES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *(inner[:-1] if inner[-1] == "__init__" else inner)])] = path
    return found


MODULES = _modules()


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of ours that a module imports, at any depth of its code."""
    return frozenset(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import at line {node.lineno}"
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in wanted:
            if target.split(".")[0] == "tiltopt":
                yield _module_of(target)


def _module_of(target: str) -> str:
    """The module that holds `target`, which may be a name inside it, or one that is not Python (`tiltopt.embedded`)."""
    parts = target.split(".")
    known = [".".join(parts[:n]) for n in range(len(parts), 1, -1)]
    return next((module for module in known if module in MODULES), ".".join(parts[:2]))


def room(module: str) -> str | None:
    """The room of `online` that a module stands in, by its longest name among the floors; None outside `online`."""
    parts = module.split(".")
    if parts[:2] != ["tiltopt", "online"] or len(parts) < 3:
        return None
    rooms = {name for floor in FLOORS for name in floor.split()}
    found = next((name for n in (4, 3) if (name := ".".join(parts[2:n])) in rooms), None)
    assert found is not None, f"{module} is in no room: give it one in FLOORS"
    return found


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms.split())


def circles(arrows: dict[str, set[str]]) -> set[frozenset[str]]:
    """The strongly connected components of more than one node, and nodes with an arrow to themselves (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in arrows.get(node, ()):
                found.add(frozenset(component))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


# ---- the walk itself


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    assert len(MODULES) > 100
    assert "tiltopt.online.store.store" in imports("tiltopt.online.optimizer")
    assert "tiltopt.online.engine.diffusion" in imports("tiltopt.online.optimizer"), "inside a function"
    assert _module_of("tiltopt.online.store.files.write_json") == "tiltopt.online.store.files"
    assert _module_of("tiltopt.online.store.files") == "tiltopt.online.store.files"
    assert _module_of("tiltopt.embedded") == "tiltopt.embedded"


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {frozenset("bc")}
    assert circles({"a": {"a"}}) == {frozenset("a")}
    assert circles({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}}) == {frozenset("ab"), frozenset("cd")}


def test_rooms_are_found_by_their_longest_name() -> None:
    assert room("tiltopt.online.report.numbers") == "report.numbers"
    assert room("tiltopt.online.report.text") == "report"
    assert room("tiltopt.online.seeds") == "seeds"
    assert room("tiltopt.online") is None
    assert room("tiltopt.samplers.das") is None
    assert floor("report.numbers") < floor("rounds") <= floor("report")


# ---- folders, rooms, circles


def _of_folders() -> list[tuple[str, set[str]]]:
    found = []
    for place, allowed in MAY_IMPORT.items():
        for name, path in MODULES.items():
            where = path.relative_to(ROOT)
            if (str(where) == place or where.parts[0] == place) and str(where) not in SCRIPTS:
                found.append((name, allowed))
    return found


@pytest.mark.parametrize(("name", "allowed"), _of_folders(), ids=lambda value: value if isinstance(value, str) else "")
def test_folders_import_what_they_may(name: str, allowed: set[str]) -> None:
    extra = {target.split(".")[1] for target in imports(name)} - allowed
    assert not extra, f"{name} imports tiltopt.{', tiltopt.'.join(sorted(extra))}"


def test_a_room_imports_only_rooms_below_it() -> None:
    where: dict[tuple[str, str], list[str]] = {}
    for name in MODULES:
        here = room(name)
        for target in imports(name) if here is not None else ():
            there = room(target)
            if there is not None and there != here and floor(there) >= floor(here or ""):
                where.setdefault((str(here), there), []).append(f"{name} -> {target}")
    new = {arrow: places for arrow, places in where.items() if arrow not in UPWARD}
    assert not new, f"arrows that do not lead down: {new}"
    assert set(where) == UPWARD, f"no longer true, take it out of UPWARD: {UPWARD - set(where)}"


def test_the_picture_in_the_docs_has_every_room_on_its_floor() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.split("## The rooms of `online/`")[1].split("```text\n")[1].split("```")[0]
    shown: dict[int, str] = {}
    here = -1
    for line in picture.splitlines():
        number = line[:4].strip()
        here = int(number) if number else here  # a floor may go on in the next line
        shown[here] = shown.get(here, "") + line[4:]
    assert sorted(shown) == list(range(len(FLOORS)))
    missing = [
        f"{name} on floor {number}"
        for number, rooms in enumerate(FLOORS)
        for name in rooms.split()
        if name.split(".")[-1] not in re.findall(r"\w+", shown[number])
    ]
    assert not missing, missing


def test_no_import_circle() -> None:
    arrows = {name: {target for target in imports(name) if not _is_to_go(name, target)} for name in MODULES}
    assert [sorted(circle) for circle in circles(arrows)] == []


def _is_to_go(name: str, target: str) -> bool:
    return (room(name), room(target)) in UPWARD


# ---- what a file may be and do


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_no_file_is_long_without_a_reason() -> None:
    lengths = {str(path.relative_to(ROOT)): len(_text_of(path).splitlines()) for path in MODULES.values()}
    long = {name: n for name, n in lengths.items() if n > 500}
    assert set(long) == set(LONG), f"over 500 lines: {long}; with a reason in LONG: {sorted(LONG)}"


@pytest.mark.parametrize("text", ONLY_IN)
def test_only_the_named_files_may(text: str) -> None:
    holding = {str(path.relative_to(ROOT)) for path in MODULES.values() if text in _text_of(path)}
    assert holding <= ONLY_IN[text], f"`{text}` in {sorted(holding - ONLY_IN[text])}"
