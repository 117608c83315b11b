"""Folders, personas and shares; how a conversation is answered and where it stands; and the index of what was said."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from modelworks.assistant.search import index_all

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
_COLUMNS = ("mode", "temperature", "folder_id", "pinned", "title_by", "origin")


def upgrade() -> None:
    """Make the tables and columns, and index what is there."""
    for name, *columns in (
        ("folders", sa.Column("name", sa.Text(), nullable=False)),
        (
            "personas",
            sa.Column("name", sa.Text(), nullable=False),
            sa.Column("prompt", sa.Text(), nullable=False),
        ),
        (
            "shares",
            sa.Column("conversation_id", sa.String(32), nullable=False),
            sa.Column("title", sa.Text(), nullable=False),
            sa.Column("messages", sa.Text(), nullable=False),
            sa.ForeignKeyConstraint(
                ["conversation_id"], ["conversations.id"], name="fk_shares_conversation_id", ondelete="CASCADE"
            ),
        ),
    ):
        op.create_table(
            name,
            sa.Column("id", sa.String(64 if name == "shares" else 32), nullable=False),
            sa.Column("user_id", sa.String(32), nullable=True),
            *columns,
            sa.Column("created", sa.Float(), nullable=False),
            sa.PrimaryKeyConstraint("id", name=f"pk_{name}"),
            sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=f"fk_{name}_user_id", ondelete="CASCADE"),
        )
        op.create_index(f"ix_{name}_user_id", name, ["user_id"])
    op.create_index("ix_shares_conversation_id", "shares", ["conversation_id"])
    for column in (
        sa.Column("mode", sa.String(32), nullable=False, server_default="regular"),
        sa.Column("temperature", sa.Float(), nullable=True),
        sa.Column("folder_id", sa.String(32), nullable=True),
        sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("title_by", sa.String(16), nullable=False, server_default="line"),
        sa.Column("origin", sa.String(300), nullable=True),
    ):
        op.add_column("conversations", column)
    op.create_index("ix_conversations_origin", "conversations", ["user_id", "origin"], unique=True)
    op.create_index("ix_messages_parent", "messages", ["parent_id"])
    _make_index()
    index_all(op.get_bind())


def downgrade() -> None:
    """Drop them."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER said_deleted")
    op.execute("DROP TABLE said")
    op.drop_index("ix_messages_parent", "messages")
    op.drop_index("ix_conversations_origin", "conversations")
    for column in reversed(_COLUMNS):
        op.drop_column("conversations", column)
    for table in ("shares", "personas", "folders"):
        op.drop_table(table)


def _make_index() -> None:
    """The index of words: FTS5's own table, or a column of PostgreSQL's with a GIN index. Rows go with their messages.

    What is in it, `assistant.search` says.
    """
    if op.get_bind().dialect.name == "sqlite":
        op.execute("CREATE VIRTUAL TABLE said USING fts5(words, prefix='2 3', tokenize='unicode61')")
        op.execute(
            "CREATE TRIGGER said_deleted AFTER DELETE ON messages BEGIN DELETE FROM said WHERE rowid = old.id; END"
        )
    else:
        op.execute(
            "CREATE TABLE said ("
            "message_id integer PRIMARY KEY REFERENCES messages (id) ON DELETE CASCADE, words tsvector NOT NULL)"
        )
        op.execute("CREATE INDEX ix_said_words ON said USING gin (words)")
