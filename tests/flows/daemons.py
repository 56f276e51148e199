"""Daemon processes over a fixed spool, for the flow tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oodmon.feeds.spool import Spool
from oodmon.store.events import Store
from tests.streams import EPOCH, SECOND, batch, calibration
from tests.waiting import PATIENCE_SECONDS, eventually

DETECTORS = ("msp", "gram")


@dataclass
class Site:
    """A folder with a config, calibrations, a spool and a database.

    Attributes:
        folder: holds everything.
        store: YAML text of the store's URL.
        sinks: YAML text of the sinks.
    """

    folder: Path
    store: str = ""
    sinks: str = "{}"
    triggers: str = "{}"
    rule_triggers: str = "[]"
    detectors: tuple[str, ...] = DETECTORS
    batches: int = 0
    _log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._log = self.folder / "daemon.log"
        self.store = self.store or f"sqlite:///{self.folder / 'oodmon.db'}"
        states = self.folder / "states"
        states.mkdir(exist_ok=True)
        for name in self.detectors:
            calibration(2000, detector=name).save(states / f"{name}.calibration.safetensors")
        self.config.write_text(
            f"""
model: {{name: m, version: "1"}}
daemon:
  feed: {{type: spool, path: spool/}}
  calibration: {{path: states/}}
  flag_level: 0.01
  windows: {{length_seconds: 2, allowed_lateness_seconds: 1}}
  drift:
    budget: {{type: budget, false_alarms: 1 per 5000 windows}}
    ks: {{type: ks}}
    adwin: {{type: adwin}}
  rules:
    novelty:
      drift: budget
      severity: critical
      resolve_after_windows: 2
      triggers: {self.rule_triggers}
    shape: {{drift: ks, for_windows: 3}}
  store: {{url: "{self.store}"}}
  sinks: {self.sinks}
  triggers: {self.triggers}
  http: {{host: 127.0.0.1, port: 0}}
"""
        )

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "oodmon.yaml"

    @property
    def url(self) -> str:
        """Of the database."""
        return self.store

    def fill(self, batches: int, rows: int = 64, seed: int = 0) -> None:
        """Write traffic of two agents, with two episodes of novelty, and close the spool."""
        rng = np.random.default_rng(seed)
        feed = Spool(str(self.folder / "spool"), segment_bytes=1 << 20)
        writers = {name: feed.writer(name) for name in ("agent-a", "agent-b")}
        third = batches // 3
        for at in range(batches):
            name = ("agent-a", "agent-b")[at % 2]
            shift = 2.5 if at // (third // 2) in (2, 4) else 0.0
            one = batch(
                rng.normal(size=rows) + shift,
                seconds=at * 0.05,
                sequence=at // 2,
                source=name,
                detectors=self.detectors,
                predicted=rng.integers(0, 4, rows).astype(np.int32),
                segment=rng.integers(0, 2, rows).astype(np.int32),
                segments=("eu", "us"),
            )
            assert writers[name].put(one)
        for writer in writers.values():
            writer.close()
        self.batches = batches

    def start(self) -> subprocess.Popen[bytes]:
        """A daemon process on this folder."""
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "oodmon", "run", str(self.config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def committed(self) -> int:
        """Batches of one agent that are committed, 0 before the first."""
        with self.open() as store:
            return max((agent["sequence"] + 1 for agent in store.agents()), default=0)

    def times_ready(self) -> int:
        """How often a daemon has become ready here."""
        return self.log().count(": ready")

    def wait_ready(self, before: int) -> None:
        """Until one more has become ready than `times_ready` told before."""
        eventually(lambda: self.times_ready() > before, self.log)

    def wait_committed(self, before: int) -> None:
        """Until more is committed than `committed` told before."""
        eventually(lambda: self.committed() > before, self.log)

    def log(self) -> str:
        """What the daemons said."""
        return self._log.read_text() if self._log.exists() else ""

    @contextmanager
    def open(self) -> Iterator[Store]:
        """The store, for reading."""
        store = Store(self.url)
        store.open()
        try:
            yield store
        finally:
            store.close()

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until everything was read, concluded and delivered, then end the daemon."""
        try:
            with self.open() as store:

                def done() -> bool:
                    assert process.poll() is None, self.log()
                    return self._done(store)

                eventually(done, lambda: self.log()[-3000:], 300)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0, self.log()
        finally:
            process.kill()
            process.wait()

    def _done(self, store: Store) -> bool:
        seen = {agent["source"]: agent["sequence"] for agent in store.agents()}
        last = self.batches // 2 - 1
        if seen != {"agent-a": last, "agent-b": last}:
            return False
        windows = store.windows(newest_first=True, limit=1)
        end = EPOCH + round(self.batches * 0.05 * SECOND)
        return bool(windows) and windows[0]["window_end_ns"] >= end and not store.depths()

    def facts(self) -> dict[str, list[str]]:
        """Every row of the tables that hold conclusions, sorted, as text."""
        with self.open() as store:
            tables: dict[str, list[dict[str, Any]]] = {
                "windows": store.windows(),
                "drift_results": store.drift_results(),
                "alerts": store.alerts(),
                "flagged": store.exceedances(),
                "notices": store.notices(),
            }
        return {
            name: sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
            for name, rows in tables.items()
        }


__all__ = ["DETECTORS", "Site"]
