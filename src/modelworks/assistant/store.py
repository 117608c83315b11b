"""Conversations, kept: created, listed, renamed, deleted; messages added, saved while they are written, and read back.

What is handed out are plain values, not rows. Every change is one transaction; when a call has returned, what it
wrote survives a crash of this process or of the machine.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database
from modelworks.assistant.tables import ConversationRow, MessageRow
from modelworks.spec.errors import InputError

Role = Literal["system", "user", "assistant"]
State = Literal["complete", "writing", "stopped", "failed", "interrupted"]
CUT_SHORT: tuple[State, ...] = ("stopped", "failed", "interrupted")
"""Answers that can be taken up where they stand."""
TITLE_LENGTH = 60
UNTITLED = "New conversation"


@dataclass(frozen=True)
class Conversation:
    """A conversation without its messages; times in seconds since 1970."""

    id: str
    title: str
    model: str
    leaf_id: int | None
    created: float
    updated: float


@dataclass(frozen=True)
class Message:
    """One message. `versions` are the ids of the messages that stand at its place, itself included, oldest first."""

    id: int
    conversation_id: str
    parent_id: int | None
    role: Role
    content: str
    model: str | None
    state: State
    notice: str | None
    created: float
    updated: float
    versions: tuple[int, ...]


class ConversationStore:
    """The conversations of one database. Safe to use from several threads and processes.

    Parameters
    ----------
    where
        The SQLite file or the address of a database; made if absent, its schema brought up to date.
    clock
        Gives the time in seconds since 1970.
    """

    def __init__(self, where: Path | str, clock: Callable[[], float] = time.time) -> None:
        self._database = Database(where)
        self._clock = clock
        self._owner: str | None = None

    def of(self, user_id: str) -> ConversationStore:
        """The same store as one user has it: nobody else's conversation is there, whatever its id."""
        own = copy.copy(self)
        own._owner = user_id
        return own

    @property
    def database(self) -> Database:
        """Where they are kept."""
        return self._database

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def conversations(self, containing: str = "") -> list[Conversation]:
        """All conversations, the latest first; only those whose title or messages contain a text, if given."""
        query = select(ConversationRow).order_by(ConversationRow.updated.desc(), ConversationRow.id)
        if self._owner is not None:
            query = query.where(ConversationRow.user_id == self._owner)
        if containing:
            spoken = select(MessageRow.conversation_id).where(MessageRow.content.icontains(containing, autoescape=True))
            titled = ConversationRow.title.icontains(containing, autoescape=True)
            query = query.where(or_(titled, ConversationRow.id.in_(spoken)))
        with self._database.read() as session:
            return [_conversation(row) for row in session.scalars(query)]

    def conversation(self, conversation_id: str) -> Conversation:
        """One conversation.

        Raises
        ------
        InputError
            If there is none of that id.
        """
        with self._database.read() as session:
            return _conversation(self._row(session, conversation_id))

    def create(self, model: str) -> Conversation:
        """A new, empty conversation."""
        now = self._clock()
        row = ConversationRow(
            id=secrets.token_urlsafe(9),
            user_id=self._owner,
            title=UNTITLED,
            model=model,
            leaf_id=None,
            created=now,
            updated=now,
        )
        with self._database.write() as session:
            session.add(row)
            session.flush()
            return _conversation(row)

    def rename(self, conversation_id: str, title: str) -> None:
        """Give a conversation another title; an empty one is refused."""
        if not title.strip():
            raise InputError("a conversation's title can't be empty")
        with self._database.write() as session:
            self._row(session, conversation_id).title = title.strip()

    def choose_model(self, conversation_id: str, model: str) -> None:
        """Remember which model the conversation goes on with."""
        with self._database.write() as session:
            self._row(session, conversation_id).model = model

    def delete(self, conversation_id: str) -> None:
        """Remove a conversation and its messages; nothing happens if it is gone already."""
        with self._database.write() as session:
            gone = delete(ConversationRow).where(ConversationRow.id == conversation_id)
            if self._owner is not None:
                gone = gone.where(ConversationRow.user_id == self._owner)
            session.execute(gone)

    def add(
        self,
        conversation_id: str,
        role: Role,
        content: str,
        parent_id: int | None,
        model: str | None = None,
        state: State = "complete",
    ) -> Message:
        """Add a message behind another (or as the first), and show its branch.

        The first message of a user gives an untitled conversation its title.

        Raises
        ------
        InputError
            If the conversation isn't there, or the parent isn't one of its messages.
        """
        now = self._clock()
        with self._database.write() as session:
            conversation = self._row(session, conversation_id)
            if parent_id is not None:
                _message_row(session, conversation_id, parent_id)
            row = MessageRow(
                conversation_id=conversation_id,
                parent_id=parent_id,
                role=role,
                content=content,
                model=model,
                state=state,
                notice=None,
                created=now,
                updated=now,
            )
            session.add(row)
            session.flush()
            if role == "user" and conversation.title == UNTITLED:
                conversation.title = title_of(content)
            conversation.leaf_id, conversation.updated = row.id, now
            return _messages(session, conversation_id)[row.id]

    def save(self, message_id: int, content: str, state: State, notice: str | None = None) -> None:
        """Store what a message has become; nothing happens if its conversation was deleted meanwhile.

        A part (state ``writing``) never replaces what is finished, should it arrive late.
        """
        changed = update(MessageRow).where(MessageRow.id == message_id)
        if state == "writing":
            changed = changed.where(MessageRow.state == "writing")
        with self._database.write() as session:
            session.execute(changed.values(content=content, state=state, notice=notice, updated=self._clock()))

    def take_up(self, conversation_id: str, message_id: int) -> Message:
        """Begin to write an answer on that was cut short.

        Raises
        ------
        InputError
            If it isn't an answer of this conversation, or one that is whole or being written.
        """
        with self._database.write() as session:
            self._row(session, conversation_id)
            row = _message_row(session, conversation_id, message_id)
            if row.role != "assistant" or row.state not in CUT_SHORT:
                raise InputError(
                    f"the message {message_id} is a {row.state} one of the {row.role}: "
                    f"an answer that is {', '.join(CUT_SHORT[:-1])} or {CUT_SHORT[-1]} can be taken up"
                )
            row.state, row.notice, row.updated = "writing", None, self._clock()
            return _messages(session, conversation_id)[message_id]

    def thread(self, conversation_id: str) -> list[Message]:
        """The branch of a conversation that is shown, from its first message to its last."""
        with self._database.read() as session:
            leaf_id = self._row(session, conversation_id).leaf_id
            messages = _messages(session, conversation_id)
        return _path(messages, leaf_id)

    def path(self, conversation_id: str, message_id: int) -> list[Message]:
        """The messages that lead to one, itself included."""
        with self._database.read() as session:
            self._row(session, conversation_id)
            _message_row(session, conversation_id, message_id)
            messages = _messages(session, conversation_id)
        return _path(messages, message_id)

    def show(self, conversation_id: str, message_id: int) -> None:
        """Show the branch of a message, down to the latest message below it."""
        with self._database.write() as session:
            conversation = self._row(session, conversation_id)
            _message_row(session, conversation_id, message_id)
            below = {message_id}
            for message in _messages(session, conversation_id).values():
                if message.parent_id in below:
                    below.add(message.id)
            # Ids grow with time, so the largest below has no message below it.
            conversation.leaf_id = max(below)

    def interrupt_unfinished(self) -> int:
        """Mark the answers that a server's end cut short; to be called when a server starts, before it answers."""
        with self._database.write() as session:
            unfinished = session.scalars(select(MessageRow).where(MessageRow.state == "writing")).all()
            for row in unfinished:
                row.state = "interrupted"
                row.notice = "The server ended while this was being written."
            return len(unfinished)

    def _row(self, session: Session, conversation_id: str) -> ConversationRow:
        row = session.get(ConversationRow, conversation_id)
        if row is None or (self._owner is not None and row.user_id != self._owner):
            raise InputError(f"there is no conversation {conversation_id!r}")
        return row


def title_of(text: str) -> str:
    """A conversation's title: the first line of its first message, cut at a word."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), UNTITLED)
    if len(line) <= TITLE_LENGTH:
        return line
    cut = line[:TITLE_LENGTH]
    return (cut.rsplit(" ", 1)[0] if " " in cut[TITLE_LENGTH // 2 :] else cut).rstrip(" ,;:.") + "…"


def _message_row(session: Session, conversation_id: str, message_id: int) -> MessageRow:
    row = session.get(MessageRow, message_id)
    if row is None or row.conversation_id != conversation_id:
        raise InputError(f"there is no message {message_id} in the conversation {conversation_id!r}")
    return row


def _messages(session: Session, conversation_id: str) -> dict[int, Message]:
    """All messages of a conversation by id, in the order in which they were added."""
    query = select(MessageRow).where(MessageRow.conversation_id == conversation_id).order_by(MessageRow.id)
    rows = session.scalars(query).all()
    versions: dict[int | None, list[int]] = {}
    for row in rows:
        versions.setdefault(row.parent_id, []).append(row.id)
    return {row.id: _message(row, tuple(versions[row.parent_id])) for row in rows}


def _path(messages: dict[int, Message], leaf_id: int | None) -> list[Message]:
    path = []
    while leaf_id is not None:
        path.append(messages[leaf_id])
        leaf_id = messages[leaf_id].parent_id
    return path[::-1]


def _conversation(row: ConversationRow) -> Conversation:
    return Conversation(row.id, row.title, row.model, row.leaf_id, row.created, row.updated)


def _message(row: MessageRow, versions: tuple[int, ...]) -> Message:
    return Message(
        id=row.id,
        conversation_id=row.conversation_id,
        parent_id=row.parent_id,
        role=cast("Role", row.role),
        content=row.content,
        model=row.model,
        state=cast("State", row.state),
        notice=row.notice,
        created=row.created,
        updated=row.updated,
        versions=versions,
    )
