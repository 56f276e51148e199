"""A real Kafka-protocol broker as a process of its own, which tests may stop, hang and restart.

``OODMON_TEST_KAFKA=host:port`` runs the same tests against another broker; those that stop or hang
it are then skipped.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.servers.processes import end, free_port, start
from tests.waiting import eventually


class Broker:
    """One broker and what a test does to it.

    Attributes:
        address: ``host:port`` for clients.
    """

    def __init__(
        self, address: str, binary: Path | None = None, folder: Path | None = None
    ) -> None:
        self.address = address
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def topic(self, prefix: str = "oodmon.test") -> str:
        """A topic name that no other test uses."""
        return f"{prefix}.{uuid.uuid4().hex[:12]}"

    def start(self) -> None:
        """Start the process on its port, with the data that it had."""
        binary, folder = self._own()
        if self._process is None:
            port = self.address.rpartition(":")[2]
            command = [str(binary), "start", "--data-dir", str(folder / "data")]
            command += ["--only", "kafka", "--kafka-port", port]
            self._process = start(command, int(port), folder / "broker.log")

    def stop(self) -> None:
        """End the process; the port refuses connections until `start`."""
        self._own()
        if self._process is not None:
            self.thaw()
            end(self._process)
            self._process = None

    def freeze(self) -> None:
        """Hang the process: connections stay, nothing answers."""
        self._own()
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            # The signal is still under way: a thread on the other core may yet answer.
            tasks = Path(f"/proc/{self._process.pid}/task")
            eventually(lambda: all(_stopped(task) for task in tasks.iterdir()))

    def thaw(self) -> None:
        """Let a hung process go on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def read_all(self, topic: str) -> list[Any]:
        """Every record that the topic holds now; none where there is no such topic."""
        from kafka import KafkaConsumer, TopicPartition  # type: ignore[import-untyped]

        consumer = KafkaConsumer(bootstrap_servers=self.address, group_id=None)
        found: list[Any] = []
        try:
            numbers = consumer.partitions_for_topic(topic) or ()
            partitions = [TopicPartition(topic, number) for number in numbers]
            if not partitions:
                return found
            consumer.assign(partitions)
            consumer.seek_to_beginning()
            ends = consumer.end_offsets(partitions)

            def at_the_end() -> bool:
                for records in consumer.poll(timeout_ms=100).values():
                    found.extend(records)
                return all(consumer.position(one) >= end for one, end in ends.items())

            eventually(at_the_end, f"{topic} could not be read to its end")
        finally:
            consumer.close()
        return found

    def _own(self) -> tuple[Path, Path]:
        if self._binary is None or self._folder is None:
            pytest.skip("this test stops the broker, which OODMON_TEST_KAFKA does not allow")
        return self._binary, self._folder


def _stopped(task: Path) -> bool:
    """Whether a thread of a process has taken the signal to stop, or is gone."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):
        return True


def broker_binary() -> Path:
    """The broker's executable, from the wheel; the wheel's own command only wraps it."""
    try:
        found = Path(str(files("noida_db"))) / "noida-db"
    except ModuleNotFoundError:
        found = Path("noida-db")
    if not found.is_file():
        pytest.skip("no broker: pip install noida-db, or set OODMON_TEST_KAFKA=host:port")
    if not os.access(found, os.X_OK):
        found.chmod(found.stat().st_mode | stat.S_IXUSR)
    return found


@pytest.fixture(scope="session")
def _broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    given = os.environ.get("OODMON_TEST_KAFKA")
    if given:
        yield Broker(given)
        return
    broker = Broker(f"127.0.0.1:{free_port()}", broker_binary(), tmp_path_factory.mktemp("kafka"))
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture
def kafka(_broker: Broker) -> Iterator[Broker]:
    """The session's broker, running; whatever the test did to it is undone afterwards."""
    yield _broker
    if not os.environ.get("OODMON_TEST_KAFKA"):
        _broker.thaw()
        _broker.start()


def ids(records: Sequence[Any]) -> list[str]:
    """The events' ids, as a consumer finds them in either mode of CloudEvents."""
    found = []
    for record in records:
        headers = dict(record.headers)
        found.append(
            headers["ce_id"].decode() if "ce_id" in headers else json.loads(record.value)["id"]
        )
    return found
