"""Live sources with their items and passages, the full-text index of these, and what answers were given of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_SQLITE = (
    "CREATE VIRTUAL TABLE live_words USING fts5(heading, text, content='live_passages', content_rowid='id', "
    "tokenize='porter unicode61 remove_diacritics 2')",
    "CREATE TRIGGER live_passages_added AFTER INSERT ON live_passages BEGIN "
    "INSERT INTO live_words(rowid, heading, text) VALUES (new.id, new.heading, new.text); END",
    "CREATE TRIGGER live_passages_removed AFTER DELETE ON live_passages BEGIN INSERT INTO "
    "live_words(live_words, rowid, heading, text) VALUES ('delete', old.id, old.heading, old.text); END",
)
_POSTGRESQL = (
    "CREATE TABLE live_words (passage_id integer PRIMARY KEY REFERENCES live_passages(id) ON DELETE CASCADE, "
    "words tsvector NOT NULL)",
    "CREATE INDEX ix_live_words ON live_words USING gin (words)",
    "CREATE FUNCTION index_live_passage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "INSERT INTO live_words VALUES (new.id, to_tsvector('english', new.heading || ' ' || new.text)); "
    "RETURN NULL; END $$",
    "CREATE TRIGGER live_passages_added AFTER INSERT ON live_passages "
    "FOR EACH ROW EXECUTE FUNCTION index_live_passage()",
)


def upgrade() -> None:
    """Make the tables, the index, and the triggers that keep it."""
    op.add_column("conversations", sa.Column("look_up", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_table(
        "live_sources",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("user_id", sa.String(32), nullable=True),
        sa.Column("shared", sa.Boolean(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("interval_s", sa.Float(), nullable=False),
        sa.Column("whole", sa.Boolean(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("next_at", sa.Float(), nullable=False),
        sa.Column("refreshed", sa.Float(), nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("etag", sa.Text(), nullable=True),
        sa.Column("modified", sa.Text(), nullable=True),
        sa.Column("holder", sa.String(32), nullable=True),
        sa.Column("held_until", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_live_sources"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_live_sources_user_id", ondelete="CASCADE"),
    )
    op.create_index("ix_live_sources_user_id", "live_sources", ["user_id"])
    op.create_index("ix_live_sources_next_at", "live_sources", ["next_at"])
    op.create_table(
        "live_items",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("source_id", sa.String(32), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("published", sa.Float(), nullable=True),
        sa.Column("fetched", sa.Float(), nullable=False),
        sa.Column("seen", sa.Float(), nullable=False),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("etag", sa.Text(), nullable=True),
        sa.Column("modified", sa.Text(), nullable=True),
        sa.Column("embedded_by", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_live_items"),
        sa.ForeignKeyConstraint(["source_id"], ["live_sources.id"], name="fk_live_items_source_id", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_live_items_key", "live_items", ["source_id", "key"], unique=True)
    op.create_table(
        "live_passages",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("item_id", sa.Integer(), nullable=False),
        sa.Column("source_id", sa.String(32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("heading", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("overlap", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_live_passages"),
        sa.ForeignKeyConstraint(["item_id"], ["live_items.id"], name="fk_live_passages_item_id", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_live_passages_item", "live_passages", ["item_id", "number"])
    op.create_index("ix_live_passages_source", "live_passages", ["source_id"])
    op.create_table(
        "citations",
        sa.Column("message_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("heading", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("published", sa.Float(), nullable=True),
        sa.Column("fetched", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("message_id", "number", name="pk_citations"),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name="fk_citations_message_id", ondelete="CASCADE"),
    )
    for statement in _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL:
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER live_passages_added")
        op.execute("DROP TRIGGER live_passages_removed")
        op.execute("DROP TABLE live_words")
    else:
        op.execute("DROP TABLE live_words")
        op.execute("DROP TRIGGER live_passages_added ON live_passages")
        op.execute("DROP FUNCTION index_live_passage")
    op.drop_table("citations")
    op.drop_table("live_passages")
    op.drop_table("live_items")
    op.drop_table("live_sources")
    op.drop_column("conversations", "look_up")
