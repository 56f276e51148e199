"""Which facts leave for whom: fact → (receiver, event) pairs for the outbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from oodmon.errors import ContractError
from oodmon.records import Alert, DriftResult, Event, Exceedance, Fact, Notice, Window
from oodmon.wire import event_of

__all__ = ["KINDS", "Routes", "sink_receiver", "trigger_receiver"]

KINDS: Final[Mapping[str, type]] = {
    "alert": Alert,
    "notice": Notice,
    "window": Window,
    "drift": DriftResult,
    "sample": Exceedance,
}
"""Words of a sink's `events` option → the facts that they name."""


def sink_receiver(sink: str) -> str:
    """The name of a sink in the outbox."""
    return f"sinks.{sink}"


def trigger_receiver(trigger: str) -> str:
    """The name of a trigger in the outbox."""
    return f"triggers.{trigger}"


class Routes:
    """Sinks take the kinds of fact that they ask for; triggers take the firing alerts of rules.

    Args:
        sinks: sink id → kinds that it takes, words of `KINDS`.
        triggers: rule id → ids of the triggers that its firing alerts reach.

    An unknown kind is a `ContractError`.
    """

    def __init__(
        self,
        sinks: Mapping[str, Sequence[str]],
        triggers: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._sinks: dict[type, list[str]] = {cls: [] for cls in KINDS.values()}
        for sink, kinds in sinks.items():
            for kind in kinds:
                if kind not in KINDS:
                    raise ContractError(
                        f"sinks.{sink}.events: {kind!r} is not one of {', '.join(KINDS)}"
                    )
                self._sinks[KINDS[kind]].append(sink_receiver(sink))
        self._triggers = {
            rule: [trigger_receiver(trigger) for trigger in ids]
            for rule, ids in (triggers or {}).items()
        }

    def __call__(self, fact: Fact) -> list[tuple[str, Event]]:
        """The receivers of one fact, each with the same event."""
        receivers = self._sinks[type(fact)]
        if isinstance(fact, Alert) and fact.status == "firing":
            receivers = receivers + self._triggers.get(fact.rule, [])
        if not receivers:
            return []
        event = event_of(fact)
        return [(receiver, event) for receiver in receivers]

    @property
    def watchers(self) -> tuple[str, ...]:
        """The receivers that want the daemon's own events: the sinks that take notices."""
        return tuple(self._sinks[Notice])
