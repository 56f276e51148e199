"""What Alembic runs around the revisions: the connection and the transaction are the caller's."""

from __future__ import annotations

from alembic import context

from oodmon.store import tables
from oodmon.store.schema import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    version_table=VERSION_TABLE,
    # SQLite cannot alter a column: Alembic then copies the table.
    render_as_batch=True,
    # SQLite's DDL is transactional once its driver leaves transactions to us, as `database` does.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
