"""INSERT … ON CONFLICT for both dialects: what makes a replay change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Connection, Dialect, Table, cast, extract, func
from sqlalchemy import literal_column as sql
from sqlalchemy.dialects import postgresql, sqlite

__all__ = ["add_new", "insert_new", "insert_or_change", "now_ns"]

_UNIX_EPOCH_DAYS: Final = 2_440_587.5  # Julian day of 1970-01-01

_Insert = sqlite.Insert | postgresql.Insert


@lru_cache(maxsize=64)
def insert_new(table: Table, dialect: str) -> _Insert:
    """Rows whose key is there already are skipped."""
    return _insert(table, dialect).on_conflict_do_nothing()


def add_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert many rows of one set of columns; those whose key is there already are skipped.

    Their values are plain (texts, numbers, booleans), so the driver takes them as they are: a
    parameter set that SQLAlchemy makes of a row costs as much as the row.
    """
    text, names = _compiled(table, connection.dialect, tuple(rows[0]))
    if names is None:
        connection.exec_driver_sql(text, [dict(row) for row in rows])
    else:
        connection.exec_driver_sql(text, list(map(itemgetter(*names), rows)))


@lru_cache(maxsize=64)
def _compiled(
    table: Table, dialect: Dialect, columns: tuple[str, ...]
) -> tuple[str, tuple[str, ...] | None]:
    """The statement in the driver's words, and the order of its values; none where by name."""
    made = insert_new(table, dialect.name).compile(dialect=dialect, column_keys=columns)
    order = made.positiontup
    return str(made), None if order is None else tuple(order)


def insert_or_change(
    table: Table,
    dialect: str,
    values: Callable[[Any], Mapping[str, Any]],
    where: Callable[[Any], ColumnElement[bool]] | None = None,
) -> _Insert:
    """Rows whose key is there already are changed.

    Args:
        table: where.
        dialect: ``sqlite`` or ``postgresql``.
        values: the columns of the row that was offered → column name and new value.
        where: the same → which rows are changed; none: all.
    """
    statement = _insert(table, dialect)
    return statement.on_conflict_do_update(
        index_elements=list(table.primary_key.columns),
        set_=dict(values(statement.excluded)),
        where=None if where is None else where(statement.excluded),
    )


def now_ns(dialect: str) -> ColumnElement[int]:
    """The database's clock, ns UTC: to the millisecond in SQLite, the microsecond in PostgreSQL."""
    if dialect == "sqlite":
        return cast((func.julianday("now") - _UNIX_EPOCH_DAYS) * sql("86400e9"), BigInteger)
    return cast(extract("epoch", func.clock_timestamp()) * sql("1e9"), BigInteger)


def _insert(table: Table, dialect: str) -> _Insert:
    # Two classes with the same calls and no base in common that has them.
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
