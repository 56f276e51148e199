"""The agent's end of a spool: appends frames to segments of its own, and never raises into it."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Final

from oodmon.contracts import Writer
from oodmon.errors import FeedError, WireError
from oodmon.feeds.spool.segments import (
    FRAME_HEAD_BYTES,
    SEGMENT_HEADER,
    SEGMENT_HEADER_BYTES,
    folder_bytes,
    frame_of,
    new_folder,
    release,
    secure_folder,
    segment_path,
)
from oodmon.records import ScoreBatch
from oodmon.wire import encode_batch

__all__ = ["SpoolWriter"]

_COUNT_SECONDS: Final = 1.0  # between two looks at what the other writers have added
_COUNT_SECONDS_FULL: Final = 0.1  # the same while the spool is full
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class SpoolWriter(Writer):
    """Appends to its own segments. Any thread may call it; a forked child's `put` sheds.

    Attributes:
        folder: the writer's own folder.
        shed: batches that `put` refused, whatever the reason.
        last_failure: why the latest batch was shed because of the disk, or "".
    """

    def __init__(
        self,
        root: Path,
        source: str,
        *,
        max_bytes: int,
        segment_bytes: int,
        max_frame_bytes: int,
        fsync_seconds: float,
    ) -> None:
        self._root = root
        self._source = source
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._max_frame_bytes = max_frame_bytes
        self._fsync_seconds = fsync_seconds
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self.shed = 0
        self.last_failure = ""
        self._segment = -1  # descriptor of the segment that is being written
        self._number = -1
        self._size = 0
        self._unsynced = False
        self._synced_at = time.monotonic()
        self._held = -1
        self._used = 0
        self._counted_at = float("-inf")
        self._begin()

    def put(self, batch: ScoreBatch) -> bool:
        """Append one batch; False where it is too long, the spool or the disk full. Never raises.

        The bytes are with the operating system when it returns.
        """
        if self._process != os.getpid():  # before the lock: a fork may have copied it while taken
            self.shed += 1
            return False
        try:
            frame = frame_of(encode_batch(batch))
        except WireError as error:
            self.last_failure = str(error)
            frame = b""
        with self._lock:
            accepted = bool(frame) and not self._closed and self._append(frame)
            self.shed += not accepted
            return accepted

    def close(self) -> None:
        """Sync and release. Safe twice."""
        if self._process != os.getpid():
            return  # the descriptors belong to the parent, and end with this process
        with self._lock:
            if not self._closed:
                self._closed = True
                self._sync()
                self._let_go()
                self._free()

    def _begin(self) -> None:
        """Take a folder of our own."""
        secure_folder(self._root)
        try:
            self.folder, self._held = new_folder(self._root, self._source)
        except OSError as error:
            raise FeedError(f"spool folder {self._root}: {error.strerror or error}") from None
        self._number = -1

    def _free(self) -> None:
        """Give up the lock, which tells the reader that nothing more comes."""
        if self._held >= 0:
            release(self._held)
            self._held = -1

    def _append(self, frame: bytes) -> bool:
        try:
            now = time.monotonic()
            if not self._fits(len(frame), now):
                return False
            if self._segment < 0 or (
                self._size > SEGMENT_HEADER_BYTES and self._size + len(frame) > self._segment_bytes
            ):
                self._roll()
            _write_all(self._segment, frame)
        except (OSError, FeedError) as error:
            self.last_failure = str(error)
            self._take_back(error)
            return False
        self._size += len(frame)
        self._used += len(frame)
        self._unsynced = True
        if now - self._synced_at >= self._fsync_seconds:
            self._sync()
        return True

    def _fits(self, count: int, now: float) -> bool:
        if count > self._max_frame_bytes + FRAME_HEAD_BYTES:
            self.last_failure = f"a batch of {count} bytes is longer than max_frame_bytes"
            return False
        full = self._used + count > self._max_bytes
        if now - self._counted_at >= (_COUNT_SECONDS_FULL if full else _COUNT_SECONDS):
            self._count(now)
            full = self._used + count > self._max_bytes
            if full and self._size > SEGMENT_HEADER_BYTES:
                # Only whole segments can be freed: let the reader have this one.
                self._roll()
        return not full

    def _count(self, now: float) -> None:
        """Look how much all writers together have in the spool."""
        if not self.folder.exists():  # somebody cleared the spool under us
            self._let_go()
            self._free()
            self._begin()
        self._used = folder_bytes(self._root)
        self._counted_at = now

    def _roll(self) -> None:
        """Begin the next segment."""
        if self._segment >= 0:
            self._sync()
            self._let_go()
        path = segment_path(self.folder, self._number + 1)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            _write_all(descriptor, SEGMENT_HEADER)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._segment, self._size = descriptor, SEGMENT_HEADER_BYTES
        self._number += 1
        self._used += SEGMENT_HEADER_BYTES
        sync_folder(self.folder)

    def _take_back(self, error: Exception) -> None:
        """After a failed write: cut off the partial frame, or else leave the segment as it is."""
        if self._segment < 0:
            return
        try:
            os.ftruncate(self._segment, self._size)
            keep = isinstance(error, OSError) and error.errno in _NO_SPACE
        except OSError:
            keep = False  # a reader skips the torn tail because a later segment follows
        if not keep:
            self._let_go()

    def _sync(self) -> None:
        self._synced_at = time.monotonic()
        if self._segment >= 0 and self._unsynced:
            self._unsynced = False
            try:
                os.fdatasync(self._segment)
            except OSError as error:  # the bytes stay with the operating system
                self.last_failure = f"fsync: {error}"

    def _let_go(self) -> None:
        if self._segment >= 0:
            os.close(self._segment)
            self._segment, self._size = -1, 0


def _write_all(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, data[written:])


def sync_folder(folder: Path) -> None:
    """The names of the files in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
