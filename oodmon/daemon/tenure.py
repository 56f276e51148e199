"""Which of several daemons works: the one that holds the lease; the others stand by, not ready."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from oodmon.daemon.asked import Asked
from oodmon.daemon.health import Health
from oodmon.daemon.metrics import Metrics
from oodmon.errors import OodmonError, StoreError, Superseded
from oodmon.store.events import Store

__all__ = ["Tenure"]

_log = logging.getLogger(__name__)

_BEATS: Final = 5
"""Renewals, or looks for a free lease, within one lease."""

_LONGEST_LOOK: Final = 0.5
"""A lease that was given back is found within so many seconds."""


class Tenure:
    """Takes the store's lease, keeps it and gives it back.

    Args:
        store: opened by somebody else before the first call.
        health, metrics: told who works.
        asked: a request for the end interrupts the waiting.
        monotonic: seconds.
    """

    def __init__(
        self,
        store: Store,
        health: Health,
        metrics: Metrics,
        asked: Asked,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._health = health
        self._metrics = metrics
        self._asked = asked
        self._monotonic = monotonic
        self._every = store.lease_seconds / _BEATS
        self._kept_at = 0.0
        self.waited = False
        metrics.put("oodmon_lease_held", 0)

    def win(self) -> bool:
        """Wait until this daemon is the one that works; False where it is to end before.

        A store that fails is raised, unless this daemon has waited already: then it waits on.
        """
        while not self._asked.stopping:
            wait = min(self._every, _LONGEST_LOOK)
            try:
                holder = self._store.acquire()
                self._health.mend("store")
            except Superseded:
                continue
            except StoreError as error:
                if not self.waited:
                    raise
                self._asked.wait(self._health.fail("store", error))
                continue
            if not holder:
                self._health.mend("lease")
                self._metrics.put("oodmon_lease_held", 1)
                self._kept_at = self._monotonic()
                return True
            self.waited = True
            self._health.fail("lease", OodmonError(f"standing by: {holder}"))
            self._asked.wait(wait)
        return False

    def keep(self) -> None:
        """Renew the lease if it is time; `Superseded` where another daemon has it now.

        This is also how a daemon without traffic notices that its database is away.
        """
        if self._monotonic() - self._kept_at < self._every:
            return
        self._kept_at = self._monotonic()
        try:
            self._store.renew()
        except Superseded:
            raise
        except StoreError as error:
            self._metrics.put("oodmon_store_up", 0)
            self._metrics.add("oodmon_store_failures_total")
            self._health.fail("store", error)
        else:
            self._metrics.put("oodmon_store_up", 1)
            self._health.mend("store")

    def lose(self, error: Superseded) -> None:
        """Another daemon has taken over."""
        self.waited = True
        self._metrics.put("oodmon_lease_held", 0)
        self._health.fail("lease", error)

    def end(self) -> None:
        """Give the lease back; a store that fails keeps it until its time is over."""
        self._metrics.put("oodmon_lease_held", 0)
        try:
            self._store.release()
        except StoreError as error:
            _log.warning("the lease could not be given back: %s", error)
