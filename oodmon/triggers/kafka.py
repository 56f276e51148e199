"""A retraining request as one acknowledged message on a Kafka topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oodmon.brokers import Access
from oodmon.registry import triggers
from oodmon.secret import Secret
from oodmon.triggers import Requesting

__all__ = ["Kafka"]


@triggers.register("kafka")
@dataclass(frozen=True)
class Kafka(Access, Requesting):
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

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        plain = {"bootstrap_servers": ("{address}",), "timeout_seconds": 0.3}
        login = {"username": "u", "password": Secret("p"), "security_protocol": "SASL_PLAINTEXT"}
        return [plain, {**plain, **login, "mode": "binary"}]
