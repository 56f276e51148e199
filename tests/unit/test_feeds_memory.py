"""The queue within one process: its bound, its positions, and threads at both ends."""

from __future__ import annotations

import threading
import time

import pytest

from oodmon.errors import ContractError, FeedError
from oodmon.feeds.memory import Memory
from tests.unit.spool_process import batch
from tests.waiting import PATIENCE_SECONDS


def test_room_comes_back_when_settled_and_not_before() -> None:
    feed = Memory(capacity_batches=3)
    writer, reader = feed.writer("a"), feed.reader()
    assert [writer.put(batch("a", n)) for n in range(5)] == [True, True, True, False, False]
    found = reader.poll(2, 0)
    assert not writer.put(batch("a", 5))
    reader.settle({found[-1].partition: found[-1].position})
    assert [writer.put(batch("a", n)) for n in (6, 7, 8)] == [True, True, False]
    assert [d.batch.sequence for d in reader.poll(9, 0)] == [2, 6, 7]


def test_the_bound_is_shared_by_all_writers() -> None:
    feed = Memory(capacity_batches=2)
    one, two = feed.writer("a"), feed.writer("a")
    assert one.put(batch("a", 0))
    assert two.put(batch("a", 0))
    assert not one.put(batch("a", 1))
    reader = feed.reader()
    assert len({d.partition for d in reader.poll(9, 0)}) == 2


def test_a_closed_and_settled_partition_is_forgotten() -> None:
    feed = Memory()
    writer, reader = feed.writer("a"), feed.reader()
    writer.put(batch("a", 0))
    writer.close()
    found = reader.poll(1, 0)
    reader.settle({found[0].partition: found[0].position})
    reader.settle({found[0].partition: found[0].position})
    feed.writer("b").close()
    assert not feed._shared.partitions
    assert reader.backlog_bytes() == 0


def test_a_put_wakes_the_reader() -> None:
    feed = Memory()
    writer, reader = feed.writer("a"), feed.reader()
    timer = threading.Timer(0.05, writer.put, [batch("a", 0)])
    timer.start()
    begun = time.monotonic()
    assert len(reader.poll(1, PATIENCE_SECONDS)) == 1
    assert time.monotonic() - begun < PATIENCE_SECONDS / 2
    timer.join()


def test_close_from_another_thread_ends_a_poll() -> None:
    reader = Memory().reader()
    timer = threading.Timer(0.05, reader.close)
    timer.start()
    begun = time.monotonic()
    assert not reader.poll(1, PATIENCE_SECONDS)
    assert time.monotonic() - begun < PATIENCE_SECONDS / 2
    timer.join()
    with pytest.raises(FeedError, match="closed"):
        reader.poll(1, 0)


def test_one_reader_at_a_time() -> None:
    feed = Memory()
    reader = feed.reader()
    with pytest.raises(FeedError, match="already has a reader"):
        feed.reader()
    reader.close()
    feed.reader().close()


def test_many_threads_lose_nothing() -> None:
    feed = Memory(capacity_batches=10_000)
    reader = feed.reader()

    def write(source: str) -> None:
        writer = feed.writer(source)
        for n in range(500):
            assert writer.put(batch(source, n, rows=1))

    threads = [threading.Thread(target=write, args=[f"s{n}"]) for n in range(4)]
    for thread in threads:
        thread.start()
    got: dict[str, list[int]] = {}
    while found := reader.poll(64, 0.5):
        for delivery in found:
            got.setdefault(delivery.batch.source, []).append(delivery.batch.sequence)
        reader.settle({d.partition: d.position for d in found})
    for thread in threads:
        thread.join()
    assert got == {f"s{n}": list(range(500)) for n in range(4)}


@pytest.mark.parametrize("position", ["", "-1", "x", "1:2", "²"])
def test_a_position_that_is_none_is_refused(position: str) -> None:
    reader = Memory().reader()
    with pytest.raises(FeedError, match="position"):
        reader.seek({"a#0": position})


def test_no_room_at_all_is_refused() -> None:
    with pytest.raises(ContractError, match="capacity_batches"):
        Memory(capacity_batches=0)
