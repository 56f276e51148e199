"""What alerts set going: retraining requests, always behind the guard."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from oodmon.contracts import Sink, Trigger, TriggerRequest
from oodmon.records import Event
from oodmon.registry import sinks
from oodmon.wire import cloud_event

__all__ = ["REQUESTED", "as_sink", "request_event"]

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
