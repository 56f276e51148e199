"""Labels that come late, from a Kafka topic: messages in the order of their partitions.

It is no feed of scores: what is in a message is the reader's affair, and so is where it stands. The
offset of the group is a hint for lag monitors, and for a database without positions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from oodmon.brokers import Access, consumer, knock, reader_problem, reading
from oodmon.errors import ContractError, FeedError

__all__ = ["LabelReader", "LabelTopic", "Message"]

_LOOK_SECONDS: Final = 1.0  # between two looks for a topic that is not there
_GROWTH_SECONDS: Final = 30.0  # between two looks for new partitions
_MILLION: Final = 1_000_000


class Message(NamedTuple):
    """One message.

    Attributes:
        partition: ``topic/number``.
        offset: of the message in it.
        at: when it was sent, ns UTC, as the broker says; 0 where it does not.
        value: may be empty.
    """

    partition: str
    offset: int
    at: int
    value: bytes


@dataclass(frozen=True, kw_only=True)
class LabelTopic(Access):
    """Where labels come from.

    Args:
        bootstrap_servers: ``host:port`` of some brokers.
        topic: of labels alone. Messages of one sample belong in one partition, so let its id be
            the key: a later label takes the place of an earlier one.
        group: where the daemon notes how far it came. Daemons with databases of their own need
            groups of their own.
        timeout_seconds: bound on connecting and on each request.
        max_message_bytes: of one message, within the topic's ``max.message.bytes``.
        client_id, api_version, security_protocol, sasl_mechanism, username, password, ssl_cafile,
        ssl_certfile, ssl_keyfile, ssl_password: as in `oodmon.brokers.Access`.
    """

    bootstrap_servers: tuple[str, ...]
    topic: str = "oodmon.labels.v1"
    group: str = "oodmon-labels"
    timeout_seconds: float = 10.0
    max_message_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        problem = self.access_problem() or reader_problem(
            self.bootstrap_servers, self.topic, self.group, self.timeout_seconds
        )
        if self.max_message_bytes < 1:
            problem = problem or f"max_message_bytes: {self.max_message_bytes} is not at least 1"
        if problem:
            raise ContractError(problem)

    def reader(self) -> LabelReader:
        """It connects at the first `poll`."""
        return LabelReader(self)


class LabelReader:
    """Reads every partition of the topic. One thread at a time; any failure is a `FeedError`.

    After one it begins again at what `seek` or `settle` said last.
    """

    def __init__(self, options: LabelTopic) -> None:
        self._options = options
        self._client: Any = None
        self._next: dict[int, int] = {}
        self._reading: frozenset[int] = frozenset()
        self._looked_at = float("-inf")
        self._heard_at = 0.0
        self.gone: list[str] = []

    def seek(self, positions: Mapping[str, str]) -> None:
        """Go on at these offsets; partitions of other topics are left alone."""
        self._next = {}
        for name, text in positions.items():
            topic, _, number = name.rpartition("/")
            if topic == self._options.topic and number.isdigit() and text.isdigit():
                self._next[int(number)] = int(text)
        self._drop()

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Message]:
        """Up to so many messages, each partition's in order; none where none came in time.

        `FeedError` where the topic is not there, which may pass.
        """
        what = f"labels topic {self._options.topic}"
        return reading(what, lambda: self._poll(limit, timeout_seconds), self._drop)

    def settle(self, positions: Mapping[str, str]) -> None:
        """These are stored; tell the group, which may fail without harm."""
        from kafka import TopicPartition  # type: ignore[import-untyped]
        from kafka.structs import OffsetAndMetadata  # type: ignore[import-untyped]

        offsets = {}
        for name, text in positions.items():
            number = int(name.rpartition("/")[2])
            self._next[number] = int(text)
            at = TopicPartition(self._options.topic, number)
            offsets[at] = OffsetAndMetadata(int(text), "", -1)
        with suppress(Exception):
            self._client.commit(offsets, timeout_ms=int(self._options.timeout_seconds * 1000))

    def close(self) -> None:
        """Safe twice."""
        self._drop()

    def _poll(self, limit: int, timeout_seconds: float) -> Sequence[Message]:
        if self._client is None:
            options = self._options
            self._heard_at = time.monotonic()
            self._client = consumer(
                options,
                options.bootstrap_servers,
                options.group,
                options.timeout_seconds,
                options.max_message_bytes,
                _GROWTH_SECONDS / 2.0,
            )
        self._look()
        if not self._reading:
            raise FeedError(f"labels topic {self._options.topic} is not there yet")
        found = self._client.poll(timeout_ms=int(timeout_seconds * 1000), max_records=limit)
        now = time.monotonic()
        if found:
            self._heard_at = now
        elif now - self._heard_at >= self._options.timeout_seconds:
            # The client tries silently to reach a broker that is gone, and says that nothing came.
            self._heard_at = now
            knock(self._options, self._options.bootstrap_servers, self._options.timeout_seconds)
        return [
            Message(
                f"{at.topic}/{at.partition}",
                record.offset,
                max(record.timestamp or 0, 0) * _MILLION,
                record.value or b"",
            )
            for at, records in found.items()
            for record in records
        ]

    def _look(self) -> None:
        """For partitions that are not read yet."""
        from kafka import TopicPartition

        pause = _GROWTH_SECONDS if self._reading else _LOOK_SECONDS
        if time.monotonic() - self._looked_at < pause:
            return
        self._looked_at = time.monotonic()
        client, topic = self._client, self._options.topic
        numbers = frozenset(client.partitions_for_topic(topic) or ())
        fresh = [TopicPartition(topic, number) for number in sorted(numbers - self._reading)]
        if not fresh:
            return
        places = {at: client.position(at) for at in client.assignment()}
        client.assign([*places, *fresh])
        firsts, lasts = client.beginning_offsets(fresh), client.end_offsets(fresh)
        for at in fresh:
            places[at] = self._begin(at, firsts[at], lasts[at])
        for at, place in places.items():
            client.seek(at, place)
        self._reading |= numbers

    def _begin(self, at: Any, first: int, last: int) -> int:
        known = self._next.get(at.partition)
        if known is None:
            millis = int(self._options.timeout_seconds * 1000)
            hint = self._client.committed(at, timeout_ms=millis)
            known = first if hint is None or hint < 0 else int(hint)
        if first <= known <= last:
            return known
        why = "it was made anew" if known > last else "they were too old"
        self.gone.append(f"{at.topic}/{at.partition}: labels from {known} are gone; {why}")
        return first

    def _drop(self) -> None:
        client, self._client = self._client, None
        self._reading, self._looked_at = frozenset(), float("-inf")
        if client is not None:
            with suppress(Exception):
                client.close(autocommit=False, timeout_ms=1000)
