"""How far each partition of the feed, and of topics of labels, was read.

The positions of labels lie in the same table, under a prefix: they are none of the feed's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from sqlalchemy import Connection, delete, select

from oodmon.store.database import Database
from oodmon.store.statements import insert_or_change
from oodmon.store.tables import positions

__all__ = ["LABELS", "forget", "read", "write"]

LABELS: Final = "labels:"
"""Before the names of partitions that hold labels."""

_AT_ONCE: Final = 500
"""Names in one IN list."""


def read(connection: Connection, pipeline: str, prefix: str = "") -> dict[str, str]:
    """Partition → position: those of the feed, or those with the prefix, named without it."""
    table = positions
    query = select(table.c.partition, table.c.position).where(table.c.pipeline == pipeline)
    return {
        row.partition.removeprefix(prefix): row.position
        for row in connection.execute(query)
        if row.partition.startswith(prefix or LABELS) == bool(prefix)
    }


def write(
    connection: Connection, pipeline: str, reached: Mapping[str, str], prefix: str = ""
) -> None:
    """Partition → position, in the caller's transaction."""
    if reached:
        dialect = connection.dialect.name
        connection.execute(
            insert_or_change(positions, dialect, lambda new: {"position": new.position}),
            [
                {"pipeline": pipeline, "partition": prefix + name, "position": position}
                for name, position in reached.items()
            ],
        )


def forget(database: Database, pipeline: str, there: Collection[str]) -> int:
    """Delete the positions of the feed's partitions that are not among these; how many."""
    with database.read() as connection:
        gone = sorted(read(connection, pipeline).keys() - set(there))
    for start in range(0, len(gone), _AT_ONCE):
        named = positions.c.partition.in_(gone[start : start + _AT_ONCE])
        with database.write() as connection:
            connection.execute(delete(positions).where(positions.c.pipeline == pipeline, named))
    return len(gone)
