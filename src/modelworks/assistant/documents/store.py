"""Documents and their passages in the database; each belongs to a conversation, and to whom that belongs."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from sqlalchemy import delete, func, insert, select, union, update
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database
from modelworks.assistant.documents.passages import Piece
from modelworks.assistant.owned import NotFoundError, owned
from modelworks.assistant.store import message_row
from modelworks.assistant.tables import CitationRow, ConversationRow, DocumentRow, MessageRow, PassageRow, SourceRow
from modelworks.spec.errors import InputError

State = Literal["reading", "ready", "failed"]
MOST_DOCUMENTS = 50
"""Of a conversation."""


@dataclass(frozen=True)
class Document:
    """A document without what is in it; `created` in seconds since 1970."""

    id: str
    conversation_id: str
    name: str
    kind: str
    size: int
    state: State
    notice: str | None
    created: float


@dataclass(frozen=True)
class Passage:
    """A passage with the document that it is of."""

    id: int
    document_id: str
    document: str
    number: int
    place: str
    heading: str
    text: str
    overlap: int
    address: str = ""
    """Where it can be read, if it is of a live source; then its document is that source's name with a title."""
    published: float | None = None
    fetched: float | None = None
    """When it was read from a live source; None of a document."""

    @property
    def time(self) -> float | None:
        """As of when it is, in seconds since 1970: when it was published if that is known, else when it was read."""
        return self.fetched if self.published is None else self.published

    @property
    def where(self) -> str:
        """Its document, its place in it and its time, in a reader's words."""
        if self.published is not None:
            said = f"published {shown_time(self.published)}"
        else:
            said = f"read {shown_time(self.fetched)}" if self.fetched is not None else ""
        return ", ".join(part for part in (self.document, self.place, self.heading, said) if part)


def shown_time(seconds: float) -> str:
    """A time in words that are the same everywhere."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


class DocumentStore:
    """The documents of one database. Safe to use from several threads and processes."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._clock = clock
        self._owner: str | None = None

    @property
    def owner(self) -> str | None:
        """Whose documents alone are there; None if everybody's are."""
        return self._owner

    def of(self, user_id: str) -> DocumentStore:
        """The same store as one user has it: nobody else's document is there, whatever its id."""
        own = copy.copy(self)
        own._owner = user_id
        return own

    def begin(self, conversation_id: str, name: str, size: int, most: int | None = None) -> Document:
        """Note a document that is going to be read.

        Parameters
        ----------
        most
            The bytes that all documents of the owner may have.

        Raises
        ------
        InputError
            If there is no such conversation, or it or its owner has as many as are allowed.
        """
        row = DocumentRow(
            id=secrets.token_urlsafe(9),
            conversation_id=conversation_id,
            name=name,
            kind="",
            size=size,
            state="reading",
            notice=None,
            created=self._clock(),
        )
        with self.database.write() as session:
            self._conversation(session, conversation_id)
            own = select(func.count()).where(DocumentRow.conversation_id == conversation_id)
            if (count := session.scalar(own) or 0) >= MOST_DOCUMENTS:
                raise InputError(f"the conversation has {count} documents: up to {MOST_DOCUMENTS} are accepted")
            if most is not None:
                held = session.scalar(self._owned(select(func.coalesce(func.sum(DocumentRow.size), 0)))) or 0
                if held + size > most:
                    raise InputError(f"your documents would have {held + size:,} bytes: up to {most:,} are accepted")
            session.add(row)
            session.flush()
            return _document(row)

    def finish(
        self, document_id: str, kind: str, pieces: Sequence[Piece], picture: bytes | None, notice: str | None
    ) -> None:
        """Keep what was read; nothing happens if the document was removed meanwhile."""
        with self.database.write() as session:
            done = update(DocumentRow).where(DocumentRow.id == document_id)
            changed: Any = session.execute(done.values(kind=kind, state="ready", notice=notice, picture=picture))
            if changed.rowcount and pieces:
                rows = [
                    {"document_id": document_id, "number": number, "vector": None, **vars(piece)}
                    for number, piece in enumerate(pieces)
                ]
                session.execute(insert(PassageRow), rows)

    def fail(self, document_id: str, reason: str) -> None:
        """Say why a document could not be read."""
        with self.database.write() as session:
            failed = update(DocumentRow).where(DocumentRow.id == document_id)
            session.execute(failed.values(state="failed", notice=reason))

    def interrupt_unfinished(self) -> None:
        """Mark what a server's end cut short; to be called when a server starts."""
        with self.database.write() as session:
            cut = update(DocumentRow).where(DocumentRow.state == "reading")
            session.execute(cut.values(state="failed", notice="the server ended while this was being read"))

    def documents(self, conversation_id: str) -> list[Document]:
        """A conversation's documents, the oldest first.

        Raises
        ------
        InputError
            If there is no such conversation.
        """
        with self.database.read() as session:
            self._conversation(session, conversation_id)
            mine = select(*_SHOWN).where(DocumentRow.conversation_id == conversation_id)
            rows = session.execute(mine.order_by(DocumentRow.created, DocumentRow.id))
            return [_document(row) for row in rows]

    def document(self, conversation_id: str, document_id: str) -> Document:
        """One of them.

        Raises
        ------
        InputError
            If it isn't there.
        """
        with self.database.read() as session:
            return _document(self._document(session, conversation_id, document_id))

    def remove(self, conversation_id: str, document_id: str) -> None:
        """Remove a document with its passages.

        Raises
        ------
        InputError
            If it isn't there.
        """
        with self.database.write() as session:
            self._document(session, conversation_id, document_id)
            session.execute(delete(DocumentRow).where(DocumentRow.id == document_id))

    def passages(self, document_ids: Sequence[str]) -> list[Passage]:
        """All passages of some documents, in the order in which the documents are named."""
        with self.database.read() as session:
            query = self._passages().where(PassageRow.document_id.in_(document_ids))
            found = [Passage(*row) for row in session.execute(query.order_by(PassageRow.number))]
        return sorted(found, key=lambda passage: document_ids.index(passage.document_id))

    def length(self, document_ids: Sequence[str]) -> int:
        """Characters of some documents."""
        count = select(func.coalesce(func.sum(func.length(PassageRow.text) - PassageRow.overlap), 0))
        with self.database.read() as session:
            return int(session.scalar(count.where(PassageRow.document_id.in_(document_ids))) or 0)

    def passages_of(self, passage_ids: Sequence[int]) -> list[Passage]:
        """Passages by their ids, in this order; without those that are gone or another's."""
        with self.database.read() as session:
            rows = session.execute(self._passages().where(PassageRow.id.in_(passage_ids)))
            found = {passage.id: passage for passage in (Passage(*row) for row in rows)}
        return [found[one] for one in passage_ids if one in found]

    def pictures(self, document_ids: Sequence[str]) -> list[bytes]:
        """The images among some documents, as a model takes them."""
        with self.database.read() as session:
            query = self._owned(select(DocumentRow.picture)).where(DocumentRow.id.in_(document_ids))
            rows = session.scalars(query.where(DocumentRow.picture.is_not(None)).order_by(DocumentRow.created))
            return [row for row in rows if row is not None]

    def keep_sources(self, message_id: int, passages: Sequence[Passage]) -> None:
        """Note what an answer was given; the first passage is number 1.

        What is of a live source is kept as it was: it can be another tomorrow, or gone.
        """
        numbered = list(enumerate(passages, start=1))
        kept = ("document", "place", "heading", "text", "address", "published", "fetched")
        cited = [
            {"message_id": message_id, "number": number} | {name: getattr(one, name) for name in kept}
            for number, one in numbered
            if one.fetched is not None
        ]
        ids = [one.id for one in passages if one.fetched is None]
        with self.database.write() as session:
            session.execute(delete(SourceRow).where(SourceRow.message_id == message_id))
            session.execute(delete(CitationRow).where(CitationRow.message_id == message_id))
            if not passages or session.get(MessageRow, message_id) is None:
                return
            there = set(session.scalars(select(PassageRow.id).where(PassageRow.id.in_(ids))))
            rows = [
                {"message_id": message_id, "number": number, "passage_id": passage.id}
                for number, passage in numbered
                if passage.fetched is None and passage.id in there
            ]
            if rows:
                session.execute(insert(SourceRow), rows)
            if cited:
                session.execute(insert(CitationRow), cited)

    def sources(self, conversation_id: str, message_id: int) -> dict[int, Passage]:
        """What an answer was given, by its numbers.

        Raises
        ------
        InputError
            If the message isn't there.
        """
        with self.database.read() as session:
            self._conversation(session, conversation_id)
            message_row(session, conversation_id, message_id)
            query = select(SourceRow.number, *_PASSAGE).join(PassageRow, PassageRow.id == SourceRow.passage_id)
            query = query.join(DocumentRow, DocumentRow.id == PassageRow.document_id)
            rows = session.execute(query.where(SourceRow.message_id == message_id).order_by(SourceRow.number))
            found = {row[0]: Passage(*row[1:]) for row in rows}
            cited = session.scalars(select(CitationRow).where(CitationRow.message_id == message_id))
            found |= {row.number: _cited(row) for row in cited}
            return dict(sorted(found.items()))

    def given(self, conversation_id: str) -> frozenset[int]:
        """The messages of a conversation that were given something.

        Raises
        ------
        InputError
            If the conversation isn't there.
        """
        with self.database.read() as session:
            self._conversation(session, conversation_id)
            messages = select(MessageRow.id).where(MessageRow.conversation_id == conversation_id)
            kept = union(select(SourceRow.message_id), select(CitationRow.message_id)).subquery()
            return frozenset(session.scalars(messages.where(MessageRow.id.in_(select(kept)))))

    def _owned(self, query: Any) -> Any:
        """A query of documents, of this owner's alone."""
        if self._owner is None:
            return query
        owned = select(ConversationRow.id).where(ConversationRow.user_id == self._owner)
        return query.where(DocumentRow.conversation_id.in_(owned))

    def _passages(self) -> Any:
        return self._owned(select(*_PASSAGE).join(DocumentRow, DocumentRow.id == PassageRow.document_id))

    def _conversation(self, session: Session, conversation_id: str) -> None:
        owned(session, self._owner, ConversationRow, conversation_id, "conversation")

    def _document(self, session: Session, conversation_id: str, document_id: str) -> DocumentRow:
        self._conversation(session, conversation_id)
        row = None if "\0" in document_id else session.get(DocumentRow, document_id)
        if row is None or row.conversation_id != conversation_id:
            raise NotFoundError(f"there is no document {document_id!r} in the conversation {conversation_id!r}")
        return row


_SHOWN = (
    DocumentRow.id,
    DocumentRow.conversation_id,
    DocumentRow.name,
    DocumentRow.kind,
    DocumentRow.size,
    DocumentRow.state,
    DocumentRow.notice,
    DocumentRow.created,
)
_PASSAGE = (
    PassageRow.id,
    PassageRow.document_id,
    DocumentRow.name,
    PassageRow.number,
    PassageRow.place,
    PassageRow.heading,
    PassageRow.text,
    PassageRow.overlap,
)


def _cited(row: CitationRow) -> Passage:
    return Passage(
        *(0, "", row.document, 0, row.place, row.heading, row.text, 0),
        address=row.address,
        published=row.published,
        fetched=row.fetched,
    )


def _document(row: Any) -> Document:
    return Document(
        id=row.id,
        conversation_id=row.conversation_id,
        name=row.name,
        kind=row.kind,
        size=row.size,
        state=cast("State", row.state),
        notice=row.notice,
        created=row.created,
    )
