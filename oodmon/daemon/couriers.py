"""The delivery threads of a daemon, one per receiver: started, swapped at a reload, ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, get_args

from oodmon.contracts import Clock, TriggerRequest
from oodmon.daemon.backoff import Backoff, Receiver
from oodmon.daemon.delivery import Delivery
from oodmon.daemon.metrics import Metrics
from oodmon.store.events import Store
from oodmon.triggers.guard import Guard, Outcome

__all__ = ["Couriers"]

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 0.1
"""Somebody who waits for the end may lose patience: look so often."""


class Couriers:
    """All deliveries.

    Args:
        store: where events wait, and what the guards of triggers remember.
        backoff: how receivers are tried again.
        clock: wall clock, ns UTC.
        metrics: where outcomes are counted.
        seed: of the jitter.
        monotonic: seconds, for durations.
    """

    def __init__(
        self,
        store: Store,
        *,
        backoff: Backoff,
        clock: Clock,
        metrics: Metrics,
        seed: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._backoff = backoff
        self._clock = clock
        self._metrics = metrics
        self._seed = seed
        self._monotonic = monotonic
        self._threads: dict[str, Delivery] = {}

    def serve(self, receivers: Mapping[str, Receiver], patience_seconds: float) -> None:
        """A thread for each of these; receivers that did not change go on undisturbed.

        What goes is waited for so long, and then left behind: should its call end one day, its
        events may be sent twice, and receivers drop repeats by id.
        """
        gone = [
            self._threads.pop(name)
            for name, delivery in list(self._threads.items())
            if name not in receivers or receivers[name] != delivery.receiver
        ]
        self._end(gone, 0.0, patience_seconds)
        for name, receiver in receivers.items():
            if name in self._threads:
                continue
            if isinstance(receiver, Guard):
                receiver.remember(self._store, self._clock, self._requested)
                for outcome in get_args(Outcome):
                    self._metrics.add(
                        "oodmon_retrain_requests_total", 0, trigger=receiver.id, result=outcome
                    )
            delivery = self._threads[name] = Delivery(
                name,
                receiver,
                self._store,
                backoff=self._backoff,
                clock=self._clock,
                metrics=self._metrics,
                seed=self._seed,
            )
            delivery.start()

    def wake(self, receivers: Iterable[str]) -> None:
        """There is something in the outbox for these."""
        for name in receivers:
            if name in self._threads:
                self._threads[name].wake()

    def states(self) -> dict[str, str]:
        """Receiver → ``ok``, ``failing`` or ``stalled``."""
        return {
            name: "stalled" if delivery.stalled else "failing" if delivery.failing else "ok"
            for name, delivery in list(self._threads.items())
        }

    def stop(
        self, grace_seconds: float, hurry: Callable[[], bool], patience_seconds: float = 0.0
    ) -> None:
        """Let each deliver what it can within the grace period, or until `hurry` says otherwise.

        The call that runs is waited for at least so long as `patience_seconds`.
        """
        threads, self._threads = list(self._threads.values()), {}
        self._end(threads, grace_seconds, max(grace_seconds, patience_seconds), hurry)

    def _end(
        self,
        threads: list[Delivery],
        grace_seconds: float,
        patience_seconds: float,
        hurry: Callable[[], bool] = bool,
    ) -> None:
        deadline = self._monotonic() + patience_seconds
        for delivery in threads:
            delivery.stop(grace_seconds)
        for delivery in threads:
            while not delivery.join(min(deadline - self._monotonic(), _LOOK_SECONDS)):
                if self._monotonic() >= deadline or hurry():
                    _log.warning("%s did not end in time and was left behind", delivery.name)
                    break

    def _requested(self, request: TriggerRequest, outcome: str) -> None:
        trigger = request.id.removesuffix(f"-{request.alert.id}")
        self._metrics.add("oodmon_retrain_requests_total", trigger=trigger, result=outcome)
