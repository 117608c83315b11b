"""Whose a conversation is, and who a user is at an OpenID provider."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. What was there before there were owners belongs to nobody."""
    op.add_column("conversations", sa.Column("user_id", sa.String(32), nullable=True))
    op.create_index("ix_conversations_user_id", "conversations", ["user_id"])
    op.add_column("users", sa.Column("issuer", sa.Text(), nullable=True))
    op.add_column("users", sa.Column("subject", sa.Text(), nullable=True))
    op.create_index("ix_users_subject", "users", ["issuer", "subject"], unique=True)


def downgrade() -> None:
    """Drop them. In place: a table that is made anew would take its messages or keys with it."""
    op.drop_index("ix_users_subject", "users")
    op.drop_column("users", "subject")
    op.drop_column("users", "issuer")
    op.drop_index("ix_conversations_user_id", "conversations")
    op.drop_column("conversations", "user_id")
