"""A feed within one process: a bounded queue between the writers and the reader of one instance."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from oodmon.contracts import Delivery, Feed, Reader, Stability, Writer
from oodmon.errors import ContractError, FeedError
from oodmon.records import ScoreBatch
from oodmon.registry import feeds

__all__ = ["Memory", "MemoryReader", "MemoryWriter"]


class _Partition:
    """The unsettled batches of one writer; `first` is the number of the oldest of them."""

    def __init__(self) -> None:
        self.batches: deque[ScoreBatch] = deque()
        self.first = 0
        self.next = 0  # number of the next batch to deliver
        self.open = True


class _Shared:
    """What writers and reader of one instance share; guarded by `changed`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.partitions: dict[str, _Partition] = {}
        self.opened = 0
        self.unsettled = 0
        self.read = False


@feeds.register("memory")
@dataclass(frozen=True)
class Memory(Feed):
    """A bounded queue for an agent and a pipeline in one process; nothing survives its end.

    Args:
        capacity_batches: of all writers together, accepted and not settled; more are shed.
    """

    capacity_batches: int = 4096
    _shared: _Shared = field(default_factory=_Shared, init=False, repr=False, compare=False)

    stability: ClassVar[Stability] = "stable"

    def __post_init__(self) -> None:
        if self.capacity_batches < 1:
            raise ContractError(
                f"feeds.memory.capacity_batches: expected 1 or more, found {self.capacity_batches}"
            )

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        return ({"capacity_batches": 64},)

    def writer(self, source: str) -> MemoryWriter:
        """One more writer; its partition is named after the source and a number."""
        with self._shared.changed:
            name = f"{source}#{self._shared.opened}"
            self._shared.opened += 1
            partition = self._shared.partitions[name] = _Partition()
        return MemoryWriter(self._shared, name, partition, self.capacity_batches)

    def reader(self) -> MemoryReader:
        """The one reader, at the oldest unsettled batch; `FeedError` while there is another."""
        with self._shared.changed:
            if self._shared.read:
                raise FeedError("this memory feed already has a reader")
            self._shared.read = True
            for partition in self._shared.partitions.values():
                partition.next = partition.first
        return MemoryReader(self._shared)


class MemoryWriter(Writer):
    """Appends to the queue. Any thread may call it."""

    def __init__(self, shared: _Shared, name: str, partition: _Partition, capacity: int) -> None:
        self._shared = shared
        self._name = name
        self._partition = partition
        self._capacity = capacity

    def put(self, batch: ScoreBatch) -> bool:
        """Queue one batch; False when the queue is full or this writer is closed."""
        with self._shared.changed:
            if not self._partition.open or self._shared.unsettled >= self._capacity:
                return False
            self._partition.batches.append(batch)
            self._shared.unsettled += 1
            self._shared.changed.notify_all()
        return True

    def close(self) -> None:
        """Accept no more; what was accepted stays for the reader. Safe twice."""
        with self._shared.changed:
            self._partition.open = False
            if not self._partition.batches:
                self._shared.partitions.pop(self._name, None)


class MemoryReader(Reader):
    """Merges all writers' batches by event time. Positions are counts of batches."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._closed = False

    def seek(self, positions: Mapping[str, str]) -> None:
        """Go on after these positions; what is settled is gone and is not delivered again."""
        self._check_open()
        numbers = {name: _parse(text) for name, text in positions.items()}
        with self._shared.changed:
            for name, partition in self._shared.partitions.items():
                newest = partition.first + len(partition.batches)
                partition.next = min(max(numbers.get(name, 0), partition.first), newest)

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        """Up to `limit` batches, by event time then partition; `close` from elsewhere ends it."""
        self._check_open()
        deadline = time.monotonic() + timeout_seconds
        with self._shared.changed:
            while True:
                found = self._take(limit)
                left = deadline - time.monotonic()
                if found or left <= 0 or self._closed:
                    return found
                self._shared.changed.wait(left)

    def settle(self, positions: Mapping[str, str]) -> None:
        """Forget the batches before these positions, which makes room for new ones."""
        self._check_open()
        numbers = {name: _parse(text) for name, text in positions.items()}
        with self._shared.changed:
            for name, number in numbers.items():
                partition = self._shared.partitions.get(name)
                if partition is None:
                    continue
                while partition.first < number and partition.batches:
                    partition.batches.popleft()
                    partition.first += 1
                    self._shared.unsettled -= 1
                partition.next = max(partition.next, partition.first)
                if not partition.open and not partition.batches:
                    del self._shared.partitions[name]

    def backlog_bytes(self) -> int:
        """Bytes of the scores, classes and names that are accepted and not settled."""
        with self._shared.changed:
            return sum(
                _bytes(batch)
                for partition in self._shared.partitions.values()
                for batch in partition.batches
            )

    def close(self) -> None:
        """Let another reader in. Safe twice."""
        with self._shared.changed:
            if not self._closed:
                self._closed = True
                self._shared.read = False
                self._shared.changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise FeedError("this reader of a memory feed is closed")

    def _take(self, limit: int) -> list[Delivery]:
        heads = [
            (partition.batches[partition.next - partition.first].observed_at, name)
            for name, partition in self._shared.partitions.items()
            if partition.next < partition.first + len(partition.batches)
        ]
        heapq.heapify(heads)
        out: list[Delivery] = []
        while heads and len(out) < limit:
            _, name = heads[0]
            partition = self._shared.partitions[name]
            batch = partition.batches[partition.next - partition.first]
            partition.next += 1
            out.append(Delivery(batch, name, str(partition.next)))
            place = partition.next - partition.first
            if place < len(partition.batches):
                heapq.heapreplace(heads, (partition.batches[place].observed_at, name))
            else:
                heapq.heappop(heads)
        return out


def _parse(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise FeedError(f"memory position {text[:64]!r}: expected a count of batches")
    return int(text)


def _bytes(batch: ScoreBatch) -> int:
    arrays = (*batch.scores.values(), batch.segment, batch.predicted)
    return sum(array.nbytes for array in arrays) + sum(map(len, batch.sample_ids))
