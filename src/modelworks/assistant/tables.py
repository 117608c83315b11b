"""The database's tables, as SQLAlchemy maps them; `migrations/` makes them.

Users have keys and belong to a tier and perhaps to a team. Each answered request is a row of `usage`: it is written
before the engine is asked, with what is set aside, and completed at the end; limits are sums over these rows.

A conversation's messages form a tree: each names its parent, so that an edited question or a second answer stands
beside the first as its sibling and nothing is lost. `leaf_id` says which branch is shown.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
)
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
            "uq": "uq_%(table_name)s_%(column_0_name)s",
        }
    )


class ConversationRow(Base):
    """One conversation."""

    __tablename__ = "conversations"
    __table_args__ = (Index("ix_conversations_updated", "updated"), Index("ix_conversations_user_id", "user_id"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(String(32))
    """Whose it is; none where there are no users. Removing a user removes it (`Accounts.remove_user`)."""
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


class TeamRow(Base):
    """A team: whose users' use is reported together."""

    __tablename__ = "teams"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created: Mapped[float] = mapped_column(Float)


class TierRow(Base):
    """A tier that the operator made or changed."""

    __tablename__ = "tiers"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    limits: Mapped[str] = mapped_column(Text)
    """Its limits as JSON."""


class UserRow(Base):
    """Somebody who may use the gateway."""

    __tablename__ = "users"
    __table_args__ = (Index("ix_users_subject", "issuer", "subject", unique=True),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    password: Mapped[str | None] = mapped_column(Text)
    """Argon2's own form of salt, parameters and hash; none if the user has keys alone."""
    tier: Mapped[str] = mapped_column(String(32))
    team_id: Mapped[str | None] = mapped_column(ForeignKey("teams.id", ondelete="SET NULL"))
    admin: Mapped[bool] = mapped_column(Boolean)
    disabled: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[float] = mapped_column(Float)
    issuer: Mapped[str | None] = mapped_column(Text)
    """The OpenID provider that the user signs in with; none if it is a password."""
    subject: Mapped[str | None] = mapped_column(Text)
    """What that provider calls the user, for good."""


class KeyRow(Base):
    """An API key, or a sign-in, which is a key that ends soon."""

    __tablename__ = "keys"
    __table_args__ = (Index("ix_keys_user_id", "user_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """The part of the key that is shown."""
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the part that isn't: it is 256 random bits, which nobody guesses, so that a slow hash adds nothing."""
    scopes: Mapped[str] = mapped_column(Text)
    """Separated by spaces."""
    created: Mapped[float] = mapped_column(Float)
    expires: Mapped[float | None] = mapped_column(Float)
    revoked: Mapped[float | None] = mapped_column(Float)
    last_used: Mapped[float | None] = mapped_column(Float)


class UsageRow(Base):
    """One request: what was set aside for it while it runs, what it has used when it has ended."""

    __tablename__ = "usage"
    __table_args__ = (
        Index("ix_usage_user_at", "user_id", "at"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    team_id: Mapped[str | None] = mapped_column(String(32))
    """The user's team at that time."""
    key_id: Mapped[str] = mapped_column(String(32))
    endpoint: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(Text)
    answers: Mapped[int] = mapped_column(Integer)
    open: Mapped[bool] = mapped_column(Boolean)
    alive: Mapped[float] = mapped_column(Float)
    """When the process that runs it last said so."""
    reserved_tokens: Mapped[int] = mapped_column(Integer)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    cached_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    status: Mapped[int] = mapped_column(Integer)
    first_s: Mapped[float | None] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)


class ResponseRow(Base):
    """A response that can be gone on from."""

    __tablename__ = "responses"
    __table_args__ = (Index("ix_responses_created", "created"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    created: Mapped[float] = mapped_column(Float)
    response: Mapped[str] = mapped_column(Text)
    items: Mapped[str] = mapped_column(Text)
    """All that it was made of, as JSON."""


class FileRow(Base):
    """A file that was sent to the API, or that a batch has made."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_user_id", "user_id", "created"), Index("ix_files_expires", "expires"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    name: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    size: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[float] = mapped_column(Float)
    expires: Mapped[float] = mapped_column(Float)
    content: Mapped[bytes] = mapped_column(LargeBinary)


class BatchRow(Base):
    """Requests that are answered when there is time."""

    __tablename__ = "batches"
    __table_args__ = (
        Index("ix_batches_user_id", "user_id", "created"),
        Index("ix_batches_state", "state", "created"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    key_id: Mapped[str | None] = mapped_column(String(32))
    endpoint: Mapped[str] = mapped_column(String(32))
    input_file: Mapped[str] = mapped_column(String(64))
    window_s: Mapped[float] = mapped_column(Float)
    created: Mapped[float] = mapped_column(Float)
    state: Mapped[str] = mapped_column(String(16))
    worker: Mapped[str | None] = mapped_column(String(32))
    """Who works on it."""
    alive: Mapped[float | None] = mapped_column(Float)
    """When the worker last said so."""
    begun: Mapped[float | None] = mapped_column(Float)
    asked_to_end: Mapped[float | None] = mapped_column(Float)
    ended: Mapped[float | None] = mapped_column(Float)
    total: Mapped[int] = mapped_column(Integer)
    completed: Mapped[int] = mapped_column(Integer)
    failed: Mapped[int] = mapped_column(Integer)
    details: Mapped[str] = mapped_column(Text)
    """Its metadata, as JSON."""
    errors: Mapped[str] = mapped_column(Text)
    """What is wrong with its file, as JSON."""
    output_file: Mapped[str | None] = mapped_column(String(64))
    error_file: Mapped[str | None] = mapped_column(String(64))


class ResultRow(Base):
    """What became of one line of a batch that has not ended."""

    __tablename__ = "batch_results"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    good: Mapped[bool] = mapped_column(Boolean)
    content: Mapped[str] = mapped_column(Text)


class AttemptRow(Base):
    """Attempts to come in that have failed, by who tried or from where."""

    __tablename__ = "attempts"

    subject: Mapped[str] = mapped_column(String(160), primary_key=True)
    failures: Mapped[int] = mapped_column(Integer)
    last: Mapped[float] = mapped_column(Float)


class AuditRow(Base):
    """What was done to accounts, by whom. Nothing secret is in it."""

    __tablename__ = "audit"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    actor: Mapped[str] = mapped_column(String(64))
    """A user's name, or ``command line``."""
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(Text)
