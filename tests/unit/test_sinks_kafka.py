"""The Kafka sink on a real broker: what arrives, and what becomes of a broker in trouble."""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from oodmon.checks.hostile import hostile
from oodmon.checks.sinks import event
from oodmon.errors import Rejected, RetryLater
from oodmon.records import Event
from oodmon.secret import Secret
from oodmon.sinks.kafka import Kafka
from oodmon.wire import cloud_event
from tests.servers.kafka import Broker, ids
from tests.servers.processes import free_port
from tests.waiting import PATIENCE_SECONDS, eventually


@pytest.fixture
def sink(kafka: Broker) -> Iterator[Kafka]:
    made = Kafka((kafka.address,), kafka.topic(), timeout_seconds=30.0)
    yield made
    made.close()


@pytest.fixture
def impatient(kafka: Broker) -> Iterator[Kafka]:
    made = Kafka((kafka.address,), kafka.topic(), timeout_seconds=2.0)
    yield made
    made.close()


def delivered(sink: Kafka, *events: Event) -> bool:
    """One try, as delivery makes it: a busy machine may be slower than the timeout."""
    try:
        sink.send(events)
    except RetryLater:
        return False
    return True


def test_structured_mode(sink: Kafka, kafka: Broker) -> None:
    sink.send([event(0), event(1)])
    first, second = kafka.read_all(sink.topic)
    assert json.loads(first.value) == cloud_event(event(0))
    assert json.loads(second.value)["id"] == event(1).id
    assert first.key == b"digits/1"
    assert dict(first.headers) == {"content-type": b"application/cloudevents+json"}


def test_binary_mode(sink: Kafka, kafka: Broker) -> None:
    binary = replace(sink, mode="binary", compression="gzip")
    binary.send([event(3)])
    binary.close()
    (record,) = kafka.read_all(sink.topic)
    headers = {name: value.decode() for name, value in record.headers}
    assert json.loads(record.value) == event(3).data
    assert headers["content-type"] == "application/json"
    assert headers["ce_specversion"] == "1.0"
    assert headers["ce_id"] == event(3).id
    assert headers["ce_type"] == "oodmon.alert.firing.v1"
    assert headers["ce_source"] == "/oodmon/digits/1"
    assert headers["ce_subject"] == event(3).subject
    assert headers["ce_time"] == "2023-11-14T22:13:23Z"
    assert record.key == b"digits/1"


def test_names_that_need_encoding_make_the_key_that_people_expect(
    sink: Kafka, kafka: Broker
) -> None:
    sink.send([replace(event(), source="/oodmon/my%20model/v%2F1")])
    assert kafka.read_all(sink.topic)[0].key == b"my model/v/1"


def test_an_event_that_is_too_large_is_rejected_before_any_is_sent(
    sink: Kafka, kafka: Broker
) -> None:
    huge = replace(event(1), data={"x": "a" * 2_000_000})
    with pytest.raises(Rejected, match=f"{huge.id}.*max_message_bytes"):
        sink.send([event(0), huge])
    sink.send([event(2)])
    assert ids(kafka.read_all(sink.topic)) == [event(2).id]


def test_an_event_that_is_no_json_is_rejected(sink: Kafka) -> None:
    with pytest.raises(Rejected, match="cannot be encoded"):
        sink.send([Event("1", "t", "/oodmon/m/1", "", 0, {"x": object()})])


@pytest.mark.parametrize("topic", ["two words", "", "a" * 250, ".."])
def test_a_topic_that_cannot_be_is_rejected(topic: str, sink: Kafka) -> None:
    wrong = replace(sink, topic=topic)
    with pytest.raises(Rejected, match="kafka"):
        wrong.send([event()])
    wrong.close()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "json"),
        ("compression", "rar"),
        ("security_protocol", "TLS"),
        ("sasl_mechanism", "MAGIC"),
        ("ssl_cafile", "/nowhere.pem"),
        ("bootstrap_servers", ()),
        ("bootstrap_servers", ("host:port",)),
    ],
)
def test_impossible_options_are_rejected(option: str, value: object, sink: Kafka) -> None:
    wrong = replace(sink, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(Rejected, match=option):
        wrong.open()


def test_impossible_options_that_only_the_client_knows_are_rejected(sink: Kafka) -> None:
    wrong = replace(sink, api_version="new")
    with pytest.raises(Rejected, match="kafka"):
        wrong.open()


def test_while_no_broker_listens_it_fails_at_once() -> None:
    addresses = (f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    sink = Kafka(addresses, timeout_seconds=PATIENCE_SECONDS)
    began = time.monotonic()
    with pytest.raises(RetryLater, match="no broker answers"):
        sink.send([event()])
    assert time.monotonic() - began < PATIENCE_SECONDS / 2


# kafka-python leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <ssl:ResourceWarning")
@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
@pytest.mark.parametrize("manner", ["is silent", "hangs up", "talks nonsense", "drips"])
def test_a_tls_handshake_that_does_not_end_is_left_in_time(manner: str, protocol: str) -> None:
    before = set(threading.enumerate())
    logging.disable()  # a log record would keep the error, and with it the socket
    try:
        with hostile(manner) as address:
            sink = Kafka((address,), timeout_seconds=0.3, security_protocol=protocol)
            began = time.monotonic()
            with pytest.raises(RetryLater, match="kafka"):
                sink.send([event()])
            assert time.monotonic() - began < PATIENCE_SECONDS / 2
            sink.close()
    finally:
        logging.disable(logging.NOTSET)
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_one_broker_of_several_is_enough(kafka: Broker) -> None:
    topic = kafka.topic()
    sink = Kafka((f"127.0.0.1:{free_port()}", kafka.address), topic, timeout_seconds=30.0)
    sink.send([event()])
    sink.close()
    assert ids(kafka.read_all(topic)) == [event().id]


def test_a_broker_that_hangs_is_left_in_time_and_nothing_is_lost(
    impatient: Kafka, kafka: Broker
) -> None:
    eventually(lambda: delivered(impatient, event(0)))
    kafka.freeze()
    began = time.monotonic()
    with pytest.raises(RetryLater, match="kafka"):
        impatient.send([event(1)])
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert not [t for t in threading.enumerate() if "network-thread" in t.name]
    kafka.thaw()
    eventually(lambda: delivered(impatient, event(1), event(2)))
    found = ids(kafka.read_all(impatient.topic))
    assert list(dict.fromkeys(found)) == [event(n).id for n in range(3)]


def test_a_broker_that_restarts_is_found_again(impatient: Kafka, kafka: Broker) -> None:
    eventually(lambda: delivered(impatient, event(0)))
    kafka.stop()
    for _ in range(2):
        with pytest.raises(RetryLater, match="kafka"):
            impatient.send([event(1)])
    kafka.start()
    eventually(lambda: delivered(impatient, event(1)))
    found = ids(kafka.read_all(impatient.topic))
    assert list(dict.fromkeys(found)) == [event(0).id, event(1).id]


def test_the_password_reaches_the_client_and_nothing_else(sink: Kafka) -> None:
    armed = replace(
        sink, security_protocol="SASL_SSL", username="me", password=Secret("pw-1"), ssl_cafile="ca"
    )
    settings = armed._settings(1.0)
    assert settings["sasl_plain_password"] == "pw-1"
    assert settings["sasl_mechanism"] == "PLAIN"
    assert settings["ssl_cafile"] == "ca"
    assert settings["acks"] == "all"
    assert settings["enable_idempotence"] is True
    assert "pw-1" not in repr(armed)


def test_a_login_by_sasl(sink: Kafka, kafka: Broker) -> None:
    login = replace(sink, security_protocol="SASL_PLAINTEXT", username="me", password=Secret("pw"))
    login.send([event()])
    login.close()
    assert ids(kafka.read_all(sink.topic)) == [event().id]
