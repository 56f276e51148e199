"""Questions to the tables of one pipeline, answered with plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

from sqlalchemy import ColumnElement, Table, select

from oodmon.errors import ContractError
from oodmon.store import tables
from oodmon.store.database import Database
from oodmon.store.rows import decode

__all__ = ["Asked", "Queries"]


class Asked(TypedDict, total=False):
    """What a question may ask for; None and 0 ask for nothing.

    A name that the table does not have as a column is a `ContractError`.
    """

    model: str | None
    version: str | None
    segment: str | None
    detector: str | None
    test: str | None
    drifted: bool | None
    rule: str | None
    severity: str | None
    status: str | None
    fingerprint: str | None
    source: str | None
    sample_id: str | None
    trigger_id: str | None
    outcome: str | None
    since_ns: int
    until_ns: int
    limit: int
    newest_first: bool


_BOUNDS: Final = ("since_ns", "until_ns", "limit", "newest_first")


class Queries:
    """Reads one pipeline's rows; `Store` documents the calls."""

    def __init__(self, database: Database, pipeline: str) -> None:
        self._database = database
        self._pipeline = pipeline

    def timed(
        self, table: Table, asked: Mapping[str, Any], first: Sequence[Any] = ()
    ) -> list[dict[str, Any]]:
        """Rows with ``since_ns <= time < until_ns``, in the order `first`, then by time and key."""
        time = tables.TIME_OF[table]
        where = [table.c.pipeline == self._pipeline]
        for name, value in asked.items():
            if name in _BOUNDS or value is None:
                continue
            if name not in table.c:
                known = ", ".join(column.name for column in table.c if column.name != "pipeline")
                raise ContractError(f"{table.name} has no column {name!r}; it has: {known}")
            where.append(table.c[name] == value)
        if asked.get("since_ns"):
            where.append(time >= asked["since_ns"])
        if asked.get("until_ns"):
            where.append(time < asked["until_ns"])
        order: list[ColumnElement[Any]] = [time]
        order += [column for column in table.primary_key if column is not time]
        if asked.get("newest_first"):
            order = [column.desc() for column in order]
        return self._rows(table, where, [*first, *order], asked.get("limit", 0))

    def all(self, table: Table) -> list[dict[str, Any]]:
        """Every row, by key."""
        return self._rows(
            table, [table.c.pipeline == self._pipeline], list(table.primary_key.columns), 0
        )

    def _rows(
        self, table: Table, where: list[ColumnElement[bool]], order: list[Any], limit: int
    ) -> list[dict[str, Any]]:
        query = select(table).where(*where).order_by(*order).limit(limit or None)
        with self._database.read() as connection:
            return decode([row._asdict() for row in connection.execute(query)])
