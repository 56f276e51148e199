"""The outbox: queued once, in order, per subject, through failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from oodmon.store.events import Depth, OutboxRow, Store
from tests.unit.store_facts import START, event
from tests.waiting import PATIENCE_SECONDS

NOW = START
LATER = START + 10**9


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    store.open()
    yield store
    store.close()


def ids(rows: list[OutboxRow]) -> list[str]:
    return [row.event.id for row in rows]


def seqs(rows: list[OutboxRow], *names: str) -> list[int]:
    return [row.seq for row in rows if row.event.id in names]


def test_events_come_back_as_they_went_in_and_in_order(store: Store) -> None:
    sent = [event(f"e{i}", subject=f"s{i % 3}", at_ns=START + i) for i in range(7)]
    store.append([], state=b"", positions={}, outbox=[("sinks.a", one) for one in sent[:4]])
    store.emit([("sinks.a", one) for one in sent[4:]])
    rows = store.pending("sinks.a", NOW, 100)
    assert [row.event for row in rows] == sent
    assert [row.attempts for row in rows] == [0] * 7
    assert ids(store.pending("sinks.a", NOW, 2)) == ["e0", "e1"]
    assert store.pending("sinks.b", NOW, 100) == []


def test_an_event_is_queued_once_per_receiver(store: Store) -> None:
    store.emit([("sinks.a", event("e")), ("sinks.b", event("e")), ("sinks.a", event("e"))])
    [row] = store.pending("sinks.a", NOW, 10)
    store.settle("sinks.a", [row.seq])
    store.emit([("sinks.a", event("e"))])  # a replay
    assert store.pending("sinks.a", NOW, 10) == []
    assert len(store.pending("sinks.b", NOW, 10)) == 1


def test_settling_needs_the_right_receiver(store: Store) -> None:
    store.emit([("sinks.a", event("e"))])
    [row] = store.pending("sinks.a", NOW, 10)
    store.settle("sinks.b", [row.seq])
    store.settle("sinks.a", [])
    assert len(store.pending("sinks.a", NOW, 10)) == 1


def test_a_deferred_event_holds_back_its_subject_only(store: Store) -> None:
    names = [("e0", "x"), ("e1", "y"), ("e2", "x"), ("e3", "y")]
    store.emit([("sinks.a", event(name, subject)) for name, subject in names])
    rows = store.pending("sinks.a", NOW, 10)
    store.defer("sinks.a", seqs(rows, "e2"), LATER, "connection refused\x00")
    assert ids(store.pending("sinks.a", NOW, 10)) == ["e0", "e1", "e3"]
    store.defer("sinks.a", seqs(rows, "e0"), LATER, "connection refused")
    assert ids(store.pending("sinks.a", NOW, 10)) == ["e1", "e3"]
    store.emit([("sinks.a", event("e4", "x"))])
    assert ids(store.pending("sinks.a", NOW, 10)) == ["e1", "e3"]
    again = store.pending("sinks.a", LATER, 10)
    assert ids(again) == ["e0", "e1", "e2", "e3", "e4"]
    assert [row.attempts for row in again] == [1, 0, 1, 0, 0]
    assert again[0].error == "connection refused"


def test_a_dead_letter_holds_nothing_back_and_can_be_revived(store: Store) -> None:
    store.emit([("sinks.a", event(name)) for name in ("e0", "e1")])
    rows = store.pending("sinks.a", NOW, 10)
    store.defer("sinks.a", seqs(rows, "e0"), LATER, "later")
    store.bury("sinks.a", seqs(rows, "e0"), "schema refused")
    assert ids(store.pending("sinks.a", NOW, 10)) == ["e1"]
    [dead] = store.dead("sinks.a")
    assert (dead.event.id, dead.attempts, dead.error) == ("e0", 2, "schema refused")
    store.settle("sinks.a", [dead.seq])  # what is dead stays so
    assert len(store.dead("sinks.a")) == 1
    assert store.revive("sinks.a", [dead.seq]) == 1
    assert store.revive("sinks.a", [dead.seq]) == 0
    revived = store.pending("sinks.a", NOW, 10)
    assert ids(revived) == ["e0", "e1"]
    assert (revived[0].attempts, revived[0].error) == (0, "")


def test_depths(store: Store) -> None:
    store.emit([("sinks.a", event(f"e{i}", at_ns=START + i)) for i in range(5)])
    store.emit([("triggers.t", event("t"))])
    rows = store.pending("sinks.a", NOW, 10)
    store.settle("sinks.a", seqs(rows, "e0"))
    store.bury("sinks.a", seqs(rows, "e1"), "no")
    [row] = store.pending("triggers.t", NOW, 10)
    store.bury("triggers.t", [row.seq], "no")
    assert store.depths() == {
        "sinks.a": Depth(pending=3, dead=1, oldest_ns=START + 2),
        "triggers.t": Depth(pending=0, dead=1, oldest_ns=0),
    }


def test_many_at_once(store: Store) -> None:
    store.emit([("sinks.a", event(f"e{i}")) for i in range(1203)])
    rows = store.pending("sinks.a", NOW, 5000)
    assert len(rows) == 1203
    store.settle("sinks.a", [row.seq for row in rows])
    assert store.depths() == {}


def test_a_long_backlog_behind_one_deferred_event_is_quick(store: Store) -> None:
    store.emit([("sinks.a", event(f"e{i}", subject=f"s{i % 2}")) for i in range(20_000)])
    first = store.pending("sinks.a", NOW, 1)
    store.defer("sinks.a", [first[0].seq], LATER, "down")
    began = time.perf_counter()
    assert len(store.pending("sinks.a", NOW, 100)) == 100
    # Some 20 ms; a plan that compares every row with every other takes minutes.
    assert time.perf_counter() - began < PATIENCE_SECONDS / 2


def test_an_oversized_event_id_is_cut_and_still_unique(store: Store) -> None:
    long = [replace(event("e"), id="x" * 5000 + end) for end in "ab"]
    store.emit([("sinks.a", one) for one in long])
    store.emit([("sinks.a", one) for one in long])
    assert len(set(ids(store.pending("sinks.a", NOW, 10)))) == 2


def test_service_and_delivery_at_the_same_time(store: Store) -> None:
    """One thread appends, three deliver: nothing is lost, doubled or out of order."""
    receivers = ("sinks.a", "sinks.b", "triggers.c")
    count = 60
    got: dict[str, list[str]] = {name: [] for name in receivers}
    failures: list[BaseException] = []

    def deliver(name: str) -> None:
        try:
            give_up = time.monotonic() + PATIENCE_SECONDS
            while len(got[name]) < count and time.monotonic() < give_up:
                rows = store.pending(name, NOW, 7)
                got[name] += ids(rows)
                store.settle(name, [row.seq for row in rows])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=deliver, args=(name,)) for name in receivers]
    for thread in threads:
        thread.start()
    for i in range(count):
        store.append(
            [],
            state=bytes(1000),
            positions={"p": str(i)},
            outbox=[(name, event(f"e{i}")) for name in receivers],
        )
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert failures == []
    assert got == {name: [f"e{i}" for i in range(count)] for name in receivers}
