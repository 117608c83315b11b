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
    false,
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
    __table_args__ = (
        Index("ix_conversations_updated", "updated"),
        Index("ix_conversations_user_id", "user_id"),
        Index("ix_conversations_origin", "user_id", "origin", unique=True),
    )

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
    mode: Mapped[str] = mapped_column(String(32), server_default="regular")
    """``regular``, ``fun``, or a persona's id."""
    temperature: Mapped[float | None] = mapped_column(Float)
    """None is the server's own."""
    folder_id: Mapped[str | None] = mapped_column(String(32))
    """No foreign key, which SQLite could not drop again in place: `Folders.delete` takes it out."""
    pinned: Mapped[bool] = mapped_column(Boolean, server_default=false())
    title_by: Mapped[str] = mapped_column(String(16), server_default="line")
    """Who gave the title: ``line`` (its first line), ``model`` or ``person``."""
    origin: Mapped[str | None] = mapped_column(String(300))
    """What it was where it was imported from; the same is not imported twice."""
    look_up: Mapped[bool] = mapped_column(Boolean, server_default=false())
    """Whether answers are looked up in the owner's sources."""


class MessageRow(Base):
    """One message; `parent_id` is the one before it."""

    __tablename__ = "messages"
    __table_args__ = (
        Index("ix_messages_conversation", "conversation_id"),
        Index("ix_messages_parent", "parent_id"),
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


class FolderRow(Base):
    """A folder of conversations."""

    __tablename__ = "folders"
    __table_args__ = (Index("ix_folders_user_id", "user_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    name: Mapped[str] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float)


class PersonaRow(Base):
    """A way to answer that somebody has written."""

    __tablename__ = "personas"
    __table_args__ = (Index("ix_personas_user_id", "user_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    name: Mapped[str] = mapped_column(Text)
    prompt: Mapped[str] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float)


class ShareRow(Base):
    """A branch of a conversation as it was, for everybody who has its id."""

    __tablename__ = "shares"
    __table_args__ = (Index("ix_shares_user_id", "user_id"), Index("ix_shares_conversation_id", "conversation_id"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    title: Mapped[str] = mapped_column(Text)
    messages: Mapped[str] = mapped_column(Text)
    """The branch, as JSON."""
    created: Mapped[float] = mapped_column(Float)


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


class DocumentRow(Base):
    """A document or an image that was dropped into a conversation."""

    __tablename__ = "documents"
    __table_args__ = (Index("ix_documents_conversation", "conversation_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    """Whose conversation it is, of that one is the document."""
    name: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(String(16))
    """What it is by its content; empty until that is known."""
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes of the file."""
    state: Mapped[str] = mapped_column(String(16))
    """``reading``, ``ready`` or ``failed``."""
    notice: Mapped[str | None] = mapped_column(Text)
    """How it was read, or why it could not be."""
    created: Mapped[float] = mapped_column(Float)
    picture: Mapped[bytes | None] = mapped_column(LargeBinary)
    """An image as a model takes it, a JPEG."""
    embedded_by: Mapped[str | None] = mapped_column(Text)
    """The model that made its passages' vectors."""


class PassageRow(Base):
    """A passage of a document. Its words are in the full-text index ``passage_words``, which migrations make."""

    __tablename__ = "passages"
    __table_args__ = (Index("ix_passages_document", "document_id", "number"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    document_id: Mapped[str] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    place: Mapped[str] = mapped_column(Text)
    heading: Mapped[str] = mapped_column(Text)
    text: Mapped[str] = mapped_column(Text)
    overlap: Mapped[int] = mapped_column(Integer)
    """Characters that it repeats of the one before it."""
    vector: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Numbers of 32 bits, of unit length."""


class SourceRow(Base):
    """A passage that an answer was given, and the number under which it may name it."""

    __tablename__ = "sources"
    __table_args__ = (Index("ix_sources_passage", "passage_id"),)

    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    passage_id: Mapped[int] = mapped_column(ForeignKey("passages.id", ondelete="CASCADE"))


class LiveSourceRow(Base):
    """A source that refreshes itself; with who refreshes it now, and how it went."""

    __tablename__ = "live_sources"
    __table_args__ = (Index("ix_live_sources_user_id", "user_id"), Index("ix_live_sources_next_at", "next_at"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    """None where there are no accounts."""
    shared: Mapped[bool] = mapped_column(Boolean)
    """Whether it is everybody's, as an administrator made it."""
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(Text)
    address: Mapped[str] = mapped_column(Text)
    """An address, a folder, a search of X, or the name of a search engine."""
    interval_s: Mapped[float] = mapped_column(Float)
    whole: Mapped[bool] = mapped_column(Boolean)
    """Whether a feed's pages are read, or its own words alone."""
    paused: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[float] = mapped_column(Float)
    next_at: Mapped[float] = mapped_column(Float)
    refreshed: Mapped[float | None] = mapped_column(Float)
    """When it was last refreshed without an error."""
    failures: Mapped[int] = mapped_column(Integer)
    """In a row."""
    error: Mapped[str | None] = mapped_column(Text)
    etag: Mapped[str | None] = mapped_column(Text)
    modified: Mapped[str | None] = mapped_column(Text)
    holder: Mapped[str | None] = mapped_column(String(32))
    """Who refreshes it."""
    held_until: Mapped[float | None] = mapped_column(Float)


class LiveItemRow(Base):
    """An entry of a feed, a page of a site, a file of a folder, a post."""

    __tablename__ = "live_items"
    __table_args__ = (
        Index("ix_live_items_key", "source_id", "key", unique=True),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    source_id: Mapped[str] = mapped_column(ForeignKey("live_sources.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(64))
    """What its source calls it, as a hash."""
    address: Mapped[str] = mapped_column(Text)
    title: Mapped[str] = mapped_column(Text)
    published: Mapped[float | None] = mapped_column(Float)
    fetched: Mapped[float] = mapped_column(Float)
    """When it was last read."""
    seen: Mapped[float] = mapped_column(Float)
    """When its source last listed it."""
    version: Mapped[str | None] = mapped_column(Text)
    """What its source says of its state; if that is the same, it isn't read again."""
    etag: Mapped[str | None] = mapped_column(Text)
    modified: Mapped[str | None] = mapped_column(Text)
    embedded_by: Mapped[str | None] = mapped_column(Text)


class LivePassageRow(Base):
    """A passage of an item. Its words are in the full-text index ``live_words``, which migrations make."""

    __tablename__ = "live_passages"
    __table_args__ = (
        Index("ix_live_passages_item", "item_id", "number"),
        Index("ix_live_passages_source", "source_id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("live_items.id", ondelete="CASCADE"))
    source_id: Mapped[str] = mapped_column(String(32))
    number: Mapped[int] = mapped_column(Integer)
    place: Mapped[str] = mapped_column(Text)
    heading: Mapped[str] = mapped_column(Text)
    text: Mapped[str] = mapped_column(Text)
    overlap: Mapped[int] = mapped_column(Integer)
    vector: Mapped[bytes | None] = mapped_column(LargeBinary)


class CitationRow(Base):
    """What an answer was given of a source, as it was then: the item may be another tomorrow, or gone."""

    __tablename__ = "citations"

    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    document: Mapped[str] = mapped_column(Text)
    """The source's name and the item's title."""
    place: Mapped[str] = mapped_column(Text)
    heading: Mapped[str] = mapped_column(Text)
    text: Mapped[str] = mapped_column(Text)
    address: Mapped[str] = mapped_column(Text)
    published: Mapped[float | None] = mapped_column(Float)
    fetched: Mapped[float] = mapped_column(Float)


class ToolCallRow(Base):
    """A tool that an answer has asked for, and what it gave."""

    __tablename__ = "tool_calls"

    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    position: Mapped[int] = mapped_column(Integer)
    """Where in the answer's text it was asked for, in characters."""
    call_id: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    arguments: Mapped[str] = mapped_column(Text)
    """As the model wrote them."""
    state: Mapped[str] = mapped_column(String(16))
    """See `assistant.calls.CallState`."""
    result: Mapped[str] = mapped_column(Text)
    seconds: Mapped[float | None] = mapped_column(Float)


class ConversationToolsRow(Base):
    """The tools of a conversation; one that has no row has none."""

    __tablename__ = "conversation_tools"

    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True)
    turned_on: Mapped[str] = mapped_column(Text)
    """Their names, as JSON."""
    always: Mapped[str] = mapped_column(Text)
    """The names of those that may be called without asking, as JSON."""


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
