"""A conversation and its messages as plain values, and how they are read from the database's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from modelworks.assistant.calls import Call, call_of
from modelworks.assistant.search import Snippet
from modelworks.assistant.tables import ConversationRow, MessageRow, ToolCallRow

Role = Literal["system", "user", "assistant"]
State = Literal["complete", "writing", "stopped", "failed", "interrupted"]
CUT_SHORT: tuple[State, ...] = ("stopped", "failed", "interrupted")
"""Answers that can be taken up where they stand, beside those that end with `CUT`."""
CUT = "The answer was cut: it reached the longest that is allowed."
"""The notice of an answer that is whole as far as it was allowed to be."""


@dataclass(frozen=True)
class Conversation:
    """A conversation without its messages; times in seconds since 1970.

    `mode` is ``regular``, ``fun`` or a persona's id; `temperature` None is the server's own; `title_by` is ``line``,
    ``model`` or ``person``; `look_up` is whether answers are looked up in the owner's sources.
    """

    id: str
    title: str
    model: str
    leaf_id: int | None
    created: float
    updated: float
    mode: str
    temperature: float | None
    folder_id: str | None
    pinned: bool
    title_by: str
    look_up: bool = False


class Changes(TypedDict, total=False):
    """What of a conversation can be changed; see `Conversation`."""

    title: str
    model: str
    mode: str
    temperature: float | None
    folder_id: str | None
    pinned: bool
    look_up: bool


@dataclass(frozen=True)
class Found:
    """A conversation that holds what was looked for: in a message, of which this is a piece, or in its title alone."""

    conversation: Conversation
    message_id: int | None
    snippet: Snippet | None


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
    calls: tuple[Call, ...] = ()


def goes_on(state: str, notice: str | None) -> bool:
    """Whether an answer can be taken up where it stands."""
    return state in CUT_SHORT or (state == "complete" and (notice or "").endswith(CUT))


def messages_of(session: Session, conversation_id: str) -> dict[int, Message]:
    """All messages of a conversation by id, in the order in which they were added."""
    query = select(MessageRow).where(MessageRow.conversation_id == conversation_id).order_by(MessageRow.id)
    rows = session.scalars(query).all()
    versions: dict[int | None, list[int]] = {}
    for row in rows:
        versions.setdefault(row.parent_id, []).append(row.id)
    calls: dict[int, list[Call]] = {}
    asked = select(ToolCallRow).join(MessageRow).where(MessageRow.conversation_id == conversation_id)
    for call in session.scalars(asked.order_by(ToolCallRow.number)):
        calls.setdefault(call.message_id, []).append(call_of(call))
    return {row.id: message_of(row, tuple(versions[row.parent_id]), tuple(calls.get(row.id, ()))) for row in rows}


def path_to(messages: dict[int, Message], leaf_id: int | None) -> list[Message]:
    """The messages that lead to one, itself included."""
    path = []
    while leaf_id is not None:
        path.append(messages[leaf_id])
        leaf_id = messages[leaf_id].parent_id
    return path[::-1]


def conversation_of(row: ConversationRow) -> Conversation:
    """A conversation, from its row."""
    return Conversation(
        id=row.id,
        title=row.title,
        model=row.model,
        leaf_id=row.leaf_id,
        created=row.created,
        updated=row.updated,
        mode=row.mode,
        temperature=row.temperature,
        folder_id=row.folder_id,
        pinned=row.pinned,
        title_by=row.title_by,
        look_up=row.look_up,
    )


def message_of(row: MessageRow, versions: tuple[int, ...], calls: tuple[Call, ...] = ()) -> Message:
    """A message, from its row."""
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
        calls=calls,
    )
