"""The port of the HTTP intake: who comes in, how much they may bring, and what they are told."""

from __future__ import annotations

import json
import logging
import math
import socket
import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final, Protocol

from oodmon.admission import Admission
from oodmon.daemon.bodies import FRAME_TYPE
from oodmon.daemon.listening import Server
from oodmon.errors import OodmonError, RetryLater, WireError
from oodmon.secret import Secret

__all__ = ["Porter", "Taker"]

_log = logging.getLogger(__name__)

_CONNECTION_SECONDS: Final = 30.0
"""A connection is cut after this (and the time for scoring), whatever it is doing."""
_READ_SECONDS: Final = 10.0
_BATCHES: Final = "/v1/batches"
_OUTPUTS: Final = "/v1/outputs"
_LABELS: Final = "/v1/labels"
_TYPES: Final = (FRAME_TYPE, "application/json")


class Taker(Protocol):
    """What stands behind the port."""

    def admit(self) -> float:
        """0 where one more request is within the rate, else how long to wait."""

    def take_batch(self, body: bytes, content_type: str) -> int:
        """Store a score batch: its rows."""

    def take_outputs(self, body: bytes, headers: Mapping[str, str]) -> int:
        """Score and store outputs: their rows."""

    def take_labels(self, body: bytes) -> int:
        """Store labels: how many."""

    def count(self, kind: str, status: int) -> None:
        """One more request with this answer."""


class Porter(Server):
    """Lets requests in, cuts off who takes too long, and says 503 where all places are taken.

    Args:
        taker: stands behind it.
        options: where to listen, whom to let in.
        tls: of our side; none for plain HTTP.
    """

    request_queue_size = 64

    def __init__(self, taker: Taker, options: Admission, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self.taker = taker
        self.options = options
        self._longest = _CONNECTION_SECONDS + options.score_timeout_seconds
        self._since: dict[socket.socket, float] = {}
        address = (options.host, options.port)
        super().__init__(address, _Handler, options.max_requests)

    def service_actions(self) -> None:
        """Cut off whoever takes too long."""
        now = time.monotonic()
        for connection, since in list(self._since.items()):
            if now - since > self._longest:
                self._cut(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it, or 503 where all are busy."""
        self._since[request] = time.monotonic()
        super().process_request(request, client_address)

    def turn_away(self, request: Any) -> None:
        """503, where that can be said without a handshake."""
        self._since.pop(request, None)
        if self._tls is None:
            request.settimeout(0.1)
            try:
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
                    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
                )
            except OSError as error:
                _log.debug("a client that was turned away is gone: %s", error)
        super().turn_away(request)

    def serve(self, request: Any, client_address: Any) -> None:
        """The handshake, then the request."""
        raw = request
        try:
            if self._tls is not None:
                request.settimeout(_READ_SECONDS)
                try:
                    request = self._tls.wrap_socket(request, server_side=True)
                except (OSError, ValueError) as error:
                    _log.debug("no TLS with %s: %s", client_address, error)
                    self.shutdown_request(request)
                    return
                self._since[request] = self._since.pop(raw, time.monotonic())
                raw = request
            super().serve(request, client_address)
        finally:
            self._since.pop(raw, None)

    def _cut(self, connection: socket.socket) -> None:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("a slow connection was gone already: %s", error)


class _Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: HTTPStatus, why: str, after_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.status = status
        self.after_seconds = after_seconds


class _Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with it."""

    server: Porter

    protocol_version = "HTTP/1.1"
    server_version = "oodmon"
    sys_version = ""
    timeout = _READ_SECONDS

    def do_POST(self) -> None:
        self.close_connection = True
        path = self.path.split("?", 1)[0]
        kind = {_BATCHES: "batch", _OUTPUTS: "outputs", _LABELS: "labels"}.get(path, "other")
        answer: dict[str, Any]
        try:
            rows = self._take(path)
            status, answer, after = HTTPStatus.OK, {"rows": rows}, 0.0
        except _Refused as refused:
            status, after = refused.status, refused.after_seconds
            answer = {"error": str(refused)}
        except WireError as error:
            status, after = HTTPStatus.UNPROCESSABLE_ENTITY, 0.0
            answer = {"error": str(error)}
        except RetryLater as error:
            full = "full" in str(error)
            status = HTTPStatus.TOO_MANY_REQUESTS if full else HTTPStatus.SERVICE_UNAVAILABLE
            after, answer = max(error.after_seconds, 1.0), {"error": str(error)}
        except OodmonError as error:
            _log.warning("intake: %s", error)
            status, after = HTTPStatus.SERVICE_UNAVAILABLE, 1.0
            answer = {"error": "cannot be taken now"}
        self.server.taker.count(kind, status)
        self._answer(status, answer, after)

    def do_GET(self) -> None:
        self.close_connection = True
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "use POST"}, 0.0)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET  # noqa: N815

    def _take(self, path: str) -> int:
        given = self.headers.get("Authorization", "")
        scheme, _, token = given.partition(" ")
        if self.server.options.token and (
            scheme.lower() != "bearer" or Secret(token) != self.server.options.token
        ):
            raise _Refused(HTTPStatus.UNAUTHORIZED, "a bearer token is required")
        if wait := self.server.taker.admit():
            raise _Refused(HTTPStatus.TOO_MANY_REQUESTS, "more than the rate allows", wait)
        if path not in (_BATCHES, _OUTPUTS, _LABELS):
            pages = f"{_BATCHES}, {_OUTPUTS} or {_LABELS}"
            raise _Refused(HTTPStatus.NOT_FOUND, f"no such page; {pages}")
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Encoding is not read")
        headers = {name.lower(): value for name, value in self.headers.items()}
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if path == _BATCHES and content_type not in _TYPES:
            raise _Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected one of {', '.join(_TYPES)}"
            )
        body = self._body()
        if path == _BATCHES:
            return self.server.taker.take_batch(body, content_type)
        if path == _LABELS:
            return self.server.taker.take_labels(body)
        return self.server.taker.take_outputs(body, headers)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is required")
        if len(length) > 12 or int(length) > self.server.options.max_body_bytes:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"at most {self.server.options.max_body_bytes} bytes are taken",
            )
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the body ended early")
        return body

    def handle_expect_100(self) -> bool:
        return True  # answered once the body is wanted

    def _answer(self, status: HTTPStatus, value: Mapping[str, Any], after: float) -> None:
        body = json.dumps(value).encode() + b"\n"
        self.request_version = self.protocol_version  # HTTP/0.9 would get no status line
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if after:
            self.send_header("Retry-After", str(math.ceil(after)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # The library's own page repeats what the client sent, a token perhaps.
        del message, explain
        self.close_connection = True
        self.command = self.command or ""
        self.server.taker.count("other", code)
        self._answer(HTTPStatus(code), {"error": "no request that is understood"}, 0.0)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        _log.debug("%s %s", self.address_string(), format % args)
