"""A branch of a conversation for everybody who has its link, as it was when it was shared.

What is kept is a copy: what is said afterwards isn't in it. It goes when its owner revokes it, or removes the
conversation. Its id is 192 random bits, which nobody guesses.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from modelworks.assistant.calls import named
from modelworks.assistant.database import Database
from modelworks.assistant.owned import NotFoundError, Owned
from modelworks.assistant.tables import ConversationRow, ShareRow
from modelworks.assistant.talk import messages_of, path_to
from modelworks.spec.errors import InputError

MOST_SHARES = 1000


@dataclass(frozen=True)
class Share:
    """A shared branch, as its owner lists it."""

    id: str
    conversation_id: str
    title: str
    created: float

    @property
    def path(self) -> str:
        """Its page on this server."""
        return f"/s/{self.id}"


@dataclass(frozen=True)
class SharedMessage:
    """A message as everybody sees it."""

    role: str
    content: str
    model: str | None


class Shares(Owned):
    """What a person has shared."""

    def all(self) -> list[Share]:
        """All of it, the earliest first."""
        with self._database.read() as session:
            return [_share(row) for row in session.scalars(self._mine(ShareRow))]

    def create(self, conversation_id: str) -> Share:
        """Share the branch of a conversation that is shown.

        Raises
        ------
        InputError
            If there is no such conversation, nothing was said in it, or too much is shared.
        """
        with self._database.write() as session:
            conversation = self._row(session, ConversationRow, conversation_id, "conversation")
            if self._count(session, ShareRow) >= MOST_SHARES:
                raise InputError(f"{MOST_SHARES:,} conversations are shared, which is the most; revoke one first")
            shown = path_to(messages_of(session, conversation_id), conversation.leaf_id)
            said = [
                [one.role, "\n\n".join([*map(named, one.calls), one.content]), one.model]
                for one in shown
                if one.content.strip() or one.calls
            ]
            if not said:
                raise InputError("a conversation in which nothing was said can't be shared")
            row = ShareRow(
                id=secrets.token_urlsafe(24),
                user_id=self._owner,
                conversation_id=conversation_id,
                title=conversation.title,
                messages=json.dumps(said),
                created=self._clock(),
            )
            session.add(row)
            session.flush()
            return _share(row)

    def revoke(self, share_id: str) -> None:
        """Close a link for good."""
        with self._database.write() as session:
            session.delete(self._row(session, ShareRow, share_id, "share"))


def shared(database: Database, share_id: str) -> tuple[str, list[SharedMessage]]:
    """What everybody sees who has the link: the title and the messages, and nothing of whose they are.

    Raises
    ------
    NotFoundError
        If there is no such link, or there is none any more.
    """
    with database.read() as session:
        row = None if "\0" in share_id else session.get(ShareRow, share_id)
        if row is None:
            raise NotFoundError("there is no such link, or it was revoked")
        return row.title, [SharedMessage(*one) for one in json.loads(row.messages)]


def _share(row: ShareRow) -> Share:
    return Share(row.id, row.conversation_id, row.title, row.created)
