"""The agent's end of a Kafka feed: a bounded buffer, and a thread that gets it acknowledged.

The reader tells repeats from new batches by the writer's own numbers. That is exact because of how
the producer is used: it is idempotent and never gives up a message by itself, so what one producer
has put into the partition is a gapless run. When something fails or takes too long, the producer is
ended and another one begins at the first message that was not acknowledged. So whatever reaches the
partition late, each number comes there for the first time only after the number before it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
import zlib
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from oodmon.brokers import built, reach
from oodmon.contracts import Writer
from oodmon.errors import WireError
from oodmon.records import ScoreBatch
from oodmon.wire import encode_batch

if TYPE_CHECKING:
    from kafka import KafkaProducer  # type: ignore[import-untyped]

    from oodmon.feeds.kafka import Kafka

__all__ = ["NUMBER", "WRITER", "KafkaWriter"]

_log = logging.getLogger(__name__)

WRITER: Final = "oodmon_writer"
NUMBER: Final = "oodmon_number"
"""Headers of a message: the writer's name, and the number of the message from 0."""

_CONTENT_TYPE: Final = b"application/vnd.oodmon.score-batch"
_IN_FLIGHT: Final = 256
_NEVER_MS: Final = 2**31 - 1
_FIRST_WAIT_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 0.5
_OVERHEAD_BYTES: Final = 512  # of headers and framing around a message


class KafkaWriter(Writer):
    """Any thread may call it; a forked child's `put` sheds. What waits here ends with the process.

    Attributes:
        name: of this writer; no other one ever has it.
        shed: batches that `put` refused.
        given_up: batches that the broker will never take; the daemon sees a gap and counts it too.
        last_failure: why the latest attempt failed, or "".
    """

    def __init__(self, options: Kafka, source: str) -> None:
        clean = re.sub(r"[^A-Za-z0-9_.-]", "_", source)[:80] or "agent"
        self.name = f"{clean}-{secrets.token_hex(4)}"
        self.shed = 0
        self.given_up = 0
        self.last_failure = ""
        self._options = options
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, bytes, bytes]] = deque()  # number, key, frame
        self._bytes = 0
        self._next = 0
        self._closed = False
        self._give_up_at = float("inf")
        self._thread: threading.Thread | None = None
        # Of the thread alone:
        self._producer: KafkaProducer | None = None
        self._sent: deque[Any] = deque()  # futures of the first messages of the queue
        self._partition = -1
        self._careful = False
        self._failures = 0

    def put(self, batch: ScoreBatch) -> bool:
        """Buffer one batch; False where it is too long or the buffer is full. Never waits."""
        if self._process != os.getpid():  # before the lock: a fork may have copied it while taken
            self.shed += 1
            return False
        try:
            frame = encode_batch(batch)
        except WireError as error:
            self.last_failure = str(error)
            frame = b""
        key = f"{batch.model}/{batch.version}".encode(errors="replace")
        fits = 0 < len(frame) <= self._options.max_message_bytes - _OVERHEAD_BYTES - len(key)
        with self._changed:
            room = self._bytes + len(frame) <= self._options.capacity_bytes
            if not fits or not room or self._closed:
                self.shed += 1
                return False
            self._queue.append((self._next, key, frame))
            self._next += 1
            self._bytes += len(frame)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="oodmon-kafka-feed", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return True

    def close(self) -> None:
        """Wait until all is acknowledged, at most `timeout_seconds`. Safe twice."""
        if self._process != os.getpid():
            return  # the thread and its connections belong to the parent
        with self._changed:
            if not self._closed:
                self._closed = True
                self._give_up_at = time.monotonic() + self._options.timeout_seconds
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(self._options.timeout_seconds + 4 * _CLOSE_SECONDS)

    # The thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._step()
                except Exception as error:
                    self._fail(error)
        finally:
            self._end()

    def _wait(self) -> bool:
        """Wait for something to do; False when nothing more is to be done."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._queue and time.monotonic() < self._give_up_at:
                return True
            if self._queue:
                _log.warning(
                    "kafka feed: %d batches were not acknowledged: %s",
                    len(self._queue),
                    self.last_failure or "the time was over",
                )
            return False

    def _step(self) -> None:
        """Send what is new, wait for the oldest to be acknowledged, forget what is."""
        if self._producer is None:
            self._connect()
        assert self._producer is not None  # noqa: S101  for the type checker
        with self._changed:
            window = 1 if self._careful else _IN_FLIGHT
            fresh = [self._queue[n] for n in range(len(self._sent), min(window, len(self._queue)))]
        for number, key, frame in fresh:
            headers = [
                (WRITER, self.name.encode()),
                (NUMBER, str(number).encode()),
                ("content-type", _CONTENT_TYPE),
            ]
            self._sent.append(
                self._producer.send(self._options.topic, frame, key, headers, self._partition)
            )
        self._sent[0].get(timeout=self._options.timeout_seconds)
        while self._sent and self._sent[0].is_done and self._sent[0].succeeded():
            self._sent.popleft()
            with self._changed:
                self._bytes -= len(self._queue.popleft()[2])
        self._careful, self._failures, self.last_failure = False, 0, ""

    def _fail(self, error: Exception) -> None:
        from kafka import errors

        hopeless = (
            errors.MessageSizeTooLargeError,
            errors.RecordListTooLargeError,
            errors.InvalidRecordError,
        )
        self.last_failure = f"{type(error).__name__}: {error}"
        if not self._failures:
            _log.warning("kafka feed: nothing can be sent at present: %s", self.last_failure)
        self._failures += 1
        self._end()
        if self._careful and isinstance(error, hopeless):
            # It was alone on its way, so it is this message that the broker will never take.
            self.given_up += 1
            with self._changed:
                self._bytes -= len(self._queue.popleft()[2])
            return
        self._careful = True
        wait = _FIRST_WAIT_SECONDS * 2.0 ** min(self._failures - 1, 10)
        with self._changed:
            end = time.monotonic() + min(wait, _LONGEST_WAIT_SECONDS)
            while (left := min(end, self._give_up_at) - time.monotonic()) > 0:
                self._changed.wait(left)

    def _connect(self) -> None:
        from kafka import KafkaProducer

        options = self._options
        reach(options, options.bootstrap_servers, options.timeout_seconds)
        millis = max(100, int(options.timeout_seconds * 1000))
        self._producer = built(
            KafkaProducer,
            bootstrap_servers=list(options.bootstrap_servers),
            acks="all",
            enable_idempotence=True,
            compression_type=options.compression or None,
            bootstrap_timeout_ms=millis,
            max_block_ms=millis,
            request_timeout_ms=max(50, millis // 2),
            delivery_timeout_ms=_NEVER_MS,
            max_request_size=options.max_message_bytes,
            reconnect_backoff_max_ms=1000,
            metrics_enabled=False,
            **options.settings(),
        )
        if self._partition < 0:  # once: a topic that grows must not part what is in order
            numbers = sorted(self._producer.partitions_for(options.topic) or (0,))
            self._partition = numbers[zlib.crc32(self.name.encode()) % len(numbers)]

    def _end(self) -> None:
        """End the producer; nothing that it holds is sent any more."""
        producer, self._producer = self._producer, None
        self._sent.clear()
        if producer is None:
            return
        with suppress(Exception):
            producer._sender.force_close()
        with suppress(Exception):
            producer.close(timeout=_CLOSE_SECONDS)
