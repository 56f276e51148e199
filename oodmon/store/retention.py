"""Deletes what is older than a person wants to keep, in small transactions, and tells sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Table, delete, func, select, text, tuple_

from oodmon.errors import ContractError
from oodmon.store import tables
from oodmon.store.database import Database

__all__ = ["KINDS", "extent", "give_back_space", "prune", "size_bytes"]

_CHUNK_ROWS: Final = 5_000
"""Rows deleted in one transaction: some tens of milliseconds, so that the daemon's appends wait
no longer than that for SQLite's one write lock."""

_PAGES_AT_ONCE: Final = 500
"""Pages given back in one transaction; 2 MB."""

_SPARE_PAGES: Final = 256
"""Free pages that SQLite keeps for the next rows; 1 MB."""

KINDS: Final = (
    "windows",
    "drift_results",
    "alerts",
    "flagged_samples",
    "notices",
    "outbox",
    "dead_letters",
    "trigger_firings",
    "agents",
    "predictions",
    "labels",
)
"""What can be pruned. ``outbox`` is what was settled; ``alerts`` is episodes that have ended;
``labels`` is those that no prediction was found for."""


def prune(
    database: Database,
    pipeline: str,
    before_ns: int,
    kinds: Sequence[str] = KINDS,
    ended: Callable[[], bool] = bool,
) -> dict[str, int]:
    """Delete what is older than `before_ns`; kind → rows deleted. `ended`: stop in between."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ContractError(f"prune: unknown {', '.join(unknown)}; known: {', '.join(KINDS)}")
    return {kind: _prune(database, *_target(kind, pipeline, before_ns), ended) for kind in kinds}


def _target(kind: str, pipeline: str, before_ns: int) -> tuple[Table, list[ColumnElement[bool]]]:
    outbox, alerts = tables.outbox, tables.alerts
    if kind in ("outbox", "dead_letters"):
        status = "settled" if kind == "outbox" else "dead"
        where = [outbox.c.status == status, outbox.c.time_ns < before_ns]
        return outbox, [outbox.c.pipeline == pipeline, *where]
    if kind == "alerts":
        where = [alerts.c.status == "resolved", alerts.c.ended_at_ns < before_ns]
        return alerts, [alerts.c.pipeline == pipeline, *where]
    if kind == "agents":
        agents = tables.agents
        return agents, [agents.c.pipeline == pipeline, agents.c.observed_at_ns < before_ns]
    if kind == "labels":
        # One that nobody has looked at has no time yet.
        seen = tables.labels.c.seen_ns
        return tables.labels, [tables.labels.c.pipeline == pipeline, seen > 0, seen < before_ns]
    table = tables.metadata.tables[kind]
    return table, [table.c.pipeline == pipeline, tables.TIME_OF[table] < before_ns]


def _prune(
    database: Database, table: Table, where: list[ColumnElement[bool]], ended: Callable[[], bool]
) -> int:
    key: tuple[Any, ...] = tuple(table.primary_key.columns)
    some = select(*key).where(*where).limit(_CHUNK_ROWS)
    # One column stands for itself; a tuple of one is not SQL that both dialects take.
    place = tuple_(*key) if len(key) > 1 else key[0]
    statement = delete(table).where(place.in_(some))
    deleted = 0
    while True:
        with database.write() as connection:
            count = connection.execute(statement).rowcount
        deleted += count
        if count < _CHUNK_ROWS or ended():
            return deleted


def extent(database: Database, pipeline: str) -> tuple[int, int]:
    """Start of the oldest and of the newest window, ns UTC; zeros where there is none."""
    start = tables.windows.c.window_start_ns
    mine = tables.windows.c.pipeline == pipeline
    with database.read() as connection:
        # Two questions: each then is one look into the index.
        oldest = connection.execute(select(func.min(start)).where(mine)).scalar()
        newest = connection.execute(select(func.max(start)).where(mine)).scalar()
    return oldest or 0, newest or 0


def size_bytes(database: Database, *, live: bool) -> int:
    """What the database (SQLite) or our tables with their indexes (PostgreSQL) take on disk.

    `live`: without pages that are free to be used again.
    """
    with database.read() as connection:
        if database.dialect == "sqlite":
            pages, free, page = (
                int(connection.exec_driver_sql(f"PRAGMA {name}").scalar() or 0)
                for name in ("page_count", "freelist_count", "page_size")
            )
            return (pages - free * live) * page + (0 if live else database.log_bytes())
        total = text(
            "SELECT coalesce(sum(pg_total_relation_size(to_regclass(name))), 0) "
            "FROM unnest(CAST(:names AS text[])) AS name"
        )
        names = [table.name for table in tables.metadata.sorted_tables]
        return int(connection.execute(total, {"names": names}).scalar() or 0)


def give_back_space(database: Database, ended: Callable[[], bool] = bool) -> None:
    """Hand free pages of a SQLite file back to the file system; PostgreSQL has its autovacuum."""
    if database.dialect != "sqlite":
        return
    while not ended():
        with database.write() as connection:
            free = int(connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0)
            if free <= _SPARE_PAGES:
                return
            step = min(free - _SPARE_PAGES, _PAGES_AT_ONCE)
            # The driver itself: the statement has to be run to its end, a step per page, and has
            # no columns to ask SQLAlchemy for.
            cursor = connection.connection.cursor()
            cursor.execute(f"PRAGMA incremental_vacuum({step})")
            cursor.fetchall()
            cursor.close()
            if connection.exec_driver_sql("PRAGMA freelist_count").scalar() == free:
                return  # not a file of ours: only VACUUM shrinks it
