"""A feed over a Kafka topic: agents on many hosts publish score batches, one daemon reads them.

One message is one batch. Each start of an agent is a *writer* with a name of its own and messages
numbered from 0, all in one partition of the topic; so the reader drops what a writer had to send
twice, and knows each writer's batches in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from oodmon.brokers import Access, choice, reader_problem
from oodmon.contracts import Feed, Stability
from oodmon.errors import ContractError
from oodmon.feeds.kafka.publish import KafkaWriter
from oodmon.feeds.kafka.topic import KafkaReader
from oodmon.registry import feeds

__all__ = ["Kafka", "KafkaReader", "KafkaWriter"]

_COMPRESSIONS: Final = ("", "gzip", "snappy", "lz4", "zstd")


@feeds.register("kafka")
@dataclass(frozen=True)
class Kafka(Access, Feed):
    """Score batches as messages on a topic: many writers, one reader for each database.

    Args:
        bootstrap_servers: ``host:port`` of some brokers.
        topic: one for each model; all daemons that watch that model may read it.
        group: where the reader leaves how far it came, for lag monitors and for a database that
            holds no positions yet. Daemons with databases of their own need groups of their own.
        compression: of what is sent: none (empty), gzip, snappy, lz4 or zstd.
        timeout_seconds: bound on connecting, on an acknowledgement, and on the writer's close.
        capacity_bytes: accepted by a writer and not yet acknowledged; beyond it batches are shed.
        max_message_bytes: of one batch; a writer sheds a longer one. Keep it within the topic's
            ``max.message.bytes``.
        lookahead_batches: of each partition, so many batches are put in order of event time.
        client_id, api_version, security_protocol, sasl_mechanism, username, password, ssl_cafile,
        ssl_certfile, ssl_keyfile, ssl_password: as in `oodmon.brokers.Access`.
    """

    bootstrap_servers: tuple[str, ...]
    topic: str = "oodmon.scores.v1"
    group: str = "oodmon"
    compression: str = ""
    timeout_seconds: float = 10.0
    capacity_bytes: int = 16 << 20
    max_message_bytes: int = 1_000_000
    lookahead_batches: int = 1024

    stability: ClassVar[Stability] = "beta"

    def __post_init__(self) -> None:
        problem = (
            choice("compression", self.compression, _COMPRESSIONS)
            or self.access_problem()
            or reader_problem(self.bootstrap_servers, self.topic, self.group, self.timeout_seconds)
        )
        for name, least in (
            ("max_message_bytes", 1024),
            ("capacity_bytes", self.max_message_bytes),
            ("lookahead_batches", 1),
        ):
            value = getattr(self, name)
            if value < least:
                problem = problem or f"{name}: expected at least {least}, found {value}"
        if problem:
            raise ContractError(f"feeds.kafka.{problem}")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Small options for the conformity checks, which need a broker at ``{address}``."""
        return (
            {
                "bootstrap_servers": ("{address}",),
                "topic": "oodmon.check",
                "capacity_bytes": 1 << 15,
                "max_message_bytes": 1 << 13,
                "timeout_seconds": 30.0,
            },
        )

    def writer(self, source: str) -> KafkaWriter:
        """One more writer; it connects when the first batch is there."""
        return KafkaWriter(self, source)

    def reader(self) -> KafkaReader:
        """A reader of the whole topic; it connects at `seek` or at the first `poll`."""
        return KafkaReader(self)
