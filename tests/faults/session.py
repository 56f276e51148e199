"""What the runs of a session share, how one is made and judged, and the table over all of them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tests.faults.catalogue import FAULTS, Fault, mountable
from tests.faults.proxy import Proxy
from tests.faults.site import Agents, Outcome, Run
from tests.servers.kafka import Broker
from tests.servers.postgres import PostgresServer
from tests.streams import calibration

_TRAFFICS = 2
"""Different traffics; the undisturbed run of each is made once."""

_MORE_THREADS, _MORE_FILES, _MORE_BYTES = 2, 12, 24 << 20
"""What a disturbed daemon may hold beyond an undisturbed one: kept connections of pools."""


@dataclass
class Verdict:
    """How one run differs from an undisturbed one.

    Attributes:
        lost: facts that are missing; differing: rows that are in one of the two only.
        missing: alerts and other events that never reached the topic.
        duplicates: ids that an undisturbed run does not send, or under which the topic holds two
            different bodies; copies: records that a consumer drops because it has seen their id.
        leaks: what the daemon holds too much of, in words.
        recovery: seconds to ready, one per disturbance that ended readiness.
        failure: what broke the run itself.
        example: a row that differs, as it is and as it should be.
    """

    lost: int = 0
    differing: int = 0
    missing: int = 0
    duplicates: int = 0
    copies: int = 0
    leaks: str = ""
    recovery: list[float] = field(default_factory=list)
    failure: str = ""
    example: str = ""

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        wrong = self.lost or self.differing or self.missing or self.duplicates
        return not (wrong or self.leaks or self.failure)


class Session:
    """Servers and writers for many runs.

    Args:
        broker: running.
        server: running, or none for SQLite only.
    """

    def __init__(self, broker: Broker, server: PostgresServer | None) -> None:
        self.broker = broker
        self.server = server
        self._folder = Path(tempfile.mkdtemp(prefix="oodmon-faults-"))
        self._states = self._folder / "states"
        self._states.mkdir()
        calibration(2000).save(self._states / "msp.calibration.safetensors")
        self._mountable = mountable()
        self._calm: dict[tuple[str, int], Outcome] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.agents = Agents()
        self._stack.callback(self.agents.close)
        self.proxy = Proxy(int(self.broker.address.rpartition(":")[2]))
        self._stack.callback(self.proxy.close)
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def calm(self, database: str, traffic: int) -> Outcome:
        """What an undisturbed run of this traffic leaves behind."""
        key = (database, traffic)
        if key not in self._calm:
            found = self._run(database, traffic, None, np.random.default_rng(0))
            assert found.facts["windows"], "the traffic closes windows"
            assert len(found.alerts) >= 4, "the traffic fires and resolves alerts"
            assert found.alerts <= set(found.sent), "every alert is sent"
            assert len(found.sent) == len(set(found.sent)), "a calm run sends each event once"
            self._calm[key] = found
        return self._calm[key]

    def judge(self, fault: Fault, database: str, seed: int) -> Verdict:
        """One seeded run of a fault, against the undisturbed run of the same traffic."""
        calm = self.calm(database, seed % _TRAFFICS)
        rng = np.random.default_rng((seed, FAULTS.index(fault)))
        cut = self.proxy.cut
        try:
            wild = self._run(database, seed % _TRAFFICS, fault, rng)
        except Exception as error:
            return Verdict(failure=f"{type(error).__name__}: {error}")
        finally:
            self._mend()
        verdict = _compared(calm, wild)
        if fault.name.startswith("spool: bit") and wild.damaged < 1:
            verdict.failure = "the damage was not told"
        if fault.name.endswith("acknowledgement lost") and self.proxy.cut == cut:
            verdict.failure = "no acknowledgement was lost"
        return verdict

    def _mend(self) -> None:
        self.proxy.set("pass")
        self.broker.start()
        if self.server is not None and not self.server.runs:
            self.server.start()

    def _run(
        self, database: str, traffic: int, fault: Fault | None, rng: np.random.Generator
    ) -> Outcome:
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            name = fault.name if fault else ""
            for part, size in (("spool", "4m"), ("database", "24m")):
                (folder / part).mkdir(mode=0o700)
                if name == f"{part}: full disk" and self._mountable:
                    self._mount(stack, folder / part, size)
            url = self._url(stack, database, folder / "database")
            run = Run(folder, url, traffic, self.agents, self.broker, self.proxy, self._states)
            stack.callback(_kill_all, run)
            faults, harm = fault.plan(rng, self.server) if fault else ({}, {})
            return run.go(faults, harm)

    def _mount(self, stack: ExitStack, place: Path, size: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(place)]
        subprocess.run(command, check=True)

        def undo() -> None:
            # The agents keep their last folder open until their next run.
            subprocess.run(["umount", "--lazy", str(place)], check=True)

        stack.callback(undo)

    def _url(self, stack: ExitStack, database: str, folder: Path) -> str:
        if database == "sqlite":
            return f"sqlite:///{folder / 'oodmon.db'}"
        assert self.server is not None
        import psycopg

        name, admin = f"faults_{uuid.uuid4().hex[:12]}", self.server.url
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')

        def drop() -> None:
            assert self.server is not None
            if not self.server.runs:
                self.server.start()
            with psycopg.connect(admin, autocommit=True) as connection:
                connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

        stack.callback(drop)
        return f"{admin.rpartition('/')[0]}/{name}"


def _kill_all(run: Run) -> None:
    for process, _ in run.daemons:
        process.kill()
        process.wait()


def _compared(calm: Outcome, wild: Outcome) -> Verdict:
    found = Verdict(recovery=wild.recovery)
    for table, rows in calm.facts.items():
        expected, there = set(rows), set(wild.facts[table])
        found.lost += len(expected - there)
        if expected ^ there and not found.example:
            pair = [*sorted(there - expected)[:1], *sorted(expected - there)[:1]]
            found.example = f"{table}: " + " | ".join(row[:600] for row in pair)
        found.differing += len(expected ^ there) + abs(len(wild.facts[table]) - len(there))
    found.missing = len(set(calm.sent) - set(wild.sent))
    found.duplicates = sum(len(bodies) > 1 for bodies in wild.contents.values())
    found.duplicates += len(set(wild.sent) - set(calm.sent))
    found.copies = len(wild.sent) - len(set(wild.sent))
    for what, has, may in (
        ("threads", wild.threads, calm.threads + _MORE_THREADS),
        ("files", wild.files, calm.files + _MORE_FILES),
        ("bytes", wild.memory, calm.memory + _MORE_BYTES),
    ):
        if has > may:
            found.leaks += f"{has} {what}, at most {may} expected; "
    return found


@dataclass
class Table:
    """The verdicts, by fault and database."""

    rows: dict[tuple[str, str], list[Verdict]] = field(default_factory=dict)

    def add(self, fault: str, database: str, verdict: Verdict) -> None:
        """One run."""
        self.rows.setdefault((fault, database), []).append(verdict)

    def lines(self) -> list[str]:
        """For people."""
        head = (
            f"{'fault':32} {'database':10} {'runs':>5} {'lost':>5} {'differ':>6} {'missing':>7} "
            f"{'dupl.':>5} {'copies':>6} {'leaks':>5} {'broken':>6} {'recovery s: median':>18} "
            f"{'worst':>6}"
        )
        body = [self._line(*key, found) for key, found in self.rows.items()]
        every = [one for found in self.rows.values() for one in found]
        return [head, *body, self._line("all", "", every)]

    @staticmethod
    def _line(fault: str, database: str, found: Sequence[Verdict]) -> str:
        recovery = sorted(seconds for one in found for seconds in one.recovery)
        middle = f"{recovery[len(recovery) // 2]:.2f}" if recovery else "-"
        worst = f"{recovery[-1]:.2f}" if recovery else "-"
        return (
            f"{fault:32} {database:10} {len(found):5} {sum(v.lost for v in found):5} "
            f"{sum(v.differing for v in found):6} {sum(v.missing for v in found):7} "
            f"{sum(v.duplicates for v in found):5} {sum(v.copies for v in found):6} "
            f"{sum(bool(v.leaks) for v in found):5} {sum(bool(v.failure) for v in found):6} "
            f"{middle:>18} {worst:>6}"
        )


__all__ = ["Session", "Table", "Verdict"]
