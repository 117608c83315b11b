"""The database: opened, brought to the newest schema, and made to keep what it acknowledged.

SQLite runs in WAL mode with ``synchronous=FULL``: readers never wait for a writer, and a commit that returned is on
the disk. A writing transaction takes the write lock when it begins (``BEGIN IMMEDIATE``), so that two writers queue
instead of failing when one of them turns from reading to writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from modelworks.spec.errors import OperationError

BUSY_TIMEOUT_S = 15
"""How long a writer waits for another one."""


class Database:
    """An engine with the schema in place.

    Raises
    ------
    OperationError
        If the file can't be opened, isn't a database, or has a schema newer than this program's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = _engine(path)
        self._reading = self.engine.execution_options(reading=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            migrate(self.engine)
        except (OSError, DBAPIError) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise OperationError(f"the database {path} cannot be used: {reason}") from error
        except CommandError as error:
            raise OperationError(f"the database {path} was written by a newer Modelworks: {error}") from error

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed to the disk when the block ends, or rolled back when it raises."""
        try:
            with Session(self.engine) as session, session.begin():
                yield session
        except OperationalError as error:
            raise OperationError(f"the database {self.path} could not be written: {error.orig}") from error

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads."""
        with Session(self._reading) as session:
            yield session

    def close(self) -> None:
        """Let go of the file."""
        self.engine.dispose()


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to a revision: ``head`` is the newest, ``base`` is none."""
    with as_file(files("modelworks.assistant") / "migrations") as folder, engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(folder))
        config.attributes["connection"] = connection
        (command.downgrade if revision == "base" else command.upgrade)(config, revision)


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    # Transactions are begun by `_begin`, not by the driver's guess.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
