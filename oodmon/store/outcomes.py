"""Labels that are judged as they find their predictions, and labels that come from a topic.

What is concluded of them is committed with them, so a crash between the two is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from oodmon.records import Event, Fact
from oodmon.store import positions, tables
from oodmon.store.commits import Commits
from oodmon.store.database import Database
from oodmon.store.labels import Labels
from oodmon.store.leases import Lease
from oodmon.store.outbox import Outbox
from oodmon.store.rows import Row, key
from oodmon.store.statements import insert_or_change

__all__ = ["Judge", "Outcome", "Outcomes"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One sample of which it is known now whether the answer was right."""

    sample_id: str
    observed_at: int
    wrong: bool


Concluded = tuple[str, Sequence[Fact], Sequence[tuple[str, Event]]]
Judge = Callable[[str, Sequence[Outcome]], Concluded]
"""(state, new outcomes in order of time) → state, facts, (receiver, event) pairs."""


class Outcomes:
    """What labels show, of one pipeline; `Store` documents the calls."""

    def __init__(
        self,
        database: Database,
        pipeline: str,
        lease: Lease,
        labels: Labels,
        commits: Commits,
        outbox: Outbox,
    ) -> None:
        self._database = database
        self._pipeline = pipeline
        self._lease = lease
        self._labels = labels
        self._commits = commits
        self._outbox = outbox

    def join(self, now_ns: int, model: str, version: str, judge: Judge, most: int) -> int:
        """As `Labels.join`, with what comes of it; at most so many transactions."""

        def conclude(connection: Connection, found: Sequence[Row]) -> None:
            self._lease.check(connection)
            outcomes = self._fresh(connection, found, model, version)
            if not outcomes:
                return
            table = tables.label_evidence
            mine = (
                (table.c.pipeline == self._pipeline)
                & (table.c.model == key(model))
                & (table.c.version == key(version))
            )
            before = connection.execute(select(table.c.state).where(mine)).scalar()
            state, facts, outbox = judge(before or "", outcomes)
            connection.execute(
                insert_or_change(table, self._database.dialect, lambda new: {"state": new.state}),
                {
                    "pipeline": self._pipeline,
                    "model": key(model),
                    "version": key(version),
                    "state": state,
                },
            )
            self._commits.conclude(connection, facts)
            self._outbox.add(connection, outbox)

        return self._labels.join(now_ns, conclude, most)

    def _fresh(
        self, connection: Connection, found: Sequence[Row], model: str, version: str
    ) -> list[Outcome]:
        """Those that had no label before: one that is corrected was judged already."""
        kept = tables.predictions
        label = {row["name"]: row["value"] for row in found}
        query = (
            select(kept.c.sample_id, kept.c.observed_at_ns, kept.c.predicted)
            .where(
                kept.c.pipeline == self._pipeline,
                kept.c.sample_id.in_(list(label)),
                kept.c.model == key(model),
                kept.c.version == key(version),
                kept.c.label.is_(None),
            )
            .order_by(kept.c.observed_at_ns, kept.c.sample_id)
        )
        return [
            Outcome(row.sample_id, row.observed_at_ns, label[row.sample_id] != row.predicted)
            for row in connection.execute(query)
        ]

    def take(
        self,
        labels: Mapping[str, int],
        reached: Mapping[str, str],
        facts: Sequence[Fact],
        outbox: Sequence[tuple[str, Event]],
    ) -> None:
        """Labels and how far their topic was read for them, in one transaction."""
        with self._database.write() as connection:
            self._lease.check(connection)
            self._labels.put(connection, labels)
            self._commits.conclude(connection, facts)
            self._outbox.add(connection, outbox)
            positions.write(connection, self._pipeline, reached, positions.LABELS)

    def positions(self) -> dict[str, str]:
        """How far the topics of labels were read."""
        with self._database.read() as connection:
            return positions.read(connection, self._pipeline, positions.LABELS)
