"""Housekeeping beside the loop: old facts go, space is given back, sizes are told.

A thread of its own with its own connections, in small transactions: the loop's commits wait some
milliseconds for one of them at most.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from oodmon.contracts import Reader
from oodmon.daemon.late import Late
from oodmon.daemon.metrics import Metrics
from oodmon.errors import OodmonError
from oodmon.store.events import Store

__all__ = ["Retention", "Upkeep"]

_log = logging.getLogger(__name__)

_DAY: Final = 86_400_000_000_000
_JOIN_SECONDS: Final = 5.0
_PARTS: Final = 8
"""Over the limit, the oldest such part of the history goes first."""

_GOES_FIRST: Final = (
    "predictions",
    "flagged_samples",
    "outbox",
    "windows",
    "drift_results",
    "notices",
)
"""What a store that is too large gives up: never alerts, and never what waits to be sent."""

_GOES_LAST: Final = ("dead_letters",)
"""What it gives up when that was not enough."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept.

    Attributes:
        days: kind of `store.retention.KINDS` → days before the newest window; 0 for ever.
        max_bytes: of the store; beyond it the oldest history of a SQLite file goes early. A
            PostgreSQL server, whose tables seldom shrink, is only watched. 0: no limit.
    """

    days: Mapping[str, float] = field(default_factory=dict)
    max_bytes: int = 0


class Upkeep:
    """The thread that keeps the store small.

    Args:
        store: open while the thread runs.
        metrics: where sizes are told.
        retention: what is kept.
        every_seconds: between two rounds.
        late: what each round does with labels.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        retention: Retention,
        every_seconds: float,
        late: Late | None = None,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._retention = retention
        self._every = every_seconds
        self._late = late
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._receivers: set[str] = set()  # that had letters once: what is none any more is told

    def start(self, reader: Reader) -> None:
        """Begin; the reader tells which partitions are still there."""
        self._end.clear()
        self._thread = threading.Thread(
            target=self._run, args=(reader,), name="upkeep", daemon=True
        )
        self._thread.start()
        if self._late is not None:
            self._late.start()

    def stop(self) -> None:
        """End after the transaction that runs. Safe twice, safe without `start`."""
        self._end.set()
        if self._late is not None:
            self._late.stop()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_JOIN_SECONDS)

    def round(self, reader: Reader) -> None:
        """Prune and measure once, and join what labels came."""
        if self._late is not None:
            self._late.round()
        self._prune()
        partitions = reader.partitions()
        if partitions is not None:
            self._store.forget_positions(partitions)
        self._store.give_back_space(self._end.is_set)
        self._measure(reader)

    def _measure(self, reader: Reader) -> None:
        put, clear = self._metrics.put, self._metrics.clear
        put("oodmon_store_size_bytes", self._store.size_bytes())
        put("oodmon_store_max_bytes", self._retention.max_bytes)
        put("oodmon_feed_max_bytes", reader.capacity_bytes)
        letters = self._store.letter_bytes()
        for receiver in self._receivers | letters.keys():
            waiting, dead = letters.get(receiver, (0, 0))
            put("oodmon_outbox_pending_bytes", waiting, sink=receiver)
            put("oodmon_dead_letters_bytes", dead, sink=receiver)
        self._receivers |= letters.keys()
        clear("oodmon_disk_free_bytes")
        clear("oodmon_disk_size_bytes")
        for part, folder in (("feed", reader.folder), ("store", self._store.folder)):
            with suppress(OSError):  # a folder that is gone is told by whoever works in it
                if folder:
                    disk = os.statvfs(folder)
                    put("oodmon_disk_free_bytes", disk.f_bavail * disk.f_frsize, part=part)
                    put("oodmon_disk_size_bytes", disk.f_blocks * disk.f_frsize, part=part)

    def _prune(self) -> None:
        newest = self._store.newest_ns()
        for kind, days in self._retention.days.items():
            if days and newest and not self._end.is_set():
                self._count(
                    self._store.prune(newest - round(days * _DAY), [kind], self._end.is_set)
                )
        limit = self._retention.max_bytes if self._store.gives_back_space else 0
        for kinds, what in ((_GOES_FIRST, "history"), (_GOES_LAST, "dead letters")):
            oldest = self._store.oldest_ns()
            for part in range(1, _PARTS):
                if not limit or self._end.is_set() or self._store.size_bytes(live=True) <= limit:
                    return
                before = oldest + (newest - oldest) * part // _PARTS
                _log.warning("the store is larger than %d bytes: its oldest %s go", limit, what)
                self._count(self._store.prune(before, kinds, self._end.is_set))

    def _count(self, deleted: Mapping[str, int]) -> None:
        for kind, rows in deleted.items():
            self._metrics.add("oodmon_store_pruned_total", rows, kind=kind)

    def _run(self, reader: Reader) -> None:
        while True:
            try:
                self.round(reader)
            except OodmonError as error:
                _log.warning("upkeep of the store failed, and is tried again: %s", error)
            except Exception:
                _log.exception("upkeep failed in a way that it should not")
            if self._end.wait(self._every):
                return
