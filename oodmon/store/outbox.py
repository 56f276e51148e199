"""Events on their way to sinks and triggers: queued once, delivered at least once, in order.

A row is ``pending`` until its receiver took it (``settled``) or never will (``dead``). Settled rows
stay until they are pruned: they are how a replay knows that an event was queued before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    Connection,
    LargeBinary,
    Row,
    and_,
    bindparam,
    case,
    cast,
    func,
    or_,
    select,
    update,
)

from oodmon.records import Event
from oodmon.store import rows, statements
from oodmon.store.database import Database
from oodmon.store.statements import insert_new
from oodmon.store.tables import outbox

__all__ = ["Depth", "Outbox", "OutboxRow"]

_AT_ONCE: Final = 500
"""Numbers in one IN list; SQLite takes 32,766 variables in a statement."""

_TRIES: Final = ("attempts", "not_before_ns", "first_failed_ns", "last_failed_ns")

_LONGEST_WAIT_NS: Final = 2 * 3600 * 1_000_000_000
"""Delivery puts nothing off for longer: a time beyond was written by a clock that was wrong."""

_ERROR_CHARS: Final = 2000
"""What is kept of a receiver's last words."""


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One event on its way to one receiver.

    Attributes:
        seq: place in the queue; grows, with gaps.
        event: what to deliver.
        attempts: failed deliveries so far.
        error: what the last one failed with, "" before.
        first_failed_ns, last_failed_ns: when, by the database's clock; 0 before.
    """

    seq: int
    event: Event
    attempts: int
    error: str = ""
    first_failed_ns: int = 0
    last_failed_ns: int = 0


@dataclass(frozen=True, slots=True)
class Depth:
    """How far a receiver is behind.

    Attributes:
        pending, dead: rows.
        oldest_ns: event time of the oldest pending row, 0 if there is none.
    """

    pending: int
    dead: int
    oldest_ns: int


class Outbox:
    """The outbox of one pipeline; `Store` documents the calls."""

    def __init__(self, database: Database, pipeline: str) -> None:
        self._database = database
        self._pipeline = pipeline

    def add(self, connection: Connection, queued: Sequence[tuple[str, Event]]) -> None:
        """Queue (receiver, event) pairs within the caller's transaction; known ones are skipped."""
        found = [
            {**rows.outbox_row(receiver, event), "pipeline": self._pipeline}
            for receiver, event in queued
        ]
        if found:
            connection.execute(insert_new(outbox, self._database.dialect), found)

    def emit(self, queued: Sequence[tuple[str, Event]]) -> None:
        """Queue in a transaction of its own."""
        if queued:
            with self._database.write() as connection:
                self.add(connection, queued)

    def pending(self, receiver: str, now_ns: int, limit: int) -> list[OutboxRow]:
        """What may be delivered now, in order, never past a deferred row of the same subject."""
        waiting = and_(*self._at(receiver, "pending"))
        blocked = (
            select(outbox.c.subject, func.min(outbox.c.seq).label("seq"))
            .where(
                waiting,
                outbox.c.not_before_ns > now_ns,
                outbox.c.not_before_ns <= now_ns + _LONGEST_WAIT_NS,
            )
            .group_by(outbox.c.subject)
            .cte("blocked")
        )
        query = (
            select(outbox)
            .outerjoin(blocked, blocked.c.subject == outbox.c.subject)
            .where(waiting, or_(blocked.c.seq.is_(None), outbox.c.seq < blocked.c.seq))
            .order_by(outbox.c.seq)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [_row(found) for found in connection.execute(query)]

    def settle(self, receiver: str, seqs: Sequence[int]) -> None:
        """These were taken; what is already settled stays so."""
        self._change(receiver, seqs, "pending", {"status": "settled", "error": ""})

    def defer(self, receiver: str, seqs: Sequence[int], not_before_ns: int, error: str) -> None:
        """These failed: not again before that time."""
        values = {
            "attempts": outbox.c.attempts + 1,
            "not_before_ns": not_before_ns,
            **self._failed(error),
        }
        self._change(receiver, seqs, "pending", values)

    def bury(self, receiver: str, seqs: Sequence[int], error: str) -> None:
        """These will never be taken: dead letters."""
        values = {
            "status": "dead",
            "attempts": outbox.c.attempts + 1,
            **self._failed(error),
        }
        self._change(receiver, seqs, "pending", values)

    def revive(self, receiver: str, seqs: Sequence[int]) -> int:
        """Dead letters that are pending again, as if never tried."""
        values = {"status": "pending", "error": ""} | dict.fromkeys(_TRIES, 0)
        return self._change(receiver, seqs, "dead", values)

    def dead(self, receiver: str, limit: int, after: int) -> list[OutboxRow]:
        """The dead letters of a receiver behind this number, in order; 0 is no limit."""
        wanted = (*self._at(receiver, "dead"), outbox.c.seq > after)
        query = select(outbox).where(*wanted).order_by(outbox.c.seq)
        with self._database.read() as connection:
            return [_row(found) for found in connection.execute(query.limit(limit or None))]

    def depths(self) -> dict[str, Depth]:
        """Receiver → how far it is behind; receivers with nothing pending or dead are left out."""
        query = (
            select(
                outbox.c.receiver,
                outbox.c.status,
                func.count().label("rows"),
                func.min(outbox.c.time_ns).label("oldest"),
            )
            .where(
                outbox.c.pipeline == self._pipeline,
                outbox.c.status.in_(("pending", "dead")),
            )
            .group_by(outbox.c.receiver, outbox.c.status)
        )
        counted: dict[str, dict[str, tuple[int, int]]] = {}
        with self._database.read() as connection:
            for receiver, status, count, oldest in connection.execute(query):
                counted.setdefault(receiver, {})[status] = (count, oldest)
        nothing = (0, 0)
        return {
            receiver: Depth(
                pending=found.get("pending", nothing)[0],
                dead=found.get("dead", nothing)[0],
                oldest_ns=found.get("pending", nothing)[1],
            )
            for receiver, found in sorted(counted.items())
        }

    def letter_bytes(self) -> dict[str, tuple[int, int]]:
        """Receiver → bytes of what waits and of what is dead; indexes and settled rows apart."""
        sqlite = self._database.dialect == "sqlite"
        data = cast(outbox.c.data, LargeBinary) if sqlite else outbox.c.data
        size = func.length(data) if sqlite else func.octet_length(data)
        query = (
            select(outbox.c.receiver, outbox.c.status, func.sum(size))
            .where(outbox.c.pipeline == self._pipeline, outbox.c.status.in_(("pending", "dead")))
            .group_by(outbox.c.receiver, outbox.c.status)
        )
        found: dict[str, tuple[int, int]] = {}
        with self._database.read() as connection:
            for receiver, status, total in connection.execute(query):
                waits, dead = found.get(receiver, (0, 0))
                is_dead = status == "dead"
                found[receiver] = (waits, int(total)) if is_dead else (int(total), dead)
        return found

    def _failed(self, error: str) -> dict[str, Any]:
        now = statements.now_ns(self._database.dialect)
        first = outbox.c.first_failed_ns
        return {
            "error": _last_words(error),
            "first_failed_ns": case((first == 0, now), else_=first),
            "last_failed_ns": now,
        }

    def _at(self, receiver: str, status: str) -> tuple[Any, ...]:
        return (
            outbox.c.pipeline == self._pipeline,
            outbox.c.receiver == receiver,
            outbox.c.status == status,
        )

    def _change(
        self, receiver: str, seqs: Sequence[int], status: str, values: Mapping[str, Any]
    ) -> int:
        if not seqs:
            return 0
        statement = (
            update(outbox)
            .where(
                *self._at(receiver, status),
                outbox.c.seq.in_(bindparam("seqs", expanding=True)),
            )
            .values(dict(values))
        )
        changed = 0
        with self._database.write() as connection:
            for part in _parts(seqs):
                changed += connection.execute(statement, {"seqs": part}).rowcount
        return changed


def _parts(seqs: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(seqs), _AT_ONCE):
        yield list(seqs[start : start + _AT_ONCE])


def _last_words(error: str) -> str:
    return rows.clean(error)[:_ERROR_CHARS]


def _row(found: Row[Any]) -> OutboxRow:
    event = Event(
        id=found.event_id,
        type=found.type,
        source=found.source,
        subject=found.subject,
        time=found.time_ns,
        data=json.loads(found.data),
    )
    return OutboxRow(
        found.seq,
        event,
        found.attempts,
        found.error,
        found.first_failed_ns,
        found.last_failed_ns,
    )
