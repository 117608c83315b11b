"""The database: opened, brought to the newest schema, and made to keep what it acknowledged.

SQLite runs in WAL mode with ``synchronous=FULL``: readers never wait for a writer, and a commit that returned is on
the disk. A writing transaction takes the write lock when it begins (``BEGIN IMMEDIATE``), so that two writers queue
instead of failing when one of them turns from reading to writing.

Several servers share a PostgreSQL database: set ``MODELWORKS_DATABASE`` to its address. There, what must not be done
twice at once locks the row that it is about.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import home

BUSY_TIMEOUT_S = 15
"""How long a writer waits for another one."""


def default_database() -> Path | str:
    """Where things are kept: ``$MODELWORKS_DATABASE``, or ``modelworks.db`` in the home folder."""
    return os.environ.get("MODELWORKS_DATABASE") or home() / "modelworks.db"


class Database:
    """An engine with the schema in place.

    Parameters
    ----------
    where
        The SQLite file, made if absent; or an address such as ``postgresql://user:password@host/name``.

    Raises
    ------
    InputError
        If the address can't be one, or is of a database that isn't supported.
    OperationError
        If the database can't be opened, isn't one, or has a schema newer than this program's.
    """

    def __init__(self, where: Path | str) -> None:
        self.engine = _engine(where)
        self.shown = str(where) if isinstance(where, Path) else self.engine.url.render_as_string(hide_password=True)
        self._reading = self.engine.execution_options(reading=True)
        try:
            if isinstance(where, Path):
                where.parent.mkdir(parents=True, exist_ok=True)
            migrate(self.engine)
        except (OSError, DBAPIError) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise OperationError(f"the database {self.shown} cannot be used: {_one_line(reason)}") from error
        except CommandError as error:
            raise OperationError(f"the database {self.shown} was written by a newer Modelworks: {error}") from error

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed to the disk when the block ends, or rolled back when it raises."""
        try:
            with Session(self.engine) as session, session.begin():
                yield session
        except IntegrityError as error:
            raise OperationError("the same was changed by two at the same time; try again") from error
        except OperationalError as error:
            raise OperationError(f"the database {self.shown} could not be written: {_one_line(error.orig)}") from error

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads."""
        try:
            with Session(self._reading) as session:
                yield session
        except OperationalError as error:
            raise OperationError(f"the database {self.shown} could not be read: {_one_line(error.orig)}") from error

    def close(self) -> None:
        """Let go of the database."""
        self.engine.dispose()


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema up to ``head``, the newest, or down to an earlier revision; ``base`` is none."""
    with as_file(files("modelworks.assistant") / "migrations") as folder, engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # servers that start together migrate one after the other
            connection.execute(text("SELECT pg_advisory_xact_lock(7264810)"))
        config = Config()
        config.set_main_option("script_location", str(folder))
        config.attributes["connection"] = connection
        (command.upgrade if revision == "head" else command.downgrade)(config, revision)


def _engine(where: Path | str) -> Engine:
    if isinstance(where, str):
        return _postgresql(where)
    engine = create_engine(f"sqlite:///{where}", connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _postgresql(address: str) -> Engine:
    try:
        url = make_url(address)
    except ArgumentError:
        url = None
    if url is None or url.get_backend_name() != "postgresql":
        raise InputError(
            "MODELWORKS_DATABASE is not accepted: an address such as 'postgresql://user@host/modelworks' is"
        )
    return create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=8, max_overflow=8)


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())


def _prepare(connection: Any, _record: Any) -> None:
    # Transactions are begun by `_begin`, not by the driver's guess.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
