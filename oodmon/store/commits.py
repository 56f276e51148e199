"""The fold's commits: facts, events, state and positions in one transaction, by one writer.

Whatever is written a second time, after a crash between the commit and its acknowledgement, is
already there and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, Table, select, true

from oodmon.errors import Superseded
from oodmon.records import Event, Fact
from oodmon.store import positions, tables
from oodmon.store.database import Database
from oodmon.store.labels import Labels, Prediction
from oodmon.store.leases import Lease
from oodmon.store.outbox import Outbox
from oodmon.store.rows import clean, fact_rows, key
from oodmon.store.statements import add_new, insert_new, insert_or_change

__all__ = ["AgentSeen", "Commits", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was committed last.

    Attributes:
        state: the frozen pipeline.
        positions: feed partition → position.
        digest: what the state was made for, in the daemon's words; "" if it gave none.
    """

    state: bytes
    positions: dict[str, str]
    digest: str


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """An agent as it stands after the batches of one append; the counts are totals.

    Attributes:
        source: which agent.
        model, version: what it serves.
        sequence, observed_at: of its newest batch.
        samples: samples received from it so far.
        dropped: samples that it says it shed so far.
        sampled_fraction: of its newest batch.
        lost: batches that are missing in its numbering so far.
    """

    source: str
    model: str
    version: str
    sequence: int
    observed_at: int
    samples: int
    dropped: int = 0
    sampled_fraction: float = 1.0
    lost: int = 0


class Commits:
    """Reads and writes one pipeline's state; `Store` documents the calls.

    Each instance marks the state as its own at its first append. A daemon that was thought dead
    and comes back finds another one's mark, or a state that it did not load, and is refused.
    """

    def __init__(
        self, database: Database, pipeline: str, outbox: Outbox, lease: Lease, labels: Labels
    ) -> None:
        self._database = database
        self._pipeline = pipeline
        self._outbox = outbox
        self._lease = lease
        self._labels = labels
        self._writer = uuid4().hex
        self._revision: int | None = None
        self._appended = False

    def load(self) -> Snapshot | None:
        """The committed state and positions, of one moment."""
        table = tables.pipeline_state
        # The lock (PostgreSQL's; SQLite reads a snapshot anyway) keeps a writer from committing
        # between the two questions.
        query = select(table).where(table.c.pipeline == self._pipeline).with_for_update(read=True)
        with self._database.read() as connection:
            found = connection.execute(query).one_or_none()
            reached = positions.read(connection, self._pipeline)
        self._revision = 0 if found is None else found.revision
        self._appended = False
        if found is None:
            return None
        return Snapshot(bytes(found.state), reached, found.digest)

    def append(
        self,
        facts: Iterable[Fact],
        *,
        state: bytes,
        reached: Mapping[str, str],
        outbox: Sequence[tuple[str, Event]],
        agents: Sequence[AgentSeen],
        digest: str,
        predictions: Sequence[Prediction],
    ) -> None:
        """One transaction."""
        found = fact_rows(facts, self._pipeline)
        with self._database.write() as connection:
            self._lease.check(connection)
            self._write_state(connection, state, digest)
            self._write_facts(connection, found)
            self._labels.keep(connection, predictions)
            self._outbox.add(connection, outbox)
            self._write_agents(connection, agents)
            positions.write(connection, self._pipeline, reached)
        self._appended = True

    def conclude(self, connection: Connection, facts: Iterable[Fact]) -> None:
        """Facts that are none of the fold's, in the caller's transaction."""
        self._write_facts(connection, fact_rows(facts, self._pipeline))

    def _write_facts(
        self, connection: Connection, found: Mapping[Table, list[dict[str, Any]]]
    ) -> None:
        for table, rows in found.items():
            if table is not tables.alerts:
                add_new(connection, table, rows)
        if tables.alerts in found:
            self._write_alerts(connection, found[tables.alerts])

    def _write_state(self, connection: Connection, state: bytes, digest: str) -> None:
        """Replace the state, unless somebody else did since this instance read or wrote it."""
        statement = insert_or_change(
            tables.pipeline_state,
            self._database.dialect,
            lambda new: {
                "state": new.state,
                "digest": new.digest,
                "writer": new.writer,
                "revision": tables.pipeline_state.c.revision + 1,
            },
            lambda _new: self._may_write(),
        )
        row = {
            "pipeline": self._pipeline,
            "state": state,
            "digest": clean(digest),
            "writer": self._writer,
            "revision": 1,
        }
        changed = connection.execute(statement, row, execution_options={"preserve_rowcount": True})
        if changed.rowcount != 1:
            raise Superseded(
                f"store {self._database}: another daemon appends to pipeline {self._pipeline!r}; "
                "stop one of the two, or give them different pipeline names"
            )

    def _may_write(self) -> ColumnElement[bool]:
        table = tables.pipeline_state
        # Our own mark is also what a commit left whose acknowledgement was lost on the way.
        mine = table.c.writer == self._writer
        if self._appended:
            return mine
        if self._revision is not None:
            return mine | (table.c.revision == self._revision)
        # Who never loaded has nothing to go on from, and so begins a fold of its own.
        return true()

    def _write_alerts(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """One row per episode: opened by the firing alert, completed by the resolved one."""
        dialect = self._database.dialect
        firing = [row for row in rows if row["status"] == "firing"]
        resolved = [row for row in rows if row["status"] != "firing"]
        if firing:
            connection.execute(insert_new(tables.alerts, dialect), firing)
        if resolved:
            statement = insert_or_change(
                tables.alerts,
                dialect,
                lambda new: {name: new[name] for name in ("status", "ended_at_ns", "resolution")},
                lambda _new: tables.alerts.c.status == "firing",
            )
            connection.execute(statement, resolved)

    def _write_agents(self, connection: Connection, agents: Sequence[AgentSeen]) -> None:
        if not agents:
            return
        table = tables.agents
        values = [column.name for column in table.c if column not in set(table.primary_key)]
        statement = insert_or_change(
            table,
            self._database.dialect,
            lambda new: {name: new[name] for name in values},
            # An older replay does not turn the totals back.
            lambda new: new.observed_at_ns >= table.c.observed_at_ns,
        )
        connection.execute(
            statement,
            [
                {
                    "pipeline": self._pipeline,
                    "source": key(seen.source),
                    "model": key(seen.model),
                    "version": key(seen.version),
                    "sequence": seen.sequence,
                    "observed_at_ns": seen.observed_at,
                    "samples": seen.samples,
                    "dropped": seen.dropped,
                    "lost": seen.lost,
                    "sampled_fraction": seen.sampled_fraction,
                }
                for seen in agents
            ],
        )
