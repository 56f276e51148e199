"""What every trigger has to do: what a sink does, for one request at a time.

A trigger is checked as a sink that fires for every event, with the event's id as the request's.
`LIVE_CHECKS` take a `Live` whose component is `Fired(trigger)`; see `oodmon.checks.sinks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

from oodmon.checks import sinks
from oodmon.checks.sinks import LIVE_CHECKS, Live, at, cases, event
from oodmon.contracts import Sink, Trigger, TriggerRequest
from oodmon.records import Event

__all__ = ["CHECKS", "LIVE_CHECKS", "Fired", "Live", "at", "cases", "event"]


@dataclass(frozen=True)
class Fired(Sink):
    """A trigger with the calls of a sink: each event is fired for, without a guard."""

    trigger: Trigger

    def open(self) -> None:
        """Open the trigger."""
        self.trigger.open()

    def send(self, events: Sequence[Event]) -> None:
        """Fire for each event."""
        for alert in events:
            self.trigger.fire(TriggerRequest(alert.id, alert, alert.time, {"rule": "novelty"}))

    def close(self) -> None:
        """Close the trigger."""
        self.trigger.close()


def _for_triggers(check: Callable[[Any], None]) -> Callable[[Trigger], None]:
    @wraps(check)
    def fired(trigger: Trigger) -> None:
        check(Fired(trigger))

    return fired


CHECKS: Final[tuple[Callable[[Trigger], None], ...]] = tuple(
    _for_triggers(check) for check in sinks.CHECKS
)
