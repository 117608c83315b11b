"""A copy of the database while it is in use, and the way back.

SQLite copies itself page by page under its own locks, so that the copy is of one moment. Back, the copy is checked
first; then it replaces all that is there in one transaction, which a crash rolls back, and servers that run see it.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from modelworks.assistant.database import BUSY_TIMEOUT_S, Database
from modelworks.spec.errors import InputError, OperationError

_POSTGRESQL = "the database is PostgreSQL's: its own pg_dump and pg_restore copy it"


def back_up(where: Path | str, target: Path) -> int:
    """Copy the database into a file, whole or not at all; returns its bytes.

    Raises
    ------
    InputError
        If there is no database, or it is PostgreSQL's.
    OperationError
        If the copy can't be written.
    """
    if isinstance(where, str):
        raise InputError(_POSTGRESQL)
    if not where.exists():
        raise InputError(f"there is no database {where} yet")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # for its owner alone
        os.close(handle)
    except OSError as error:
        raise OperationError(f"the copy {target} can't be written: {error.strerror}") from None
    part = Path(name)
    try:
        with closing(_open(where)) as source, closing(_open(part)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except (OSError, sqlite3.Error) as error:
        raise OperationError(f"the copy {target} can't be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def restore(source: Path, where: Path | str) -> None:
    """Put a copy in the place of the database, and bring it to the newest schema.

    Raises
    ------
    InputError
        If the file isn't a whole copy, or the database is PostgreSQL's.
    OperationError
        If the database can't be written, or the copy was made by a newer program; what was there stands.
    """
    if isinstance(where, str):
        raise InputError(_POSTGRESQL)
    _check(source)
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent, prefix=".restore.") as folder:
        brought_up = Path(folder) / "copy.db"
        try:
            with closing(_open(source)) as given, closing(_open(brought_up)) as copy:
                given.backup(copy)
            Database(brought_up).close()
            with closing(_open(brought_up)) as copy, closing(_open(where)) as live:
                copy.backup(live)
        except sqlite3.Error as error:
            raise OperationError(f"the database {where} can't be written: {error}") from None


def _check(source: Path) -> None:
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    try:
        with closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as copy:
            sound = copy.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            ours = copy.execute("SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'").fetchone()[0]
    except sqlite3.Error as error:
        raise InputError(f"{source} is no copy of a database: {error}") from None
    if not sound or not ours:
        raise InputError(f"{source} is no whole copy of a Modelworks database; `modelworks backup` makes one")


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
