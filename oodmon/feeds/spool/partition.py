"""One writer's folder as the reader of a spool sees it: the next whole batch, or nothing yet."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from oodmon.errors import FeedError, NewerSchema, WireError
from oodmon.feeds.spool.segments import (
    FRAME_HEAD_BYTES,
    SEGMENT_HEADER_BYTES,
    Damage,
    Position,
    find_head,
    frame_head,
    read_header,
    remove_folder,
    segment_numbers,
    segment_path,
    writer_gone,
)
from oodmon.records import ScoreBatch
from oodmon.wire import decode_batch

__all__ = ["Partition"]

_CHUNK_BYTES: Final = 1 << 18
_LIVENESS_SECONDS: Final = 0.25  # how often a silent writer is asked whether it still lives


class Partition:
    """A cursor over the segments of one writer.

    Args:
        folder: the writer's folder.
        start: go on after this; none begins at the first segment that is there.
        max_frame_bytes: a longer frame is skipped and never loaded.
        damage: where skipped places are counted.
        clock: seconds that only grow.

    Attributes:
        delivered: where the last delivered batch ended.
        settled: what is committed.
        head: the next batch and the position behind it, if it is loaded.
        finished: the writer is gone and nothing more can come.
        problem: why nothing can be read here at present, or "".
    """

    def __init__(
        self,
        folder: Path,
        start: Position | None,
        max_frame_bytes: int,
        damage: Damage,
        clock: Callable[[], float],
    ) -> None:
        self.folder = folder
        self.name = folder.name
        self.head: tuple[ScoreBatch, Position] | None = None
        self.finished = False
        self.problem = ""
        self._blocked = False
        self._limit = max_frame_bytes
        self._damage = damage
        self._clock = clock
        self._asked = float("-inf")
        if start is None:
            numbers = segment_numbers(folder)
            start = Position(numbers[0] if numbers else 0, 0)
        self.delivered = start
        self.settled = start
        self._at = start
        self._kept = -1  # segments before this one are deleted
        self._doubted: Position | None = None
        # What was read of the file. Only whole frames in it are used: the writer takes a partial
        # frame back when the disk is full, and may put another one in its place.
        self._buffer = b""
        self._from = 0
        self._seen = -1  # size of the file when nothing more was found

    def load(self) -> bool:
        """Fill `head` if a whole batch is there. Never waits."""
        while self.head is None and not self.finished and not self._blocked:
            try:
                payload = self._payload()
            except FeedError as error:
                self._block(str(error))
                break
            except OSError as error:  # tried again at the next poll
                self.problem = f"{self.name} at {self._at}: {error}"
                break
            self.problem = ""
            if payload is None:
                break
            begin = self._at
            try:
                batch = decode_batch(payload)
            except NewerSchema as error:
                self._block(str(error))
                break
            except WireError as error:
                self._step(FRAME_HEAD_BYTES + len(payload))
                self._damage.note(f"{self.name} at {begin}: {error}", len(payload))
                continue
            self._step(FRAME_HEAD_BYTES + len(payload))
            self.head = batch, self._at
        return self.head is not None

    def take(self) -> tuple[ScoreBatch, Position]:
        """The loaded head, which counts as delivered from now on."""
        if self.head is None:
            raise FeedError(f"{self.name}: nothing is loaded")
        taken, self.head = self.head, None
        self.delivered = taken[1]
        return taken

    def backlog_bytes(self) -> int:
        """Bytes of frames behind the settled position."""
        total = 0
        for number in segment_numbers(self.folder):
            if number >= self.settled.segment:
                start = self.settled.offset if number == self.settled.segment else 0
                size = _size(segment_path(self.folder, number))
                total += max(0, size - max(start, SEGMENT_HEADER_BYTES))
        return total

    def sweep(self) -> bool:
        """Delete what is settled; True when the whole folder is gone because nothing can follow."""
        all_settled = self.head is None and self.settled >= self.delivered
        if all_settled and self.finished:
            return remove_folder(self.folder)
        # Once the cursor has moved on, a segment holds nothing that is still to be delivered.
        keep = self._at.segment if all_settled else self.settled.segment
        if keep > self._kept:
            for number in segment_numbers(self.folder):
                if number < keep:
                    segment_path(self.folder, number).unlink(missing_ok=True)
            self._kept = keep
        return False

    # The cursor. Each step says whether there is something new to look at. -----------------------

    @property
    def _ahead(self) -> int:
        return len(self._buffer) - self._from

    def _payload(self) -> memoryview | None:
        """The payload of the frame at the cursor; passes over whatever is damaged before it."""
        moved = True
        while moved and not self.finished:
            if self._at.offset < SEGMENT_HEADER_BYTES:
                moved = self._pass_header()
            elif self._ahead < FRAME_HEAD_BYTES:
                moved = self._more(FRAME_HEAD_BYTES)
            elif (head := frame_head(self._buffer, self._from)) is None:
                moved = self._resync()
            elif head[0] > self._limit:
                moved = self._pass_long(FRAME_HEAD_BYTES + head[0])
            elif self._ahead < FRAME_HEAD_BYTES + head[0]:
                moved = self._more(FRAME_HEAD_BYTES + head[0])
            else:
                first = self._from + FRAME_HEAD_BYTES
                payload = memoryview(self._buffer)[first : first + head[0]]
                if zlib.crc32(payload) == head[1]:
                    return payload
                if not self._look_again():
                    need = FRAME_HEAD_BYTES + head[0]
                    self._damage.note(f"{self.name} at {self._at}: checksum", need)
                    self._step(need)
        return None

    def _step(self, count: int) -> None:
        self._at = Position(self._at.segment, self._at.offset + count)
        self._from += count

    def _fill(self, need: int = 0) -> int:
        """Read from the cursor on; the number of bytes that are there, up to a chunk or `need`."""
        self._buffer, self._from = self._read(self._at.offset, need), 0
        return len(self._buffer)

    def _refill(self, need: int) -> bool:
        """Read again; whether `need` bytes are there, or others than before."""
        before = self._buffer[self._from :]
        return self._fill(need) >= need or not self._buffer.startswith(before)

    def _read(self, offset: int, need: int = 0) -> bytes:
        path = segment_path(self.folder, self._at.segment)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(descriptor, max(need, _CHUNK_BYTES), offset)
        finally:
            os.close(descriptor)

    def _look_again(self) -> bool:
        """Read this place anew, once: what looks damaged may have been replaced meanwhile."""
        if self._doubted == self._at:
            return False
        self._doubted = self._at
        self._fill(self._ahead)
        return True

    def _more(self, need: int) -> bool:
        """Get `need` bytes at the cursor, or leave the segment if they will never come."""
        if self._unchanged():
            return False
        if self._refill(need):
            return True
        following = self._following()
        if following is None:
            self._seen = self._at.offset + self._ahead
            return False
        # All that the writer did here, it did before it went on or ended: look once more.
        if self._refill(need):
            return True
        if self._ahead:
            self._damage.torn += 1
            self._damage.last = f"{self.name} at {self._at}: {self._ahead} bytes of a torn frame"
        self._leave(following)
        return True

    def _unchanged(self) -> bool:
        """Whether a wait that began earlier goes on: same size, and the writer is still here."""
        if self._seen < 0 or _size(segment_path(self.folder, self._at.segment)) != self._seen:
            return False
        return self._following() is None

    def _following(self) -> int | None:
        """The segment after this one; -1 if the writer is gone; none while it may write here."""
        later = self._later()
        if later < 0 and self._clock() - self._asked >= _LIVENESS_SECONDS:
            self._asked = self._clock()
            if writer_gone(self.folder):
                self._asked = float("-inf")
                return self._later()  # it may have begun one before it ended
        return later if later >= 0 else None

    def _later(self) -> int:
        return next((n for n in segment_numbers(self.folder) if n > self._at.segment), -1)

    def _leave(self, following: int) -> None:
        self._buffer, self._from, self._seen = b"", 0, -1
        if following < 0:
            self.finished = True
        else:
            self._at = Position(following, 0)

    def _pass_header(self) -> bool:
        if self._at.offset:  # no frame ends here: begin this segment anew
            self._at = Position(self._at.segment, 0)
            self._buffer, self._from = b"", 0
        if self._ahead < SEGMENT_HEADER_BYTES:
            return self._more(SEGMENT_HEADER_BYTES)
        if read_header(self._buffer[self._from : self._from + SEGMENT_HEADER_BYTES]) == 0:
            self._damage.note(f"{self.name} at {self._at}: header", SEGMENT_HEADER_BYTES)
        self._step(SEGMENT_HEADER_BYTES)
        return True

    def _pass_long(self, need: int) -> bool:
        """Go past a frame that is too long to be loaded."""
        end = self._at.offset + need
        if _size(segment_path(self.folder, self._at.segment)) < end:
            before = self._buffer[self._from :]
            self._fill()
            if not self._buffer.startswith(before):
                return True
            following = self._following()
            if following is None:
                return False
            self._damage.torn += 1
            self._leave(following)
            return True
        self._damage.note(f"{self.name} at {self._at}: longer than {self._limit} bytes", need)
        self._at = Position(self._at.segment, end)
        self._buffer, self._from = b"", 0
        return True

    def _resync(self) -> bool:
        """Go to the next sound frame head behind a damaged place."""
        if self._look_again():
            return True
        if self._unchanged():
            return False
        start = self._at.offset
        following: int | None = None
        offset = start + 1
        while True:
            chunk = self._read(offset)
            found = find_head(chunk, 0)
            if found >= 0:
                self._damage.note(f"{self.name} at {self._at}: no frame", offset + found - start)
                self._at = Position(self._at.segment, offset + found)
                self._buffer, self._from = chunk[found:], 0
                return True
            if len(chunk) >= FRAME_HEAD_BYTES:
                offset += len(chunk) - FRAME_HEAD_BYTES + 1  # a head may straddle two chunks
                continue
            if following is not None:
                self._damage.note(
                    f"{self.name} at {self._at}: no frame", offset + len(chunk) - start
                )
                self._leave(following)
                return True
            following = self._following()
            if following is None:
                self._seen = offset + len(chunk)
                return False

    def _block(self, why: str) -> None:
        self._blocked = True
        self.problem = f"{self.name} at {self._at}: {why}"


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 asked often
    except FileNotFoundError:
        return 0
