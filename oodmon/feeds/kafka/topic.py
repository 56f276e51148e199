"""The daemon's end of a Kafka feed: every partition of the topic, merged by event time.

The reader assigns all partitions to itself and keeps its place in the daemon's database. The offset
of the group is a hint for others: it tells lag monitors, and where a database without positions is
to begin.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from oodmon.brokers import consumer, reading
from oodmon.contracts import Delivery, Reader
from oodmon.errors import FeedError
from oodmon.feeds.kafka.lanes import Lane, Place, Spoilt, named

if TYPE_CHECKING:
    from kafka import KafkaConsumer  # type: ignore[import-untyped]

    from oodmon.feeds.kafka import Kafka

__all__ = ["KafkaReader"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_RECORDS: Final = 500  # taken from the client at a time
_STALL_SECONDS: Final = 5.0  # a partition that gives nothing for so long is passed by
_LOOK_SECONDS: Final = 1.0  # between two looks for a topic that is not there
_GROWTH_SECONDS: Final = 30.0  # between two looks for new partitions
_HINT_SECONDS: Final = 5.0  # between two commits of the group's offsets
_WAIT_MS: Final = 200
_GUESSED_BYTES: Final = 4096.0  # of a message, before the first was settled


class KafkaReader(Reader):
    """Merges all partitions and writers by event time. One thread at a time."""

    def __init__(self, options: Kafka) -> None:
        self._options = options
        self._closed = False
        self._consumer: KafkaConsumer | None = None
        self._places: dict[int, dict[str, Place]] = {}
        self._lanes: dict[int, Lane] = {}
        self._heads: list[tuple[int, str, int, str]] = []  # event time, name, partition, writer
        self._spoilt = Spoilt()
        self._looked_at = self._hinted_at = float("-inf")
        self._hinted: dict[int, int] = {}
        self._stalled: dict[int, int] = {}  # partition → where it gave nothing for too long
        self._received = self._received_bytes = 0
        self._mean = _GUESSED_BYTES

    @property
    def damaged_frames(self) -> int:
        """Messages that are no batches, and places where messages are missing."""
        return self._spoilt.messages

    def problems(self) -> Sequence[str]:
        """What cannot be read at present, and why."""
        found = [lane.problem for lane in self._lanes.values() if lane.problem]
        found += [f"{self._lanes[n].name}: the broker gives nothing" for n in self._stalled]
        if not self._lanes:
            found.append(f"topic {self._options.topic} is not there yet")
        return found

    def seek(self, positions: Mapping[str, str]) -> None:
        """Go on after these positions; those of other feeds are left alone."""
        self._check_open()
        places: dict[int, dict[str, Place]] = {}
        for name, text in positions.items():
            place = named(self._options.topic, name)
            if place is not None:
                places.setdefault(place[0], {})[place[1]] = Place.parse(text)
        self._hint()  # where nothing is committed, what was settled last is where to begin
        self._places = places
        self._forget()
        self._guard(self._find)

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        """Up to `limit` batches, by event time then partition."""
        self._check_open()
        deadline = time.monotonic() + timeout_seconds

        def ask() -> list[Delivery]:
            while True:
                self._find()
                found = self._take(limit)
                left = deadline - time.monotonic()
                if found or left <= 0 or self._closed:
                    return found
                if self._lanes:
                    self._receive(min(_WAIT_MS, max(1, int(left * 1000))))
                else:
                    time.sleep(min(left, _LOOK_SECONDS / 10))

        return self._guard(ask)

    def settle(self, positions: Mapping[str, str]) -> None:
        """Note how far it is; the group's offsets are told now and then."""
        self._check_open()
        for name, text in positions.items():
            place = named(self._options.topic, name)
            lane = self._lanes.get(place[0]) if place else None
            if lane is not None:
                lane.settled = max(lane.settled, Place.parse(text).low)
        if self._received:
            self._mean = self._received_bytes / self._received
        if time.monotonic() - self._hinted_at >= _HINT_SECONDS:
            self._hint()

    def backlog_bytes(self) -> int:
        """Messages that are not settled, times the mean size of those that came so far."""
        self._check_open()
        ends = self._guard(self._ends)
        left = sum(max(0, ends[n] - lane.settled) for n, lane in self._lanes.items())
        return round(left * self._mean)

    def close(self) -> None:
        """Leave a hint and the connection. Safe twice."""
        if not self._closed:
            self._hint()
            self._closed = True
            self._drop()

    # The connection ------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise FeedError(f"kafka topic {self._options.topic}: this reader is closed")

    def _guard(self, work: Callable[[], _T]) -> _T:
        return reading(f"kafka topic {self._options.topic}", work, self._drop)

    def _connected(self) -> KafkaConsumer:
        if self._consumer is None:
            options = self._options
            self._consumer = consumer(
                options,
                options.bootstrap_servers,
                options.group,
                options.timeout_seconds,
                options.max_message_bytes,
                # A look for new partitions sees what the client was told last.
                _GROWTH_SECONDS / 2.0,
            )
            self._assign(self._consumer)
        return self._consumer

    def _drop(self) -> None:
        client, self._consumer = self._consumer, None
        if client is not None:
            with suppress(Exception):
                client.close(autocommit=False, timeout_ms=1000)

    def _hint(self) -> None:
        """Tell the group's offsets; nothing depends on whether that succeeds."""
        self._hinted_at = time.monotonic()
        told = {n: lane.settled for n, lane in self._lanes.items()}
        if self._consumer is None or told == self._hinted:
            return
        from kafka.structs import OffsetAndMetadata  # type: ignore[import-untyped]

        offsets = {self._at(n): OffsetAndMetadata(low, "", -1) for n, low in told.items()}
        try:
            self._consumer.commit(offsets, timeout_ms=int(self._options.timeout_seconds * 1000))
            self._hinted = told
        except Exception as error:
            _log.debug("kafka: the group's offsets could not be told: %s", error)

    def _at(self, number: int) -> Any:
        from kafka import TopicPartition

        return TopicPartition(self._options.topic, number)

    # Where to begin ------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._lanes.clear()
        self._heads.clear()
        self._stalled.clear()
        self._hinted = {}
        self._looked_at = float("-inf")

    def _find(self) -> None:
        """Look for partitions that are not read yet."""
        pause = _GROWTH_SECONDS if self._lanes else _LOOK_SECONDS
        if time.monotonic() - self._looked_at < pause:
            return
        client = self._connected()  # what fails here is told at every call, not once a second
        self._looked_at = time.monotonic()
        numbers = client.partitions_for_topic(self._options.topic) or ()
        fresh = [number for number in sorted(numbers) if number not in self._lanes]
        if fresh:
            places = [self._at(number) for number in fresh]
            firsts = self._asked(client.beginning_offsets, places)
            lasts = self._asked(client.end_offsets, places)
            for at in places:
                self._lanes[at.partition] = self._begin(client, at, firsts[at], lasts[at])
            self._assign(client)

    def _assign(self, client: KafkaConsumer) -> None:
        if self._lanes:
            client.assign([self._at(number) for number in sorted(self._lanes)])
            for number, lane in self._lanes.items():
                client.seek(self._at(number), lane.fetched)

    def _begin(self, client: KafkaConsumer, at: Any, first: int, last: int) -> Lane:
        places = self._places.get(at.partition, {})
        lane = Lane(at.topic, at.partition, places, self._options.lookahead_batches, self._spoilt)
        if places:
            start = max(place.low for place in places.values())
        else:
            hint = client.committed(at, timeout_ms=int(self._options.timeout_seconds * 1000))
            start = first if hint is None or hint < 0 else int(hint)
        if start > last:
            self._spoilt.note(f"{lane.name}: ends at {last}, before {start}: it was made anew")
            lane.starts.clear()
            start = first
        elif start < first:
            if places:
                self._spoilt.note(f"{lane.name}: {start} to {first} are gone; they were too old")
            start = first
        lane.fetched = lane.settled = self._hinted[at.partition] = start
        return lane

    # Reading -------------------------------------------------------------------------------------

    def _asked(self, ask: Callable[..., Any], places: Iterable[Any]) -> Any:
        return ask(list(places), timeout_ms=int(self._options.timeout_seconds * 1000))

    def _ends(self) -> dict[int, int]:
        if not self._lanes:
            return {}
        client = self._connected()
        found = self._asked(client.end_offsets, (self._at(number) for number in self._lanes))
        return {at.partition: int(end) for at, end in found.items()}

    def _take(self, limit: int) -> list[Delivery]:
        ends = self._ends()
        self._gather(self._lanes.values(), ends)
        out: list[Delivery] = []
        while self._heads and len(out) < limit:
            _, name, number, writer = heapq.heappop(self._heads)
            lane = self._lanes[number]
            batch, place, following = lane.take(writer)
            out.append(Delivery(batch, name, str(place)))
            if following is not None:
                heapq.heappush(self._heads, (following, name, number, writer))
            try:
                self._gather((lane,), ends)
            except Exception:
                # What was taken must still be delivered; the next call meets the failure again.
                _log.debug("kafka: a poll ends early", exc_info=True)
                break
        return out

    def _gather(self, lanes: Iterable[Lane], ends: Mapping[int, int]) -> None:
        """Fill the windows with all that lies before the ends."""
        deadline = 0.0
        while True:
            for lane in lanes:
                for observed_at, writer in lane.admit():
                    name = f"{lane.name}/{writer}"
                    heapq.heappush(self._heads, (observed_at, name, lane.number, writer))
            missing = [
                lane
                for lane in lanes
                if not lane.ready(ends[lane.number])
                and self._stalled.get(lane.number) != lane.fetched
            ]
            if not missing:
                return
            before = self._received
            self._receive(_WAIT_MS)
            now = time.monotonic()
            if not deadline or self._received > before:
                deadline = now + _STALL_SECONDS
            elif now > deadline:
                for lane in missing:
                    self._stalled[lane.number] = lane.fetched

    def _receive(self, wait_ms: int) -> None:
        client = self._connected()
        full = [self._at(n) for n, lane in self._lanes.items() if len(lane.waiting) > _RECORDS]
        client.pause(*full)
        found = client.poll(timeout_ms=wait_ms, max_records=_RECORDS)
        client.resume(*full)
        for at, messages in found.items():
            lane = self._lanes[at.partition]
            lane.waiting.extend(messages)
            self._received += len(messages)
            self._received_bytes += sum(len(message.value or b"") for message in messages)
        for number, lane in self._lanes.items():
            position = client.position(self._at(number))
            if position is None or position == lane.fetched:
                continue
            if position < lane.fetched:
                self._spoilt.note(f"{lane.name}: begins anew at {position}, after {lane.fetched}")
                lane.starts.clear()
            lane.fetched = int(position)
            self._stalled.pop(number, None)
