"""``make faults``: many seeded runs of every fault, one table; exit status 1 unless all is zero."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.faults.backlog import catch_up
from tests.faults.catalogue import FAULTS
from tests.faults.session import Session
from tests.faults.verdicts import Table
from tests.servers.kafka import Broker, broker_binary
from tests.servers.postgres import PostgresServer, postgres_binaries
from tests.servers.processes import free_port


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=220, help="over all faults and databases")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the backlog; 0: none")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="oodmon-servers-"))
    broker = Broker(f"127.0.0.1:{free_port()}", broker_binary(), folder)
    binaries = postgres_binaries()
    server = None
    if binaries is not None:
        (folder / "postgres").mkdir()
        folder.chmod(0o755)
        server = PostgresServer(binaries, folder / "postgres")
        server.start()
    broker.start()
    clean = True
    try:
        with Session(broker, server) as session:
            clean = _runs(session, asked.runs, asked.seed, asked.only)
            if asked.samples:
                for line in catch_up(asked.samples):
                    _say(line)
    finally:
        broker.stop()
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if clean else 1


def _runs(session: Session, runs: int, seed: int, only: str) -> bool:
    kinds = [
        (fault, database)
        for fault in FAULTS
        for database in fault.databases
        if only in fault.name and (database == "sqlite" or session.server is not None)
    ]
    table = Table()
    began = time.monotonic()
    # An interrupt shows what there is so far.
    with suppress(KeyboardInterrupt):
        for number, (fault, database) in zip(range(runs), itertools.cycle(kinds), strict=False):
            verdict = session.judge(fault, database, seed + number // len(kinds))
            table.add(fault.name, database, verdict)
            if not verdict.clean:
                _say(f"seed {seed + number // len(kinds)}: {fault.name}, {database}: {verdict}")
    for line in table.lines():
        _say(line)
    found = [one for verdicts in table.rows.values() for one in verdicts]
    _say(f"{len(found)} runs in {time.monotonic() - began:.0f} s")
    return len(found) == runs and all(one.clean for one in found)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
