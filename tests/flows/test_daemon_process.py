"""The daemon as its users run it: a process, signals, its port, its memory, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from oodmon.feeds.spool import Spool
from oodmon.records import ScoreBatch
from tests.servers.processes import free_port
from tests.streams import calibration, stream
from tests.waiting import PATIENCE_SECONDS, eventually

IDLE_BYTES = 90_000_000
"""What an idle daemon may hold."""

BATCHES, ROWS = 8_000, 8

CONFIG = """\
model: {{name: m, version: "1"}}
daemon:
  feed: {{type: spool, path: spool/}}
  calibration: {{path: states/}}
  windows: {{length_seconds: 10, allowed_lateness_seconds: 2}}
  drift:
    budget: {{type: budget, false_alarms: "1 per 1 day", tolerated_fraction: 0.02}}
  rules:
    novelty: {{drift: budget, severity: critical, triggers: [retrain]}}
  store: {{url: "sqlite:///oodmon.db"}}
  sinks:
    log: {{type: log}}
  triggers:
    retrain: {{type: webhook, url: "http://127.0.0.1:1/retrain"}}
  http: {{host: 127.0.0.1, port: {port}}}
"""


class Daemon:
    """`oodmon run` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "states").mkdir(parents=True)
        calibration().save(folder / "states" / "msp.calibration.safetensors")
        self.config = folder / "oodmon.yaml"
        self.config.write_text(CONFIG.format(port=self.port))

    def start(self) -> None:
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "oodmon", "run", str(self.config)],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(PATIENCE_SECONDS)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def ask(self, path: str, method: str = "GET") -> tuple[int, str]:
        request = Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        try:
            with urlopen(request, timeout=PATIENCE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (URLError, ConnectionError, TimeoutError):
            return 0, ""

    def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        return self.ask("/readyz")[0] == 200

    def metric(self, name: str) -> float:
        """The sum over the labels."""
        lines = self.ask("/metrics")[1].splitlines()
        found = [one.rsplit(" ", 1)[1] for one in lines if one.startswith((f"{name} ", name + "{"))]
        return sum(map(float, found))

    def put(self, batches: Sequence[ScoreBatch], source: str = "agent") -> None:
        writer = Spool(str(self.folder / "spool")).writer(source)
        for batch in batches:
            assert writer.put(batch)
        writer.close()

    def rows(self) -> dict[str, list[Any]]:
        """What a person sees, in the order of the keys."""
        tables = ("windows", "drift_results", "alerts", "flagged_samples", "notices", "agents")
        with closing(sqlite3.connect(self.folder / "oodmon.db")) as database:
            return {
                table: sorted(database.execute(f"SELECT * FROM {table}"), key=repr)
                for table in tables
            }

    def samples(self) -> int:
        """Samples in closed windows, as far as there is a database."""
        try:
            with closing(sqlite3.connect(self.folder / "oodmon.db")) as database:
                (found,) = database.execute("SELECT sum(samples) FROM windows").fetchone()
        except sqlite3.OperationalError:
            return 0
        return found or 0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "d")
    yield daemon
    daemon.end(signal.SIGKILL)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_importing_the_daemon_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import oodmon.daemon, oodmon.daemon.service"],
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "oodmon.daemon.service" in modules
    heavy = {"torch", "pandas", "matplotlib", "sklearn", "river", "alembic", "kafka"}
    assert not {name.split(".")[0] for name in modules} & heavy


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_an_idle_daemon_is_small(daemon: Daemon) -> None:
    for _ in range(2):  # the first start makes the database, the second finds it
        daemon.start()
        eventually(daemon.ready, lambda: daemon.log)
        daemon.ask("/metrics")
        time.sleep(0.3)
        assert resident_bytes(daemon.pid) < IDLE_BYTES
        libraries = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert "libtorch" not in libraries
        assert daemon.end() == 0


def test_signals_reload_and_the_management_port(daemon: Daemon) -> None:
    daemon.start()
    eventually(daemon.ready, lambda: daemon.log)
    assert daemon.ask("/healthz")[0] == 200
    daemon.put(list(stream(100, shift_at=60)))
    eventually(lambda: daemon.metric("oodmon_drift_alarms_total") == 1, lambda: daemon.log)
    eventually(
        lambda: daemon.metric("oodmon_retrain_requests_total") == 1,
        lambda: daemon.log,
    )
    assert "oodmon_sink_deliveries_total{result=" in daemon.ask("/metrics")[1]
    good = daemon.config.read_text()
    daemon.config.write_text(good.replace("severity: critical", "severty: critical"))
    status, body = daemon.ask("/-/reload", "POST")
    assert status == 500
    assert "did you mean `severity`" in json.loads(body)["error"]
    assert daemon.metric("oodmon_config_last_reload_successful") == 0
    assert daemon.ready(), "the configuration before stays in force"
    daemon.config.write_text(good.replace("critical", "warning"))
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(
        lambda: daemon.metric("oodmon_config_last_reload_successful") == 1, lambda: daemon.log
    )
    with closing(sqlite3.connect(daemon.folder / "oodmon.db")) as database:
        told = database.execute("SELECT type, status FROM outbox ORDER BY seq").fetchall()
    kinds = [kind for kind, _ in told]
    assert kinds.count("oodmon.alert.firing.v1") == 2, "for the sink and the trigger"
    assert "oodmon.daemon.reload_failed.v1" in kinds
    assert daemon.end() == 0


def test_what_is_wrong_before_it_is_ready_ends_it_with_a_reason(daemon: Daemon) -> None:
    (daemon.folder / "states" / "msp.calibration.safetensors").unlink()
    daemon.start()
    assert daemon.process is not None
    assert daemon.process.wait(PATIENCE_SECONDS) not in (0, None)
    assert "oodmon fit" in daemon.log
    assert "Traceback" not in daemon.log


def test_interrupted_twice_it_does_not_wait_for_a_sink_that_hangs(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, answers nothing
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        hanging = f'    hook: {{type: webhook, url: "{url}"}}\n'
        text = daemon.config.read_text()
        daemon.config.write_text(text.replace("  triggers:\n", f"{hanging}  triggers:\n", 1))
        daemon.put(list(stream(100, shift_at=60)))
        daemon.start()
        eventually(lambda: daemon.metric("oodmon_outbox_pending") == 1, lambda: daemon.log)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGINT)
        eventually(lambda: "stopping" in daemon.ask("/readyz")[1], lambda: daemon.log)
        assert daemon.process.poll() is None, "it gives the sink its grace period"
        assert daemon.end(signal.SIGINT) == 130


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_killed_at_any_moment_it_writes_the_rows_of_an_undisturbed_run(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    batches = [
        ScoreBatch(
            one.model,
            one.version,
            one.source,
            one.sequence,
            one.observed_at,
            one.scores,
            one.digests,
            segment=rng.integers(0, 2, one.rows, np.int32),
            segments=("left", "right"),
            notices=("breaker opened",) if one.sequence % 2000 == 0 else (),
        )
        for one in stream(BATCHES, ROWS, seed, shift_at=BATCHES // 2, every_seconds=0.25)
    ]
    undisturbed, killed = Daemon(tmp_path / "whole"), Daemon(tmp_path / "killed")
    total = BATCHES * ROWS
    try:
        for daemon in (undisturbed, killed):
            daemon.put(batches)
        undisturbed.start()
        eventually(lambda: undisturbed.samples() == total, lambda: undisturbed.log, 300)
        assert undisturbed.end() == 0
        moments = random.Random(seed)
        between = 0
        for number in range(8):
            before = killed.samples()
            killed.start()
            if number % 4:  # some groups into the run
                eventually(lambda: killed.samples() > before, lambda: killed.log)  # noqa: B023
                time.sleep(moments.uniform(0.0, 0.15))
            else:  # while it starts
                time.sleep(moments.uniform(0.0, 1.0))
            killed.end(signal.SIGKILL)
            between += before < killed.samples() < total
            if killed.samples() == total:
                break
        assert between >= 3, "it has to be killed in the midst of its work"
        killed.start()
        eventually(lambda: killed.samples() == total, lambda: killed.log, 300)
        assert killed.end() == 0
    finally:
        undisturbed.end(signal.SIGKILL)
        killed.end(signal.SIGKILL)
    expected, found = undisturbed.rows(), killed.rows()
    assert expected["alerts"]
    assert expected["flagged_samples"]
    assert len(expected["notices"]) == 4  # every two-thousandth batch has one
    for table, rows in expected.items():
        assert found[table] == rows, table
