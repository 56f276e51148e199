"""The agent processes of the fault runs as the driver sees them, and the topic they publish to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.faults.agent import AGENTS

__all__ = ["ROOT", "Agents", "make_topic", "send_again"]

ROOT = Path(__file__).resolve().parents[2]


class Agents:
    """Writer processes that live longer than a run; one that was killed is replaced."""

    def __init__(self) -> None:
        self._processes = [_agent() for _ in range(AGENTS)]

    def pid(self, agent: int) -> int:
        """Of the process."""
        return self._processes[agent].pid

    def ask(self, agent: int, what: dict[str, Any]) -> int | None:
        """Up to which batch it has written; none where it died."""
        process = self._processes[agent]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(what).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        return int(answer) if answer else None

    def replace(self, agent: int) -> None:
        """A new process for one that died."""
        _reap(self._processes[agent])
        self._processes[agent] = _agent()

    def close(self) -> None:
        """End all."""
        for process in self._processes:
            process.kill()
            _reap(process)


def make_topic(address: str, topic: str, partitions: int) -> None:
    """A topic of so many partitions on the broker at that address."""
    from kafka.admin import KafkaAdminClient, NewTopic  # type: ignore[import-untyped]

    with closing(KafkaAdminClient(bootstrap_servers=address)) as admin:
        admin.create_topics([NewTopic(topic, partitions, 1)])


def send_again(address: str, records: Sequence[Any]) -> None:
    """Each of these messages once more to its partition; every other one without its headers."""
    from kafka import KafkaProducer  # type: ignore[import-untyped]

    with closing(KafkaProducer(bootstrap_servers=address)) as producer:
        for number, one in enumerate(records):
            headers = list(one.headers) if number % 2 else []
            producer.send(one.topic, one.value, one.key, headers, one.partition)
        producer.flush(30)


def _agent() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
