"""Labels from a topic of a real broker: once into the store, whatever fails on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from oodmon.config.parse import load
from oodmon.daemon.label_topic import LabelIntake
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.routes import Routes
from oodmon.errors import ConfigError, ContractError, StoreError
from oodmon.feeds.labels import LabelTopic
from oodmon.store import tables
from oodmon.store.database import Database
from oodmon.store.events import Store
from oodmon.store.labels import Prediction
from tests.servers.kafka import Broker
from tests.streams import EPOCH
from tests.waiting import eventually


def _topic(broker: Broker, **options: Any) -> LabelTopic:
    return LabelTopic(
        bootstrap_servers=(broker.address,),
        topic=broker.topic("labels"),
        timeout_seconds=5.0,
        **options,
    )


def _send(broker: Broker, topic: str, *values: bytes, partitions: int = 1) -> None:
    from kafka import KafkaProducer  # type: ignore[import-untyped]
    from kafka.admin import KafkaAdminClient, NewTopic  # type: ignore[import-untyped]

    admin = KafkaAdminClient(bootstrap_servers=broker.address)
    if topic not in admin.list_topics():
        admin.create_topics([NewTopic(topic, partitions, 1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=broker.address)
    for place, value in enumerate(values):
        producer.send(topic, value, partition=place % partitions)
    producer.flush()
    producer.close()


def _said(**labels: int) -> bytes:
    return json.dumps({"labels": labels}).encode()


class Site:
    """A store with predictions, and an intake that can be started again and again."""

    def __init__(self, url: str, topic: LabelTopic) -> None:
        self.url, self.topic, self.metrics = url, topic, Metrics()
        self.store = Store(url)
        self.store.open()
        kept = [Prediction(f"s{n}", "m", "1", "", EPOCH + n, 1, float("nan")) for n in range(100)]
        self.store.append([], state=b"", positions={"spool/a": "7"}, predictions=kept)
        self.intake = self.made()

    def made(self) -> LabelIntake:
        routes = Routes({"ops": ("notice",)})
        return LabelIntake(
            self.topic, self.store, self.metrics, "m", "1", lambda: routes, lambda _: None
        )

    def restart(self) -> None:
        self.intake.stop()
        self.intake = self.made()
        self.intake.start()

    def rows(self, name: str) -> list[Any]:
        database = Database(self.url)
        database.open()
        with database.read() as connection:
            found = list(connection.execute(select(tables.metadata.tables[name])))
        database.close()
        return found

    def waits(self, **labels: int) -> None:
        """Until the inbox holds just these."""
        eventually(
            lambda: {row.sample_id: row.label for row in self.rows("labels")} == labels,
            "the labels did not come",
        )

    def taken(self, result: str) -> float:
        return self.metrics.value("oodmon_label_messages_total", result=result)

    def close(self) -> None:
        self.intake.stop()
        self.store.close()


@pytest.fixture
def site(kafka: Broker, tmp_path: Path) -> Iterator[Site]:
    made = Site(f"sqlite:///{tmp_path}/labels.db", _topic(kafka))
    yield made
    made.close()


def test_labels_come_once_in_order_and_bad_messages_are_named(site: Site, kafka: Broker) -> None:
    site.intake.start()
    topic = site.topic.topic
    eventually(lambda: "not there yet" in site.intake.state)
    bad = [b"", b"\xff", b'{"labels": {"s1": "cat"}}', b'{"labels": {"s2": "dog"}}']
    _send(kafka, topic, _said(s1=3, s2=4), *bad, _said(s1=5, s3=1))
    site.waits(s1=5, s2=4, s3=1)
    eventually(lambda: site.taken("accepted") == 2)
    assert site.taken("rejected") == 4
    assert site.intake.state == "ok"
    told = [row["text"] for row in site.store.notices()]
    assert len(told) == 4, "s1 and s2 are two reasons"
    assert any(f"{topic}/0 at offset 3 holds no labels: labels.s1: expected" in t for t in told)
    assert len(site.rows("outbox")) == 4
    # The place is in the database, beside the feed's, which upkeep does not take for a lost one.
    assert site.store.label_positions() == {f"{topic}/0": "6"}
    assert site.store.forget_positions(["spool/a"]) == 0
    snapshot = site.store.load()
    assert snapshot is not None
    assert snapshot.positions == {"spool/a": "7"}
    site.store.join_labels(EPOCH)
    site.restart()
    _send(kafka, topic, _said(s4=2))
    site.waits(s4=2)
    assert len(site.rows("outbox")) == 4
    measured = site.store.measured(0, 2**62)[0]
    assert measured.labelled == 3
    assert measured.accuracy == pytest.approx(1 / 3)


def test_what_was_read_and_not_stored_comes_again(
    site: Site, kafka: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = site.topic.topic
    _send(kafka, topic, *(_said(**{f"s{n}": n}) for n in range(6)), partitions=3)
    take = site.store.take_labels
    failures: list[int] = []

    def fails_twice(*arguments: Any) -> None:
        if len(failures) < 2:
            failures.append(1)
            raise StoreError("the disk is full", retryable=True)
        take(*arguments)

    monkeypatch.setattr(site.store, "take_labels", fails_twice)
    site.intake.start()
    site.waits(**{f"s{n}": n for n in range(6)})
    eventually(lambda: site.taken("accepted") == 6)
    assert site.store.label_positions() == {f"{topic}/{n}": "2" for n in range(3)}
    # An old place, as after a restored backup: duplicates change nothing.
    site.store.join_labels(EPOCH)
    site.store.take_labels({}, {f"{topic}/{n}": "0" for n in range(3)})
    before = site.store.measured(0, 2**62)
    site.restart()
    eventually(lambda: site.taken("accepted") == 12)
    site.store.join_labels(EPOCH)
    assert site.store.measured(0, 2**62) == before
    # A place beyond the end: the topic was made anew, and is read from its beginning.
    site.store.take_labels({}, {f"{topic}/0": "999"})
    site.restart()
    eventually(lambda: site.taken("accepted") == 14)


@pytest.mark.slow
def test_a_broker_that_is_away_stops_nobody(site: Site, kafka: Broker) -> None:
    topic = site.topic.topic
    _send(kafka, topic, _said(s1=1))
    site.intake.start()
    site.waits(s1=1)
    kafka.stop()
    eventually(lambda: site.intake.state not in ("ok", "starting"))
    site.store.add_labels({"s9": 9})
    kafka.start()
    _send(kafka, topic, _said(s2=2))
    site.waits(s1=1, s2=2, s9=9)
    eventually(lambda: site.intake.state == "ok")


def test_many_labels_are_many_transactions(
    site: Site, kafka: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    take = site.store.take_labels

    def noted(labels: dict[str, int], *more: Any) -> None:
        sizes.append(len(labels))
        take(labels, *more)

    monkeypatch.setattr(site.store, "take_labels", noted)
    each = [_said(**{f"x{k}_{n}": 1 for n in range(3_000)}) for k in range(9)]
    _send(kafka, site.topic.topic, *each)
    site.intake.start()
    eventually(lambda: site.taken("accepted") == 9)
    assert sum(sizes) == 27_000
    assert max(sizes) <= 12_000


TEXT = """\
model: {name: m}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  labels:
    share: 0.5
    topic: {TOPIC}
"""


def _config(folder: Path, topic: str) -> Path:
    path = folder / "oodmon.yaml"
    path.write_text(TEXT.replace("{TOPIC}", topic))
    return path


def test_the_topic_in_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELS_PASSWORD", "s3cret-of-tests")
    given = (
        "{bootstrap_servers: [k:9092], topic: truths, security_protocol: SASL_SSL, "
        "username: u, password: '${LABELS_PASSWORD}', ssl_cafile: ca.pem}"
    )
    daemon = load(_config(tmp_path, given), "daemon").daemon
    assert daemon is not None
    assert daemon.labels is not None
    topic = daemon.labels.topic
    assert topic is not None
    assert (topic.topic, topic.group) == ("truths", "oodmon-labels")
    assert topic.settings()["sasl_plain_password"] == "s3cret-of-tests"
    assert topic.ssl_cafile == str(tmp_path / "ca.pem")
    assert "s3cret" not in repr(daemon)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{topic: truths}", "labels.topic.bootstrap_servers: is required"),
        ("{bootstrap_servers: [], topic: t}", "names no broker"),
        ("{bootstrap_servers: ['h:1'], topic: a/b}", "a/b' is no name of a topic"),
        ("{bootstrap_servers: [k], password: hunter2}", "a secret does not belong in a file"),
        ("{bootstrap_servers: [k], ssl_cafile: a.pem}", "only used with security_protocol SSL"),
        ("{bootstrap_servers: ['k:x']}", "is not host:port"),
        ("{bootstrap_servers: [k], partition: 3}", "unknown option"),
    ],
)
def test_what_is_wrong_with_a_topic_is_told_at_its_place(
    given: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_config(tmp_path, given), "daemon")
    assert said in str(caught.value)
    assert "oodmon.yaml:7:" in str(caught.value)


def test_options_of_a_topic_are_checked() -> None:
    for options in ({"timeout_seconds": 0.0}, {"group": ""}, {"max_message_bytes": 0}):
        with pytest.raises(ContractError, match=next(iter(options))):
            LabelTopic(bootstrap_servers=("k",), **options)
