"""One transaction per group: facts, state, positions and outbox rows, tried until it succeeds."""

from __future__ import annotations

import logging
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
from oodmon.errors import StoreError
from oodmon.records import Event, Fact
from oodmon.store.events import Store

__all__ = ["Commits"]

_log = logging.getLogger(__name__)

_SECOND = 1_000_000_000


class Commits:
    """Makes true what was concluded.

    Args:
        store: where to.
        reader: settled after each transaction.
        health, metrics, observer: told of the outcome.
        couriers: woken for what is now in the outbox.
        asked: a request for the end interrupts the waiting.
        clock: wall clock, ns UTC; monotonic: seconds, for durations.
    """

    def __init__(
        self,
        store: Store,
        reader: Reader,
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
        self._reader = reader
        self._health = health
        self._metrics = metrics
        self._observer = observer
        self._couriers = couriers
        self._asked = asked
        self._clock = clock
        self._monotonic = monotonic

    def commit(self, intake: Intake, routes: Routes) -> bool:
        """Commit the open group; False where the daemon is to end before the store takes it.

        The same call is repeated after a failure: should the first have been committed and only its
        answer lost, the second changes nothing.
        """
        group = intake.group
        began = self._monotonic()
        state = intake.pipeline.freeze()
        outbox = _routed(group.facts, routes)
        while True:
            try:
                self._store.append(
                    group.facts,
                    state=state,
                    positions=group.positions,
                    outbox=outbox,
                    agents=list(group.agents.values()),
                )
                break
            except Exception as error:
                if not isinstance(error, StoreError):
                    _log.exception("the store failed in a way that it should not")
                self._metrics.put("oodmon_store_up", 0)
                self._metrics.add("oodmon_store_failures_total")
                if self._asked.wait(self._health.fail("store", error)):
                    # Nothing is lost: the positions stand where the last transaction left them.
                    _log.warning("ended with %d batches not committed", group.batches)
                    return False
        self._health.mend("store")
        self._metrics.put("oodmon_store_up", 1)
        intake.committed(state)
        took = self._monotonic() - began
        self._metrics.observe("oodmon_processing_duration_seconds", took, stage="commit")
        try:
            self._reader.settle(group.positions)
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


def _routed(facts: Sequence[Fact], routes: Routes) -> list[tuple[str, Event]]:
    outbox: list[tuple[str, Event]] = []
    for fact in facts:
        try:
            outbox += routes(fact)
        except Exception:
            # It is stored all the same; a plugin's evidence may be no JSON.
            _log.exception("a %s cannot be told", type(fact).__name__)
    return outbox
