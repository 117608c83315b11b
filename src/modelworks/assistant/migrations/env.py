"""How Alembic reaches the database: over the connection that `assistant.database` hands it."""

from alembic import context

from modelworks.assistant.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
context.run_migrations()
