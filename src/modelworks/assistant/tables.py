"""The database's tables, as SQLAlchemy maps them; `migrations/` makes them.

A conversation's messages form a tree: each names its parent, so that an edited question or a second answer stands
beside the first as its sibling and nothing is lost. `leaf_id` says which branch is shown.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Float, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

STATES = ("complete", "writing", "stopped", "failed", "interrupted")
"""What can be said of a message: whole; being written; stopped by the user; broken off by an error; cut short by the
end of the server."""
ROLES = ("system", "user", "assistant")


class Base(DeclarativeBase):
    """The tables' common ground: constraints are named, so that migrations can refer to them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class ConversationRow(Base):
    """One conversation."""

    __tablename__ = "conversations"
    __table_args__ = (Index("ix_conversations_updated", "updated"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    """The model that was chosen last."""
    leaf_id: Mapped[int | None] = mapped_column(Integer)
    """The last message of the branch that is shown."""
    created: Mapped[float] = mapped_column(Float)
    updated: Mapped[float] = mapped_column(Float)


class MessageRow(Base):
    """One message; `parent_id` is the one before it."""

    __tablename__ = "messages"
    __table_args__ = (
        Index("ix_messages_conversation", "conversation_id"),
        CheckConstraint(f"state IN {STATES}", name="state"),
        CheckConstraint(f"role IN {ROLES}", name="role"),
        # An id is never given twice, so that an answer to a deleted conversation can't be saved into another's.
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(String(16))
    content: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(Text)
    """The model that wrote it."""
    state: Mapped[str] = mapped_column(String(16))
    notice: Mapped[str | None] = mapped_column(Text)
    """What the reader should know: why it failed, or that older turns were left out."""
    created: Mapped[float] = mapped_column(Float)
    updated: Mapped[float] = mapped_column(Float)
