"""Events as signed CloudEvents by HTTP POST.

The signature is that of the Standard Webhooks specification, for which verifying libraries exist
in most languages: ``webhook-id`` (the event's id), ``webhook-timestamp`` (seconds UTC) and
``webhook-signature``, ``v1,`` + base64(HMAC-SHA256(secret, id + "." + timestamp + "." + body)).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit

from oodmon.contracts import Clock, Sink
from oodmon.errors import Rejected, RetryLater, WireError
from oodmon.records import Event
from oodmon.registry import sinks
from oodmon.secret import Secret
from oodmon.wire import cloud_event

__all__ = ["Webhook", "sign", "verify"]

KEY_PREFIX: Final = "whsec_"
"""A secret that starts so is base64, as Standard Webhooks libraries write it."""

_RETRIED: Final = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)
_REDIRECTS: Final = frozenset({HTTPStatus.TEMPORARY_REDIRECT, HTTPStatus.PERMANENT_REDIRECT})
_MOST_REDIRECTS: Final = 3
_LONGEST_WAIT_SECONDS: Final = 86_400.0
"""A receiver's ``Retry-After`` is followed up to a day."""
_NANOSECONDS: Final = 1_000_000_000
_PORTS: Final = {"http": 80, "https": 443}


@sinks.register("webhook")
@dataclass(frozen=True)
class Webhook(Sink):
    """POST each event (or each batch) to a URL, signed, with its id as idempotency key.

    Any 2xx answer is success. 408, 425, 429, 5xx and everything that goes wrong on the way are
    tried again (`RetryLater`, with the receiver's ``Retry-After``); other answers are `Rejected`.
    307 and 308 are followed on the same origin only, so that neither events nor credentials go
    where the configuration does not say.

    Options:
        url: ``https://…`` (or ``http://…``).
        secret: signs every request; empty sends unsigned requests.
        token: sent as ``Authorization: Bearer``; empty sends none.
        batch: one request with a JSON array per delivery instead of one request per event.
        timeout_seconds: for one whole request, from connecting to the last byte of the answer.
        ca_file: PEM file of certification authorities instead of the system's.
    """

    url: str
    secret: Secret = field(default_factory=Secret)
    token: Secret = field(default_factory=Secret)
    batch: bool = False
    timeout_seconds: float = 10.0
    ca_file: str = ""
    # The age of a signature is judged by the receiver's wall clock; nothing else here reads one.
    _clock: Clock = field(default=time.time_ns, init=False, repr=False, compare=False)
    _tls: list[ssl.SSLContext] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        signed = {"url": "http://{address}/hook", "secret": Secret("s"), "token": Secret("t")}
        return [
            {**signed, "timeout_seconds": 0.5},
            {**signed, "timeout_seconds": 0.5, "batch": True},
        ]

    def open(self) -> None:
        """Check the URL and load the certificates; the server is first met in `send`."""
        target = urlsplit(self.url)
        if target.scheme not in _PORTS or not target.hostname:
            raise Rejected("webhook: url must be http://host… or https://host…")
        if target.scheme == "https" and not self._tls:
            try:
                context = ssl.create_default_context(cafile=self.ca_file or None)
            except (OSError, ssl.SSLError) as error:
                raise Rejected(f"webhook: ca_file {self.ca_file!r}: {error}") from error
            self._tls.append(context)

    def send(self, events: Sequence[Event]) -> None:
        """POST the events; `RetryLater` or `Rejected` on the first that fails."""
        if not events:
            return
        self.open()
        if self.batch:
            body = _body(events, batch=True)
            digest = hashlib.sha256("\n".join(event.id for event in events).encode()).hexdigest()
            self._post(f"batch-{digest[:32]}", body, "application/cloudevents-batch+json")
            return
        for event in events:
            body = _body([event], batch=False)
            self._post(event.id, body, "application/cloudevents+json")

    def close(self) -> None:
        """Forget the certificates; no connection outlives a request."""
        self._tls.clear()

    def _post(self, key: str, text: str, content_type: str) -> None:
        body = text.encode()
        headers = {
            "Content-Type": f"{content_type}; charset=utf-8",
            "User-Agent": "oodmon",
            "Idempotency-Key": _header(key),
        }
        if self.token:
            headers["Authorization"] = f"Bearer {self.token.reveal()}"
        if self.secret:
            headers |= sign(self.secret, _header(key), self._clock() // _NANOSECONDS, body)
        target = urlsplit(self.url)
        deadline = time.monotonic() + self.timeout_seconds
        for _ in range(_MOST_REDIRECTS + 1):
            status, answer = self._exchange(target, headers, body, deadline)
            location = answer.get("location", "")
            if status not in _REDIRECTS or not location:
                break
            target = _same_origin(target, location)
        else:
            raise Rejected(f"webhook: more than {_MOST_REDIRECTS} redirects")
        _judge(status, answer, self._clock)

    def _exchange(
        self, target: SplitResult, headers: Mapping[str, str], body: bytes, deadline: float
    ) -> tuple[int, Mapping[str, str]]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RetryLater(f"webhook: no answer within {self.timeout_seconds:g} s")
        host = target.hostname or ""
        port = target.port
        connection = (
            http.client.HTTPSConnection(host, port, timeout=left, context=self._tls[0])
            if target.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=left)
        )
        # The socket's timeout is for one operation: a server that sends a byte now and then would
        # never meet it. Hence a watch over the whole exchange.
        late = threading.Event()
        watch = threading.Timer(left, _cut, (connection, late))
        watch.daemon = True
        watch.start()
        try:
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            connection.request("POST", path, body=body, headers=dict(headers))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                why = f"no answer within {self.timeout_seconds:g} s"
            else:
                why = f"{type(error).__name__}: {error}"
            raise RetryLater(f"webhook: {host}: {why}") from error
        finally:
            watch.cancel()
            watch.join()
            connection.close()


def _body(events: Sequence[Event], *, batch: bool) -> str:
    try:
        envelopes = [cloud_event(event) for event in events]
        return json.dumps(envelopes if batch else envelopes[0], allow_nan=False)
    except (WireError, ValueError) as error:
        ids = ", ".join(event.id for event in events)
        raise Rejected(f"webhook: event {ids} cannot be encoded: {error}") from error


def sign(secret: Secret, key: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three signature headers of one request.

    Args:
        secret: shared with the receiver; see `KEY_PREFIX`.
        key: the message's id, the same on every attempt.
        timestamp: seconds since the epoch, UTC.
        body: the bytes that are sent.
    """
    return {
        "webhook-id": key,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + _mac(secret, key, str(timestamp), body),
    }


def verify(
    secret: Secret | str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now_seconds: float | None = None,
    tolerance_seconds: float = 300.0,
) -> bool:
    """Whether a request was signed with this secret: for receivers, in constant time.

    Args:
        secret: the secret that the sink or trigger was given.
        headers: the request's headers, in any case of letters.
        body: the request's body as it came, before any parsing.
        now_seconds: the receiver's clock; given, a timestamp that is further away than
            `tolerance_seconds` (a replayed request) is refused.
        tolerance_seconds: see `now_seconds`.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    key = lowered.get("webhook-id", "")
    timestamp = lowered.get("webhook-timestamp", "")
    given = lowered.get("webhook-signature", "")
    if not (key and timestamp.isascii() and timestamp.isdigit() and given):
        return False
    if now_seconds is not None and abs(now_seconds - int(timestamp)) > tolerance_seconds:
        return False
    held = secret if isinstance(secret, Secret) else Secret(secret)
    if not held:
        return False
    expected = f"v1,{_mac(held, key, timestamp, body)}".encode()
    # A sender that changes its secret may send several signatures; every one is looked at.
    matches = [hmac.compare_digest(expected, one.encode()) for one in given.split()]
    return any(matches)


def _mac(secret: Secret, key: str, timestamp: str, body: bytes) -> str:
    text = secret.reveal()
    raw = text.encode()
    if text.startswith(KEY_PREFIX):
        try:
            raw = base64.b64decode(text.removeprefix(KEY_PREFIX), validate=True)
        except binascii.Error:
            raise Rejected(f"webhook: a secret with {KEY_PREFIX} must be base64") from None
    message = f"{key}.{timestamp}.".encode() + body
    return base64.b64encode(hmac.new(raw, message, hashlib.sha256).digest()).decode()


def _header(value: str) -> str:
    """A value that may stand in a header: printable ASCII, no line breaks."""
    return "".join(c if c.isascii() and c.isprintable() else "_" for c in value)


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    held = connection.sock
    if held is not None:
        try:
            held.shutdown(socket.SHUT_RDWR)
        except OSError:
            held.close()  # not connected yet, or already gone: nothing to shut down


def _same_origin(target: SplitResult, location: str) -> SplitResult:
    there = urlsplit(urljoin(target.geturl(), location))
    if _origin(there) != _origin(target):
        raise Rejected("webhook: redirected to another host, which is not followed")
    return there


def _origin(target: SplitResult) -> tuple[str, str, int]:
    return target.scheme, target.hostname or "", target.port or _PORTS.get(target.scheme, 0)


def _judge(status: int, answer: Mapping[str, str], clock: Clock) -> None:
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return
    if status in _RETRIED or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        wait = _wait_seconds(answer.get("retry-after", ""), clock)
        raise RetryLater(f"webhook: HTTP {status}", wait)
    raise Rejected(f"webhook: HTTP {status}")


def _wait_seconds(value: str, clock: Clock) -> float:
    """``Retry-After`` in seconds, from seconds or an HTTP date; 0 where it says nothing usable."""
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = parsedate_to_datetime(value).timestamp() - clock() / _NANOSECONDS
        except (ValueError, TypeError, IndexError):
            return 0.0
    return min(max(wait, 0.0), _LONGEST_WAIT_SECONDS) if math.isfinite(wait) else 0.0
