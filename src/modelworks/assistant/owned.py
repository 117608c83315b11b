"""Small things that belong to a user, such as folders: each is there for its owner alone."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database
from modelworks.spec.errors import InputError

Row = TypeVar("Row")


class NotFoundError(InputError):
    """Something that isn't there, or is somebody else's, which is the same to who asks."""


class Owned:
    """What one user has of a kind; without users, everything.

    Parameters
    ----------
    database : Database
        Where it is kept.
    owner : str, optional
        The user's id.
    clock
        Gives the time in seconds since 1970.
    """

    def __init__(self, database: Database, owner: str | None, clock: Callable[[], float]) -> None:
        self._database = database
        self._owner = owner
        self._clock = clock

    def _mine(self, table: type[Row]) -> Select[Row]:
        return mine(table, self._owner)

    def _count(self, session: Session, table: type[Row]) -> int:
        return session.scalar(select(func.count()).select_from(self._mine(table).subquery())) or 0

    def _row(self, session: Session, table: type[Row], row_id: str, kind: str) -> Row:
        return owned(session, self._owner, table, row_id, kind)


def mine(table: type[Row], owner: str | None) -> Select[Row]:
    """The rows of a table that are an owner's, the earliest first."""
    columns: Any = table
    query = select(table).order_by(columns.created, columns.id)
    return query if owner is None else query.where(columns.user_id == owner)


def owned(session: Session, owner: str | None, table: type[Row], row_id: str, kind: str) -> Row:
    """One row of an owner's.

    Raises
    ------
    NotFoundError
        If there is none of that id, or it is somebody else's, which is the same to who asks.
    """
    row = session.get(table, row_id) if "\0" not in row_id else None  # which PostgreSQL can't look for
    if row is None or (owner is not None and row.user_id != owner):  # type: ignore[attr-defined]
        raise NotFoundError(f"there is no {kind} {row_id!r}")
    return row


def new_id() -> str:
    """An id that nobody has had."""
    return secrets.token_urlsafe(9)


def named(name: str, kind: str, longest: int = 100) -> str:
    """A name without the spaces around it.

    Raises
    ------
    InputError
        If it is empty, too long, or holds line breaks or other control characters.
    """
    name = name.strip()
    if not name or len(name) > longest or not name.isprintable():
        raise InputError(f"a {kind}'s name {name[:40]!r} is not accepted: one line of 1 to {longest} characters is")
    return name
