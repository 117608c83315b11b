"""Every call of a tool, kept with the answer that asked for it; and which tools a conversation has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from modelworks.assistant.calls import Call, call_of
from modelworks.assistant.database import Database
from modelworks.assistant.tables import ConversationToolsRow, ToolCallRow
from modelworks.spec.errors import InputError


@dataclass(frozen=True)
class Chosen:
    """The tools that a conversation has, and those that may be called there without asking."""

    on: tuple[str, ...] = ()
    always: tuple[str, ...] = ()


class ToolStore:
    """Calls and choices of one database. Whose conversation it is, the caller has made sure of."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def chosen(self, conversation_id: str) -> Chosen:
        """Which tools a conversation has; none until they are chosen."""
        with self._database.read() as session:
            row = session.get(ConversationToolsRow, conversation_id)
            return Chosen(tuple(json.loads(row.turned_on)), tuple(json.loads(row.always))) if row else Chosen()

    def turn_on(self, conversation_id: str, names: Sequence[str]) -> None:
        """Give a conversation these tools and no others; whoever asks does so again from here on."""
        with self._database.write() as session:
            row = self._row(session, conversation_id)
            row.turned_on, row.always = json.dumps(list(dict.fromkeys(names))), "[]"

    def always(self, conversation_id: str, name: str) -> None:
        """Call a tool in a conversation without asking from here on."""
        with self._database.write() as session:
            row = self._row(session, conversation_id)
            row.always = json.dumps(list(dict.fromkeys([*json.loads(row.always), name])))

    def calls(self, message_id: int) -> list[Call]:
        """The calls of an answer, in their order."""
        query = select(ToolCallRow).where(ToolCallRow.message_id == message_id).order_by(ToolCallRow.number)
        with self._database.read() as session:
            return [call_of(row) for row in session.scalars(query)]

    def keep(self, message_id: int, call: Call) -> None:
        """Store what a call has become."""
        with self._database.write() as session:
            row = session.get(ToolCallRow, (message_id, call.number))
            if row is None:
                row = ToolCallRow(message_id=message_id, number=call.number)
                session.add(row)
            row.position, row.call_id, row.name, row.arguments = call.position, call.call_id, call.name, call.arguments
            row.state, row.result, row.seconds = call.state, call.result, call.seconds

    def decide(self, message_id: int, number: int, allowed: bool) -> None:
        """Answer a call that an earlier server left waiting.

        Raises
        ------
        InputError
            If it doesn't wait.
        """
        with self._database.write() as session:
            row = session.get(ToolCallRow, (message_id, number))
            if row is None or row.state != "waiting":
                raise InputError(f"the call {number} doesn't wait for an answer")
            row.state = "allowed" if allowed else "refused"

    def _row(self, session: Session, conversation_id: str) -> ConversationToolsRow:
        row = session.get(ConversationToolsRow, conversation_id)
        if row is None:
            row = ConversationToolsRow(conversation_id=conversation_id, turned_on="[]", always="[]")
            session.add(row)
        return row
