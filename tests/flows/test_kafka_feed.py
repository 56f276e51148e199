"""Serving processes with agents of their own → Kafka → daemons that are killed → database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oodmon.calibration import Calibration
from oodmon.store.events import Store
from tests.faults.writers import make_topic
from tests.servers.kafka import Broker
from tests.waiting import PATIENCE_SECONDS, eventually

torch = pytest.importorskip("torch")

AGENTS, PASSES, ROWS, CLASSES = 2, 60, 8, 4
CONFIG = """
model: {{name: m, version: "1"}}
agent:
  tap: {{type: hooks, layers: auto, overhead_budget: 1.0}}
  detectors: {{msp: {{type: msp}}}}
  states: states/
  feed: {feed}
daemon:
  feed: {feed}
  calibration: {{path: states/}}
  windows: {{length_seconds: 1, allowed_lateness_seconds: 600}}
  drift: {{ks: {{type: ks}}}}
  rules: {{shape: {{drift: ks}}}}
  store: {{url: "sqlite:///oodmon.db", lease_seconds: 1}}
  http: {{host: 127.0.0.1, port: 0}}
"""
SERVER = f"""
import sys
import torch
import oodmon

torch.manual_seed(0)
model = torch.nn.Linear({CLASSES}, {CLASSES}).eval()
agent = oodmon.attach(model, sys.argv[1])
for number in range({PASSES}):
    with agent.request(ids=tuple(f"{{sys.argv[2]}}-{{number}}-{{row}}" for row in range({ROWS}))):
        with torch.inference_mode():
            model(torch.randn({ROWS}, {CLASSES}))
    print(number, flush=True)
    assert sys.stdin.readline()
assert agent.detach({PATIENCE_SECONDS})
found = agent.stats()
print("end", found.seen, found.scored, flush=True)
"""


class Server:
    """A process that serves a model: one forward pass whenever it is asked."""

    def __init__(self, folder: Path, name: str) -> None:
        (folder / "server.py").write_text(SERVER)
        self._process = subprocess.Popen(
            [sys.executable, str(folder / "server.py"), str(folder / "oodmon.yaml"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def step(self) -> list[str]:
        """The words that it says next, and leave to go on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        if words and words[0] != "end":
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return words

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


class Daemons:
    """`oodmon run` on one config, as often as it is started."""

    def __init__(self, folder: Path) -> None:
        self._config, self._log = folder / "oodmon.yaml", folder / "daemon.log"
        self.running: list[subprocess.Popen[bytes]] = []

    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "oodmon", "run", str(self._config)]
            self.running.append(subprocess.Popen(command, stdout=log, stderr=log))

    def wait_ready(self, times: int) -> None:
        eventually(lambda: self.said().count(": ready") >= times, self.said)

    def kill(self) -> None:
        process = self.running.pop(0)
        process.kill()
        process.wait()

    def close(self) -> None:
        while self.running:
            self.kill()


@pytest.fixture
def folder(tmp_path: Path, kafka: Broker) -> Path:
    from oodmon import Activations
    from oodmon.detectors import Reference, Scorer
    from oodmon.registry import detectors

    states = tmp_path / "states"
    states.mkdir()
    torch.manual_seed(1)
    logits = torch.randn(500, CLASSES)
    reference = Reference.from_arrays(logits=logits, labels=logits.argmax(1), seed=0)
    scorer = Scorer.learn(detectors.create("msp"), reference)
    scorer.save(states / "msp.safetensors")
    scores = scorer.score(Activations(layers={}, logits=logits)).numpy()
    calibration = Calibration.from_scores("msp", scorer.digest, scores)
    calibration.save(states / "msp.calibration.safetensors")
    topic = kafka.topic()
    make_topic(kafka.address, topic, 3)
    feed = f'{{type: kafka, bootstrap_servers: ["{kafka.address}"], topic: {topic}}}'
    (tmp_path / "oodmon.yaml").write_text(CONFIG.format(feed=feed))
    return tmp_path


def test_agents_on_many_hosts_one_daemon_after_the_other(folder: Path) -> None:
    daemons, servers = Daemons(folder), [Server(folder, f"h{at}") for at in range(AGENTS)]
    store = Store(f"sqlite:///{folder / 'oodmon.db'}")
    try:
        daemons.start()
        daemons.wait_ready(1)
        store.open()

        def counted() -> int:
            return sum(row["samples"] for row in store.agents())

        ended: list[list[str]] = []
        for number in range(PASSES + 1):
            if number == PASSES // 3:
                eventually(lambda: counted() > 0, daemons.said)
                daemons.kill()  # nobody reads for a while
            if number == PASSES // 2:
                daemons.start()
            if number == PASSES - 10:
                daemons.start()  # it stands by, and takes over when the first is killed
                eventually(lambda: "standing by" in daemons.said(), daemons.said)
                daemons.kill()
            ended = [server.step() for server in servers]
        assert [words[0] for words in ended] == ["end"] * AGENTS
        served = AGENTS * PASSES * ROWS
        assert sum(int(words[1]) for words in ended) == served
        scored = sum(int(words[2]) for words in ended)  # on a busy machine an agent sheds some
        assert 0 < scored <= served
        eventually(lambda: counted() >= scored, daemons.said)
        daemons.running[0].send_signal(signal.SIGTERM)
        assert daemons.running[0].wait(PATIENCE_SECONDS) == 0, daemons.said()
        rows: list[dict[str, Any]] = store.agents()
        assert len(rows) == AGENTS
        assert all(row["samples"] > 0 for row in rows)
        assert [row["lost"] for row in rows] == [0] * AGENTS
        assert counted() == scored, "nothing is lost, and nothing counts twice"
        partitions = {row["partition"].rpartition("/")[0] for row in store.positions()}
        assert all(name.startswith("oodmon.test") for name in partitions), partitions
    finally:
        store.close()
        daemons.close()
        for server in servers:
            server.close()
