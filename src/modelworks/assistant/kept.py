"""What the API keeps between requests (`serve.storage.Storage`), in the database."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database, default_database
from modelworks.assistant.tables import BatchRow, FileRow, ResponseRow, ResultRow
from modelworks.serve.errors import RequestError
from modelworks.serve.storage import ENDED, LASTS_S, Batch, Kept, Order, Result, StoredFile

DEAD_S = 30.0
"""A worker that has not said for so long that it is at a batch has lost it."""
_LARGEST = 16 << 20
"""Characters of one response with all that it was made of; a larger one isn't kept."""
_SHOWN = (FileRow.id, FileRow.name, FileRow.purpose, FileRow.size, FileRow.created, FileRow.expires)
"""Of a file, all but what is in it."""


class DatabaseStorage:
    """`serve.storage.Storage` over the database, which is opened when it is first needed.

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
        self._opening = threading.Lock()

    def _opened(self) -> Database:
        with self._opening:
            if self._database is None:
                self._database = Database(default_database())
            return self._database

    def forget(self) -> None:
        """Remove what has lasted long enough."""
        now = self._clock()
        with self._opened().write() as session:
            session.execute(delete(ResponseRow).where(ResponseRow.created < now - LASTS_S))
            session.execute(delete(FileRow).where(FileRow.expires < now))
            session.execute(delete(BatchRow).where(BatchRow.ended < now - LASTS_S))

    # --- responses

    def put_response(self, owner: str | None, kept: Kept) -> None:
        """Keep a response."""
        response, items = json.dumps(kept.response), json.dumps(kept.items)
        if len(response) + len(items) > _LARGEST:
            return
        now = self._clock()
        with self._opened().write() as session:
            session.add(ResponseRow(id=kept.response["id"], user_id=owner, created=now, response=response, items=items))

    def response(self, owner: str | None, response_id: str) -> Kept | None:
        """One that was kept."""
        with self._opened().read() as session:
            row = session.scalar(select(ResponseRow).where(*self._response(owner, response_id)))
            return Kept(json.loads(row.response), json.loads(row.items)) if row is not None else None

    def remove_response(self, owner: str | None, response_id: str) -> bool:
        """Forget one; false if there is none."""
        with self._opened().write() as session:
            return _changed(session, delete(ResponseRow).where(*self._response(owner, response_id)))

    def _response(self, owner: str | None, response_id: str) -> tuple[Any, ...]:
        fresh = ResponseRow.created >= self._clock() - LASTS_S
        return ResponseRow.id == response_id, _of(ResponseRow, owner), fresh

    # --- files

    def put_file(
        self,
        owner: str | None,
        name: str,
        purpose: str,
        content: bytes,
        *,
        lasts_s: float = LASTS_S,
        most: int | None = None,
    ) -> StoredFile:
        """Keep a file."""
        with self._opened().write() as session:
            if most is not None:
                held = session.scalar(select(func.sum(FileRow.size)).where(*self._files(owner))) or 0
                if held + len(content) > most:
                    raise RequestError(
                        f"the files would hold more than {most:,} bytes, of which {held:,} are used",
                        status=413,
                        code="storage_full",
                    )
            return self._add_file(session, owner, name, purpose, content, lasts_s)

    def _add_file(
        self, session: Session, owner: str | None, name: str, purpose: str, content: bytes, lasts_s: float = LASTS_S
    ) -> StoredFile:
        now = self._clock()
        row = FileRow(
            id=f"file-{secrets.token_hex(16)}",
            user_id=owner,
            name=name,
            purpose=purpose,
            size=len(content),
            created=now,
            expires=now + lasts_s,
            content=content,
        )
        session.add(row)
        return StoredFile(row.id, row.name, row.purpose, row.size, row.created, row.expires)

    def files(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> list[StoredFile]:
        """An owner's files by age, behind the one that is named."""
        with self._opened().read() as session:
            query = _page(session, select(*_SHOWN).where(*self._files(owner)), FileRow, after, limit, order)
            if purpose is not None:
                query = query.where(FileRow.purpose == purpose)
            return [StoredFile(*row) for row in session.execute(query)]

    def file(self, owner: str | None, file_id: str) -> StoredFile | None:
        """One of them."""
        with self._opened().read() as session:
            row = session.execute(select(*_SHOWN).where(FileRow.id == file_id, *self._files(owner))).one_or_none()
            return StoredFile(*row) if row is not None else None

    def content(self, owner: str | None, file_id: str) -> bytes | None:
        """What is in it."""
        with self._opened().read() as session:
            return session.scalar(select(FileRow.content).where(FileRow.id == file_id, *self._files(owner)))

    def remove_file(self, owner: str | None, file_id: str) -> bool:
        """Remove one; false if there is none."""
        with self._opened().write() as session:
            return _changed(session, delete(FileRow).where(FileRow.id == file_id, *self._files(owner)))

    def _files(self, owner: str | None) -> tuple[Any, ...]:
        return _of(FileRow, owner), FileRow.expires >= self._clock()

    # --- batches

    def put_batch(self, batch: Batch) -> None:
        """Keep a new batch."""
        with self._opened().write() as session:
            session.add(
                BatchRow(
                    id=batch.id,
                    user_id=batch.owner,
                    key_id=batch.key_id,
                    endpoint=batch.endpoint,
                    input_file=batch.input_file,
                    window_s=batch.window_s,
                    created=batch.created,
                    state=batch.state,
                    details=json.dumps(batch.metadata),
                    total=0,
                    completed=0,
                    failed=0,
                    errors="[]",
                )
            )

    def batches(self, owner: str | None, *, after: str | None, limit: int) -> list[Batch]:
        """An owner's batches, the newest first, behind the one that is named."""
        with self._opened().read() as session:
            query = _page(session, select(BatchRow).where(_of(BatchRow, owner)), BatchRow, after, limit, "desc")
            return [_batch(row) for row in session.scalars(query)]

    def batch(self, owner: str | None, batch_id: str) -> Batch | None:
        """One of them."""
        with self._opened().read() as session:
            row = session.scalar(select(BatchRow).where(BatchRow.id == batch_id, _of(BatchRow, owner)))
            return _batch(row) if row is not None else None

    def cancel_batch(self, owner: str | None, batch_id: str) -> Batch | None:
        """Ask a batch to end; its worker, or whoever claims it next, ends it."""
        with self._opened().write() as session:
            mine = and_(BatchRow.id == batch_id, _of(BatchRow, owner))
            asking = update(BatchRow).where(mine, BatchRow.state.not_in((*ENDED, "cancelling")))
            session.execute(asking.values(state="cancelling", asked_to_end=self._clock()))
            session.execute(update(BatchRow).where(mine, BatchRow.worker.is_(None)).values(alive=None))
            row = session.scalar(select(BatchRow).where(mine))
            return _batch(row) if row is not None else None

    def claim_batch(self, worker: str) -> Batch | None:
        """The oldest batch that has not ended and that no living worker works on, for this worker alone."""
        now = self._clock()
        free = and_(BatchRow.state.not_in(ENDED), or_(BatchRow.alive.is_(None), BatchRow.alive < now - DEAD_S))
        first = select(BatchRow.id).where(free).order_by(BatchRow.created).limit(1)
        with self._opened().read() as session:
            found = session.scalar(first)
        if found is None:
            return None
        with self._opened().write() as session:
            claim = update(BatchRow).where(BatchRow.id == found, free).values(worker=worker, alive=now)
            if not _changed(session, claim):
                return None  # another one was quicker
            return _batch(session.get_one(BatchRow, found))

    def beat_batch(self, worker: str, batch_id: str) -> Batch | None:
        """Say that the worker is at it; None if it no longer is its to work on."""
        with self._opened().write() as session:
            beat = update(BatchRow).where(*_at_work(worker, batch_id)).values(alive=self._clock())
            return _batch(session.get_one(BatchRow, batch_id)) if _changed(session, beat) else None

    def rest_batch(self, worker: str, batch_id: str, wait_s: float) -> None:
        """Let go of it, for nobody to claim before so many seconds."""
        with self._opened().write() as session:
            mine = update(BatchRow).where(*_at_work(worker, batch_id))
            session.execute(mine.values(worker=None, alive=self._clock() + wait_s - DEAD_S))

    def begin_batch(self, worker: str, batch_id: str, total: int) -> None:
        """Say how many lines it has, when they have been read."""
        with self._opened().write() as session:
            mine = update(BatchRow).where(*_at_work(worker, batch_id), BatchRow.state == "validating")
            session.execute(mine.values(state="in_progress", begun=self._clock(), total=total))

    def answered(self, batch_id: str) -> set[int]:
        """The lines whose results are kept."""
        with self._opened().read() as session:
            return set(session.scalars(select(ResultRow.line).where(ResultRow.batch_id == batch_id)))

    def put_result(self, worker: str, batch_id: str, result: Result) -> None:
        """Keep what became of a line. A worker that lost the batch meanwhile keeps nothing."""
        counts = {"completed": BatchRow.completed + 1} if result.good else {"failed": BatchRow.failed + 1}
        with self._opened().write() as session:
            mine = update(BatchRow).where(*_at_work(worker, batch_id)).values(alive=self._clock(), **counts)
            if _changed(session, mine):
                session.add(ResultRow(batch_id=batch_id, line=result.number, good=result.good, content=result.content))

    def end_batch(self, worker: str, batch_id: str, state: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        """End it, and make files of its results."""
        with self._opened().write() as session:
            row = session.scalar(select(BatchRow).where(*_at_work(worker, batch_id)))
            if row is None:
                return
            row.output_file = self._made_of(session, row, True)
            row.error_file = self._made_of(session, row, False)
            session.execute(delete(ResultRow).where(ResultRow.batch_id == batch_id))
            row.state, row.ended, row.errors = state, self._clock(), json.dumps(list(errors))

    def _made_of(self, session: Session, row: BatchRow, good: bool) -> str | None:
        """A file of the results that are answers, or of the others; None if there are none."""
        lines = select(ResultRow.content).where(ResultRow.batch_id == row.id, ResultRow.good == good)
        content = "".join(f"{line}\n" for line in session.scalars(lines.order_by(ResultRow.line)))
        if not content:
            return None
        name = f"{row.id}_{'output' if good else 'error'}.jsonl"
        return self._add_file(session, row.user_id, name, "batch_output", content.encode()).id


def _at_work(worker: str, batch_id: str) -> tuple[Any, ...]:
    return BatchRow.id == batch_id, BatchRow.worker == worker, BatchRow.state.not_in(ENDED)


def _of(table: Any, owner: str | None) -> Any:
    # Compared by `is` where there are no accounts: then none has an owner.
    return table.user_id.is_(None) if owner is None else table.user_id == owner


def _page(session: Session, query: Any, table: Any, after: str | None, limit: int, order: Order) -> Any:
    """So many of a query's rows, by age, behind one that is named.

    Raises
    ------
    RequestError
        404 if the query has none of that name.
    """
    place = tuple_(table.created, table.id)
    if after is not None:
        at = session.scalar(query.with_only_columns(table.created).where(table.id == after))
        if at is None:
            raise RequestError(f"after: there is no {after[:64]!r}", status=404, code="not_found", param="after")
        query = query.where(place > (at, after) if order == "asc" else place < (at, after))
    ways = (table.created, table.id) if order == "asc" else (table.created.desc(), table.id.desc())
    return query.order_by(*ways).limit(limit)


def _changed(session: Session, statement: Any) -> bool:
    found: Any = session.execute(statement)
    return bool(found.rowcount)


def _batch(row: BatchRow) -> Batch:
    return Batch(
        id=row.id,
        owner=row.user_id,
        key_id=row.key_id,
        endpoint=row.endpoint,
        input_file=row.input_file,
        window_s=row.window_s,
        created=row.created,
        state=row.state,
        metadata=json.loads(row.details),
        begun=row.begun,
        asked_to_end=row.asked_to_end,
        ended=row.ended,
        total=row.total,
        completed=row.completed,
        failed=row.failed,
        errors=json.loads(row.errors),
        output_file=row.output_file,
        error_file=row.error_file,
    )
