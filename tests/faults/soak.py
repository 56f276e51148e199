"""``make soak``: the daemon at the highest rate that the machine holds, for long; nothing may grow.

A writer process fills a spool as fast as the daemon empties it, with an episode of novelty now
and then. Once a second the daemon's memory, CPU time, open files, threads, backlog, outbox and
store are looked at. After a warm-up of a third of the time it must hold: memory grows by less than
1 %, the CPU time per sample stays within a tenth, and no queue grows.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from oodmon.feeds.spool import Spool
from tests.faults.backlog import cpu_seconds
from tests.faults.writers import ROOT
from tests.servers.processes import free_port
from tests.streams import batch, calibration

_ROWS = 64
_EVERY_SECONDS = 0.02
_EPISODE = (20_000, 1_500)
"""Every so many batches, so many batches of novelty."""
_AHEAD_BYTES = 2 << 20
_KINDS = ("windows", "drift_results", "flagged_samples", "outbox", "notices", "alerts")
_KEPT = "{" + ", ".join(f"{kind}: 0.02" for kind in _KINDS) + "}"
_GROWTH = 0.01
_COST = 0.10

_CONFIG = f"""
model: {{name: m, version: "1"}}
daemon:
  feed: {{type: spool, path: spool/, max_bytes: 268435456}}
  calibration: {{path: states/}}
  windows: {{length_seconds: 10, allowed_lateness_seconds: 5}}
  drift: {{budget: {{type: budget, false_alarms: 1 per 30 days}}, ks: {{type: ks}}}}
  rules: {{novelty: {{drift: budget}}}}
  store:
    url: "sqlite:///oodmon.db"
    retention_days: {_KEPT}
  sinks: {{log: {{type: log}}}}
  http: {{host: 127.0.0.1, port: 0}}
"""


@dataclass(frozen=True, slots=True)
class Look:
    """The daemon at one moment: seconds since the start, bytes, counts."""

    at: float
    memory: float
    work: float
    files: float
    threads: float
    samples: float
    backlog: float
    pending: float
    store: float


def write(folder: Path) -> None:
    """The writer process: for ever, no further ahead of the daemon than `_AHEAD_BYTES`."""
    rng = np.random.default_rng(5)
    writer = Spool(str(folder / "spool"), max_bytes=1 << 28, segment_bytes=1 << 20).writer("agent")
    calm = [rng.normal(size=_ROWS).astype(np.float32) for _ in range(512)]
    classes = rng.integers(0, 10, _ROWS).astype(np.int32)
    number = 0
    while True:
        novel = number % _EPISODE[0] >= _EPISODE[0] - _EPISODE[1]
        scores = calm[number % len(calm)] + np.float32(2.0 * novel)
        one = batch(scores, number * _EVERY_SECONDS, number, predicted=classes)
        while not writer.put(one):
            time.sleep(0.01)
        number += 1
        while number % 64 == 0 and _ahead(writer.folder) > _AHEAD_BYTES:
            time.sleep(0.002)


def _ahead(folder: Path) -> int:
    found = 0
    for path in folder.glob("*.seg"):
        with suppress(FileNotFoundError):  # the daemon has just settled it
            found += path.stat().st_size
    return found


def look(pid: int, port: int, began: float) -> Look:
    """Ask the system and the daemon itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.MULTILINE))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()

    def told(name: str) -> float:
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in values)

    return Look(
        time.monotonic() - began,
        int(found["VmRSS"]) * 1024,
        cpu_seconds(pid),
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
        int(found["Threads"]),
        told("oodmon_samples_total"),
        told("oodmon_feed_backlog_bytes"),
        told("oodmon_outbox_pending"),
        told("oodmon_store_size_bytes"),
    )


def soak(seconds: float, every_seconds: float = 1.0) -> list[Look]:
    """Run, and look once in a while."""
    with tempfile.TemporaryDirectory(prefix="oodmon-soak-") as name:
        folder, port = Path(name), free_port()
        (folder / "states").mkdir()
        calibration(5000).save(folder / "states" / "msp.calibration.safetensors")
        (folder / "oodmon.yaml").write_text(_CONFIG)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        commands = (
            ("-m", "oodmon", "run", str(folder / "oodmon.yaml"), "--port", str(port)),
            ("-m", "tests.faults.soak", "--write", str(folder)),
        )
        with (folder / "log").open("wb") as log:
            processes = [
                subprocess.Popen(
                    [sys.executable, *command], stdout=log, stderr=log, cwd=ROOT, env=environment
                )
                for command in commands
            ]
        daemon = processes[0]
        try:
            while ": ready" not in (folder / "log").read_text():
                assert daemon.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            began = time.monotonic()
            looks = []
            while time.monotonic() - began < seconds:
                time.sleep(every_seconds)
                assert all(one.poll() is None for one in processes), (folder / "log").read_text()
                looks.append(look(daemon.pid, port, began))
        finally:
            processes[1].kill()
            daemon.send_signal(signal.SIGTERM)
            for one in processes:
                one.wait(60)
        return looks


def judge(looks: list[Look]) -> list[str]:
    """What grew, in words; empty is good. The first third warms up."""
    third = len(looks) // 3
    early, late = looks[third : 2 * third], looks[2 * third :]
    wrong = []
    growth = median(one.memory for one in late) / median(one.memory for one in early) - 1
    if growth >= _GROWTH:
        wrong.append(f"memory grew by {growth:.1%}")
    if _cost(late) > _cost(early) * (1 + _COST):
        wrong.append(f"a sample costs {_cost(late):.2e} s of CPU, {_cost(early):.2e} s before")
    for what, may in (("backlog", 4.0 * _AHEAD_BYTES), ("pending", 100.0)):
        most = max(getattr(one, what) for one in late)
        if most > may:
            wrong.append(f"{what} grew to {most:,.0f}")
    for what in ("files", "threads"):
        if max(getattr(one, what) for one in late) > max(getattr(one, what) for one in early) + 4:
            wrong.append(f"{what} grew")
    return wrong


def _cost(looks: list[Look]) -> float:
    return (looks[-1].work - looks[0].work) / max(looks[-1].samples - looks[0].samples, 1.0)


def tell(looks: list[Look]) -> list[str]:
    """What docs/reliability.md shows: two sentences, and a table of what must not grow."""
    third = len(looks) // 3
    early, late = looks[third : 2 * third], looks[2 * third :]
    growth = median(one.memory for one in late) / median(one.memory for one in early) - 1
    spent = looks[-1].at - looks[0].at
    rate = (looks[-1].samples - looks[0].samples) / spent
    shown: tuple[tuple[str, Callable[[list[Look]], str]], ...] = (
        ("memory, MB", lambda some: f"{median(one.memory for one in some) / 1e6:.1f}"),
        ("CPU per sample, µs", lambda some: f"{_cost(some) * 1e6:.2f}"),
        ("backlog at most, MB", lambda some: f"{max(one.backlog for one in some) / 1e6:.1f}"),
        ("outbox at most, events", lambda some: f"{max(one.pending for one in some):.0f}"),
        ("store at most, MB", lambda some: f"{max(one.store for one in some) / 1e6:.1f}"),
        ("open files", lambda some: f"{max(one.files for one in some):.0f}"),
        ("threads", lambda some: f"{max(one.threads for one in some):.0f}"),
    )
    samples, seconds = looks[-1].samples, looks[-1].at
    return [
        f"{samples:,.0f} samples in {seconds:.0f} s, {rate:,.0f} a second; memory {growth:+.2%}.",
        "",
        "| | second third | last third |",
        "| --- | --- | --- |",
        *(f"| {what} | {of(early)} | {of(late)} |" for what, of in shown),
    ]


def main() -> int:
    """Parse, run, tell; 1 where something grew."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write is not None:
        write(asked.write)
    looks = soak(asked.seconds)
    wrong = judge(looks)
    sys.stdout.write("\n".join([*tell(looks), *(f"WRONG: {one}" for one in wrong)]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
