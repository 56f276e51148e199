"""An alert on its way out: outbox, delivery thread, broker that goes and comes, consumer by id."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from oodmon.daemon.backoff import Backoff
from oodmon.daemon.delivery import Delivery
from oodmon.daemon.metrics import Metrics
from oodmon.records import Alert
from oodmon.sinks.kafka import Kafka
from oodmon.store.events import Store
from oodmon.triggers.guard import Guard
from oodmon.triggers.webhook import Webhook
from oodmon.wire import event_of
from tests.servers.http import HttpServer
from tests.servers.kafka import Broker, ids
from tests.waiting import PATIENCE_SECONDS, eventually

START = 1_700_000_000_000_000_000


def alert(number: int) -> Alert:
    return Alert(
        "novelty",
        "firing",
        "critical",
        START + number,
        0,
        {"model": "digits", "version": "1", "detector": "*", "segment": "*", "test": "budget"},
        {"statistic": 12.0 + number},
    )


def test_an_alert_reaches_the_topic(kafka: Broker) -> None:
    sink = Kafka((kafka.address,), kafka.topic())
    sink.send([event_of(alert(0))])
    sink.close()
    assert ids(kafka.read_all(sink.topic)) == [alert(0).id]


def test_alerts_outlive_a_broker_that_stops(kafka: Broker, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'oodmon.db'}")
    store.open()
    sink = Kafka((kafka.address,), kafka.topic(), timeout_seconds=2.0)
    metrics = Metrics()
    delivery = Delivery(
        "sinks.kafka",
        sink,
        store,
        backoff=Backoff(initial_seconds=0.05, max_seconds=0.2),
        clock=time.time_ns,
        metrics=metrics,
    )

    def empty() -> bool:
        depth = store.depths().get("sinks.kafka")
        return depth is None or depth.pending == 0

    delivery.start()
    try:
        for number in range(9):
            if number == 3:
                kafka.stop()
            if number == 6:
                eventually(lambda: store.depths()["sinks.kafka"].pending >= 3)
                eventually(lambda: metrics.value("oodmon_sink_up", sink="sinks.kafka") == 0)
                kafka.start()
            store.emit([("sinks.kafka", event_of(alert(number)))])
            delivery.wake()
            if number < 3:
                eventually(empty)

        eventually(empty)
    finally:
        delivery.stop(1.0)
        delivery.join(PATIENCE_SECONDS)
        store.close()
    found = Counter(ids(kafka.read_all(sink.topic)))
    assert list(found) == [alert(number).id for number in range(9)]


def test_a_guard_remembers_in_the_store(http_server: HttpServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    outcomes: list[str] = []
    for run in range(3):  # the daemon is restarted in between, and the first alert comes again
        store = Store(url)
        store.open()
        guard = Guard("retrain", Webhook(http_server.url), 3600.0, 5, dry_run=False)
        guard.remember(store, lambda: START, lambda _, outcome: outcomes.append(outcome))
        guard.open()
        guard.send([event_of(alert(0)), event_of(alert(run + 1))])
        guard.close()
        store.close()
    assert outcomes == ["fired", "cooldown", "cooldown", "cooldown"]
    keys = [request.headers["idempotency-key"] for request in http_server.requests]
    assert keys == [f"retrain-{alert(0).id}"]
