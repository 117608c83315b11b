"""Calls of tools, and which tools a conversation has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "tool_calls",
        sa.Column("message_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("call_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("arguments", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("message_id", "number", name="pk_tool_calls"),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name="fk_tool_calls_message_id", ondelete="CASCADE"),
    )
    op.create_table(
        "conversation_tools",
        sa.Column("conversation_id", sa.String(32), nullable=False),
        sa.Column("turned_on", sa.Text(), nullable=False),
        sa.Column("always", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("conversation_id", name="pk_conversation_tools"),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name="fk_conversation_tools_conversation_id",
            ondelete="CASCADE",
        ),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("conversation_tools")
    op.drop_table("tool_calls")
