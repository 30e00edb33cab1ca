"""A run's folder: where its queries are kept, which settings are in force, and who may write."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.places import at_address, holds, local_folder
from tiltopt.online.settings.renamed import translated
from tiltopt.online.settings.run import Settings, differences, laid_over, plain
from tiltopt.online.store import address, backup, files, spool
from tiltopt.online.store.database import DamagedStoreError, Database, NoStoreError, ServerLock
from tiltopt.online.store.store import Store

Right = files.WriterLock | ServerLock
"""To write a run."""

URL_VARIABLE = "TILTOPT_STORE_URL"
"""Environment variable with the SQLAlchemy URL of a shared database; passwords belong there, never into a file."""


def exists(folder: Path, store_url: str | None = None) -> bool:
    """Whether `folder` holds a run, be it in copies alone; one that was killed while it was created does not count."""
    if at_address(folder) and not holds(_link(folder)):
        return False
    shared = is_shared(folder)
    if not shared and backup.copies(folder):
        return True
    if not shared and not (folder / backup.NAME).exists():
        return False
    try:
        database, name = _database(folder, store_url, create=False, read_only=not shared)
    except NoStoreError:
        return False
    try:
        return Store.find(database, name) is not None
    finally:
        database.close()


def create(folder: Path, config: Mapping[str, Any] | Settings, store_url: str | None) -> tuple[Store, Settings]:
    """Make a run: the store, then `config.json`.

    Raises:
        ConfigError: impossible settings, or a folder at an address and no database for the answers. StoreError: the
            folder holds a run already, or cannot be written.
    """
    url = database_of(folder, store_url)
    settings = dataclasses.replace(Settings.from_config(config), run_dir=str(folder))
    if not url and not is_shared(folder) and backup.copies(folder) and backup.known(folder / backup.NAME) is None:
        raise StoreError(
            f"{folder} holds a run whose store is gone or unusable, and copies of it beside its rounds; open it with "
            "recover=True (--recover), or choose another folder."
        )
    if url and not holds(_link(folder)):
        # of processes that make a run at one address at once, the database takes one
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:32] if at_address(folder) else uuid.uuid4().hex
        files.write_json(_link(folder), {"name": name, "url": address.shown(url)})
    database, name = _database(folder, url, create=True, read_only=False)
    store = Store.create(database, name, settings.to_dict(), _spool(folder))
    files.write_json(folder / "config.json", settings.to_dict())
    return store, settings


def reopen(
    folder: Path,
    config: Mapping[str, Any] | Settings | None,
    allow_change: bool | Collection[str] | None,
    store_url: str | None,
    read_only: bool,
    recover: bool,
) -> tuple[Store, Settings]:
    """Open a run and settle which settings are in force.

    Args:
        config: the settings wanted now, or some of their keys; None for those in `config.json`.
        allow_change: True to accept any change since the run was created, or the dotted keys that may change.
        recover: in the place of a damaged store, put one made of the newest whole rounds.

    Raises:
        ConfigError: settings changed without permission; the message names them.
        StoreError: no run, or a damaged one.
    """
    database, name, note = _open_or_recover(folder, store_url, read_only, recover)
    store = Store.open(database, name, _spool(folder))
    if note:
        store.change_config(store.config(), [note])
    stored = stored_settings(folder, store)
    if read_only:
        return store, stored
    wanted = _written(folder, stored) if config is None else _wanted(stored, config)
    wanted = dataclasses.replace(wanted, run_dir=str(folder))
    changes = differences(stored, wanted)
    _permit(changes, allow_change)
    if changes:
        store.change_config(wanted.to_dict(), changes)
    if changes or not (folder / "config.json").exists():
        files.write_json(folder / "config.json", wanted.to_dict())
    return store, wanted


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[Store]:
    """The store of an existing run, for looking; another process may write it meanwhile.

    Raises:
        ConfigError: not the folder of a run. StoreError: its store cannot be read.
    """
    store, _ = reopen(files.existing(folder), None, None, None, read_only=True, recover=False)
    try:
        yield store
    finally:
        store.close()


def stored_settings(folder: Path, store: Store) -> Settings:
    """The settings in force, as the store knows them."""
    return Settings.from_config(translated(store.config()) | {"run_dir": str(folder)})


def is_shared(folder: Path) -> bool:
    """Whether the run's queries are in a database that several processes may write at once."""
    return at_address(folder) or _link(folder).exists()


def _link(folder: Path) -> Path:
    """The file that says which database that is."""
    return folder / "store.json"


def database_of(folder: Path, store_url: str | None) -> str | None:
    """The URL of the database that a new run in `folder` is to have; None for a file in the folder.

    Raises:
        ConfigError: the folder is at an address, which cannot hold a database, and no URL is given.
    """
    if not at_address(folder):
        return store_url
    url = store_url or os.environ.get(URL_VARIABLE)
    if not url:
        raise ConfigError(
            f"`run_dir`: {folder} is no folder of this machine. Images and checkpoints can lie there; "
            f"the answers need a database. Set {URL_VARIABLE} (or store_url=) to its SQLAlchemy URL, such as "
            "postgresql+psycopg://user@host/name."
        )
    return url


def lock(folder: Path, store: Store | None = None) -> Right | None:
    """The right to write the run in `folder`, which is made where it is missing.

    Args:
        store: of the run; at an address the right comes from its database, and there is none without it.
    """
    if at_address(folder):
        return store.database.lock(store.run_id) if store is not None else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.cannot_write(folder, error) from error
    return files.WriterLock(folder)


def _open_or_recover(folder: Path, store_url: str | None, read_only: bool, recover: bool) -> tuple[Database, str, str]:
    """The database, the run's name in it, and what was done to have every answer in it.

    Every opening holds the store against its copies: one that is behind them, because the end of its log is lost, is
    replaced by the newest; one that cannot be used, with `recover`.
    """
    try:
        database, name = _database(folder, store_url, create=False, read_only=read_only)
        if is_shared(folder):
            return database, name, ""
        if Store.find(database, name) is None:
            database.close()
            raise NoStoreError(f"{database.where} holds no run of this folder; create one first.")
        found = backup.ahead(folder)
        if not found:
            return database, name, ""
        if read_only:
            warnings.warn(
                f"{database.where} lacks answers that {found[0].path} has; opening the run for writing restores them.",
                stacklevel=2,
            )
            return database, name, ""
        database.close()
    except DamagedStoreError as error:
        found = [] if is_shared(folder) else backup.recoverable(folder)
        if not found:
            raise
        if not recover or read_only:
            raise DamagedStoreError(
                f"{error} Or go on from round {found[-1].last_round}, the newest with a whole copy, by --recover "
                "(recover=True); answers that came later are then asked for again."
            ) from error
    note = backup.restore(folder, found)
    warnings.warn(note, stacklevel=2)
    return *_database(folder, store_url, create=False, read_only=False), note


def _spool(folder: Path) -> spool.Spool:
    return spool.Spool(local_folder(folder) / spool.NAME)


def _permit(changes: list[str], allow_change: bool | Collection[str] | None) -> None:
    keys = [change.split(":")[0] for change in changes]
    allowed = keys if allow_change is True else (allow_change or ())
    if isinstance(allowed, str):
        allowed = [allowed]
    refused = [change for change, key in zip(changes, keys, strict=True) if key not in allowed]
    if refused:
        raise ConfigError(
            "the configuration differs from the one this run was made with:\n  " + "\n  ".join(refused) + "\n"
            "Restore these values, or accept the change with --allow-change (allow_change=True): the run then goes on "
            "under the new settings and is no longer the run that its first settings describe."
        )


def _written(folder: Path, stored: Settings) -> Settings:
    path = folder / "config.json"
    if not path.exists():
        return stored
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("expected a mapping")
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is not readable JSON ({error}). Correct it, or delete it: the store knows the settings too."
        ) from error
    return Settings.from_config(translated(config))


def _wanted(stored: Settings, config: Mapping[str, Any] | Settings) -> Settings:
    """The settings wanted now, validated as a whole: the stored ones under the keys of a mapping."""
    from tiltopt.online.settings.validation import validated  # its tables are heavy

    whole = config if isinstance(config, Settings) else laid_over(stored.to_dict(), plain(config))
    return validated(Settings.from_config(whole))


def _database(folder: Path, store_url: str | None, create: bool, read_only: bool) -> tuple[Database, str]:
    """The database of a run and the run's name in it."""
    if not is_shared(folder):
        return Database(folder / backup.NAME, create=create, read_only=read_only), "run"
    known = files.read_json(_link(folder))
    url = store_url or os.environ.get(URL_VARIABLE)
    if not url:
        raise StoreError(
            f"the queries of {folder} are in {known['url']}; pass store_url= or set {URL_VARIABLE} to reach them."
        )
    return Database(url, create=create, read_only=read_only), known["name"]
