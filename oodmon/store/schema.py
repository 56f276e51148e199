"""Brings a database to the schema that this release knows, in one transaction.

Alembic runs from inside the package: users need no ``alembic.ini``. It is imported only when there
is something to upgrade, so that a daemon that restarts does not pay for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

from oodmon.errors import StoreError
from oodmon.store import tables
from oodmon.store.database import Database

__all__ = ["REVISIONS", "VERSION_TABLE", "upgrade", "views"]

REVISIONS: Final = ("0001",)
"""Every revision that this release knows, oldest first; the folder ``migrations/versions``."""

VERSION_TABLE: Final = "oodmon_schema"
"""Not Alembic's usual name: the database may be shared with an application that uses it."""

_LOCK: Final = 0x00DB0001
"""PostgreSQL advisory lock: one process upgrades, the others wait and find the work done."""


def upgrade(database: Database) -> None:
    """Upgrade to the last of `REVISIONS`; `StoreError` where the database is from the future."""
    with database.read() as connection:
        if _revision(connection) == REVISIONS[-1]:
            return
    with database.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        found = _revision(connection)
        if found == REVISIONS[-1]:
            return
        if found and found not in REVISIONS:
            raise StoreError(
                f"store {database}: its schema {found!r} is newer than this release of oodmon "
                f"knows (up to {REVISIONS[-1]!r}); install a newer oodmon, or name another database"
            )
        _drop_views(connection)
        _migrate(connection)
        for name, statement in views(connection.dialect.name).items():
            connection.execute(text(f"CREATE VIEW {name} AS {statement}"))


def _revision(connection: Connection) -> str:
    if not inspect(connection).has_table(VERSION_TABLE):
        return ""
    # A constant of this module, not anybody's input.
    found = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
    return str(found.scalar() or "")


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    # Alembic's options know %(…)s, so a percent sign in the path must be doubled.
    folder = str(Path(__file__).parent / "migrations").replace("%", "%%")
    config.set_main_option("script_location", folder)
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, REVISIONS[-1])


def _drop_views(connection: Connection) -> None:
    """Views hold no data and would stand in the way of a changed column: made anew each time."""
    there = set(inspect(connection).get_view_names())
    for name in reversed(views(connection.dialect.name)):
        if name in there:
            connection.execute(text(f"DROP VIEW {name}"))


def views(dialect: str) -> dict[str, str]:
    """View name → its SELECT: every table with nanoseconds, with readable timestamps beside them.

    ``x_ns`` gets a neighbour ``x``: ``timestamp with time zone`` in PostgreSQL, ISO 8601 text to
    the millisecond in SQLite; NULL where the nanoseconds are 0 (an alert that still fires).
    """
    found = {}
    for table in tables.metadata.sorted_tables:
        times = [column.name for column in table.columns if column.name.endswith("_ns")]
        if times:
            columns = ", ".join(
                ["t.*"] + [f"{_readable(name, dialect)} AS {name[:-3]}" for name in times]
            )
            found[f"{table.name}_view"] = f"SELECT {columns} FROM {table.name} t"  # noqa: S608
    found["dead_letters"] = "SELECT * FROM outbox_view WHERE status = 'dead'"
    return found


def _readable(column: str, dialect: str) -> str:
    if dialect == "postgresql":
        return f"to_timestamp(NULLIF(t.{column}, 0) / 1e9)"
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', NULLIF(t.{column}, 0) / 1e9, 'unixepoch')"
