"""Between an alert and a trigger: cooldown, daily quota, dry run, one request per episode."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, Protocol

from oodmon.contracts import Clock, Trigger, TriggerRequest
from oodmon.errors import ContractError, Rejected, RetryLater, StoreError
from oodmon.records import Event

__all__ = ["DAY_SECONDS", "Guard", "History", "Outcome", "Remembered"]

_log = logging.getLogger("oodmon.triggers")

DAY_SECONDS: Final = 86_400.0
_NANOSECONDS: Final = 1_000_000_000
_FIRING: Final = "oodmon.alert.firing."

Outcome = Literal["fired", "dry run", "cooldown", "quota", "rejected"]
"""What became of one firing alert."""


class History(Protocol):
    """What the guard remembers over restarts; the store fits.

    The first outcome noted for a request stays, but ``fired`` replaces any other and is never
    replaced. Otherwise an alert that is delivered twice would count as its own predecessor.
    """

    def fired(self, trigger_id: str, since_ns: int) -> Sequence[int]:
        """When this trigger fired (outcome ``fired``), since then, ns UTC."""

    def has_fired(self, trigger_id: str, request_id: str) -> bool:
        """Whether this trigger fired for this request, however long ago."""

    def note_fired(self, trigger_id: str, request_id: str, at_ns: int, outcome: str) -> None:
        """Note what became of a request."""


class Remembered:
    """A history in memory, for tests and for one-off runs without a store."""

    def __init__(self) -> None:
        self._noted: dict[tuple[str, str], tuple[int, str]] = {}

    def fired(self, trigger_id: str, since_ns: int) -> Sequence[int]:
        """See `History.fired`."""
        return [
            at
            for (trigger, _), (at, outcome) in self._noted.items()
            if trigger == trigger_id and outcome == "fired" and at >= since_ns
        ]

    def has_fired(self, trigger_id: str, request_id: str) -> bool:
        """See `History.has_fired`."""
        return self._noted.get((trigger_id, request_id), (0, ""))[1] == "fired"

    def note_fired(self, trigger_id: str, request_id: str, at_ns: int, outcome: str) -> None:
        """See `History.note_fired`."""
        key = (trigger_id, request_id)
        if key not in self._noted or (
            outcome == "fired" and not self.has_fired(trigger_id, request_id)
        ):
            self._noted[key] = (at_ns, outcome)

    @property
    def outcomes(self) -> Mapping[str, str]:
        """Request id → outcome."""
        return {request: outcome for (_, request), (_, outcome) in self._noted.items()}


class Guard:
    """Fires a trigger for firing alerts, at most so often; has the calls of a sink.

    Every firing alert gets one outcome: ``fired``; ``cooldown`` (the last request is too recent);
    ``quota`` (as many requests as a day allows were made in the last 24 hours); ``dry run`` (it
    would have fired, and only the log says so); ``rejected`` (the receiver will never take it).
    A request's id is the trigger's id and the alert's, so an episode asks once however often its
    alert is delivered, even days later. Resolved alerts and other events pass without effect.

    In dry run the cooldown and the quota hold for what would have fired too, since the guard was
    made, so that the log shows the rate that a live trigger would have.

    Args:
        id: the trigger's id in the configuration.
        trigger: what is fired.
        cooldown_seconds: least time between two requests.
        daily_quota: most requests in any 24 hours; 0 never fires.
        dry_run: decide and log, but do not fire.
        history: what was fired before; in memory until `remember` is called.
        clock: wall clock, ns UTC; without one an alert's own time counts.
        told: called with every outcome, for metrics and events of the caller's own.
    """

    def __init__(
        self,
        id: str,  # noqa: A002  # the word of the configuration
        trigger: Trigger,
        cooldown_seconds: float = DAY_SECONDS,
        daily_quota: int = 1,
        dry_run: bool = True,
        *,
        history: History | None = None,
        clock: Clock | None = None,
        told: Callable[[TriggerRequest, Outcome], None] | None = None,
    ) -> None:
        if not (cooldown_seconds >= 0 and daily_quota >= 0):
            raise ContractError(f"triggers.{id}: cooldown and quota must not be negative")
        self.id = id
        self.trigger = trigger
        self.cooldown_seconds = cooldown_seconds
        self.daily_quota = daily_quota
        self.dry_run = dry_run
        self._history: History = Remembered() if history is None else history
        self._clock = clock
        self._told = told
        self._rehearsed: dict[str, int] = {}
        self._lock = threading.Lock()

    def remember(
        self,
        history: History,
        clock: Clock,
        told: Callable[[TriggerRequest, Outcome], None] | None = None,
    ) -> None:
        """Join the guard to the store and the clock of the program that runs it."""
        self._history = history
        self._clock = clock
        self._told = told or self._told

    def __eq__(self, other: object) -> bool:
        """Guards of the same options are equal, so that a reload leaves an unchanged one alone."""
        if not isinstance(other, Guard):
            return NotImplemented
        return self._options() == other._options()

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Guard{self._options()!r}"

    def _options(self) -> tuple[str, Trigger, float, int, bool]:
        return self.id, self.trigger, self.cooldown_seconds, self.daily_quota, self.dry_run

    def open(self) -> None:
        """Open the trigger; a dry run needs no receiver."""
        if not self.dry_run:
            self.trigger.open()

    def send(self, events: Sequence[Event]) -> None:
        """Decide on every firing alert among the events, in order."""
        for event in events:
            if event.type.startswith(_FIRING):
                try:
                    with self._lock:
                        self._decide(event)
                except StoreError as error:
                    # Deciding without the history could fire too often; the request's id makes
                    # it safe to fire again where only the noting failed.
                    raise RetryLater(f"trigger {self.id}: no history: {error}") from error

    def close(self) -> None:
        """Close the trigger."""
        self.trigger.close()

    def _decide(self, alert: Event) -> None:
        now = alert.time if self._clock is None else self._clock()
        request = TriggerRequest(
            id=f"{self.id}-{alert.id}",
            alert=alert,
            requested_at=now,
            labels={str(k): str(v) for k, v in _labels(alert).items()},
        )
        if self._history.has_fired(self.id, request.id):
            return  # delivered again
        outcome: Outcome = self._withheld(request.id, now) or "fired"
        if outcome == "fired" and self.dry_run:
            outcome = "dry run"
            self._rehearsed.setdefault(request.id, now)
        if outcome == "fired":
            try:
                self.trigger.fire(request)
            except Rejected:
                self._conclude(request, "rejected")
                raise
        self._conclude(request, outcome)

    def _withheld(self, request_id: str, now: int) -> Literal["cooldown", "quota"] | None:
        since = now - int(max(self.cooldown_seconds, DAY_SECONDS) * _NANOSECONDS)
        self._rehearsed = {key: at for key, at in self._rehearsed.items() if at >= since}
        fired = list(self._history.fired(self.id, since))
        fired += [at for key, at in self._rehearsed.items() if key != request_id]
        # A clock that was set back leaves times in the future; they count as just now.
        ages = [max(0, now - at) / _NANOSECONDS for at in fired]
        if any(age < self.cooldown_seconds for age in ages):
            return "cooldown"
        if sum(age < DAY_SECONDS for age in ages) >= self.daily_quota:
            return "quota"
        return None

    def _conclude(self, request: TriggerRequest, outcome: Outcome) -> None:
        self._history.note_fired(self.id, request.id, request.requested_at, outcome)
        _log.log(
            logging.INFO if outcome in ("fired", "dry run") else logging.WARNING,
            _SAID[outcome],
            self.id,
            request.id,
            request.alert.id,
        )
        if self._told is not None:
            self._told(request, outcome)


_SAID: Final[Mapping[Outcome, str]] = {
    "fired": "trigger %s fired: request %s for alert %s",
    "dry run": "trigger %s would have fired (dry run): request %s for alert %s",
    "cooldown": "trigger %s did not fire, it is cooling down: request %s for alert %s",
    "quota": "trigger %s did not fire, its daily quota is used up: request %s for alert %s",
    "rejected": "trigger %s was rejected by its receiver: request %s for alert %s",
}


def _labels(alert: Event) -> Mapping[str, object]:
    labels = alert.data.get("labels")
    return labels if isinstance(labels, Mapping) else {}
