"""The Kafka feed on a real broker: nothing lost, nothing twice, one order, whatever breaks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np
import pytest

from oodmon.contracts import Delivery
from oodmon.errors import ContractError, FeedError
from oodmon.feeds.kafka import Kafka
from oodmon.feeds.kafka.publish import NUMBER, WRITER
from oodmon.records import ScoreBatch
from oodmon.secret import Secret
from oodmon.wire import encode_batch
from tests.servers.kafka import Broker
from tests.servers.kafka_door import Door, certificates, server_context
from tests.servers.processes import free_port
from tests.waiting import PATIENCE_SECONDS, eventually

logging.getLogger("kafka").setLevel(logging.CRITICAL)


def batch(source: str, sequence: int, at: int = 0, rows: int = 2) -> ScoreBatch:
    scores = {"msp": np.full(rows, sequence, np.float32)}
    return ScoreBatch("m", "1", source, sequence, at or 1 + sequence, scores)


@pytest.fixture
def feed(kafka: Broker) -> Kafka:
    return Kafka((kafka.address,), kafka.topic(), timeout_seconds=30.0, group="g")


def partitions(broker: Broker, topic: str, count: int) -> None:
    from kafka.admin import KafkaAdminClient, NewTopic  # type: ignore[import-untyped]

    with closing(KafkaAdminClient(bootstrap_servers=broker.address)) as admin:
        admin.create_topics([NewTopic(topic, count, 1)])


def read(feed: Kafka, count: int, positions: dict[str, str], limit: int = 7) -> list[Delivery]:
    got: list[Delivery] = []
    with closing(feed.reader()) as reader:
        reader.seek(positions)
        while len(got) < count and (found := reader.poll(limit, PATIENCE_SECONDS)):
            got += found
    return got


def seen(deliveries: Sequence[Delivery]) -> list[tuple[str, int]]:
    return [(d.batch.source, d.batch.sequence) for d in deliveries]


def send(feed: Kafka, messages: Sequence[tuple[str, int, bytes]], partition: int = 0) -> None:
    """Messages as a writer makes them, but whichever we like."""
    from kafka import KafkaProducer  # type: ignore[import-untyped]

    with closing(KafkaProducer(bootstrap_servers=list(feed.bootstrap_servers))) as producer:
        for writer, number, value in messages:
            headers = [(WRITER, writer.encode()), (NUMBER, str(number).encode())] if writer else []
            producer.send(feed.topic, value, headers=headers, partition=partition).get(
                PATIENCE_SECONDS
            )


def test_a_restart_anywhere_goes_on_in_the_same_order(feed: Kafka, kafka: Broker) -> None:
    partitions(kafka, feed.topic, 3)
    feed = replace(feed, lookahead_batches=4)  # less than there is: the window decides the order
    rng = np.random.default_rng(3)
    writers = {f"a{n}": feed.writer(f"a{n}") for n in range(5)}
    clock = dict.fromkeys(writers, 0)
    for _ in range(60):
        name = f"a{rng.integers(5)}"
        clock[name] += int(rng.integers(1, 9))
        assert writers[name].put(batch(name, clock[name], clock[name]))
    for writer in writers.values():
        writer.close()
    whole = read(feed, 60, {})
    assert len(set(seen(whole))) == 60
    for name in writers:
        own = [sequence for source, sequence in seen(whole) if source == name]
        assert own == sorted(own)
    for cut in (1, 13, 30, 59):
        positions = {d.partition: d.position for d in whole[:cut]}
        rest = read(feed, 60 - cut, positions, limit=5)
        assert [(d.partition, d.position) for d in rest] == [
            (d.partition, d.position) for d in whole[cut:]
        ]


def test_what_was_sent_twice_is_delivered_once(feed: Kafka) -> None:
    frames = [encode_batch(batch("a", n)) for n in range(6)]
    order = [0, 1, 2, 1, 2, 3, 3, 0, 4, 5]  # two producers of one writer, overlapping
    send(feed, [("a-1", n, frames[n]) for n in order])
    whole = read(feed, 6, {})
    assert [sequence for _, sequence in seen(whole)] == list(range(6))
    third = whole[2]
    rest = read(feed, 3, {third.partition: third.position})
    assert [sequence for _, sequence in seen(rest)] == [3, 4, 5]


def test_messages_that_are_no_batches_are_counted_and_passed_over(feed: Kafka) -> None:
    good = [encode_batch(batch("a", n)) for n in range(3)]
    send(feed, [("a-1", 0, good[0]), ("a-1", 1, b"no frame"), ("", 0, good[1]), ("a-1", 2, b"")])
    send(feed, [("a-1", 3, good[2])])
    with closing(feed.reader()) as reader:
        reader.seek({})
        got = [*reader.poll(10, PATIENCE_SECONDS)]
        assert [d.batch.sequence for d in got] == [0, 1, 2], "one was from a foreign producer"
        assert reader.damaged_frames == 2


def test_a_newer_schema_stops_its_writer_alone_and_is_not_lost(feed: Kafka) -> None:
    frames = [encode_batch(batch("a", n)) for n in range(3)]
    length = int.from_bytes(frames[1][:8], "little")
    header = frames[1][8 : 8 + length].replace(b"score_batch/1", b"score_batch/7")
    newer = frames[1][:8] + header + frames[1][8 + length :]
    send(feed, [("a-1", 0, frames[0]), ("a-1", 1, newer), ("a-1", 2, frames[2])])
    send(feed, [("b-1", 0, encode_batch(batch("b", 9)))])
    with closing(feed.reader()) as reader:
        reader.seek({})
        got = [*reader.poll(10, PATIENCE_SECONDS)]
        assert seen(got) == [("a", 0), ("b", 9)]
        assert "install" in reader.problems()[0]
        assert reader.damaged_frames == 0
        reader.settle({d.partition: d.position for d in got})
        assert reader.backlog_bytes() > 0
    # After the upgrade the reader begins at the blocked message again.
    assert min(int(d.position.split(":")[1]) for d in got) <= 1
    again = read(feed, 0, {d.partition: d.position for d in got})
    assert again == []


def test_an_acknowledgement_that_is_lost_doubles_nothing(kafka: Broker) -> None:
    door = Door(kafka.address)
    feed = Kafka((kafka.address,), kafka.topic(), timeout_seconds=30.0, api_version="2.3")
    writer = replace(feed, bootstrap_servers=(door.address,)).writer("a")
    try:
        for n in range(120):
            if n % 30 == 10:
                door.cuts += 1
            while not writer.put(batch("a", n)):
                time.sleep(0.01)
            time.sleep(0.002)
        writer.close()
        assert not door.cuts, "no acknowledgement was lost: the test did nothing"
    finally:
        door.close()
    assert [sequence for _, sequence in seen(read(feed, 120, {}))] == list(range(120))
    assert not writer.given_up


def test_while_the_broker_is_away_batches_wait_and_then_are_shed(
    feed: Kafka, kafka: Broker
) -> None:
    small = replace(feed, capacity_bytes=16_384, max_message_bytes=8_192, timeout_seconds=2.0)
    writer = small.writer("a")
    assert writer.put(batch("a", 0))
    eventually(lambda: not writer._queue)
    got: list[Delivery] = []
    with closing(small.reader()) as reader:

        def come(count: int) -> bool:
            with suppress(FeedError):  # the broker is away, or slower than the timeout
                got.extend(reader.poll(50, 0.5))
            return len(got) >= count

        with suppress(FeedError):
            reader.seek({})
        eventually(lambda: come(1))
        kafka.stop()
        taken = 1
        while writer.put(batch("a", taken)):
            taken += 1
            assert taken < 1000
        assert writer.shed == 1
        with pytest.raises(FeedError):
            reader.poll(5, 0.1)
        kafka.start()
        eventually(lambda: come(taken))
        assert [d.batch.sequence for d in got] == list(range(taken))
    writer.close()


def test_a_writer_without_a_broker_neither_waits_nor_hangs() -> None:
    feed = Kafka((f"127.0.0.1:{free_port()}",), timeout_seconds=0.5)
    writer = feed.writer("a")
    began = time.monotonic()
    for n in range(500):
        assert writer.put(batch("a", n))
    writer.close()
    # Had each waited for the broker, it were four minutes.
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert "ConnectionError" in writer.last_failure
    with closing(feed.reader()) as reader, pytest.raises(FeedError, match=r"127\.0\.0\.1"):
        reader.seek({})


def test_a_batch_that_is_too_long_is_shed(feed: Kafka) -> None:
    writer = replace(feed, max_message_bytes=1024).writer("a")
    assert not writer.put(batch("a", 0, rows=1000))
    assert writer.shed == 1
    writer.close()


def test_a_topic_that_is_not_there_yet_is_waited_for(feed: Kafka) -> None:
    with closing(feed.reader()) as reader:
        reader.seek({"spool-folder-1": "0:16"})  # of another feed
        assert reader.poll(1, 0.1) == []
        assert "not there" in reader.problems()[0]
        assert reader.backlog_bytes() == 0
        send(feed, [("a-1", 0, encode_batch(batch("a", 0)))])
        assert len(reader.poll(1, PATIENCE_SECONDS)) == 1
        assert not reader.problems()
    with closing(feed.reader()) as reader, pytest.raises(FeedError, match="offset:low:number"):
        reader.seek({f"{feed.topic}-0/a-1": "nonsense"})


def test_the_group_tells_how_far_the_daemon_is(feed: Kafka) -> None:
    from kafka import KafkaConsumer, TopicPartition

    send(feed, [("a-1", n, encode_batch(batch("a", n))) for n in range(5)])
    with closing(feed.reader()) as reader:
        reader.seek({})
        got = [*reader.poll(10, PATIENCE_SECONDS)]
        reader.settle({d.partition: d.position for d in got[:3]})
    with closing(
        KafkaConsumer(bootstrap_servers=list(feed.bootstrap_servers), group_id=feed.group)
    ) as consumer:
        assert consumer.committed(TopicPartition(feed.topic, 0)) == 3
    # The database's own position wins over the hint, both ways.
    assert len(read(feed, 4, {got[0].partition: got[0].position})) == 4
    assert [n for _, n in seen(read(feed, 2, {}))] == [3, 4]


@pytest.fixture
def guarded(kafka: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, str]]:
    files = certificates(tmp_path_factory.mktemp("ca"))
    door = Door(kafka.address, server_context(files), {"agent": "pw-right"})
    yield door, files.ca
    door.close()


def test_tls_and_login(guarded: tuple[Door, str], kafka: Broker) -> None:
    door, authority = guarded
    feed = Kafka(
        (door.address,),
        kafka.topic(),
        timeout_seconds=30.0,
        api_version="2.3",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-256",
        username="agent",
        password=Secret("pw-right"),
        ssl_cafile=authority,
    )
    writer = feed.writer("a")
    assert writer.put(batch("a", 0))
    writer.close()
    assert seen(read(feed, 1, {})) == [("a", 0)]
    wrong = replace(feed, password=Secret("pw-wrong"))
    with closing(wrong.reader()) as reader, pytest.raises(FeedError, match="login of 'agent'"):
        reader.seek({})
    assert "pw-" not in repr(wrong)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bootstrap_servers": ()}, "bootstrap_servers"),
        ({"bootstrap_servers": ("host:port",)}, "bootstrap_servers"),
        ({"topic": "two words"}, "topic"),
        ({"topic": ".."}, "topic"),
        ({"group": ""}, "group"),
        ({"compression": "rar"}, "compression"),
        ({"timeout_seconds": 0.0}, "timeout_seconds"),
        ({"capacity_bytes": 10}, "capacity_bytes"),
        ({"max_message_bytes": 10}, "max_message_bytes"),
        ({"lookahead_batches": 0}, "lookahead_batches"),
        ({"security_protocol": "TLS"}, "security_protocol"),
    ],
)
def test_impossible_options(options: dict[str, object], word: str) -> None:
    made: Callable[..., Kafka] = Kafka
    with pytest.raises(ContractError, match=rf"feeds\.kafka\.{word}"):
        made(**{"bootstrap_servers": ("b:9092",), **options})


def test_positions_are_plain_text(feed: Kafka) -> None:
    send(feed, [("a-1", 0, encode_batch(batch("a", 0)))])
    (one,) = read(feed, 1, {})
    assert json.loads(json.dumps([one.partition, one.position])) == [f"{feed.topic}-0/a-1", "1:1:0"]
