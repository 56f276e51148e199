"""One partition of a topic as the reader of a Kafka feed sees it: what comes next of each writer.

The window holds the first batches of the partition that were not delivered, so many that it is
full. What is in it depends on nothing but the partition and on what was delivered; so a reader that
begins again at committed positions has the same window, and delivers in the same order.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from oodmon.errors import FeedError, NewerSchema, WireError
from oodmon.feeds.kafka.publish import NUMBER, WRITER
from oodmon.records import ScoreBatch
from oodmon.wire import decode_batch

__all__ = ["Lane", "Place", "Spoilt", "named"]

_WINDOW_BYTES: Final = 64 << 20
_WRITERS: Final = 65_536
"""Writers of one partition whose numbers are remembered."""
_NO_NUMBER: Final = -1
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class Place(NamedTuple):
    """Where one writer stands in one partition.

    Attributes:
        offset: the next message of this writer is here or later.
        low: everything before this, of any writer, was delivered.
        number: of the writer's last delivered message; -1 where it has none.
    """

    offset: int
    low: int
    number: int

    def __str__(self) -> str:
        return f"{self.offset}:{self.low}:{self.number}"

    @staticmethod
    def parse(text: str) -> Place:
        """The place that this text names, or `FeedError`."""
        found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18}):(-1|[0-9]{1,18})", text)
        if found is None:
            raise FeedError(f"kafka position {text[:64]!r}: expected offset:low:number")
        return Place(int(found[1]), int(found[2]), int(found[3]))


class Spoilt:
    """Messages that are no batches, counted.

    Attributes:
        messages: so many, or places where messages are missing.
        last: the latest one, in words.
    """

    def __init__(self) -> None:
        self.messages = 0
        self.last = ""

    def note(self, what: str) -> None:
        """Count one."""
        self.messages += 1
        self.last = what


class Lane:
    """The cursor over one partition.

    Args:
        topic, number: of the partition.
        places: writer → committed place.
        lookahead: batches in the window.
        spoilt: where messages that are no batches are counted.

    Attributes:
        fetched: offset of the next message that is to come from the broker.
        settled: everything before this offset is committed.
        waiting: messages that came and have no room in the window yet.
        problem: why something here cannot be read at present, or "".
    """

    def __init__(
        self, topic: str, number: int, places: Mapping[str, Place], lookahead: int, spoilt: Spoilt
    ) -> None:
        self.name = f"{topic}-{number}"
        self.number = number
        self.fetched = 0
        self.settled = 0
        self.waiting: deque[Any] = deque()
        self.problem = ""
        self.starts = {writer: place.offset for writer, place in places.items()}
        self._numbers = {writer: place.number for writer, place in places.items()}
        self._lookahead = lookahead
        self._spoilt = spoilt
        self._window: dict[str, deque[tuple[int, int, int, ScoreBatch]]] = {}
        self._open: OrderedDict[int, int] = OrderedDict()  # offset → bytes; ascending
        self._bytes = 0
        self._blocked: dict[str, int] = {}

    @property
    def full(self) -> bool:
        """Whether the window takes no more."""
        return len(self._open) >= self._lookahead or self._bytes >= _WINDOW_BYTES

    @property
    def low(self) -> int:
        """Everything before this offset was delivered."""
        if self._open:
            return next(iter(self._open))
        return int(self.waiting[0].offset) if self.waiting else self.fetched

    def ready(self, end: int) -> bool:
        """Whether the window holds all it can of what lies before `end`."""
        return self.full or (not self.waiting and self.fetched >= end)

    def admit(self) -> Iterator[tuple[int, str]]:
        """Fill the window from `waiting`: event time and writer of each that is a new first."""
        while self.waiting and not self.full:
            message = self.waiting.popleft()
            writer, number = _stamp(message)
            if writer in self._blocked or message.offset < self.starts.get(writer, 0):
                continue
            if _NO_NUMBER < number <= self._numbers.get(writer, _NO_NUMBER):
                continue  # sent twice
            try:
                batch = decode_batch(message.value or b"")
            except NewerSchema as error:
                self._block(writer, message.offset, str(error))
                continue
            except WireError as error:
                self._spoilt.note(f"{self.name} at {message.offset}: {error}")
                continue
            self._remember(writer, number)
            queue = self._window.setdefault(writer, deque())
            queue.append((message.offset, len(message.value), number, batch))
            self._open[message.offset] = len(message.value)
            self._bytes += len(message.value)
            if len(queue) == 1:
                yield batch.observed_at, writer

    def take(self, writer: str) -> tuple[ScoreBatch, Place, int | None]:
        """The writer's next batch, the place behind it, and the event time of the one after."""
        queue = self._window[writer]
        offset, size, number, batch = queue.popleft()
        del self._open[offset]
        self._bytes -= size
        following = queue[0][3].observed_at if queue else None
        if not queue:
            del self._window[writer]
        return batch, Place(offset + 1, self.low, number), following

    def _remember(self, writer: str, number: int) -> None:
        self._numbers.pop(writer, None)
        if len(self._numbers) >= _WRITERS:
            del self._numbers[next(iter(self._numbers))]
        self._numbers[writer] = number

    def _block(self, writer: str, offset: int, why: str) -> None:
        """A newer release wrote this: its writer waits here, and nothing of it is lost."""
        self._blocked[writer] = offset
        self._open[offset] = 0
        self.problem = f"{self.name}/{writer} at {offset}: {why}"


def named(topic: str, name: str) -> tuple[int, str] | None:
    """Partition and writer of a feed partition of this name; none if it is not of this topic."""
    found = re.fullmatch(re.escape(topic) + r"-([0-9]{1,9})/([A-Za-z0-9_.-]{0,128})", name)
    return (int(found[1]), found[2]) if found else None


def _stamp(message: Any) -> tuple[str, int]:
    """Writer and number of a message; a foreign producer's have neither."""
    headers = {name: value or b"" for name, value in message.headers}
    writer = headers.get(WRITER, b"").decode("ascii", "replace")
    number = headers.get(NUMBER, b"")
    if not _NAME.fullmatch(writer):
        return "", _NO_NUMBER
    return writer, int(number) if re.fullmatch(rb"[0-9]{1,18}", number) else _NO_NUMBER
