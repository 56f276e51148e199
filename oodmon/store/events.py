"""The store: facts, outbox, pipeline state and feed positions, committed together.

One transaction holds what was concluded and how far the feed was read for it. So after a crash
the daemon goes on from the last commit, and whatever it concludes a second time is already there
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Unpack

from oodmon.errors import StoreError
from oodmon.records import Event, Fact
from oodmon.secret import Secret
from oodmon.store import positions, retention, schema, tables
from oodmon.store.commits import AgentSeen, Commits, Snapshot
from oodmon.store.database import Database
from oodmon.store.firings import Firings
from oodmon.store.labels import Labels, Measured, Prediction
from oodmon.store.leases import Lease
from oodmon.store.outbox import Depth, Outbox, OutboxRow
from oodmon.store.outcomes import Judge, Outcomes
from oodmon.store.queries import Asked, Queries
from oodmon.store.rows import key

__all__ = ["AgentSeen", "Asked", "Depth", "OutboxRow", "Snapshot", "Store"]


class Store:
    """One pipeline's place in a SQLite or PostgreSQL database; safe to use from several threads.

    Every call is one transaction and raises `StoreError` when the database fails; after a failure
    the store can be used again as soon as the database can.

    Args:
        url: ``sqlite:///oodmon.db`` or ``postgresql://user:password@host:port/name``.
        pipeline: whose rows these are; daemons that share a database need different names.
        lease_seconds: how long a daemon that fell silent keeps others from working.
    """

    def __init__(
        self, url: str | Secret, pipeline: str = "default", lease_seconds: float = 10.0
    ) -> None:
        self.pipeline = key(pipeline)
        self._database = Database(url)
        self._outbox = Outbox(self._database, self.pipeline)
        self._queries = Queries(self._database, self.pipeline)
        self._firings = Firings(self._database, self.pipeline)
        self.lease_seconds = lease_seconds
        self._lease = Lease(self._database, self.pipeline, lease_seconds)
        self._labels = Labels(self._database, self.pipeline)
        self._commits = Commits(
            self._database, self.pipeline, self._outbox, self._lease, self._labels
        )
        self._outcomes = Outcomes(
            self._database, self.pipeline, self._lease, self._labels, self._commits, self._outbox
        )

    def __repr__(self) -> str:
        return f"Store({str(self._database)!r}, {self.pipeline!r})"

    def open(self) -> None:
        """Connect and bring the schema up to date. Safe twice.

        Errors:
            `StoreError` where the database cannot be used, or was written by a newer release.
        """
        self._database.open()
        try:
            schema.upgrade(self._database)
        except StoreError:
            self._database.close()
            raise

    def close(self) -> None:
        """Give the connections back. Safe twice."""
        self._database.close()

    # the one daemon that may work

    def acquire(self) -> str:
        """Take the pipeline's lease, or renew it: "" if it is ours, else who holds it, in words.

        A daemon takes it before `load`. From then on every `append` renews it, and raises
        `Superseded` once another daemon has taken over.
        """
        return self._lease.acquire()

    def renew(self) -> None:
        """Renew the lease where nothing is appended for a while; `Superseded` if it is lost."""
        self._lease.renew()

    def release(self) -> None:
        """Give the lease back, so that the next daemon need not wait for its end."""
        self._lease.release()

    # the fold

    def load(self) -> Snapshot | None:
        """The committed pipeline state with the positions that belong to it; none at the start."""
        return self._commits.load()

    def append(
        self,
        facts: Iterable[Fact],
        *,
        state: bytes,
        positions: Mapping[str, str],
        outbox: Sequence[tuple[str, Event]] = (),
        agents: Sequence[AgentSeen] = (),
        digest: str = "",
        predictions: Sequence[Prediction] = (),
    ) -> None:
        """Commit what was concluded, what is to be told, and how far the feed was read for it.

        Idempotent: facts and events that are there already are left as they are.

        Args:
            facts: what the pipeline concluded. All facts of one score batch in one call.
            state: the frozen pipeline after these facts.
            positions: feed partition → position after the batches that the facts came from.
            outbox: (receiver, event) pairs; receivers are ``sinks.<id>`` and ``triggers.<id>``.
            agents: what was seen of the agents in these batches.
            digest: what the state was made for.
            predictions: what was answered, to be held against labels; the first of a sample stays.

        Errors:
            `StoreError`; nothing was written. `Superseded` where another daemon works for the same
            pipeline: two folds over one feed would mix.
        """
        self._commits.append(
            facts,
            state=state,
            reached=positions,
            outbox=outbox,
            agents=agents,
            digest=digest,
            predictions=predictions,
        )

    # labels that come late

    def add_labels(self, labels: Mapping[str, int]) -> None:
        """Sample id → class: wait in the inbox until `join_labels`; a newer one replaces one."""
        self._labels.add(labels)

    def join_labels(self, now_ns: int) -> int:
        """Move labels from the inbox to their predictions; how many found one."""
        return self._labels.join(now_ns)

    def judge_labels(self, now_ns: int, model: str, version: str, judge: Judge, most: int) -> int:
        """`join_labels`, and what they show of one model version, in the same transactions.

        Args:
            now_ns: when labels that find no prediction were looked at.
            model, version: whose outcomes are judged; all labels are joined.
            judge: is given its state, and the outcomes that were not known before.
            most: transactions; what is left waits for the next call.

        Errors:
            `Superseded` where another daemon works for the same pipeline.
        """
        return self._outcomes.join(now_ns, model, version, judge, most)

    def take_labels(
        self,
        labels: Mapping[str, int],
        positions: Mapping[str, str],
        facts: Sequence[Fact] = (),
        outbox: Sequence[tuple[str, Event]] = (),
    ) -> None:
        """`add_labels` of a topic, with its positions and what there is to tell of its messages."""
        self._outcomes.take(labels, positions, facts, outbox)

    def label_positions(self) -> dict[str, str]:
        """How far each partition of a topic of labels was read."""
        return self._outcomes.positions()

    def judged(self, model: str, version: str, since_ns: int) -> list[tuple[float, bool]]:
        """Expected errors of labelled samples observed since then, and whether they were wrong."""
        return self._labels.judged(model, version, since_ns)

    def measured(self, since_ns: int, until_ns: int) -> list[Measured]:
        """Per model version: what labels say of samples observed in [since, until)."""
        return self._labels.measured(since_ns, until_ns)

    # delivery

    def emit(self, outbox: Sequence[tuple[str, Event]]) -> None:
        """Queue events of the daemon's own, outside `append`; known ones are skipped."""
        self._outbox.emit(outbox)

    def pending(self, receiver: str, now_ns: int, limit: int) -> list[OutboxRow]:
        """What may be delivered to a receiver now, in order of `seq`.

        A deferred row holds back all later rows of the same subject until its time has come.
        """
        return self._outbox.pending(receiver, now_ns, limit)

    def settle(self, receiver: str, seqs: Sequence[int]) -> None:
        """These were delivered."""
        self._outbox.settle(receiver, seqs)

    def defer(self, receiver: str, seqs: Sequence[int], not_before_ns: int, error: str) -> None:
        """These failed and are not to be tried again before that time."""
        self._outbox.defer(receiver, seqs, not_before_ns, error)

    def bury(self, receiver: str, seqs: Sequence[int], error: str) -> None:
        """These will never be taken: they become dead letters and hold nothing back."""
        self._outbox.bury(receiver, seqs, error)

    def dead(self, receiver: str, limit: int = 0, after: int = 0) -> list[OutboxRow]:
        """The dead letters of a receiver with a greater `seq`, in its order; 0 is no limit."""
        return self._outbox.dead(receiver, limit, after)

    def revive(self, receiver: str, seqs: Sequence[int]) -> int:
        """Make dead letters pending again, as if never tried; how many there were."""
        return self._outbox.revive(receiver, seqs)

    def depths(self) -> dict[str, Depth]:
        """Receiver → how far it is behind; receivers with nothing pending or dead are left out."""
        return self._outbox.depths()

    def fired(self, trigger_id: str, since_ns: int) -> list[int]:
        """When a trigger fired (outcome ``fired``) since then, ns UTC, oldest first."""
        return self._firings.fired(trigger_id, since_ns)

    def has_fired(self, trigger_id: str, request_id: str) -> bool:
        """Whether a trigger fired for this request, however long ago."""
        return self._firings.has_fired(trigger_id, request_id)

    def note_fired(self, trigger_id: str, request_id: str, at_ns: int, outcome: str) -> None:
        """Remember what became of a request. The first outcome stays, but ``fired`` always does."""
        self._firings.note(trigger_id, request_id, at_ns, outcome)

    # questions

    def windows(self, **asked: Unpack[Asked]) -> list[dict[str, Any]]:
        """Closed windows, one row per detector, by `window_start_ns`."""
        return self._queries.timed(tables.windows, asked)

    def drift_results(self, **asked: Unpack[Asked]) -> list[dict[str, Any]]:
        """Decisions of the drift tests, by `window_start_ns`."""
        return self._queries.timed(tables.drift_results, asked)

    def alerts(self, **asked: Unpack[Asked]) -> list[dict[str, Any]]:
        """Episodes, by `started_at_ns`; `ended_at_ns` is 0 while one fires."""
        return self._queries.timed(tables.alerts, asked)

    def notices(self, **asked: Unpack[Asked]) -> list[dict[str, Any]]:
        """What agents and the pipeline had to tell, by `observed_at_ns`."""
        return self._queries.timed(tables.notices, asked)

    def exceedances(
        self, *, most_novel_first: bool = False, **asked: Unpack[Asked]
    ) -> list[dict[str, Any]]:
        """Flagged samples by `observed_at_ns`, or the smallest p and largest score first."""
        table = tables.flagged_samples
        first = (table.c.p, table.c.score.desc()) if most_novel_first else ()
        return self._queries.timed(table, asked, first)

    def firings(self, **asked: Unpack[Asked]) -> list[dict[str, Any]]:
        """What became of retraining requests, by `at_ns`."""
        return self._queries.timed(tables.trigger_firings, asked)

    def agents(self) -> list[dict[str, Any]]:
        """Every agent that was ever seen, by name."""
        return self._queries.all(tables.agents)

    def agents_seen(self) -> list[AgentSeen]:
        """The same as records: what a daemon goes on counting from."""
        return [
            AgentSeen(observed_at=row.pop("observed_at_ns"), **row)
            for row in self._queries.all(tables.agents)
        ]

    def positions(self) -> list[dict[str, Any]]:
        """How far every partition of the feed was read: `partition`, `position`."""
        return self._queries.all(tables.positions)

    # upkeep

    def prune(
        self,
        before_ns: int,
        kinds: Sequence[str] = retention.KINDS,
        ended: Callable[[], bool] = bool,
    ) -> dict[str, int]:
        """Delete what is older, a few thousand rows at a time; kind → rows deleted.

        Keep more than any replay may go back: what is gone is written (and told) again. `ended` is
        asked between two transactions and stops it.
        """
        return retention.prune(self._database, self.pipeline, before_ns, kinds, ended)

    def oldest_ns(self) -> int:
        """Start of the oldest window; 0 where there is none."""
        return retention.extent(self._database, self.pipeline)[0]

    def newest_ns(self) -> int:
        """Start of the newest window; 0 where there is none."""
        return retention.extent(self._database, self.pipeline)[1]

    def forget_positions(self, there: Collection[str]) -> int:
        """Delete the positions of partitions that are not among these; how many there were."""
        return positions.forget(self._database, self.pipeline, there)

    def size_bytes(self, *, live: bool = False) -> int:
        """What is taken on disk; `live`: without what SQLite keeps free for the next rows."""
        return retention.size_bytes(self._database, live=live)

    @property
    def folder(self) -> str:
        """The folder of this machine that it fills; "" where there is none."""
        return self._database.folder

    def letter_bytes(self) -> dict[str, tuple[int, int]]:
        """Receiver → bytes of its waiting events and of its dead letters. Reads them all."""
        return self._outbox.letter_bytes()

    @property
    def gives_back_space(self) -> bool:
        """Whether pruning makes it smaller (SQLite) or only makes room within (PostgreSQL)."""
        return self._database.dialect == "sqlite"

    def give_back_space(self, ended: Callable[[], bool] = bool) -> None:
        """Hand what pruning freed back to the file system, in small steps."""
        retention.give_back_space(self._database, ended)
