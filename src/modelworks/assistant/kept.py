"""Responses that are kept in the database (`serve.responses.Keeper`), for thirty days."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, select

from modelworks.assistant.database import Database, default_database
from modelworks.assistant.tables import ResponseRow
from modelworks.serve.responses import Kept

LASTS_S = 30 * 86400.0
_LARGEST = 16 << 20
"""Characters of one response with all that it was made of; a larger one isn't kept."""


class DatabaseKeeper:
    """`serve.responses.Keeper` over the database, which is opened when it is first needed.

    Parameters
    ----------
    database : Database, optional
        The database; left out, this installation's.
    clock : callable, optional
        The time in seconds.
    """

    def __init__(self, database: Database | None = None, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def put(self, owner: str | None, kept: Kept) -> None:
        """Keep a response, and forget those that are too old."""
        await asyncio.to_thread(self._put, owner, kept)

    async def get(self, owner: str | None, response_id: str) -> Kept | None:
        """One that was kept."""
        return await asyncio.to_thread(self._get, owner, response_id)

    async def delete(self, owner: str | None, response_id: str) -> bool:
        """Forget one; false if there is none."""
        return await asyncio.to_thread(self._delete, owner, response_id)

    def _opened(self) -> Database:
        if self._database is None:
            self._database = Database(default_database())
        return self._database

    def _put(self, owner: str | None, kept: Kept) -> None:
        response, items = json.dumps(kept.response), json.dumps(kept.items)
        if len(response) + len(items) > _LARGEST:
            return
        now = self._clock()
        with self._opened().write() as session:
            session.execute(delete(ResponseRow).where(ResponseRow.created < now - LASTS_S))
            session.add(ResponseRow(id=kept.response["id"], user_id=owner, created=now, response=response, items=items))

    def _get(self, owner: str | None, response_id: str) -> Kept | None:
        with self._opened().read() as session:
            row = session.scalar(select(ResponseRow).where(*self._mine(owner, response_id)))
            return Kept(json.loads(row.response), json.loads(row.items)) if row is not None else None

    def _delete(self, owner: str | None, response_id: str) -> bool:
        with self._opened().write() as session:
            found: Any = session.execute(delete(ResponseRow).where(*self._mine(owner, response_id)))
            return bool(found.rowcount)

    def _mine(self, owner: str | None, response_id: str) -> tuple[Any, ...]:
        # Compared by `is` where there are no accounts: then none has an owner.
        whose = ResponseRow.user_id.is_(None) if owner is None else ResponseRow.user_id == owner
        return ResponseRow.id == response_id, whose, ResponseRow.created >= self._clock() - LASTS_S
