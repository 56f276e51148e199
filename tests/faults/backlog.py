"""How fast a daemon that was away is ready again, and works off what has piled up in the spool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from oodmon.feeds.spool import Spool
from oodmon.store.events import Store
from tests.faults.writers import ROOT
from tests.servers.processes import free_port
from tests.streams import batch, calibration

ROWS = 64
_EVERY_SECONDS = 0.02


def fill(folder: Path, samples: int) -> int:
    """Batches of `ROWS` samples by two agents; how many batches."""
    rng = np.random.default_rng(3)
    feed = Spool(str(folder / "spool"), max_bytes=1 << 31)
    writers = [feed.writer(name) for name in ("agent-0", "agent-1")]
    count = samples // ROWS // 2 * 2
    for at in range(count):
        one = batch(
            rng.normal(size=ROWS),
            seconds=at * _EVERY_SECONDS,
            sequence=at // 2,
            source=f"agent-{at % 2}",
            predicted=rng.integers(0, 10, ROWS).astype(np.int32),
        )
        assert writers[at % 2].put(one)
    for writer in writers:
        writer.close()
    return count


def catch_up(samples: int) -> Iterator[str]:
    """Fill, start, wait: lines for people."""
    with tempfile.TemporaryDirectory(prefix="oodmon-backlog-") as name:
        folder = Path(name)
        (folder / "states").mkdir()
        calibration(5000).save(folder / "states" / "msp.calibration.safetensors")
        (folder / "oodmon.yaml").write_text(
            """
model: {name: m, version: "1"}
daemon:
  feed: {type: spool, path: spool/, max_bytes: 2147483648}
  calibration: {path: states/}
  windows: {length_seconds: 10, allowed_lateness_seconds: 5}
  drift: {budget: {type: budget, false_alarms: 1 per 30 days}}
  rules: {novelty: {drift: budget}}
  store: {url: "sqlite:///oodmon.db"}
  http: {host: 127.0.0.1, port: 0}
"""
        )
        batches = fill(folder, samples)
        began = time.monotonic()
        with (folder / "daemon.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "oodmon", "run", str(folder / "oodmon.yaml")),
                    *("--port", str(free_port())),
                ],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        try:
            while ": ready" not in (folder / "daemon.log").read_text():
                assert process.poll() is None, (folder / "daemon.log").read_text()
                time.sleep(0.01)
            ready, work_ready = time.monotonic(), cpu_seconds(process.pid)
            _wait(folder, batches)
            done, work_done = time.monotonic(), cpu_seconds(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    yield (
        f"ready {ready - began:.2f} s ({work_ready:.2f} s of CPU) after the start, over a backlog "
        f"of {samples:,} samples"
    )
    rate = batches * ROWS / (done - ready)
    yield (
        f"backlog worked off in {done - ready:.2f} s: {rate:,.0f} samples/s, "
        f"{1e6 / rate:.2f} s per million "
        f"({(work_done - work_ready) * 1e6 / batches / ROWS:.2f} s of CPU)"
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _wait(folder: Path, batches: int) -> None:
    store = Store(f"sqlite:///{folder / 'oodmon.db'}")
    store.open()
    try:
        while sum(agent["sequence"] + 1 for agent in store.agents()) < batches:
            time.sleep(0.02)
    finally:
        store.close()
