"""One fault run: agents, spool, daemon, database, proxy, broker; and what came out at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oodmon.store.events import Store
from tests.faults.agent import AGENTS, STEPS
from tests.faults.proxy import Proxy
from tests.faults.writers import ROOT, Agents, make_topic
from tests.servers.kafka import Broker
from tests.servers.processes import free_port
from tests.waiting import PATIENCE_SECONDS, eventually

CHUNK = 6
"""The agents are never further apart than so many batches; lateness allows for more."""
PARTITIONS = 4
"""Of the topic that agents publish to."""
_PACE_SECONDS = 0.02


@dataclass
class Outcome:
    """What one run left behind.

    Attributes:
        facts: table → rows as sorted text.
        alerts: ids of the alerts that were stored.
        sent: ids in the topic, one per record; contents: id → different bodies.
        recovery: seconds from each restart (or mended part) to ready.
        threads, files, memory: of the daemon at rest, bytes.
        damaged: damaged places that the daemon told of.
        repeated: messages of the topic that agents publish to which are there more than once.
    """

    facts: dict[str, list[str]] = field(default_factory=dict)
    alerts: set[str] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    contents: dict[str, set[bytes]] = field(default_factory=dict)
    recovery: list[float] = field(default_factory=list)
    threads: int = 0
    files: int = 0
    memory: int = 0
    damaged: float = 0.0
    repeated: int = 0


class Run:
    """One run in a folder of its own.

    Args:
        folder: empty.
        url: of the database.
        seed: of the traffic.
        agents, broker: shared by the runs of a session.
        doors: the proxies before the broker, shared as well: of the sink, and of the feed.
        states: folder with the calibration.
        feed: ``spool`` or ``kafka``.

    Attributes:
        doors: those that the run goes through.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        seed: int,
        agents: Agents,
        broker: Broker,
        doors: Sequence[Proxy],
        states: Path,
        feed: str = "spool",
    ) -> None:
        self.folder = folder
        self.url = url
        self.agents = agents
        self.broker = broker
        self.feed = feed
        self.doors = tuple(doors if feed == "kafka" else doors[:1])
        self.outcome = Outcome()
        self.spool = folder / "spool"
        self.spool.mkdir(mode=0o700, exist_ok=True)
        self.log = folder / "daemon.log"
        self.daemons: list[tuple[subprocess.Popen[bytes], int]] = []
        self.topic = f"oodmon.faults.{uuid.uuid4().hex[:12]}"
        self.scores = f"{self.topic}.scores"
        self._seed = seed
        self._lock = threading.Lock()
        self.shift_clock(0.0)
        (folder / "oodmon.yaml").write_text(
            f"""
model: {{name: m, version: "1"}}
daemon:
  feed: {self._feed()}
  calibration: {{path: {states}}}
  flag_level: 0.01
  windows: {{length_seconds: 2, allowed_lateness_seconds: 2}}
  drift:
    budget: {{type: budget, false_alarms: 1 per 5000 windows}}
    ks: {{type: ks}}
  rules:
    novelty: {{drift: budget, severity: critical, resolve_after_windows: 2}}
    shape: {{drift: ks}}
  store: {{url: "{url}", lease_seconds: 1.0}}
  sinks:
    kafka:
      type: kafka
      bootstrap_servers: ["{doors[0].address}"]
      topic: {self.topic}
      timeout_seconds: 0.5
      events: [alert, notice, window, drift]
  http: {{host: 127.0.0.1, port: 0}}
"""
        )

    def _feed(self) -> str:
        if self.feed == "spool":
            sizes = f"max_bytes: {1 << 25}, segment_bytes: {1 << 16}"
            return f"{{type: spool, path: {self.spool}, {sizes}}}"
        servers, group = f'["{self.doors[1].address}"]', f"{self.scores}.group"
        return (
            f"{{type: kafka, bootstrap_servers: {servers}, topic: {self.scores}, group: {group}, "
            "timeout_seconds: 2.0}"
        )

    # what faults do

    def set_doors(self, mode: str, delay_seconds: float = 0.0) -> None:
        """Every proxy of this run behaves otherwise."""
        for door in self.doors:
            door.set(mode, delay_seconds)

    def start(self, *, wait: bool = True) -> subprocess.Popen[bytes]:
        """A daemon process; `wait`: until it is ready, and note how long that took."""
        port = free_port()
        began = time.monotonic()
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.faults.daemon"),
                    *(str(self.folder / "oodmon.yaml"), str(self.folder), str(port)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self.daemons.append((process, port))
        if wait:
            self.ready(began)
        return process

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the daemon that was started last, in this way."""
        process, _ = self.daemons.pop()
        process.send_signal(number)
        status = process.wait(PATIENCE_SECONDS)
        assert number == signal.SIGKILL or status == 0, self.said()

    def page(self, name: str, port: int = 0) -> tuple[int, str]:
        """Status and text of a page of the daemon that was started last; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port or self.daemons[-1][1]}/{name}", timeout=20
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def ready(self, since: float, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until the daemon is ready; note the time since then as a recovery."""
        self.until(lambda: self.page("readyz")[0] == 200, "ready", seconds)
        with self._lock:
            self.outcome.recovery.append(time.monotonic() - since)

    def until(
        self, holds: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS
    ) -> None:
        """Wait for it."""

        def so() -> bool:
            dead = [p for p, _ in self.daemons if p.poll() is not None]
            assert not dead, f"a daemon ended by itself: {self.said()}"
            return holds()

        eventually(so, lambda: f"{what}: {self.said()}", seconds)

    def shift_clock(self, seconds: float) -> None:
        """Set the daemon's wall clock off."""
        path = self.folder / "clock"
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            file.write(struct.pack("<q", round(seconds * 1e9)))

    def said(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    # the run

    def go(self, faults: dict[int, Callable[[Run], None]], harm: dict[int, str]) -> Outcome:
        """Traffic from beginning to end.

        Args:
            faults: chunk → what begins at it, beside the traffic.
            harm: chunk → ``torn``, ``flipped`` or ``killed``, done by one agent within it.
        """
        if self.feed == "kafka":
            make_topic(self.broker.address, self.scores, PARTITIONS)
        for agent in range(AGENTS):
            self._open(agent, 0)
        self.start()
        self.outcome.recovery.clear()
        failures: list[BaseException] = []
        beside: list[threading.Thread] = []
        for chunk, to in enumerate(range(CHUNK, STEPS + 1, CHUNK)):
            if chunk in faults:
                thread = threading.Thread(target=_guarded, args=(faults[chunk], self, failures))
                thread.start()
                beside.append(thread)
            for agent in range(AGENTS):
                fault = harm.get(chunk, "") if agent == chunk % AGENTS else ""
                self._write(agent, to, fault)
            time.sleep(_PACE_SECONDS)
        for thread in beside:
            thread.join()
        if failures:
            raise failures[0]
        time.sleep(0.1)  # every folder has been seen before the last batch closes the windows
        for agent in range(AGENTS):
            self._write(agent, STEPS + 1, "")
        self._drain()
        return self.outcome

    def _open(self, agent: int, at: int) -> None:
        what: dict[str, Any] = {"agent": agent, "seed": self._seed, "at": at}
        if self.feed == "kafka":
            what |= {"topic": self.scores, "address": self.doors[1].address}
        else:
            what["folder"] = str(self.spool)
        assert self.agents.ask(agent, what) == at

    def _write(self, agent: int, to: int, fault: str) -> None:
        answer = self.agents.ask(agent, {"to": to, "fault": fault})
        if answer is None:
            self.agents.replace(agent)
            # One of the chunk was accepted before it died; it is sent again, and counts once.
            self._open(agent, to - CHUNK)
            answer = self.agents.ask(agent, {"to": to})
        assert answer == to

    def _drain(self) -> None:
        store = Store(self.url)
        store.open()
        try:
            self.until(lambda: self._done(store), "everything read and delivered")
            self._collect(store)
        finally:
            store.close()
        self._weigh()
        while self.daemons:
            self.kill(signal.SIGTERM)
        for record in self.broker.read_all(self.topic):
            body = json.loads(record.value)
            self.outcome.sent.append(body["id"])
            self.outcome.contents.setdefault(body["id"], set()).add(record.value)
        if self.feed == "kafka":
            values = [record.value for record in self.broker.read_all(self.scores)]
            self.outcome.repeated = len(values) - len(set(values))

    def _done(self, store: Store) -> bool:
        seen = [agent["sequence"] for agent in store.agents()]
        return seen == [STEPS] * AGENTS and not any(d.pending for d in store.depths().values())

    def _collect(self, store: Store) -> None:
        tables: dict[str, list[dict[str, Any]]] = {
            "windows": store.windows(),
            "drift_results": store.drift_results(),
            "alerts": store.alerts(),
            "flagged": store.exceedances(),
            "notices": store.notices(),
            "agents": store.agents(),
        }
        self.outcome.facts = {
            name: sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
            for name, rows in tables.items()
        }
        for row in tables["alerts"]:
            one = f"{row['fingerprint']}-{row['started_at_ns']}"
            self.outcome.alerts.add(f"{one}-firing")
            if row["ended_at_ns"]:
                self.outcome.alerts.add(f"{one}-resolved")
        assert not any(depth.dead for depth in store.depths().values()), "dead letters"

    def _weigh(self) -> None:
        """Threads, open files and memory of the daemon at rest."""
        time.sleep(0.05)
        process, _ = self.daemons[-1]
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.MULTILINE))
        self.outcome.threads = int(found["Threads"])
        self.outcome.memory = int(found["VmRSS"]) * 1024
        self.outcome.files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        text = self.page("metrics")[1]
        told = re.search(r"^oodmon_feed_damaged_total (\S+)", text, re.MULTILINE)
        self.outcome.damaged = float(told[1]) if told else 0.0


def _guarded(fault: Callable[[Run], None], run: Run, failures: list[BaseException]) -> None:
    try:
        fault(run)
    except BaseException as error:
        failures.append(error)


def chunks() -> int:
    """How many chunks a run has."""
    return STEPS // CHUNK


def moments(rng: np.random.Generator, count: int) -> list[int]:
    """Chunks at which something may happen, not too near to the end."""
    return sorted(int(at) for at in rng.choice(np.arange(1, chunks() - 2), count, replace=False))
