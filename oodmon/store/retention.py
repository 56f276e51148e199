"""Deletes what is older than a person wants to keep, in small transactions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Table, delete, select, tuple_

from oodmon.errors import ContractError
from oodmon.store import tables
from oodmon.store.database import Database

__all__ = ["KINDS", "prune"]

_CHUNK_ROWS: Final = 5_000
"""Rows deleted in one transaction: some tens of milliseconds, so that the daemon's appends wait
no longer than that for SQLite's one write lock."""

KINDS: Final = (
    "windows",
    "drift_results",
    "alerts",
    "flagged_samples",
    "notices",
    "outbox",
    "dead_letters",
    "trigger_firings",
)
"""What can be pruned. ``outbox`` is what was settled; ``alerts`` is episodes that have ended."""


def prune(
    database: Database, pipeline: str, before_ns: int, kinds: Sequence[str] = KINDS
) -> dict[str, int]:
    """Delete what is older than `before_ns`; kind → rows deleted."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ContractError(f"prune: unknown {', '.join(unknown)}; known: {', '.join(KINDS)}")
    return {kind: _prune(database, *_target(kind, pipeline, before_ns)) for kind in kinds}


def _target(kind: str, pipeline: str, before_ns: int) -> tuple[Table, list[ColumnElement[bool]]]:
    outbox, alerts = tables.outbox, tables.alerts
    if kind in ("outbox", "dead_letters"):
        status = "settled" if kind == "outbox" else "dead"
        where = [outbox.c.status == status, outbox.c.time_ns < before_ns]
        return outbox, [outbox.c.pipeline == pipeline, *where]
    if kind == "alerts":
        where = [alerts.c.status == "resolved", alerts.c.ended_at_ns < before_ns]
        return alerts, [alerts.c.pipeline == pipeline, *where]
    table = tables.metadata.tables[kind]
    return table, [table.c.pipeline == pipeline, tables.TIME_OF[table] < before_ns]


def _prune(database: Database, table: Table, where: list[ColumnElement[bool]]) -> int:
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
        if count < _CHUNK_ROWS:
            return deleted
