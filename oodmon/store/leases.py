"""The lease: one daemon at a time works for a pipeline, and whoever lost it can commit nothing.

A row names the holder. It is renewed in every transaction of the fold, which fails if the row names
somebody else by then (fencing), so two daemons cannot both write, whatever the clocks say. When the
holder may be replaced:

- it was a process of this machine that is gone: at once;
- it is elsewhere and its lease has ended by the database's clock: at once;
- it has not renewed while we watched for a whole lease, by our own monotonic clock: then. This is
  the rule that a clock that was set back cannot break, and the only one for a process of this
  machine that lives and hangs.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import (
    Connection,
    Row,
    delete,
    select,
    update,
)

from oodmon.errors import Superseded
from oodmon.store.database import Database
from oodmon.store.rows import clean
from oodmon.store.statements import insert_new, now_ns
from oodmon.store.tables import leases

__all__ = ["Lease"]

_SECOND: Final = 1_000_000_000
_STARTED: Final = 19
"""Field of /proc/PID/stat behind the name: when the process began, clock ticks after the boot."""


class Lease:
    """The lease of one pipeline as one daemon sees it; `Store` documents the calls.

    Args:
        database: where it is kept.
        pipeline: which.
        seconds: how long it lasts without being renewed.
    """

    def __init__(self, database: Database, pipeline: str, seconds: float) -> None:
        self._database = database
        self._pipeline = pipeline
        self._lasts = round(seconds * _SECOND)
        self._seconds = seconds
        self._holder = uuid4().hex
        self._place = _place()
        self._seen: tuple[str, int] | None = None
        self._since = 0.0
        self.held = False

    def acquire(self) -> str:
        """Take the lease or renew it: "" if it is ours, else who holds it, in words."""
        mine = leases.c.pipeline == self._pipeline
        with self._database.read() as connection:
            found = connection.execute(
                select(leases, now_ns(self._database.dialect).label("now")).where(mine)
            ).first()
        if found is None:
            won = self._insert()
        elif found.holder == self._holder:
            self.held = True
            self.renew()
            return ""
        elif self._may_replace(found):
            won = self._replace(found)
        else:
            return f"process {found.pid} on {found.host} holds pipeline {self._pipeline!r}"
        self.held = won
        return "" if won else f"another daemon was faster to take pipeline {self._pipeline!r}"

    def renew(self) -> None:
        """Renew in a transaction of its own."""
        with self._database.write() as connection:
            self.check(connection)

    def check(self, connection: Connection) -> None:
        """Renew within the caller's transaction; `Superseded` if the lease is not ours any more.

        Nothing to do where no lease was ever taken.
        """
        if not self.held:
            return
        statement = (
            update(leases)
            .where(leases.c.pipeline == self._pipeline, leases.c.holder == self._holder)
            .values(
                beats=leases.c.beats + 1, expires_at_ns=now_ns(self._database.dialect) + self._lasts
            )
        )
        if connection.execute(statement).rowcount != 1:
            raise Superseded(
                f"store {self._database}: another daemon has taken over pipeline "
                f"{self._pipeline!r}; this one may not write any more"
            )

    def release(self) -> None:
        """Give it back, if it is ours: the next daemon need not wait."""
        if self.held:
            self.held = False
            statement = delete(leases).where(
                leases.c.pipeline == self._pipeline, leases.c.holder == self._holder
            )
            with self._database.write() as connection:
                connection.execute(statement)

    def _row(self, epoch: int) -> dict[str, Any]:
        return {
            "holder": self._holder,
            "host": clean(socket.gethostname()),
            "place": self._place,
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "epoch": epoch,
            "beats": 0,
        }

    def _insert(self) -> bool:
        statement = insert_new(leases, self._database.dialect).values(
            pipeline=self._pipeline,
            **self._row(1),
            expires_at_ns=now_ns(self._database.dialect) + self._lasts,
        )
        with self._database.write() as connection:
            options = {"preserve_rowcount": True}
            return connection.execute(statement, execution_options=options).rowcount == 1

    def _replace(self, found: Row[Any]) -> bool:
        """Only if nobody else was faster, and the holder did not come back meanwhile."""
        statement = (
            update(leases)
            .where(
                leases.c.pipeline == self._pipeline,
                leases.c.holder == found.holder,
                leases.c.beats == found.beats,
            )
            .values(
                **self._row(found.epoch + 1),
                expires_at_ns=now_ns(self._database.dialect) + self._lasts,
            )
        )
        with self._database.write() as connection:
            return connection.execute(statement).rowcount == 1

    def _may_replace(self, found: Row[Any]) -> bool:
        here = found.place == self._place
        if here and _started(found.pid) != found.started:
            return True
        if not here and found.now >= found.expires_at_ns:
            return True
        beat = (found.holder, found.beats)
        if beat != self._seen:
            self._seen, self._since = beat, time.monotonic()
        return time.monotonic() - self._since >= self._seconds


def _place() -> str:
    """Where process numbers mean the same: one boot of one machine, one namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        # Not Linux: no other process is ever taken for one of this machine.
        return f"{socket.gethostname()} {uuid4().hex}"


def _started(pid: int) -> int:
    """When this process began; 0 where there is none (or it is a zombie)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if words[0] in ("Z", "X") else int(words[_STARTED])
