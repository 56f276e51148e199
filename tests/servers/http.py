"""A scriptable HTTP server on loopback: it records what it gets and answers as it is told."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class Answer:
    """What to answer.

    Attributes:
        status: of the answer.
        headers: beside ``Content-Length``.
        body: of the answer.
        delay_seconds: before anything is sent.
        drip_seconds: send the status line one byte at a time with this pause.
        reason: of the status line, where it drips.
        cut: close the connection without an answer, having read the request.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    delay_seconds: float = 0.0
    drip_seconds: float = 0.0
    reason: str = "slow"
    cut: bool = False


class HttpServer:
    """Listens from construction until `close`.

    Attributes:
        url: its root.
        requests: what came, in order.
        answers: given one after the other; then `default`.
        default: the answer when `answers` is empty.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.answers: list[Answer] = []
        self.default = Answer()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        scheme, host = ("http", "127.0.0.1") if tls is None else ("https", "localhost")
        self.url = f"{scheme}://{host}:{self._server.server_address[1]}"

    def answer(self, request: Request) -> Answer:
        """Record the request and choose its answer; subclasses look at the request."""
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else self.default

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond `close`."""
        self._closing.wait(seconds)

    def close(self) -> None:
        """Stop listening and wait for the requests in progress."""
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing then waits for them, so that no test leaves one behind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of what is tested."""


def _handler(owner: HttpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, self.rfile.read(length))
            answer = owner.answer(request)
            owner.pause(answer.delay_seconds)
            if answer.cut:
                self.close_connection = True
                return
            if answer.drip_seconds:
                for byte in f"HTTP/1.1 {answer.status} {answer.reason}\r\n".encode():
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    owner.pause(answer.drip_seconds)
            else:
                self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection = True

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    return Handler


@pytest.fixture
def http_server() -> Iterator[HttpServer]:
    """A server that answers 200 until told otherwise."""
    server = HttpServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def https_server(tmp_path: Path) -> Iterator[tuple[HttpServer, str]]:
    """A server with a certificate for ``localhost``, and the file that vouches for it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HttpServer(context)
    try:
        yield server, str(certificate)
    finally:
        server.close()
