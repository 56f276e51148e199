"""Triggers: what a request looks like, and that a trigger is its sink for one event."""

from __future__ import annotations

import dataclasses
import json

import pytest

from oodmon.checks.sinks import event
from oodmon.contracts import TriggerRequest
from oodmon.registry import sinks, triggers
from oodmon.secret import Secret
from oodmon.sinks.webhook import verify
from oodmon.triggers import REQUESTED, as_sink, request_event
from oodmon.triggers.webhook import Webhook
from oodmon.wire import cloud_event
from tests.servers.http import HttpServer

REQUEST = TriggerRequest("retrain-1", event(), 1_700_000_001_000_000_000, {"rule": "novelty"})


def test_a_request_holds_the_whole_alert() -> None:
    made = request_event(REQUEST)
    assert (made.id, made.type) == ("retrain-1", REQUESTED)
    assert (made.source, made.subject) == (event().source, event().subject)
    assert made.time == REQUEST.requested_at
    assert made.data["alert"] == cloud_event(event())
    assert made.data["labels"] == {"rule": "novelty"}


def test_the_webhook_trigger_posts_it_signed_under_its_idempotency_key(
    http_server: HttpServer,
) -> None:
    trigger = Webhook(http_server.url, Secret("s"))
    trigger.fire(REQUEST)
    trigger.close()
    (got,) = http_server.requests
    assert got.headers["idempotency-key"] == "retrain-1"
    assert verify("s", got.headers, got.body)
    body = json.loads(got.body)
    assert body["type"] == "oodmon.retraining.requested.v1"
    assert body["data"]["alert"]["data"]["evidence"]["statistic"] == 12.5


@pytest.mark.parametrize("name", ["webhook", "kafka"])
def test_every_option_of_a_trigger_is_its_sinks(name: str) -> None:
    ours = {f.name: f for f in dataclasses.fields(triggers.get(name)) if f.init}  # type: ignore[arg-type]
    theirs = {f.name: f for f in dataclasses.fields(sinks.get(name)) if f.init}  # type: ignore[arg-type]
    missing = {"batch"} if name == "webhook" else set()
    assert set(theirs) - set(ours) == missing
    for option in set(ours) - {"topic"}:
        assert ours[option].default == theirs[option].default, option
        assert ours[option].type == theirs[option].type, option


def test_as_sink_carries_the_options_over() -> None:
    trigger = Webhook("https://ci/retrain", Secret("s"), timeout_seconds=3.0)
    sink = as_sink(trigger)
    assert sink == sinks.create(
        "webhook", url="https://ci/retrain", secret=Secret("s"), timeout_seconds=3.0
    )
