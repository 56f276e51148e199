"""A retraining request as one acknowledged message on a Kafka topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oodmon.brokers import Access
from oodmon.contracts import Sink, Trigger, TriggerRequest
from oodmon.registry import triggers
from oodmon.secret import Secret
from oodmon.triggers import as_sink, request_event

__all__ = ["Kafka"]


@triggers.register("kafka")
@dataclass(frozen=True)
class Kafka(Access, Trigger):
    """Publish a CloudEvent `oodmon.retraining.requested.v1`, key ``model/version``.

    The options are those of the `kafka` sink, and so are acknowledgement and failures.

    Options:
        bootstrap_servers: ``host:port`` of some brokers.
        topic: where the requests go.
        mode, compression, timeout_seconds, max_message_bytes, client_id, api_version,
        security_protocol, sasl_mechanism, username, password, ssl_cafile, ssl_certfile,
        ssl_keyfile, ssl_password: as in the sink.
    """

    bootstrap_servers: tuple[str, ...]
    topic: str = "oodmon.retrain.v1"
    mode: str = "structured"
    compression: str = ""
    timeout_seconds: float = 10.0
    max_message_bytes: int = 1_000_000
    _sinks: list[Sink] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        plain = {"bootstrap_servers": ("{address}",), "timeout_seconds": 0.3}
        login = {"username": "u", "password": Secret("p"), "security_protocol": "SASL_PLAINTEXT"}
        return [plain, {**plain, **login, "mode": "binary"}]

    def open(self) -> None:
        """Connect; `RetryLater` while no broker answers."""
        if not self._sinks:
            sink = as_sink(self)
            sink.open()
            self._sinks.append(sink)

    def fire(self, request: TriggerRequest) -> None:
        """Publish the request and wait until all in-sync replicas have it."""
        self.open()
        self._sinks[0].send([request_event(request)])

    def close(self) -> None:
        """End the producer and its thread."""
        while self._sinks:
            self._sinks.pop().close()
