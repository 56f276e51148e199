"""What alerts set going: retraining requests, always behind the guard."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from oodmon.contracts import Sink, Trigger, TriggerRequest
from oodmon.records import Event
from oodmon.registry import sinks
from oodmon.wire import cloud_event

__all__ = ["REQUESTED", "Requesting", "as_sink", "request_event"]

REQUESTED: Final = "oodmon.retraining.requested.v1"
"""Type of the event that a trigger sends."""


def request_event(request: TriggerRequest) -> Event:
    """The request as an event: its id is the idempotency key, its data holds the whole alert."""
    return Event(
        id=request.id,
        type=REQUESTED,
        source=request.alert.source,
        subject=request.alert.subject,
        time=request.requested_at,
        data={
            "request_id": request.id,
            "labels": dict(request.labels),
            "alert": cloud_event(request.alert),
        },
    )


def as_sink(trigger: Trigger) -> Sink:
    """The sink of the trigger's name with the trigger's options: a protocol is written once.

    A request is one event to one receiver, so the sink of that protocol already knows how to
    sign, acknowledge and fail. It is found through the registry, as a configuration would.
    """
    options: dict[str, Any] = {
        option.name: getattr(trigger, option.name)
        for option in fields(trigger)  # type: ignore[arg-type]  # every component is a dataclass
        if option.init
    }
    return sinks.create(trigger.name, **options)


@dataclass(frozen=True)
class Requesting(Trigger):
    """A trigger that sends its requests through the sink of its own name and options."""

    # Empty or one sink: what is open lives outside the options.
    _sinks: list[Sink] = field(default_factory=list, init=False, repr=False, compare=False)

    def open(self) -> None:
        """As the sink does."""
        if not self._sinks:
            sink = as_sink(self)
            sink.open()
            self._sinks.append(sink)

    def fire(self, request: TriggerRequest) -> None:
        """Send the request as one event."""
        self.open()
        self._sinks[0].send([request_event(request)])

    def close(self) -> None:
        """As the sink does."""
        while self._sinks:
            self._sinks.pop().close()
