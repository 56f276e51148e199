"""One transaction per group: facts, state, positions and outbox rows, tried until it succeeds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from oodmon.contracts import Clock, Reader
from oodmon.daemon.asked import Asked
from oodmon.daemon.couriers import Couriers
from oodmon.daemon.health import Health
from oodmon.daemon.intake import Intake
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.observe import Observer
from oodmon.daemon.routes import Routes
from oodmon.errors import StoreError, Superseded
from oodmon.records import Event, Fact
from oodmon.store.events import Store

__all__ = ["Commits"]

_log = logging.getLogger(__name__)

_SECOND = 1_000_000_000
_LONGEST_REST = 1.0
"""Seconds."""


class Commits:
    """Makes true what was concluded.

    Args:
        store: where to.
        health, metrics, observer: told of the outcome.
        couriers: woken for what is now in the outbox.
        asked: a request for the end interrupts the waiting.
        clock: wall clock, ns UTC; monotonic: seconds, for durations.
    """

    def __init__(
        self,
        store: Store,
        *,
        health: Health,
        metrics: Metrics,
        observer: Observer,
        couriers: Couriers,
        asked: Asked,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._health = health
        self._metrics = metrics
        self._observer = observer
        self._couriers = couriers
        self._asked = asked
        self._clock = clock
        self._monotonic = monotonic
        self._told = ""
        self._rest_until = -math.inf

    @property
    def rested(self) -> bool:
        """Whether as much time has passed since the last commit as it took, or a second.

        Ten thousand streams have thirty megabytes of state, written whole each time: without this
        committing would take all the time that there is. What waits is told in one group.
        """
        return self._monotonic() >= self._rest_until

    def commit(self, intake: Intake, routes: Routes, reader: Reader) -> bool:
        """Commit the open group; False where the daemon is to end before the store takes it.

        The same call is repeated after a failure: should the first have been committed and only its
        answer lost, the second changes nothing. A failure that will not go away by itself is
        told once as critical and tried again all the same: a person may mend it.

        Raises:
            Superseded: another daemon has taken over; nothing was written.
        """
        group = intake.group
        began = self._monotonic()
        state = intake.pipeline.freeze()
        outbox = _routed(group.facts, routes)
        prepared = self._monotonic() - began
        while True:
            tried = self._monotonic()
            try:
                self._store.append(
                    group.facts,
                    state=state,
                    positions=group.positions,
                    outbox=outbox,
                    agents=list(group.agents.values()),
                    predictions=group.predictions,
                )
                break
            except Superseded:
                raise
            except Exception as error:
                self._tell(error)
                self._metrics.put("oodmon_store_up", 0)
                self._metrics.add("oodmon_store_failures_total")
                if self._asked.wait(self._health.fail("store", error)):
                    # Nothing is lost: the positions stand where the last transaction left them.
                    _log.warning("ended with %d batches not committed", group.batches)
                    return False
        self._told = ""
        self._health.mend("store")
        self._metrics.put("oodmon_store_up", 1)
        intake.committed(state)
        done = self._monotonic()
        took = done - began
        # Not what was waited for a store that was away.
        self._rest_until = done + min(prepared + done - tried, _LONGEST_REST)
        self._metrics.observe("oodmon_processing_duration_seconds", took, stage="commit")
        try:
            reader.settle(group.positions)
        except Exception as error:
            # What the next group settles covers this.
            _log.warning("the feed could not be settled: %s", error)
        self._couriers.wake({receiver for receiver, _ in outbox})
        self._observer.facts(group.facts)
        now = self._clock()
        for observed_at in group.accepted:
            delay = max(now - observed_at, 0) / _SECOND
            self._metrics.observe("oodmon_end_to_end_delay_seconds", delay)
        return True

    def _tell(self, error: Exception) -> None:
        """What waiting alone will not mend is told loudly, once."""
        if isinstance(error, StoreError) and error.retryable:
            return
        why = f"{type(error).__name__}: {error}"
        if why != self._told:
            self._told = why
            _log.critical(
                "the store refuses what was concluded, and waiting will not mend it: %s. "
                "Consumption has stopped and the feed fills; nothing is lost while it has room",
                error,
                exc_info=None if isinstance(error, StoreError) else error,
            )


def _routed(facts: Sequence[Fact], routes: Routes) -> list[tuple[str, Event]]:
    outbox: list[tuple[str, Event]] = []
    for fact in facts:
        try:
            outbox += routes(fact)
        except Exception:
            # It is stored all the same; a plugin's evidence may be no JSON.
            _log.exception("a %s cannot be told", type(fact).__name__)
    return outbox
