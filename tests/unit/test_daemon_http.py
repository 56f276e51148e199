"""The management port: what each page says, and what a bad client can do (nothing)."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from oodmon import __version__
from oodmon.daemon.http import Management, Readiness
from oodmon.daemon.metrics import Metrics
from oodmon.errors import ConfigError
from tests.waiting import PATIENCE_SECONDS


class World:
    """What the pages ask for."""

    def __init__(self) -> None:
        self.ready = True
        self.why: str | None = None
        self.reloads = 0
        self.metrics = Metrics()

    def readiness(self) -> Readiness:
        return Readiness(self.ready, {"store": "ok" if self.ready else "gone", "sinks.a": "ok"})

    def reload(self) -> str | None:
        self.reloads += 1
        return self.why


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def port(world: World) -> Iterator[int]:
    server = Management(
        "127.0.0.1",
        0,
        readiness=world.readiness,
        metrics=world.metrics.render,
        reload=world.reload,
    )
    server.start()
    yield server.port
    server.stop()
    server.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "http"]


def ask(port: int, path: str, method: str = "GET", body: bytes = b"") -> tuple[int, str, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read().decode()
    finally:
        connection.close()


def test_pages(port: int, world: World) -> None:
    assert ask(port, "/healthz")[0] == 200
    status, kind, body = ask(port, "/readyz")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body) == {"ready": True, "parts": {"store": "ok", "sinks.a": "ok"}}
    world.ready = False
    status, _, body = ask(port, "/readyz")
    assert status == 503
    assert json.loads(body)["parts"]["store"] == "gone"
    assert ask(port, "/healthz")[0] == 200, "it lives although it is not ready"
    assert json.loads(ask(port, "/version")[2]) == {"name": "oodmon", "version": __version__}
    world.metrics.put("oodmon_ready", 1)
    status, kind, body = ask(port, "/metrics?x=1")
    assert kind.startswith("text/plain; version=0.0.4")
    assert "oodmon_ready 1.0" in body
    assert ask(port, "/nothing")[0] == 404
    assert ask(port, "/healthz", "HEAD") == (200, "application/json", "")


def test_reload_is_asked_for_by_post_only(port: int, world: World) -> None:
    assert ask(port, "/-/reload")[0] == 405
    assert world.reloads == 0
    assert json.loads(ask(port, "/-/reload", "POST", b"x" * 100)[2]) == {"reloaded": True}
    world.why = "oodmon.yaml:3:1: daemon.feed: is required"
    status, _, body = ask(port, "/-/reload", "POST")
    assert status == 500
    assert json.loads(body) == {"reloaded": False, "error": world.why}
    assert ask(port, "/metrics", "POST")[0] == 404
    assert ask(port, "/healthz", "PUT")[0] == 501


def test_clients_that_never_finish_do_not_stop_others(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for one in idle:
        one.sendall(b"GET /healthz HTTP/1.1\r\n")
    assert ask(port, "/healthz")[0] == 200
    for one in idle:
        one.close()


def test_garbage_is_answered_and_forgotten(port: int) -> None:
    for line in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(PATIENCE_SECONDS)
            client.sendall(line)
            client.recv(4096)
    assert ask(port, "/healthz")[0] == 200


def test_a_taken_port_is_a_problem_of_the_configuration(port: int, world: World) -> None:
    second = Management(
        "127.0.0.1",
        port,
        readiness=world.readiness,
        metrics=world.metrics.render,
        reload=world.reload,
    )
    with pytest.raises(ConfigError, match=rf"daemon.http: cannot listen on 127.0.0.1:{port}"):
        second.start()
    second.stop()
