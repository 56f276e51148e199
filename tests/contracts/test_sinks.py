"""Every registered sink and trigger against every check, and each check against a broken sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oodmon.checks import checks_for, subjects
from oodmon.checks import sinks as checks
from oodmon.checks.sinks import LIVE_CHECKS, Live
from oodmon.checks.triggers import Fired
from oodmon.registry import sinks, triggers
from oodmon.secret import Secret
from oodmon.sinks.grafana import Grafana
from oodmon.sinks.kafka import Kafka
from oodmon.sinks.log import Log
from oodmon.sinks.webhook import Webhook
from oodmon.triggers.kafka import Kafka as KafkaTrigger
from oodmon.triggers.webhook import Webhook as WebhookTrigger
from tests.contracts.broken_sinks import BROKEN, BROKEN_LIVE
from tests.servers.grafana import GrafanaServer
from tests.servers.http import HttpServer
from tests.servers.kafka import Broker, ids


def _subjects(kind: str, names: list[str]) -> list[Any]:
    return [
        pytest.param(case, id=f"{name}-{number}")
        for name in names
        for number, case in enumerate(subjects(kind, name))
    ]


SINKS = _subjects("sinks", sinks.names())
TRIGGERS = _subjects("triggers", triggers.names())

Check = Callable[[Any], None]


def named(check: Check) -> str:
    return check.__name__


@pytest.mark.parametrize("check", checks_for("sinks"), ids=named)
@pytest.mark.parametrize("sink", SINKS)
def test_sink_holds_to_its_contract(sink: Any, check: Check) -> None:
    check(sink)


@pytest.mark.parametrize("check", checks_for("triggers"), ids=named)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_trigger_holds_to_its_contract(trigger: Any, check: Check) -> None:
    check(trigger)


@pytest.mark.parametrize("check", checks_for("sinks"), ids=named)
def test_check_rejects_its_broken_counterpart(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "BOUND_SECONDS", 0.5)
    monkeypatch.setattr(checks, "SETTLE_SECONDS", 0.2)
    assert BROKEN[check], f"{check.__name__} has no counterpart that it must reject"
    for broken in BROKEN[check]:
        with pytest.raises(AssertionError, match=r"\w"):
            check(broken)


@pytest.mark.parametrize("check", LIVE_CHECKS, ids=named)
def test_live_check_rejects_its_broken_counterpart(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "SETTLE_SECONDS", 0.2)
    assert BROKEN_LIVE[check], f"{check.__name__} has no counterpart that it must reject"
    for broken in BROKEN_LIVE[check]:
        with pytest.raises(AssertionError, match=r"\w"):
            check(broken())


@pytest.mark.parametrize("check", LIVE_CHECKS, ids=named)
def test_log_delivers(check: Check, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    def received() -> list[str]:
        lines = [r.getMessage() for r in caplog.records if r.name == "oodmon.events"]
        # A log has no ids of its own; who reads it knows a line by the id at its end.
        return list(dict.fromkeys(line.rpartition("[")[2].rstrip("]") for line in lines))

    check(Live(Log(), received))


@pytest.mark.parametrize("trigger", [False, True], ids=["sink", "trigger"])
@pytest.mark.parametrize("check", LIVE_CHECKS, ids=named)
def test_webhook_delivers(check: Check, trigger: bool, http_server: HttpServer) -> None:
    url, secret = f"{http_server.url}/hook", Secret("s3")
    sink = Fired(WebhookTrigger(url, secret)) if trigger else Webhook(url, secret)

    def received() -> list[str]:
        keys = [request.headers["idempotency-key"] for request in http_server.requests]
        return list(dict.fromkeys(keys))

    check(Live(sink, received))


@pytest.mark.parametrize("check", LIVE_CHECKS, ids=named)
def test_grafana_delivers(check: Check, grafana: GrafanaServer) -> None:
    def received() -> list[str]:
        return [
            tag.removeprefix("event:")
            for number in sorted(grafana.annotations)
            for tag in grafana.annotations[number]["tags"]
            if tag.startswith("event:")
        ]

    check(Live(Grafana(grafana.url, Secret(grafana.token)), received))


@pytest.mark.parametrize("mode", ["structured", "binary"])
@pytest.mark.parametrize("trigger", [False, True], ids=["sink", "trigger"])
@pytest.mark.parametrize("check", LIVE_CHECKS, ids=named)
def test_kafka_delivers(check: Check, trigger: bool, mode: str, kafka: Broker) -> None:
    topic = kafka.topic()
    servers = (kafka.address,)
    sink = Fired(KafkaTrigger(servers, topic, mode)) if trigger else Kafka(servers, topic, mode)
    check(Live(sink, lambda: list(dict.fromkeys(ids(kafka.read_all(topic))))))
