"""The webhook sink: what it sends, how it signs, and what it makes of every answer."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import replace

import pytest

from oodmon.checks.sinks import event
from oodmon.errors import Rejected, RetryLater
from oodmon.secret import Secret
from oodmon.sinks.webhook import Webhook, sign, verify
from oodmon.wire import cloud_event
from tests.servers.http import Answer, HttpServer
from tests.waiting import PATIENCE_SECONDS

SECRET = Secret("sup3r")
NOW = 1_700_000_000


def sink(server: HttpServer, **options: object) -> Webhook:
    made = Webhook(f"{server.url}/hook?a=1", SECRET, timeout_seconds=30.0)
    object.__setattr__(made, "_clock", lambda: NOW * 1_000_000_000 + 5)
    copy = replace(made, **options)  # type: ignore[arg-type]
    object.__setattr__(copy, "_clock", made._clock)
    return copy


def test_one_request_per_event(http_server: HttpServer) -> None:
    sink(http_server, token=Secret("tok")).send([event(0), event(1)])
    first, second = http_server.requests
    assert (first.method, first.path) == ("POST", "/hook?a=1")
    assert json.loads(first.body) == cloud_event(event(0))
    assert first.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert first.headers["idempotency-key"] == first.headers["webhook-id"] == event(0).id
    assert first.headers["authorization"] == "Bearer tok"
    assert first.headers["webhook-timestamp"] == str(NOW)
    assert verify(SECRET, first.headers, first.body, now_seconds=NOW + 10)
    assert json.loads(second.body)["id"] == event(1).id


def test_a_batch_is_one_request_with_a_stable_key(http_server: HttpServer) -> None:
    for _ in range(2):
        sink(http_server, batch=True).send([event(0), event(1)])
    first, again = http_server.requests
    assert json.loads(first.body) == [cloud_event(event(0)), cloud_event(event(1))]
    assert first.headers["content-type"].startswith("application/cloudevents-batch+json")
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]
    assert verify(SECRET, first.headers, first.body)


def test_without_secret_nothing_is_signed(http_server: HttpServer) -> None:
    sink(http_server, secret=Secret()).send([event()])
    assert "webhook-signature" not in http_server.requests[0].headers


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # Computed by hand from the specification: HMAC-SHA256 over "id.timestamp.body".
    key = base64.b64encode(b"\x01" * 32).decode()
    headers = sign(Secret(f"whsec_{key}"), "msg_1", NOW, b'{"a":1}')
    mac = hmac.new(b"\x01" * 32, b'msg_1.1700000000.{"a":1}', hashlib.sha256).digest()
    assert headers == {
        "webhook-id": "msg_1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": "v1," + base64.b64encode(mac).decode(),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": "other"},
        {"webhook-timestamp": str(NOW + 1)},
        {"webhook-timestamp": "now"},
        {"webhook-timestamp": "²"},
        {"webhook-signature": "v1,AAAA"},
        {"webhook-signature": "v1,ü"},
        {"webhook-signature": ""},
        {"webhook-id": ""},
    ],
)
def test_verify_refuses_what_was_changed(change: dict[str, str]) -> None:
    headers = sign(SECRET, "id", NOW, b"body")
    assert verify(SECRET, headers, b"body")
    assert not verify(SECRET, {**headers, **change}, b"body")


def test_verify_refuses_other_bodies_secrets_and_old_requests() -> None:
    headers = {k.title(): v for k, v in sign(SECRET, "id", NOW, b"body").items()}
    assert verify("sup3r", headers, b"body", now_seconds=NOW + 299)
    assert not verify(SECRET, headers, b"body", now_seconds=NOW + 301)
    assert not verify(SECRET, headers, b"body", now_seconds=NOW - 301)
    assert not verify(SECRET, headers, b"bodY")
    assert not verify(Secret("other"), headers, b"body")
    assert not verify("", headers, b"body")


def test_verify_takes_one_of_several_signatures() -> None:
    headers = sign(SECRET, "id", NOW, b"body")
    headers["webhook-signature"] = f"v1,AAAA {headers['webhook-signature']}"
    assert verify(SECRET, headers, b"body")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
def test_passing_troubles_are_tried_again(status: int, http_server: HttpServer) -> None:
    http_server.default = Answer(status, {"Retry-After": "17"})
    with pytest.raises(RetryLater, match=str(status)) as caught:
        sink(http_server).send([event()])
    assert caught.value.after_seconds == 17.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422, 301, 302])
def test_refusals_are_final(status: int, http_server: HttpServer) -> None:
    http_server.default = Answer(status, {"Location": "/elsewhere"} if status < 400 else {})
    with pytest.raises(Rejected, match=str(status)):
        sink(http_server).send([event()])
    assert len(http_server.requests) == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),  # NOW is 22:13:20
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("-5", 0.0),
        ("nan", 0.0),
        ("soon", 0.0),
        ("1e9", 86_400.0),
    ],
)
def test_retry_after_in_every_form(value: str, expected: float, http_server: HttpServer) -> None:
    http_server.default = Answer(503, {"Retry-After": value})
    with pytest.raises(RetryLater) as caught:
        sink(http_server).send([event()])
    assert caught.value.after_seconds == pytest.approx(expected, abs=0.01)


def test_a_redirect_within_the_origin_keeps_method_and_body(http_server: HttpServer) -> None:
    http_server.answers = [Answer(308, {"Location": "/new"})]
    sink(http_server).send([event()])
    moved = http_server.requests[1]
    assert (moved.method, moved.path) == ("POST", "/new")
    assert moved.body == http_server.requests[0].body


def test_no_redirect_to_another_host(http_server: HttpServer) -> None:
    other = HttpServer()
    try:
        http_server.default = Answer(307, {"Location": f"{other.url}/steal"})
        with pytest.raises(Rejected, match="another host"):
            sink(http_server).send([event()])
        assert not other.requests
    finally:
        other.close()


def test_a_ring_of_redirects_ends(http_server: HttpServer) -> None:
    http_server.default = Answer(307, {"Location": "/hook"})
    with pytest.raises(Rejected, match="redirects"):
        sink(http_server).send([event()])


def test_the_timeout_is_for_the_whole_answer(http_server: HttpServer) -> None:
    http_server.default = Answer(drip_seconds=0.1, reason="slow" * 1000)
    began = time.monotonic()
    with pytest.raises(RetryLater, match="no answer within"):
        sink(http_server, timeout_seconds=0.4).send([event()])
    assert time.monotonic() - began < PATIENCE_SECONDS / 2, "the whole takes minutes"


def test_a_cut_connection_is_tried_again(http_server: HttpServer) -> None:
    http_server.default = Answer(cut=True)
    with pytest.raises(RetryLater, match=r"127\.0\.0\.1"):
        sink(http_server).send([event()])


@pytest.mark.parametrize("url", ["ftp://host/", "host/path", "http:///path", ""])
def test_an_impossible_url_is_rejected(url: str) -> None:
    with pytest.raises(Rejected, match="url"):
        Webhook(url).open()


def test_a_missing_ca_file_is_rejected() -> None:
    with pytest.raises(Rejected, match="ca_file"):
        Webhook("https://localhost/", ca_file="/nowhere.pem").open()


def test_a_secret_that_is_no_base64_is_rejected(http_server: HttpServer) -> None:
    with pytest.raises(Rejected, match="base64"):
        sink(http_server, secret=Secret("whsec_!!")).send([event()])


def test_an_event_that_is_no_json_is_rejected(http_server: HttpServer) -> None:
    bad = replace(event(), data={"x": object()})
    with pytest.raises(Rejected, match="cannot be encoded"):
        sink(http_server).send([bad])
    assert not http_server.requests


def test_tls_is_verified(https_server: tuple[HttpServer, str]) -> None:
    server, certificate = https_server
    with pytest.raises(RetryLater, match="CERTIFICATE_VERIFY_FAILED"):
        Webhook(server.url, SECRET, timeout_seconds=30.0).send([event()])
    assert not server.requests
    Webhook(server.url, SECRET, timeout_seconds=30.0, ca_file=certificate).send([event()])
    assert verify(SECRET, server.requests[0].headers, server.requests[0].body)
    other = server.url.replace("localhost", "127.0.0.1")
    with pytest.raises(RetryLater, match="CERTIFICATE_VERIFY_FAILED"):
        Webhook(other, SECRET, timeout_seconds=30.0, ca_file=certificate).send([event()])
