"""Kafka over TLS and with logins: what gets through, and what is said where trust is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oodmon.brokers import Access, address
from oodmon.checks.sinks import event
from oodmon.errors import Rejected, RetryLater
from oodmon.secret import Secret
from oodmon.sinks.kafka import Kafka
from tests.servers.kafka import Broker, ids
from tests.servers.kafka_door import Certificates, Door, certificates, server_context
from tests.waiting import PATIENCE_SECONDS

LOGINS = {"monitor": "correct horse"}
VERSION = "2.3"  # the door does not speak for the broker's versions


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("other"))


@pytest.fixture
def door(kafka: Broker) -> Iterator[Callable[..., Door]]:
    opened: list[Door] = []

    def make(**options: Any) -> Door:
        opened.append(Door(kafka.address, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def sink_for(door: Door, topic: str, **options: Any) -> Kafka:
    return Kafka(
        (door.address,), topic, timeout_seconds=PATIENCE_SECONDS, api_version=VERSION, **options
    )


def refusal(sink: Kafka) -> str:
    """What `open` says; quick, and without the password."""
    began = time.monotonic()
    with pytest.raises(Rejected) as caught:
        sink.open()
    sink.close()
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert "correct horse" not in str(caught.value)
    assert "wr0ng" not in str(caught.value)
    return str(caught.value)


def test_tls(door: Callable[..., Door], kafka: Broker, files: Certificates) -> None:
    topic = kafka.topic()
    sink = sink_for(
        door(tls=server_context(files)), topic, security_protocol="SSL", ssl_cafile=files.ca
    )
    sink.send([event(0), event(1)])
    sink.close()
    assert ids(kafka.read_all(topic)) == [event(0).id, event(1).id]


def test_an_authority_that_nobody_vouches_for(
    door: Callable[..., Door], kafka: Broker, files: Certificates, strangers: Certificates
) -> None:
    sink = sink_for(
        door(tls=server_context(files)),
        kafka.topic(),
        security_protocol="SSL",
        ssl_cafile=strangers.ca,
    )
    assert "certificate verify failed" in refusal(sink)


def test_mutual_tls(
    door: Callable[..., Door], kafka: Broker, files: Certificates, strangers: Certificates
) -> None:
    asking = door(tls=server_context(files, ask_client=True))
    topic = kafka.topic()
    options = {"security_protocol": "SSL", "ssl_cafile": files.ca}
    mine = {"ssl_certfile": files.client, "ssl_keyfile": files.client_key}
    sink = sink_for(asking, topic, **options, **mine)
    sink.send([event(0)])
    sink.close()
    assert ids(kafka.read_all(topic)) == [event(0).id]
    assert "trust" in refusal(sink_for(asking, topic, **options))
    other = {"ssl_certfile": strangers.client, "ssl_keyfile": strangers.client_key}
    assert "trust" in refusal(sink_for(asking, topic, **options, **other))
    broken = {"ssl_certfile": files.client, "ssl_keyfile": strangers.client_key}
    assert "KEY_VALUES_MISMATCH" in refusal(sink_for(asking, topic, **options, **broken))


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_login(
    door: Callable[..., Door], kafka: Broker, files: Certificates, mechanism: str
) -> None:
    asking = door(tls=server_context(files), logins=LOGINS)
    topic = kafka.topic()
    options: dict[str, Any] = {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": files.ca,
        "sasl_mechanism": mechanism,
        "username": "monitor",
    }
    sink = sink_for(asking, topic, **options, password=Secret("correct horse"))
    sink.send([event(0)])
    sink.close()
    assert ids(kafka.read_all(topic)) == [event(0).id]
    said = refusal(sink_for(asking, topic, **options, password=Secret("wr0ng")))
    assert "login" in said
    assert "monitor" in said
    assert asking.refused
    # An event waits for the password to be put right; it is not given up.
    with pytest.raises(RetryLater, match="login"):
        sink_for(asking, topic, **options, password=Secret("wr0ng")).send([event(1)])


def test_options_that_cannot_be_meant() -> None:
    for options, word in (
        ({"ssl_cafile": "ca.pem"}, "ssl_cafile"),
        ({"security_protocol": "SSL", "ssl_keyfile": "k"}, "ssl_certfile"),
        ({"username": "me"}, "username"),
        ({"api_version": "new"}, "api_version"),
        ({"security_protocol": "TLS"}, "security_protocol"),
    ):
        assert word in Access(**options).access_problem()  # type: ignore[arg-type]
    assert not Access().access_problem()


def test_addresses() -> None:
    assert address("broker") == ("broker", 9092)
    assert address("broker:9093") == ("broker", 9093)
    assert address("[::1]:9093") == ("::1", 9093)
    assert address("::1") == ("::1", 9092)
    with pytest.raises(ValueError, match="host:port"):
        address("broker:kafka")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    access = Access(security_protocol="SSL", ssl_cafile=str(tmp_path / "no.pem"))
    assert "ssl_cafile" in access.missing_file()
