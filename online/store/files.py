"""Files of a run: written whole or not at all, and locked for one writer."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from tiltopt.designs import IMAGES, DesignType
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.places import at_address, holds, place_of, reaching, read_bytes

WRITERS = 16
"""Files written at once."""


def existing(folder: str | Path) -> Path:
    """The folder of an existing run.

    Raises:
        ConfigError: there is no run; says what is expected and which runs stand beside it.
    """
    path = place_of(folder)
    if is_run(path):
        return path
    got = "an existing folder without one" if path.is_dir() else "no such folder"
    around = path if path.is_dir() else path.parent
    near = [] if at_address(path) else sorted(str(found.parent) for found in around.glob("*/config.json"))[:8]
    hint = f" Runs nearby: {', '.join(near)}." if near else ""
    raise ConfigError(f"{path}: expected the folder of a run, with a config.json in it, got {got}.{hint}")


def is_run(folder: Path) -> bool:
    """Whether there is anything of a run in a folder, be it copies of its store alone. Raises StoreError where its
    address cannot be reached."""
    if any(holds(folder / name) for name in ("config.json", "queries.sqlite", "store.json")):
        return True
    return not at_address(folder) and any(folder.glob("round_*/queries.sqlite"))


def folder_there(place: str | Path, what: str, near: str | None = None) -> Path:
    """A folder that is to hold `what`.

    Args:
        near: pattern of what is named as standing nearby when it is not there.

    Raises:
        ConfigError: there is no such folder.
    """
    path = place_of(place)
    if not path.is_dir():
        beside = sorted(str(found.parent) for found in path.parent.glob(near))[:8] if near else []
        hint = f" Nearby: {', '.join(beside)}." if beside else ""
        raise ConfigError(f"{path}: expected {what}, got no such folder.{hint}")
    return path


def image_path(folder: Path, number: int) -> Path:
    """Where the picture of query `number` lies; negative numbers are those of reference samples."""
    return folder / ("images" if number > 0 else "reference") / f"{abs(number):06d}.png"


def design_path(folder: Path, number: int, kind: DesignType) -> Path:
    """Where the design of query `number` lies; an image is its own picture."""
    if kind is IMAGES:
        return image_path(folder, number)
    return folder / ("designs" if number > 0 else "reference") / f"{abs(number):06d}{kind.suffix}"


def round_folder(folder: Path, round_: int) -> Path:
    """Where the surrogate and the summary of a round lie."""
    return folder / f"round_{round_:03d}"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at every instant it is either what it was or all of the new: temp, fsync, rename, fsync.

    What is at an address is put there in one piece, which is all that object stores know.

    Raises:
        StoreError: the file cannot be written (full disk, read-only folder); what was there before is untouched.
    """
    if at_address(path):
        _put({path: write})
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(_write_partial(path, write), path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _write_partial(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """What is to become `path`, whole and on the disk, under a name of its own."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return partial


def _put(contents: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Files at addresses of one kind, each whole; drivers that can send several at once do."""
    whole: dict[str, bytes] = {}
    system: Any = None
    for path, write in contents.items():
        content = io.BytesIO()
        write(content)
        place: Any = path
        system, whole[place.path] = place.fs, content.getvalue()
    if system is not None:
        with reaching(next(iter(contents))):
            system.pipe(whole)


def write_json(path: Path, tree: Any) -> None:
    """Plain values as readable JSON, atomically; see `jsonable`."""
    text = json.dumps(jsonable(tree), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    content = text.encode("utf-8", "backslashreplace")  # half a surrogate pair, as JSON writes it
    write_atomic(path, lambda file: file.write(content))


def jsonable(tree: Any) -> Any:
    """Plain Python values: numpy and torch scalars become numbers, paths text, NaN and infinities None."""
    if isinstance(tree, Mapping):
        return {str(key): jsonable(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [jsonable(value) for value in tree]
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if tree is None or isinstance(tree, (bool, int, str)):
        return tree
    if isinstance(tree, Path) or hasattr(tree, "joinpath"):
        return str(tree)
    if hasattr(tree, "tolist"):
        return jsonable(tree.tolist())
    raise TypeError(f"expected numbers, text, lists and mappings, got {type(tree).__name__}")


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file, or `default` when the file is not there.

    Raises:
        StoreError: the file is missing and has no default, or does not hold a JSON object.
    """
    try:
        with reaching(path):
            tree = json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        if default is not None:
            return default
        raise StoreError(f"{path}: expected a JSON file, got none. Restore it.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: expected a readable JSON file, got {error}. Move it aside or restore it.") from error
    if not isinstance(tree, dict):
        raise StoreError(f"{path}: expected a JSON object, got {type(tree).__name__}. Move it aside or restore it.")
    return tree


def read_summaries(folder: Path, rounds: Iterable[int]) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """What the `summary.json` of each of these rounds says.

    Returns:
        The summaries that are there, and of the unreadable ones what is wrong with them, by round.
    """
    found: dict[int, dict[str, Any]] = {}
    damaged: dict[int, str] = {}
    for round_ in rounds:
        try:
            found[round_] = read_json(round_folder(folder, round_) / "summary.json", {})
        except StoreError as error:
            damaged[round_] = str(error)
    return {round_: summary for round_, summary in found.items() if summary}, damaged


def write_image(path: Path, image: Image.Image) -> None:
    """An image as PNG, atomically."""
    write_designs({path: image}, IMAGES)


def read_image(path: Path) -> Image.Image:
    """An image, read whole; an `OSError` when it is missing, damaged or larger than `designs.MAX_PIXELS`."""
    found: Image.Image = _read_design(path, IMAGES)
    return found


def query_image(folder: Path, number: int) -> Image.Image:
    """The image of query `number`.

    Raises:
        StoreError: its file is missing or damaged.
    """
    found: Image.Image = query_design(folder, number, IMAGES)
    return found


def query_design(folder: Path, number: int, kind: DesignType) -> Any:
    """The design of query `number`, of the run's own type.

    Raises:
        StoreError: its file is missing or damaged.
    """
    path = design_path(folder, number, kind)
    try:
        return _read_design(path, kind)
    except OSError as error:
        what = "image" if kind is IMAGES else "design"
        raise StoreError(
            f"the {what} of query {number} cannot be read from {path} ({error}); put the file back, or abandon the "
            "query."
        ) from error


def _read_design(path: Path, kind: DesignType) -> Any:
    try:
        return kind.load(read_bytes(path))
    except ValueError as error:
        raise OSError(str(error)) from error


def write_designs(designs: Mapping[Path, Any], kind: DesignType) -> None:
    """Designs of one type, each file atomically. The waits for the disk, which are what writing takes, overlap.

    Raises:
        StoreError: one cannot be written; none that was there before is touched.
    """

    def save(path: Path) -> Callable[[BinaryIO], object]:
        return lambda file: file.write(kind.dump(designs[path]))

    def write(path: Path) -> Path:
        try:
            return _write_partial(path, save(path))
        except OSError as error:
            raise cannot_write(path, error) from error

    if any(map(at_address, designs)):
        _put({path: save(path) for path in designs})
        return
    place = Path()
    folders = {path.parent for path in designs}
    try:
        for place in folders:
            place.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(WRITERS) as pool:
            partials = list(pool.map(write, designs))
        for partial, place in zip(partials, designs, strict=True):
            os.replace(partial, place)
        for place in folders:
            sync_folder(place)
    except OSError as error:
        raise cannot_write(place, error) from error


def write_queries(folder: Path, designs: Mapping[int, Any], kind: DesignType) -> None:
    """Designs by their numbers, and the pictures of those that are none, each file atomically.

    Raises:
        StoreError: see `write_designs`.
    """
    write_designs({design_path(folder, number, kind): design for number, design in designs.items()}, kind)
    if kind is not IMAGES:
        views = {image_path(folder, number): kind.view(design) for number, design in designs.items()}
        write_designs(views, IMAGES)


def replace_synced(source: Path, target: Path) -> None:
    """Move a written file to its place: fsync of its content, rename, fsync of the folder."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, target)
        sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> StoreError:
    """What to tell a person whose disk refuses."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}. Nothing that was stored before is lost; free space or make "
        "the folder writable, then resume the run."
    )


class LockedError(StoreError):
    """Another process has the right to write."""


class WriterLock:
    """The right to write a run, held by one process at a time and released by its end, however it ends.

    A lock of `flock` lives as long as any process has the file open. A forked child therefore closes it at once, so
    that it neither holds nor outlives the right of its parent.
    """

    def __init__(self, folder: Path, name: str = "writer.lock") -> None:
        self.path = folder / name
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._handle, 64).decode(errors="replace").strip() or "unknown"
            os.close(self._handle)
            raise LockedError(
                f"{folder} is being written by another process (pid {owner}). Wait for it or stop it; to look at the "
                "run meanwhile, open it with read_only=True."
            ) from error
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, str(os.getpid()).encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Let another process write."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def writer(folder: Path) -> int | None:
    """The process that has the right to write the run in `folder`; None where nobody has."""
    try:
        pid = int((folder / "writer.lock").read_text())
        with contextlib.suppress(PermissionError):  # it lives, and is another user's
            os.kill(pid, 0)
        handle = os.open(folder / "writer.lock", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):  # no lock, or its process is gone
        return None
    try:  # a process that lives may have let go; a shared lock is held for this instant only
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return pid
    finally:
        os.close(handle)


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
