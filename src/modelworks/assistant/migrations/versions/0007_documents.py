"""Documents, their passages, and the full-text index of these."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_SQLITE = (
    # `unicode61` takes accents off, `porter` the endings of English words.
    "CREATE VIRTUAL TABLE passage_words USING fts5(heading, text, content='passages', content_rowid='id', "
    "tokenize='porter unicode61 remove_diacritics 2')",
    "CREATE TRIGGER passages_added AFTER INSERT ON passages BEGIN "
    "INSERT INTO passage_words(rowid, heading, text) VALUES (new.id, new.heading, new.text); END",
    "CREATE TRIGGER passages_removed AFTER DELETE ON passages BEGIN INSERT INTO "
    "passage_words(passage_words, rowid, heading, text) VALUES ('delete', old.id, old.heading, old.text); END",
)
_POSTGRESQL = (
    "CREATE TABLE passage_words (passage_id integer PRIMARY KEY REFERENCES passages(id) ON DELETE CASCADE, "
    "words tsvector NOT NULL)",
    "CREATE INDEX ix_passage_words ON passage_words USING gin (words)",
    "CREATE FUNCTION index_passage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "INSERT INTO passage_words VALUES (new.id, to_tsvector('english', new.heading || ' ' || new.text)); "
    "RETURN NULL; END $$",
    "CREATE TRIGGER passages_added AFTER INSERT ON passages FOR EACH ROW EXECUTE FUNCTION index_passage()",
)


def upgrade() -> None:
    """Make the tables, the index, and the triggers that keep it."""
    op.create_table(
        "documents",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("conversation_id", sa.String(32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("notice", sa.Text(), nullable=True),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("picture", sa.LargeBinary(), nullable=True),
        sa.Column("embedded_by", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_documents"),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversations.id"], name="fk_documents_conversation_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_documents_conversation", "documents", ["conversation_id"])
    op.create_table(
        "passages",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("document_id", sa.String(32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("heading", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("overlap", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_passages"),
        sa.ForeignKeyConstraint(["document_id"], ["documents.id"], name="fk_passages_document_id", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_passages_document", "passages", ["document_id", "number"])
    op.create_table(
        "sources",
        sa.Column("message_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("passage_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("message_id", "number", name="pk_sources"),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name="fk_sources_message_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["passage_id"], ["passages.id"], name="fk_sources_passage_id", ondelete="CASCADE"),
    )
    op.create_index("ix_sources_passage", "sources", ["passage_id"])
    for statement in _SQLITE if op.get_bind().dialect.name == "sqlite" else _POSTGRESQL:
        op.execute(statement)


def downgrade() -> None:
    """Drop them."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER passages_added")
        op.execute("DROP TRIGGER passages_removed")
        op.execute("DROP TABLE passage_words")
    else:
        op.execute("DROP TABLE passage_words")
        op.execute("DROP TRIGGER passages_added ON passages")
        op.execute("DROP FUNCTION index_passage")
    op.drop_table("sources")
    op.drop_table("passages")
    op.drop_table("documents")
