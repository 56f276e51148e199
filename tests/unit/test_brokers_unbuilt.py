"""A broker that opens its door and never answers: whoever tries again keeps nothing open."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from oodmon.errors import FeedError
from oodmon.feeds.kafka import Kafka
from oodmon.records import ScoreBatch
from tests.waiting import eventually

logging.getLogger("kafka").setLevel(logging.CRITICAL)


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that hangs up on everybody."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                server.accept()[0].close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def of_the_client() -> list[str]:
    """Names of the client library's threads."""
    return [one.name for one in threading.enumerate() if one.name.startswith("kafka-")]


def open_files() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_reader_that_gets_no_answer_leaves_nothing_open(mute: str) -> None:
    with closing(Kafka((mute,), "t", timeout_seconds=0.2).reader()) as reader:
        before, held = of_the_client(), open_files()
        for _ in range(4):
            with pytest.raises(FeedError, match="bootstrap"):
                reader.poll(1, 0.1)
        eventually(lambda: of_the_client() == before, lambda: str(of_the_client()))
        eventually(
            lambda: open_files() <= held + 1,
            lambda: f"{open_files()} files are open, {held} before",
        )


def test_a_writer_that_gets_no_answer_leaves_nothing_open(mute: str) -> None:
    before = of_the_client()
    writer = Kafka((mute,), "t", timeout_seconds=0.2).writer("a")
    assert writer.put(ScoreBatch("m", "1", "a", 0, 1, {"msp": np.zeros(2, np.float32)}))
    eventually(lambda: writer._failures > 2, lambda: writer.last_failure)
    writer.close()
    eventually(lambda: of_the_client() == before, lambda: str(of_the_client()))
