"""What the fixtures of real servers share: free ports, waiting for a port, ending a process."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.waiting import PATIENCE_SECONDS, eventually

_LANES = 8
_anywhere = random.SystemRandom()  # a test that seeds its dice must not get the port of another
_given: set[int] = set()


def free_port() -> int:
    """A loopback port that nobody listens on, and that nobody else is given.

    The kernel hands out ephemeral ports to whoever connects or binds to port 0, so one of those may
    be gone before the test has bound it. Ours lie outside their range; each worker of a parallel
    run has a lane of its own, and no port is given twice.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    lane = int(worker) % _LANES if worker.isdigit() else 0
    for _ in range(1000):
        port = _anywhere.choice(_quiet_ports()) // _LANES * _LANES + lane
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise RuntimeError("no loopback port is free")


def _quiet_ports() -> range:
    """Ports that the kernel does not choose by itself."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        lowest, highest = map(int, text.split())
    except (OSError, ValueError):
        lowest, highest = 49152, 65535  # as the registry of ports has it
    below, above = range(10_240, lowest - _LANES), range(highest + _LANES, 65_520)
    return max(below, above, range(20_000, 21_000), key=len)


def start(command: Sequence[str], port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a server and wait until its port answers; its output goes to `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    up(process, lambda: _answers(port), lambda: log.read_text(errors="replace")[-2000:])
    return process


def up(
    process: subprocess.Popen[bytes], answers: Callable[[], bool], said: Callable[[], str]
) -> None:
    """Wait until a server answers; one that ends instead, or never answers, raises RuntimeError."""
    try:
        eventually(lambda: process.poll() is not None or answers())
    except AssertionError:
        end(process)
    if process.poll() is not None:
        raise RuntimeError(f"{process.args!r} did not start:\n{said()}")


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5.0).close()
    except OSError:
        return False
    return True


def end(process: subprocess.Popen[bytes], seconds: float = PATIENCE_SECONDS / 2) -> None:
    """Ask the process to end, then make it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
