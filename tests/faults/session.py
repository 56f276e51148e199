"""What the runs of a session share, and how one is made."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tests.faults.catalogue import FAULTS, Fault, mountable
from tests.faults.proxy import DOORS, Proxy
from tests.faults.site import Outcome, Run
from tests.faults.verdicts import Verdict, compared
from tests.faults.writers import Agents
from tests.servers.kafka import Broker
from tests.servers.postgres import PostgresServer
from tests.streams import calibration

__all__ = ["Session"]

_TRAFFICS = 2
"""Different traffics; the undisturbed run of each is made once."""


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
        self._calm: dict[tuple[str, str, int], Outcome] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.agents = Agents()
        self._stack.callback(self.agents.close)
        port = int(self.broker.address.rpartition(":")[2])
        self.doors = [Proxy(port, door) for door in DOORS]
        for door in self.doors:
            self._stack.callback(door.close)
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def calm(self, feed: str, database: str, traffic: int) -> Outcome:
        """What an undisturbed run of this traffic leaves behind."""
        key = (feed, database, traffic)
        if key not in self._calm:
            found = self._run(feed, database, traffic, None, np.random.default_rng(0))
            assert found.facts["windows"], "the traffic closes windows"
            assert len(found.alerts) >= 4, "the traffic fires and resolves alerts"
            assert found.alerts <= set(found.sent), "every alert is sent"
            self._calm[key] = found
        return self._calm[key]

    def judge(self, fault: Fault, database: str, seed: int) -> Verdict:
        """One seeded run of a fault, against the undisturbed run of the same traffic."""
        calm = self.calm(fault.feed, database, seed % _TRAFFICS)
        kind = FAULTS.index(fault) if fault in FAULTS else len(FAULTS)
        rng = np.random.default_rng((seed, kind))
        cut = [door.cut for door in self.doors]
        try:
            wild = self._run(fault.feed, database, seed % _TRAFFICS, fault, rng)
        except Exception as error:
            return Verdict(failure=f"{type(error).__name__}: {error}")
        finally:
            self._mend()
        verdict = compared(calm, wild)
        if "spool: bit" in fault.name and wild.damaged < 1:
            verdict.failure = "the damage was not told"
        # Beside other faults of the broker it depends on the machine whether one is lost.
        lost = cut != [door.cut for door in self.doors]
        if "acknowledgement lost" in fault.name and fault in FAULTS and not lost:
            verdict.failure = "no acknowledgement was lost"
        if fault.repeats and not wild.repeated:
            verdict.failure = "nothing was published twice"
        return verdict

    def _mend(self) -> None:
        for door in self.doors:
            door.set("pass")
        self.broker.start()
        if self.server is not None and not self.server.runs:
            self.server.start()

    def _run(
        self, feed: str, database: str, traffic: int, fault: Fault | None, rng: np.random.Generator
    ) -> Outcome:
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            name = fault.name if fault else ""
            for part, size in (("spool", "4m"), ("database", "24m")):
                (folder / part).mkdir(mode=0o700)
                if f"{part}: full disk" in name and self._mountable:
                    self._mount(stack, folder / part, size)
            url = self._url(stack, database, folder / "database")
            run = Run(
                *(folder, url, traffic, self.agents, self.broker, self.doors, self._states, feed)
            )
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
