"""A feed of files in a folder: survives the end of either side, in whatever way it comes.

What `put` accepted is with the operating system when it returns, so the death of the agent loses
nothing; a power loss may cost what was written since the last fsync. `segments` says how it looks
on disk.
"""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from oodmon.contracts import Delivery, Feed, Reader, Stability
from oodmon.errors import ContractError, FeedError
from oodmon.feeds.spool.append import SpoolWriter
from oodmon.feeds.spool.partition import Partition
from oodmon.feeds.spool.segments import (
    Damage,
    Position,
    claim_reader,
    release,
    secure_folder,
    writer_folders,
)
from oodmon.registry import feeds

__all__ = ["Spool", "SpoolReader", "SpoolWriter"]

_POLL_SECONDS: Final = 0.02  # between two looks for new frames; bounds the delay that a feed adds


@feeds.register("spool")
@dataclass(frozen=True)
class Spool(Feed):
    """Append-only segment files in a folder: many writers, one reader.

    Args:
        path: the folder; made with mode 0700 if it is not there.
        max_bytes: of all writers together; a batch that would exceed it is shed. Other writers'
            bytes are counted once a second, so several can exceed it by what they write meanwhile.
        segment_bytes: a segment is closed at this size, and deleted once it is settled.
        max_frame_bytes: of one batch; a writer sheds a longer one, a reader skips it.
        fsync_seconds: at most this long between two fsyncs while batches come; 0 syncs each batch.
    """

    path: str
    max_bytes: int = 1 << 30
    segment_bytes: int = 8 << 20
    max_frame_bytes: int = 16 << 20
    fsync_seconds: float = 1.0

    stability: ClassVar[Stability] = "stable"

    def __post_init__(self) -> None:
        for name, least in (("segment_bytes", 4096), ("max_frame_bytes", 1024)):
            if getattr(self, name) < least:
                raise ContractError(
                    f"feeds.spool.{name}: expected at least {least}, found {getattr(self, name)}"
                )
        # With less, the one segment that is being written could fill the spool for good.
        if self.max_bytes < 2 * self.segment_bytes:
            raise ContractError(
                f"feeds.spool.max_bytes: expected at least two segments "
                f"({2 * self.segment_bytes}), found {self.max_bytes}"
            )
        if not self.fsync_seconds >= 0:
            raise ContractError(
                f"feeds.spool.fsync_seconds: expected 0 or more, found {self.fsync_seconds}"
            )

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Small options for the conformity checks, which add a `path`."""
        return ({"max_bytes": 1 << 17, "segment_bytes": 1 << 14},)

    def writer(self, source: str) -> SpoolWriter:
        """A new folder within the spool; `FeedError` where that cannot be."""
        return SpoolWriter(
            Path(self.path),
            source,
            max_bytes=self.max_bytes,
            segment_bytes=self.segment_bytes,
            max_frame_bytes=self.max_frame_bytes,
            fsync_seconds=self.fsync_seconds,
        )

    def reader(self) -> SpoolReader:
        """The one reader; `FeedError` names the process that already reads."""
        return SpoolReader(self)


class SpoolReader(Reader):
    """Merges all writers' batches by event time. One thread at a time.

    Attributes:
        damage: what had to be skipped, counted.
    """

    def __init__(self, options: Spool) -> None:
        self._options = options
        self._root = Path(options.path)
        self.folder = str(self._root)
        secure_folder(self._root)
        self._held = claim_reader(self._root)
        self._process = os.getpid()
        self._closed = False
        self.damage = Damage()
        self._partitions: dict[str, Partition] = {}
        self._heads: list[tuple[int, str]] = []  # heap of loaded heads: event time, partition
        self._starts: dict[str, Position] = {}
        self._scanned_at = float("-inf")

    @property
    def damaged_frames(self) -> int:
        """Damaged places that were skipped, each at least one frame."""
        return self.damage.frames

    @property
    def capacity_bytes(self) -> int:
        """The limit of all writers together."""
        return self._options.max_bytes

    def partitions(self) -> Sequence[str]:
        """The writers' folders; each name is new, so one that is gone stays gone."""
        return self._names()

    def problems(self) -> Sequence[str]:
        """Partitions that cannot be read at present, and why: one sentence each."""
        return [p.problem for p in self._partitions.values() if p.problem]

    def seek(self, positions: Mapping[str, str]) -> None:
        """Go on after these positions; `FeedError` where one is not a position of a spool."""
        self._check_open()
        starts = {name: Position.parse(text) for name, text in positions.items()}
        self._starts = starts
        self._partitions.clear()
        self._heads.clear()
        self._scanned_at = float("-inf")
        self._discover()

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        """Up to `limit` batches, by event time then partition; `close` from elsewhere ends it."""
        self._check_open()
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = self._take(limit)
            left = deadline - time.monotonic()
            if found or left <= 0 or self._closed:
                return found
            time.sleep(min(_POLL_SECONDS, left))

    def settle(self, positions: Mapping[str, str]) -> None:
        """Delete segments and folders that lie wholly before these positions."""
        self._check_open()
        for name, text in positions.items():
            position = Position.parse(text)
            partition = self._partitions.get(name)
            if partition is not None and position > partition.settled:
                partition.settled = position
                self._sweep(partition)

    def backlog_bytes(self) -> int:
        """Bytes accepted and not settled, damaged ones included. Any thread may ask."""
        self._check_open()
        total = 0
        for name in self._names():
            known = self._partitions.get(name)
            total += (known or self._partition(name)).backlog_bytes()
        return total

    def close(self) -> None:
        """Let another reader in. Safe twice."""
        if not self._closed:
            self._closed = True
            if self._process == os.getpid():  # a forked child must not unlock for its parent
                release(self._held)

    def _check_open(self) -> None:
        if self._closed:
            raise FeedError(f"spool folder {self._root}: this reader is closed")

    def _discover(self) -> None:
        now = time.monotonic()
        if now - self._scanned_at < _POLL_SECONDS:
            return
        self._scanned_at = now
        for name in self._names():
            if name not in self._partitions:
                self._partitions[name] = self._partition(name)

    def _names(self) -> Sequence[str]:
        try:
            return writer_folders(self._root)
        except OSError as error:
            raise FeedError(f"spool folder {self._root}: {error.strerror or error}") from None

    def _partition(self, name: str) -> Partition:
        try:
            return Partition(
                self._root / name,
                self._starts.get(name),
                self._options.max_frame_bytes,
                self.damage,
                time.monotonic,
            )
        except OSError as error:
            raise FeedError(
                f"spool folder {self._root / name}: {error.strerror or error}"
            ) from None

    def _take(self, limit: int) -> list[Delivery]:
        self._discover()
        for partition in list(self._partitions.values()):
            if partition.head is None:
                self._load(partition)
        out: list[Delivery] = []
        while self._heads and len(out) < limit:
            _, name = heapq.heappop(self._heads)
            partition = self._partitions[name]
            batch, position = partition.take()
            out.append(Delivery(batch, name, str(position)))
            self._load(partition)
        return out

    def _load(self, partition: Partition) -> None:
        if partition.load() and partition.head is not None:
            heapq.heappush(self._heads, (partition.head[0].observed_at, partition.name))
        else:
            self._sweep(partition)

    def _sweep(self, partition: Partition) -> None:
        try:
            gone = partition.sweep()
        except OSError as error:  # what was taken for this poll must still be delivered
            partition.problem = f"{partition.name}: settled segments stay: {error}"
            return
        if gone:
            self._partitions.pop(partition.name, None)
