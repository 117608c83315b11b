"""Conversations, kept: created, listed, found, changed, deleted; messages added, saved while written, and read back.

What is handed out are plain values, not rows. Every change is one transaction; when a call has returned, what it
wrote survives a crash of this process or of the machine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from modelworks.assistant import search
from modelworks.assistant.database import Database
from modelworks.assistant.folders import Folders
from modelworks.assistant.owned import NotFoundError, new_id, owned
from modelworks.assistant.personas import Personas, prompt_of
from modelworks.assistant.removal import remove_conversations
from modelworks.assistant.shares import Shares
from modelworks.assistant.tables import ConversationRow, FolderRow, MessageRow
from modelworks.assistant.talk import (
    CUT_SHORT,
    Changes,
    Conversation,
    Found,
    Message,
    Role,
    State,
    conversation_of,
    goes_on,
    messages_of,
    path_to,
)
from modelworks.spec.errors import InputError
from modelworks.spec.modes import REGULAR

TITLE_LENGTH = 60
LONGEST_TITLE = 200
"""Of a title that a person gives."""
UNTITLED = "New conversation"


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

    @property
    def owner(self) -> str | None:
        """Whose conversations they are; None where there are no users."""
        return self._owner

    @property
    def personas(self) -> Personas:
        """The same person's personas."""
        return Personas(self._database, self._owner, self._clock)

    @property
    def folders(self) -> Folders:
        """The same person's folders."""
        return Folders(self._database, self._owner, self._clock)

    @property
    def shares(self) -> Shares:
        """What the same person has shared."""
        return Shares(self._database, self._owner, self._clock)

    def now(self) -> float:
        """The time in seconds since 1970."""
        return self._clock()

    def conversations(self) -> list[Conversation]:
        """All conversations: those that are pinned, then the others, the latest first."""
        with self._database.read() as session:
            return self._all(session)

    def search(self, typed: str, most: int = 50) -> list[Found]:
        """Conversations with all the words that a person types, or words that begin so, in their title or a message.

        Titles come first, then the best message of each other conversation; see `assistant.search` for what a word is.
        """
        words = search.query_words(typed)
        best: dict[str, int] = {}
        with self._database.read() as session:
            there = {one.id: one for one in self._all(session)} if words else {}
            for conversation_id, message_id in search.find(session, words, self._owner):
                best.setdefault(conversation_id, message_id)
            titled = [one.id for one in there.values() if search.holds(one.title, words)]
            found = [name for name in dict.fromkeys([*titled, *best]) if name in there][:most]
            query = select(MessageRow.id, MessageRow.content).where(
                MessageRow.id.in_([best[name] for name in found if name in best])
            )
            said = {row.id: row.content for row in session.execute(query)}
        return [
            Found(there[name], message_id, search.snippet(said[message_id], words) if message_id in said else None)
            for name in found
            for message_id in (best.get(name),)
        ]

    def conversation(self, conversation_id: str) -> Conversation:
        """One conversation.

        Raises
        ------
        InputError
            If there is none of that id.
        """
        with self._database.read() as session:
            return conversation_of(self._row(session, conversation_id))

    def create(
        self,
        model: str,
        mode: str = REGULAR,
        temperature: float | None = None,
        folder_id: str | None = None,
        look_up: bool = False,
    ) -> Conversation:
        """A new, empty conversation; raises as `change`."""
        now = self._clock()
        row = ConversationRow(
            id=new_id(),
            user_id=self._owner,
            title=UNTITLED,
            model=model,
            leaf_id=None,
            created=now,
            updated=now,
            mode=mode,
            temperature=temperature,
            folder_id=folder_id,
            pinned=False,
            title_by="line",
            look_up=look_up,
        )
        with self._database.write() as session:
            self._check(session, {"mode": mode, "temperature": temperature, "folder_id": folder_id})
            session.add(row)
            session.flush()
            return conversation_of(row)

    def change(self, conversation_id: str, **changes: Unpack[Changes]) -> Conversation:
        """Change something of a conversation.

        Raises
        ------
        InputError
            If the title is empty or too long, the mode or the folder isn't there, or the temperature isn't of 0 to 2.
        """
        with self._database.write() as session:
            row = self._row(session, conversation_id)
            if "title" in changes:
                row.title, row.title_by = _titled(changes["title"]), "person"
            self._check(session, changes)
            for name, value in changes.items():
                if name != "title":
                    setattr(row, name, value)
            return conversation_of(row)

    def rename(self, conversation_id: str, title: str) -> None:
        """Give a conversation another title, as a person does; an empty one is refused."""
        self.change(conversation_id, title=title)

    def entitle(self, conversation_id: str, title: str) -> bool:
        """Give a conversation the title that a model has found, unless a person has given one; whether it has it."""
        untitled = update(ConversationRow).where(ConversationRow.id == conversation_id)
        with self._database.write() as session:
            changed = session.execute(
                untitled.where(ConversationRow.title_by == "line").values(title=title, title_by="model")
            )
            return bool(changed.rowcount)  # type: ignore[attr-defined]

    def choose_model(self, conversation_id: str, model: str) -> None:
        """Remember which model the conversation goes on with."""
        self.change(conversation_id, model=model)

    def prompt(self, mode: str) -> str:
        """What a model is told first in a mode; an `InputError` if there is none such."""
        with self._database.read() as session:
            return prompt_of(session, self._owner, mode)

    def delete(self, conversation_id: str) -> None:
        """Remove a conversation and its messages; nothing happens if it is gone already."""
        with self._database.write() as session:
            gone = ConversationRow.id == conversation_id
            if self._owner is not None:
                gone &= ConversationRow.user_id == self._owner
            remove_conversations(session, gone)

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
                message_row(session, conversation_id, parent_id)
            row = MessageRow(
                conversation_id=conversation_id,
                parent_id=parent_id,
                role=role,
                content=content.replace("\0", "\ufffd"),  # which PostgreSQL can't hold
                model=model,
                state=state,
                notice=None,
                created=now,
                updated=now,
            )
            session.add(row)
            session.flush()
            if state != "writing":
                search.index(session, row.id, content)
            if role == "user" and conversation.title == UNTITLED and conversation.title_by == "line":
                conversation.title = title_of(content)
            conversation.leaf_id, conversation.updated = row.id, now
            return messages_of(session, conversation_id)[row.id]

    def save(self, message_id: int, content: str, state: State, notice: str | None = None) -> None:
        """Store what a message has become; nothing happens if its conversation was deleted meanwhile.

        A part (state ``writing``) never replaces what is finished, should it arrive late.
        """
        changed = update(MessageRow).where(MessageRow.id == message_id)
        if state == "writing":
            changed = changed.where(MessageRow.state == "writing")
        values = {"content": content, "state": state, "notice": notice, "updated": self._clock()}
        with self._database.write() as session:
            saved = session.scalar(changed.values(values).returning(MessageRow.id))
            if saved is not None and state != "writing":  # an index of what changes every moment would cost too much
                search.index(session, message_id, content)

    def take_up(self, conversation_id: str, message_id: int) -> Message:
        """Begin to write an answer on that was cut short.

        Raises
        ------
        InputError
            If it isn't an answer of this conversation, or one that is whole or being written.
        """
        with self._database.write() as session:
            self._row(session, conversation_id)
            row = message_row(session, conversation_id, message_id)
            if row.role != "assistant" or not goes_on(row.state, row.notice):
                raise InputError(
                    f"the message {message_id} is a {row.state} one of the {row.role}: "
                    f"an answer that is {', '.join(CUT_SHORT)} or was cut at its longest can be taken up"
                )
            row.state, row.notice, row.updated = "writing", None, self._clock()
            return messages_of(session, conversation_id)[message_id]

    def thread(self, conversation_id: str) -> list[Message]:
        """The branch of a conversation that is shown, from its first message to its last."""
        with self._database.read() as session:
            leaf_id = self._row(session, conversation_id).leaf_id
            messages = messages_of(session, conversation_id)
        return path_to(messages, leaf_id)

    def tree(self, conversation_id: str) -> tuple[Conversation, list[Message]]:
        """A conversation with the messages of all its branches, in the order in which they were added."""
        with self._database.read() as session:
            conversation = conversation_of(self._row(session, conversation_id))
            return conversation, list(messages_of(session, conversation_id).values())

    def path(self, conversation_id: str, message_id: int) -> list[Message]:
        """The messages that lead to one, itself included."""
        with self._database.read() as session:
            self._row(session, conversation_id)
            message_row(session, conversation_id, message_id)
            messages = messages_of(session, conversation_id)
        return path_to(messages, message_id)

    def show(self, conversation_id: str, message_id: int) -> None:
        """Show the branch of a message, down to the latest message below it."""
        with self._database.write() as session:
            conversation = self._row(session, conversation_id)
            message_row(session, conversation_id, message_id)
            below = {message_id}
            for message in messages_of(session, conversation_id).values():
                if message.parent_id in below:
                    below.add(message.id)
            # Ids grow with time, so the largest below has no message below it.
            conversation.leaf_id = max(below)

    def show_if_hidden(self, conversation_id: str, message_id: int) -> None:
        """Show the branch of a message unless it is shown anyway."""
        if message_id not in {message.id for message in self.thread(conversation_id)}:
            self.show(conversation_id, message_id)

    def interrupt_unfinished(self) -> int:
        """Mark the answers that a server's end cut short; to be called when a server starts, before it answers."""
        with self._database.write() as session:
            unfinished = session.scalars(select(MessageRow).where(MessageRow.state == "writing")).all()
            for row in unfinished:
                row.state = "interrupted"
                row.notice = "The server ended while this was being written."
                search.index(session, row.id, row.content)
            return len(unfinished)

    def _check(self, session: Session, changes: Changes) -> None:
        if "mode" in changes:
            prompt_of(session, self._owner, changes["mode"])
        temperature = changes.get("temperature")
        if temperature is not None and not 0 <= temperature <= 2:
            raise InputError(f"temperature = {temperature:g} is not accepted: a number from 0 to 2 is")
        folder_id = changes.get("folder_id")
        if folder_id is not None:
            owned(session, self._owner, FolderRow, folder_id, "folder")

    def _all(self, session: Session) -> list[Conversation]:
        latest = (ConversationRow.pinned.desc(), ConversationRow.updated.desc(), ConversationRow.id)
        query = select(ConversationRow).order_by(*latest)
        if self._owner is not None:
            query = query.where(ConversationRow.user_id == self._owner)
        return [conversation_of(row) for row in session.scalars(query)]

    def _row(self, session: Session, conversation_id: str) -> ConversationRow:
        return owned(session, self._owner, ConversationRow, conversation_id, "conversation")


def _titled(title: str) -> str:
    title = " ".join(title.replace("\0", "").split())
    if not title:
        raise InputError("a conversation's title can't be empty")
    if len(title) > LONGEST_TITLE:
        raise InputError(f"a title of {len(title)} characters is not accepted: 1 to {LONGEST_TITLE} are")
    return title


def title_of(text: str) -> str:
    """A conversation's title: the first line of its first message, cut at a word."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), UNTITLED)
    if len(line) <= TITLE_LENGTH:
        return line
    cut = line[:TITLE_LENGTH]
    return (cut.rsplit(" ", 1)[0] if " " in cut[TITLE_LENGTH // 2 :] else cut).rstrip(" ,;:.") + "…"


def message_row(session: Session, conversation_id: str, message_id: int) -> MessageRow:
    """A message of a conversation.

    Raises
    ------
    NotFoundError
        If it is none of the conversation's.
    """
    # A number that is no id of any database would be an error of theirs.
    row = session.get(MessageRow, message_id) if 0 < message_id < 1 << 31 else None
    if row is None or row.conversation_id != conversation_id:
        raise NotFoundError(f"there is no message {message_id} in the conversation {conversation_id!r}")
    return row
