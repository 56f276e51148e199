"""The management port: is it alive, is it ready, what does it measure, reload it.

GET ``/healthz`` (the process lives), ``/readyz`` (it does its work; 503 and the reasons where not),
``/metrics`` (Prometheus text), ``/version``; POST ``/-/reload`` (200 when the new configuration
took effect, 500 and the reason when the old one was kept). It has a port of its own and listens on
the loopback address unless told otherwise: it has no login.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from oodmon.daemon.listening import Listener, Server
from oodmon.daemon.metrics import CONTENT_TYPE

__all__ = ["VERSION", "Management", "Readiness"]

_log = logging.getLogger(__name__)

try:
    VERSION = version("oodmon")
except PackageNotFoundError:  # run from a checkout that was never installed
    VERSION = "unknown"

_REQUEST_SECONDS: Final = 10
"""A client that does not finish its request within this is dropped."""
_MAX_REQUESTS: Final = 32
"""Requests at a time; more are told to come back."""
_JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the daemon does its work, and what there is to say about each part.

    Attributes:
        ready: every part that must work does.
        parts: part → "ok" or what is wrong; sinks stand here too, but do not decide.
    """

    ready: bool
    parts: Mapping[str, str]


class Management:
    """The server; answers from threads of its own and never touches the pipeline.

    Args:
        host: address to listen on.
        port: 0 takes any free port.
        readiness: asked for ``/readyz``.
        metrics: the text of ``/metrics``.
        reload: asked for ``/-/reload``: none when it took effect, else why not.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        readiness: Callable[[], Readiness],
        metrics: Callable[[], bytes],
        reload: Callable[[], str | None],
    ) -> None:
        self._address = (host, port)
        self._asked = (readiness, metrics, reload)
        self._listener: Listener[Server] = Listener("http", "daemon.http")

    @property
    def port(self) -> int:
        """The port that it listens on; 0 before `start`."""
        return self._listener.port

    def start(self) -> None:
        """Listen; `ConfigError` where the address cannot be had."""
        self._listener.start(lambda: _Pages(self._address, *self._asked), *self._address)

    def stop(self) -> None:
        """Listen no more. Safe twice."""
        self._listener.stop()


class _Pages(Server):
    """Listens, and knows whom to ask."""

    def __init__(
        self,
        address: tuple[str, int],
        readiness: Callable[[], Readiness],
        metrics: Callable[[], bytes],
        reload: Callable[[], str | None],
    ) -> None:
        self.readiness = readiness
        self.metrics = metrics
        self.reload = reload
        super().__init__(address, _Handler, _MAX_REQUESTS)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Pages

    protocol_version = "HTTP/1.1"
    server_version = f"oodmon/{VERSION}"
    sys_version = ""
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        if path == "/healthz":
            self._json(HTTPStatus.OK, {"status": "alive"})
        elif path == "/readyz":
            state = self.server.readiness()
            status = HTTPStatus.OK if state.ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._json(status, {"ready": state.ready, "parts": dict(state.parts)})
        elif path == "/metrics":
            self._answer(HTTPStatus.OK, CONTENT_TYPE, self.server.metrics())
        elif path == "/version":
            self._json(HTTPStatus.OK, {"name": "oodmon", "version": VERSION})
        elif path == "/-/reload":
            self._json(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "use POST"})
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        # What a client sends along is not read, so the connection cannot be used again.
        self.close_connection = True
        if self.path.split("?", 1)[0] != "/-/reload":
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})
            return
        why = self.server.reload()
        if why is None:
            self._json(HTTPStatus.OK, {"reloaded": True})
        else:
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"reloaded": False, "error": why})

    def _json(self, status: HTTPStatus, value: Mapping[str, Any]) -> None:
        self._answer(status, _JSON, json.dumps(value).encode() + b"\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        _log.debug("%s %s", self.address_string(), format % args)
