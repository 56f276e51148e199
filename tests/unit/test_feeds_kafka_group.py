"""Several daemons and one topic: what a group of readers means, and what moves when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from oodmon.contracts import Delivery
from oodmon.feeds.kafka import Kafka, KafkaReader
from oodmon.feeds.kafka import topic as topic_module
from oodmon.records import ScoreBatch
from oodmon.store.events import Store
from tests.faults.writers import make_topic
from tests.servers.kafka import Broker

PATIENCE_SECONDS = 60.0
PARTITIONS = 3
WRITERS = 9


@pytest.fixture
def feed(kafka: Broker) -> Kafka:
    topic = kafka.topic()
    make_topic(kafka.address, topic, PARTITIONS)
    return Kafka((kafka.address,), topic, timeout_seconds=PATIENCE_SECONDS, group=topic)


def publish(feed: Kafka, first: int, count: int) -> list[tuple[str, int]]:
    """So many batches by each of several writers; what a reader should deliver of them."""
    writers = [feed.writer(f"a{n}") for n in range(WRITERS)]
    told = []
    for number in range(first, first + count):
        for at, writer in enumerate(writers):
            scores = {"msp": np.full(2, number, np.float32)}
            observed = 1 + number * WRITERS + at
            assert writer.put(ScoreBatch("m", "1", f"a{at}", number, observed, scores))
            told.append((f"a{at}", number))
    for writer in writers:
        writer.close()
    return told


@contextmanager
def reading(feed: Kafka, positions: dict[str, str]) -> Iterator[KafkaReader]:
    with closing(feed.reader()) as reader:
        reader.seek(positions)
        yield reader


def until(reader: KafkaReader, got: list[Delivery], count: int) -> list[Delivery]:
    """Read until so many are there; a hang ends with what there is."""
    polls = 0
    while len(got) < count and polls < 2 * PATIENCE_SECONDS:
        polls += 1
        got += reader.poll(count - len(got), 0.5)
    return got


def seen(deliveries: list[Delivery]) -> list[tuple[str, int]]:
    return [(d.batch.source, d.batch.sequence) for d in deliveries]


def places(deliveries: list[Delivery]) -> dict[str, str]:
    return {d.partition: d.position for d in deliveries}


def used(deliveries: list[Delivery]) -> set[str]:
    return {d.partition.partition("/")[0] for d in deliveries}


def test_daemons_with_databases_of_their_own_each_read_all(feed: Kafka) -> None:
    told = publish(feed, 0, 4)
    # Even in one group: no balancing takes a partition from either.
    with reading(feed, {}) as one, reading(feed, {}) as other:
        first, second = until(one, [], 20), until(other, [], 20)
        one.settle(places(first))
        assert seen(until(one, first, len(told))) == told
        assert seen(until(other, second, len(told))) == told
    with reading(replace(feed, group=f"{feed.group}.other"), {}) as third:
        assert seen(until(third, [], len(told))) == told


def test_every_partition_moves_with_the_database_and_nothing_counts_twice(feed: Kafka) -> None:
    """One daemon hangs within a group; another takes over, and the first comes back too late."""
    told = publish(feed, 0, 6)
    with reading(feed, {}) as hangs:
        committed = until(hangs, [], 21)
        hangs.settle(places(committed))
        uncommitted = until(hangs, [], 9)
        with reading(feed, places(committed)) as takes_over:
            rest = until(takes_over, [], len(told) - 21)
            takes_over.settle(places(committed) | places(rest))
            # It tells the group's offsets late: a hint, which no position hangs on.
            hangs.settle(places(uncommitted))
            assert seen(committed + rest) == told
            assert len(used(committed + rest)) > 1, "several partitions moved"
            assert not takes_over.poll(1, 0.3)
    with reading(feed, places(committed) | places(rest)) as again:
        assert not again.poll(1, 0.5)


def test_a_new_database_in_an_old_group_goes_on_where_the_group_was(feed: Kafka) -> None:
    old = publish(feed, 0, 2)
    with reading(feed, {}) as reader:
        reader.settle(places(until(reader, [], len(old))))
    new = publish(feed, 2, 2)
    with reading(feed, {}) as same:
        assert seen(until(same, [], len(new))) == new
        assert not same.poll(1, 0.3)
    with reading(replace(feed, group=f"{feed.group}.anew"), {}) as fresh:
        assert seen(until(fresh, [], len(old + new))) == old + new


def test_a_foreign_member_of_the_group_takes_nothing_away(feed: Kafka) -> None:
    from kafka import KafkaConsumer  # type: ignore[import-untyped]

    told = publish(feed, 0, 2)
    foreign = KafkaConsumer(
        feed.topic, bootstrap_servers=list(feed.bootstrap_servers), group_id=feed.group
    )
    with closing(foreign), reading(feed, {}) as reader:
        for _ in range(100):
            foreign.poll(timeout_ms=100)
            if foreign.assignment():
                break
        assert foreign.assignment(), "it has joined, and holds partitions"
        got = until(reader, [], len(told))
        reader.settle(places(got))
        assert seen(got) == told
        assert not reader.problems()


def test_partitions_that_are_added_are_read_too(
    feed: Kafka, kafka: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kafka.admin import KafkaAdminClient, NewPartitions  # type: ignore[import-untyped]

    monkeypatch.setattr(topic_module, "_GROWTH_SECONDS", 0.1)
    old = publish(feed, 0, 1)
    with reading(feed, {}) as reader:
        got = until(reader, [], len(old))
        with closing(KafkaAdminClient(bootstrap_servers=kafka.address)) as admin:
            admin.create_partitions({feed.topic: NewPartitions(4 * PARTITIONS)})
        new = publish(feed, 1, 2)
        assert sorted(seen(until(reader, got, len(old + new)))) == sorted(old + new)
    assert any(int(name.rpartition("-")[2]) >= PARTITIONS for name in used(got))


@pytest.mark.parametrize("cut", [1, 10, 26])
def test_positions_come_back_from_the_database_with_the_facts(
    feed: Kafka, store_url: str, cut: int
) -> None:
    """A transaction that fails leaves the positions where they were, and the batches come again."""
    told = publish(feed, 0, 3)
    store = Store(store_url)
    store.open()

    def at() -> dict[str, str]:
        snapshot = store.load()
        return dict(snapshot.positions) if snapshot else {}

    def work(count: int, commit: Callable[[dict[str, str]], None]) -> list[tuple[str, int]]:
        with reading(feed, at()) as reader:
            got = until(reader, [], count)
            commit(places(got))
            reader.settle(at())
            return seen(got)

    def stores(positions: dict[str, str]) -> None:
        store.append([], state=b"s", positions=positions)

    def dies(positions: dict[str, str]) -> None:
        """Before the commit."""

    try:
        assert work(cut, stores) == told[:cut]
        assert work(len(told) - cut, dies) == told[cut:]
        assert work(len(told) - cut, stores) == told[cut:]
    finally:
        store.close()
