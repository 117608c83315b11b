"""Takes conversations away with all that hangs on them."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, delete, select, update
from sqlalchemy.orm import Session

from modelworks.assistant.tables import ConversationRow, MessageRow


def remove_conversations(session: Session, which: ColumnElement[bool]) -> int:
    """Remove the conversations that a condition on `ConversationRow` names; how many they were.

    Messages are parted first: from parent to child SQLite would follow a thousand of them and no more.
    """
    gone = select(ConversationRow.id).where(which)
    session.execute(update(MessageRow).where(MessageRow.conversation_id.in_(gone)).values(parent_id=None))
    return cast("CursorResult[Any]", session.execute(delete(ConversationRow).where(which))).rowcount
