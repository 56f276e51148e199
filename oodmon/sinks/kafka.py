"""Events as CloudEvents on a Kafka topic, each acknowledged by all replicas."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from oodmon.brokers import Access, choice, is_refusal, reach
from oodmon.contracts import Sink
from oodmon.errors import Rejected, RetryLater, WireError
from oodmon.records import Event
from oodmon.registry import sinks
from oodmon.secret import Secret
from oodmon.wire import cloud_event

if TYPE_CHECKING:
    from kafka import KafkaProducer  # type: ignore[import-untyped]

__all__ = ["Kafka"]

_log = logging.getLogger(__name__)

_MODES: Final = ("structured", "binary")
_COMPRESSIONS: Final = ("", "gzip", "snappy", "lz4", "zstd")
_RECORD_OVERHEAD_BYTES: Final = 512
"""Allowance for the record and batch framing around key, value and headers."""
_CLOSE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class _Message:
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]

    @property
    def size(self) -> int:
        framed = sum(len(name) + len(value) for name, value in self.headers)
        return len(self.key) + len(self.value) + framed + _RECORD_OVERHEAD_BYTES


class _Network:
    """The producer's network client, kept so that it connects in time and is closed in every case.

    The client's own timeout does not cover the TLS handshake, and a producer that cannot be built
    leaves its client open.

    Args:
        seconds: bound on connecting.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._clients: list[Any] = []
        self.connected = False

    def build(self, **settings: Any) -> Any:
        """What the producer calls to make its client."""
        from kafka.net.compat import KafkaNetClient  # type: ignore[import-untyped]

        client = KafkaNetClient(**settings)
        self._clients.append(client)
        client._net.call_later(self._seconds, self._give_up)
        return client

    def _give_up(self) -> None:
        """Fail what still connects; runs in the client's own event loop."""
        from kafka.errors import KafkaTimeoutError  # type: ignore[import-untyped]

        if not self.connected:
            for client in self._clients:
                for connection in list(client._manager._conns.values()):
                    connection.close(KafkaTimeoutError(f"not connected in {self._seconds:.3g} s"))

    def close(self) -> None:
        """Close the client; again is nothing."""
        while self._clients:
            try:
                self._clients.pop().close()
            except Exception:
                _log.exception("kafka: the network client did not close")


@dataclass(frozen=True, slots=True)
class _Connection:
    producer: KafkaProducer
    network: _Network

    def end(self) -> None:
        """Close the producer within about a second, whatever state it is in."""
        # `KafkaProducer.close` gives up, its thread still running, where its flush fails. Forcing
        # the sender to abort what it holds makes the second close succeed.
        from kafka.errors import KafkaError

        try:
            self.producer.close(timeout=_CLOSE_SECONDS)
        except KafkaError:
            self.producer._sender.force_close()
            self.producer._sender.join(_CLOSE_SECONDS)
            with suppress(KafkaError):
                self.producer.close(timeout=_CLOSE_SECONDS)
        except Exception:
            _log.exception("kafka: the producer did not close")
        self.producer._sender.join(_CLOSE_SECONDS)
        self.network.close()


@sinks.register("kafka")
@dataclass(frozen=True)
class Kafka(Access, Sink):
    """One message per event, key ``model/version``, so that the order holds per model.

    The producer is idempotent and waits for all in-sync replicas; `send` returns when every event
    is acknowledged. After any error the producer is thrown away and built anew: an authorisation
    error would fail all its later messages, and a sender whose leader is unknown can spin for
    ever. What was acknowledged before such an error is sent again; consumers key by event id.

    Options:
        bootstrap_servers: ``host:port`` of some brokers.
        topic: where the events go; other kinds of events can have a sink of their own.
        mode: ``structured`` (the CloudEvent is the JSON value) or ``binary`` (attributes are
            ``ce_`` headers, the value is the data).
        compression: none (empty), gzip, snappy, lz4 or zstd; all but gzip need their library.
        timeout_seconds: bound on connecting, and again on sending one batch.
        max_message_bytes: larger events are rejected before anything is sent; keep it at or below
            the topic's ``max.message.bytes``.
        client_id, api_version, security_protocol, sasl_mechanism, username, password, ssl_cafile,
        ssl_certfile, ssl_keyfile, ssl_password: as in `oodmon.brokers.Access`.
    """

    bootstrap_servers: tuple[str, ...]
    topic: str = "oodmon.alerts.v1"
    mode: str = "structured"
    compression: str = ""
    timeout_seconds: float = 10.0
    max_message_bytes: int = 1_000_000
    # Empty or one connection: what is open lives outside the options.
    _connections: list[_Connection] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        plain = {"bootstrap_servers": ("{address}",), "timeout_seconds": 0.3}
        login = {"username": "u", "password": Secret("p"), "security_protocol": "SASL_PLAINTEXT"}
        return [plain, {**plain, **login, "mode": "binary"}]

    def open(self) -> None:
        """Build the producer, which connects; quick to fail while no broker listens."""
        if not self._connections:
            self._check()
            self._connections.append(self._connect())

    def send(self, events: Sequence[Event]) -> None:
        """Send all and wait until all are acknowledged."""
        if not events:
            return
        messages = [self._message(event) for event in events]
        try:
            self.open()
        except Rejected as error:
            # It is the connection and not the events: they wait until it is put right.
            raise RetryLater(str(error)) from error
        try:
            self._deliver(self._connections[0].producer, messages)
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            _fail(error)

    def close(self) -> None:
        """End the producer and its thread; `send` has left nothing behind to flush."""
        while self._connections:
            self._connections.pop().end()

    def _message(self, event: Event) -> _Message:
        try:
            envelope = cloud_event(event)
            message = (_binary if self.mode == "binary" else _structured)(envelope)
        except (WireError, ValueError) as error:
            raise Rejected(f"kafka: event {event.id} cannot be encoded: {error}") from error
        if message.size > self.max_message_bytes:
            raise Rejected(
                f"kafka: event {event.id} is {message.size} bytes, more than max_message_bytes"
            )
        return message

    def _deliver(self, producer: KafkaProducer, messages: Sequence[_Message]) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        futures = [
            producer.send(self.topic, message.value, message.key, list(message.headers))
            for message in messages
        ]
        for future in futures:
            future.get(timeout=max(0.0, deadline - time.monotonic()))

    def _check(self) -> None:
        problem = (
            choice("mode", self.mode, _MODES)
            or choice("compression", self.compression, _COMPRESSIONS)
            or self.access_problem()
        )
        if problem:
            raise Rejected(f"kafka: {problem}")
        if not self.bootstrap_servers:
            raise Rejected("kafka: bootstrap_servers is empty")

    def _connect(self) -> _Connection:
        try:
            from kafka import KafkaProducer
        except ImportError as error:
            raise Rejected("kafka: the client is missing; pip install 'oodmon[kafka]'") from error
        deadline = time.monotonic() + self.timeout_seconds
        self._reach()
        left = max(0.1, deadline - time.monotonic())
        network = _Network(left)
        try:
            producer = KafkaProducer(**self._settings(left), kafka_client=network.build)
        except Exception as error:
            network.close()
            _fail(error, building=True)
        network.connected = True
        return _Connection(producer, network)

    def _reach(self) -> None:
        try:
            reach(self, self.bootstrap_servers, self.timeout_seconds)
        except ConnectionError as error:
            if is_refusal(error):
                raise Rejected(
                    f"kafka: broker and sink do not trust each other; {error}"
                ) from error
            raise RetryLater(f"kafka: no broker answers; {error}") from error
        except (ValueError, OSError) as error:  # an address or a certificate file of our own
            raise Rejected(f"kafka: {error}") from error

    def _settings(self, connect_seconds: float) -> dict[str, Any]:
        millis = max(100, int(self.timeout_seconds * 1000))
        return {
            "bootstrap_servers": list(self.bootstrap_servers),
            "acks": "all",
            "enable_idempotence": True,
            "max_in_flight_requests_per_connection": 5,
            "compression_type": self.compression or None,
            "bootstrap_timeout_ms": int(connect_seconds * 1000),
            "max_block_ms": millis,
            "request_timeout_ms": max(50, millis // 2),
            "delivery_timeout_ms": millis,
            "max_request_size": self.max_message_bytes,
            "reconnect_backoff_max_ms": 1000,
            "metrics_enabled": False,
            **self.settings(),
        }


def _structured(envelope: Mapping[str, Any]) -> _Message:
    value = json.dumps(envelope, allow_nan=False).encode()
    return _Message(_key(envelope), value, (("content-type", b"application/cloudevents+json"),))


def _binary(envelope: Mapping[str, Any]) -> _Message:
    value = json.dumps(envelope["data"], allow_nan=False).encode()
    attributes = tuple(
        (f"ce_{name}", str(held).encode(errors="replace"))
        for name, held in envelope.items()
        if name not in ("data", "datacontenttype")
    )
    content_type = ("content-type", str(envelope["datacontenttype"]).encode())
    return _Message(_key(envelope), value, (content_type, *attributes))


def _key(envelope: Mapping[str, Any]) -> bytes:
    return str(envelope["partitionkey"]).encode(errors="replace")


def _fail(error: Exception, *, building: bool = False) -> NoReturn:
    """Turn what the client raised into the two failures of a sink."""
    from kafka import errors

    if isinstance(error, RetryLater | Rejected):
        raise error
    hopeless: tuple[type[Exception], ...] = (
        errors.MessageSizeTooLargeError,
        errors.RecordListTooLargeError,
        errors.InvalidTopicError,
        errors.InvalidRecordError,
        errors.InvalidRequiredAcksError,
        errors.KafkaConfigurationError,
        errors.UnsupportedVersionError,
        # The client raises no error of its own for a topic that has no legal name.
        ValueError,
        TypeError,
        AssertionError,
    )
    if building:
        # A codec whose library is missing.
        hopeless += (RuntimeError, ImportError)
    why = f"kafka: {error}" if isinstance(error, errors.KafkaError) else f"kafka: {error!r}"
    if isinstance(error, hopeless):
        raise Rejected(why) from error
    raise RetryLater(why) from error
