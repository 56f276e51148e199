"""What became of every retraining request: what `triggers.guard` remembers over restarts."""

from __future__ import annotations

from sqlalchemy import select

from oodmon.store.database import Database
from oodmon.store.rows import clean, key
from oodmon.store.statements import insert_or_change
from oodmon.store.tables import trigger_firings

__all__ = ["Firings"]

_FIRED = "fired"


class Firings:
    """The trigger history of one pipeline; `Store` documents the calls."""

    def __init__(self, database: Database, pipeline: str) -> None:
        self._database = database
        self._pipeline = pipeline

    def fired(self, trigger_id: str, since_ns: int) -> list[int]:
        """When it fired since then, oldest first."""
        table = trigger_firings
        query = (
            select(table.c.at_ns)
            .where(
                table.c.pipeline == self._pipeline,
                table.c.trigger_id == key(trigger_id),
                table.c.outcome == _FIRED,
                table.c.at_ns >= since_ns,
            )
            .order_by(table.c.at_ns)
        )
        with self._database.read() as connection:
            return list(connection.execute(query).scalars())

    def has_fired(self, trigger_id: str, request_id: str) -> bool:
        """Whether it fired for this request."""
        table = trigger_firings
        query = select(table.c.at_ns).where(
            table.c.pipeline == self._pipeline,
            table.c.trigger_id == key(trigger_id),
            table.c.request_id == key(request_id),
            table.c.outcome == _FIRED,
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None

    def note(self, trigger_id: str, request_id: str, at_ns: int, outcome: str) -> None:
        """The first outcome stays, except that whatever came before, firing is remembered."""
        table = trigger_firings
        statement = insert_or_change(
            table,
            self._database.dialect,
            lambda new: {"at_ns": new.at_ns, "outcome": new.outcome},
            lambda new: (new.outcome == _FIRED) & (table.c.outcome != _FIRED),
        )
        row = {
            "pipeline": self._pipeline,
            "trigger_id": key(trigger_id),
            "request_id": key(request_id),
            "at_ns": at_ns,
            "outcome": clean(outcome),
        }
        with self._database.write() as connection:
            connection.execute(statement, row)
