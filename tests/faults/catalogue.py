"""The faults: what is done to a run, at moments that the seed chooses."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tests.faults.site import Run, chunks, moments
from tests.faults.writers import send_again
from tests.servers.postgres import PostgresServer
from tests.waiting import PATIENCE_SECONDS

Action = Callable[[Run], None]


_BROKER_FLUSHES_SECONDS = 1.5
_TAKEN_OVER_SECONDS = 10.0


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name: what it is called.
        databases: on which it makes sense.
        feed: by which the batches come.
        repeats: whether it must leave messages on the topic twice.
        plan: generator, server → (chunk → action, chunk → harm by an agent).
    """

    name: str
    plan: Callable[
        [np.random.Generator, PostgresServer | None], tuple[dict[int, Action], dict[int, str]]
    ]
    databases: tuple[str, ...] = ("sqlite", "postgresql")
    feed: str = "spool"
    repeats: bool = False


def _once(
    action: Callable[[Run, np.random.Generator], None],
) -> Callable[..., tuple[dict[int, Action], dict[int, str]]]:
    """At one moment."""

    def plan(
        rng: np.random.Generator, server: PostgresServer | None
    ) -> tuple[dict[int, Action], dict[int, str]]:
        del server
        (at,) = moments(rng, 1)
        return {at: partial(_acted, action=action, rng=rng)}, {}

    return plan


def _acted(
    run: Run, *, action: Callable[[Run, np.random.Generator], None], rng: np.random.Generator
) -> None:
    action(run, rng)


def _restarts(number: signal.Signals) -> Callable[[Run, np.random.Generator], None]:
    def action(run: Run, rng: np.random.Generator) -> None:
        for _ in range(2):
            time.sleep(float(rng.uniform(0.0, 0.15)))
            run.kill(number)
            run.start()

    return action


def _harm(kind: str) -> Callable[..., tuple[dict[int, Action], dict[int, str]]]:
    def plan(
        rng: np.random.Generator, server: PostgresServer | None
    ) -> tuple[dict[int, Action], dict[int, str]]:
        del server
        return {}, dict.fromkeys(moments(rng, 2), kind)

    return plan


# disks


def mountable() -> bool:
    """Whether this user may mount a small file system."""
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """A small file system without a free byte, while the block runs."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            while True:
                try:
                    if file.write(b"\0" * size) < size:
                        break
                except OSError:
                    break
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def _file_limit(pid: int, size: int) -> Iterator[None]:
    """No file of this process may grow beyond that size, while the block runs."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def _spool_full(run: Run, rng: np.random.Generator) -> None:
    length = float(rng.uniform(0.1, 0.4))
    if os.path.ismount(run.spool):
        with _full(run.spool):
            time.sleep(length)
        return
    for agent in range(3):
        with _file_limit(run.agents.pid(agent), int(rng.integers(20, 3000))):
            time.sleep(length / 3)


def _sqlite_full(run: Run, rng: np.random.Generator) -> None:
    database = Path(run.url.partition(":///")[2])
    length = float(rng.uniform(0.2, 0.5))
    if os.path.ismount(database.parent):
        with _full(database.parent):
            time.sleep(length)
    else:
        process, _ = run.daemons[-1]
        with _file_limit(process.pid, database.stat().st_size // 4096 * 4096):
            time.sleep(length)
    run.ready(time.monotonic())


# databases


def _locked(shortest: float, longest: float) -> Callable[[Run, np.random.Generator], None]:
    def action(run: Run, rng: np.random.Generator) -> None:
        _lock(run, float(rng.uniform(shortest, longest)))

    return action


def _lock(run: Run, seconds: float) -> None:
    if run.url.startswith("sqlite"):
        with closing(sqlite3.connect(run.url.partition(":///")[2], timeout=20)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            other.rollback()
    else:
        import psycopg

        with psycopg.connect(run.url) as other:
            other.execute("LOCK TABLE pipeline_state, outbox, windows IN ACCESS EXCLUSIVE MODE")
            time.sleep(seconds)
    run.ready(time.monotonic())


def _server_stops(
    rng: np.random.Generator, server: PostgresServer | None
) -> tuple[dict[int, Action], dict[int, str]]:
    assert server is not None
    (at,) = moments(rng, 1)
    away = float(rng.uniform(0.0, 0.4))

    def action(run: Run) -> None:
        server.stop()
        time.sleep(away)
        server.start()
        run.ready(time.monotonic())

    return {at: action}, {}


# the broker


def _broker_stops(run: Run, rng: np.random.Generator) -> None:
    # The stand-in broker forgets what it acknowledged within its last moments, also where it is
    # asked to end; so nobody reaches it then. What a broker promises is not what is tested here.
    run.set_doors("refuse")
    time.sleep(_BROKER_FLUSHES_SECONDS)
    run.broker.stop()
    run.set_doors("pass")
    time.sleep(float(rng.uniform(0.1, 0.8)))
    run.broker.start()


def _proxied(mode: str) -> Callable[[Run, np.random.Generator], None]:
    def action(run: Run, rng: np.random.Generator) -> None:
        run.set_doors(mode, float(rng.uniform(0.05, 0.3)))
        time.sleep(float(rng.uniform(0.4, 1.2)))
        if mode != "unheard":  # that one ends with the first produce request
            run.set_doors("pass")

    return action


# clocks and daemons


def _clock_jumps(run: Run, rng: np.random.Generator) -> None:
    for _ in range(3):
        sign = 1 if rng.random() < 0.6 else -1
        run.shift_clock(sign * float(rng.choice([30.0, 7200.0, 86_400.0 * 400])))
        time.sleep(float(rng.uniform(0.05, 0.3)))
        run.shift_clock(0.0)
        time.sleep(0.05)


def _two_daemons(run: Run, rng: np.random.Generator) -> None:
    first, _ = run.daemons[-1]
    second = run.start(wait=False)
    run.until(lambda: run.page("readyz")[0] == 503, "the second answers")
    run.until(lambda: "holds pipeline" in run.page("readyz")[1], "the second stands by")
    assert second.poll() is None
    time.sleep(float(rng.uniform(0.0, 0.2)))
    run.daemons.pop(0)
    if rng.random() < 0.5:
        first.kill()
        began = time.monotonic()
        first.wait()
    else:  # it hangs for longer than its lease, and comes back to find that it has been replaced
        first.send_signal(signal.SIGSTOP)
        time.sleep(float(rng.uniform(1.2, 1.6)))
        first.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        # It keeps its place if it was stopped within a transaction: the server then holds its rows.
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        assert first.wait(PATIENCE_SECONDS) == 0, run.said()
    run.ready(began)


def _partitions_move(run: Run, rng: np.random.Generator) -> None:
    """Two daemons of one group: whenever the one that works hangs, the other reads all of it."""
    (works,) = run.daemons
    run.start(wait=False)
    run.until(lambda: "holds pipeline" in run.page("readyz")[1], "the second stands by")
    waits = run.daemons[-1]
    for _ in range(3):
        time.sleep(float(rng.uniform(0.0, 0.2)))
        while run.page("readyz", waits[1])[0] != 200:
            # Stopped within a transaction it keeps its place: the server then holds its rows.
            works[0].send_signal(signal.SIGSTOP)
            with suppress(AssertionError):
                run.until(
                    lambda port=waits[1]: run.page("readyz", port)[0] == 200,  # type: ignore[misc]
                    "taken over",
                    _TAKEN_OVER_SECONDS,
                )
            works[0].send_signal(signal.SIGCONT)
            time.sleep(0.05)
        run.until(
            lambda port=works[1]: "holds pipeline" in run.page("readyz", port)[1],  # type: ignore[misc]
            "the one that was replaced stands by",
        )
        works, waits = waits, works
    run.daemons.remove(waits)
    waits[0].send_signal(signal.SIGTERM)
    assert waits[0].wait(PATIENCE_SECONDS) == 0, run.said()


def _again(run: Run, rng: np.random.Generator) -> None:
    """All that was published so far once more, as by a mirror; half of it by a foreign producer."""
    del rng
    run.until(lambda: bool(run.broker.read_all(run.scores)), "something was published")
    send_again(run.broker.address, run.broker.read_all(run.scores))


_BY_SPOOL = (
    Fault("daemon: kill -9", _once(_restarts(signal.SIGKILL))),
    Fault("daemon: SIGTERM", _once(_restarts(signal.SIGTERM))),
    Fault("two daemons on one database", _once(_two_daemons)),
    Fault("agent: kill -9 in mid-write", _harm("torn")),
    Fault("spool: bit-flipped frame", _harm("flipped")),
    Fault("spool: full disk", _once(_spool_full)),
    Fault("database: full disk", _once(_sqlite_full), ("sqlite",)),
    Fault("database: locked", _once(_locked(0.3, 0.9))),
    Fault("database: locked for half a minute", _once(_locked(30.0, 31.0))),
    Fault("database: server stopped", _server_stops, ("postgresql",)),
    Fault("broker: stopped and started", _once(_broker_stops)),
    Fault("broker: slow", _once(_proxied("slow"))),
    Fault("broker: refuses", _once(_proxied("refuse"))),
    Fault("broker: acknowledgement lost", _once(_proxied("unheard"))),
    Fault("sink hangs", _once(_proxied("silent"))),
    Fault("clock jumps both ways", _once(_clock_jumps)),
)
_ALSO_BY_KAFKA = (
    "daemon: kill -9",
    "daemon: SIGTERM",
    "two daemons on one database",
    "database: locked",
    "database: server stopped",
    "broker: stopped and started",
    "broker: slow",
    "broker: refuses",
    "broker: acknowledgement lost",
)
_BY_KAFKA = (
    *(
        replace(one, name=f"kafka feed, {one.name}", feed="kafka")
        for one in _BY_SPOOL
        if one.name in _ALSO_BY_KAFKA
    ),
    Fault("kafka feed, broker: hangs", _once(_proxied("silent")), feed="kafka"),
    Fault("kafka feed, agent: kill -9", _harm("killed"), feed="kafka"),
    Fault("kafka feed, partitions move", _once(_partitions_move), feed="kafka"),
    Fault("kafka feed, messages come again", _once(_again), feed="kafka", repeats=True),
)
FAULTS = (*_BY_SPOOL, *_BY_KAFKA)


def together(*names: str, database: str = "sqlite") -> Fault:
    """Several faults in one run, one after the other: what `make test` has time for."""
    chosen = [fault for fault in FAULTS if fault.name in names]
    assert len(chosen) == len(names), names
    (feed,) = {fault.feed for fault in chosen}
    turn = threading.Lock()

    def in_turn(action: Action, run: Run) -> None:
        with turn:
            action(run)

    def plan(
        rng: np.random.Generator, server: PostgresServer | None
    ) -> tuple[dict[int, Action], dict[int, str]]:
        actions: dict[int, Action] = {}
        harm: dict[int, str] = {}
        for fault in chosen:
            some, harmed = fault.plan(rng, server)
            for at, action in some.items():
                free = next(n for n in itertools.count(at) if n not in actions)
                actions[min(free, chunks() - 1)] = partial(in_turn, action)
            harm |= harmed
        return actions, harm

    repeats = any(fault.repeats for fault in chosen)
    return Fault(" + ".join(names), plan, (database,), feed, repeats)
