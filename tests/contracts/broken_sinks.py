"""For every check of sinks, sinks that it has to reject."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oodmon.checks import sinks as checks
from oodmon.checks.sinks import Live
from oodmon.contracts import Sink
from oodmon.errors import RetryLater
from oodmon.records import Event
from oodmon.secret import Secret


@dataclass(frozen=True)
class Fine(Sink):
    """A sink without fault, from which each broken one differs in one point."""

    address: str = "{address}"
    key: Secret = field(default_factory=lambda: Secret("k"))
    taken: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def open(self) -> None:
        """Nothing."""

    def send(self, events: Sequence[Event]) -> None:
        if events and self.address:
            raise RetryLater("nobody is there")
        self.taken.extend(event.id for event in events if event.id not in self.taken)

    def close(self) -> None:
        """Nothing."""

    def live(self) -> Live:
        return Live(self, lambda: self.taken)


class ClosesOnlyWhenOpen(Fine):
    def close(self) -> None:
        raise AttributeError("'NoneType' object has no attribute 'close'")


@dataclass(frozen=True)
class ClosesOnce(Fine):
    closed: list[bool] = field(default_factory=list, init=False, repr=False)

    def close(self) -> None:
        if self.closed:
            raise ValueError("closed twice")
        self.closed.append(True)


class LeaksTheClientsError(Fine):
    def send(self, events: Sequence[Event]) -> None:
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), 0.2):
            raise RetryLater("it listens, but we are not sure")


class ClaimsDelivery(Fine):
    def send(self, events: Sequence[Event]) -> None:
        with contextlib.suppress(OSError):
            super_quiet = socket.create_connection(("127.0.0.1", 1), 0.1)
            super_quiet.close()


class WaitsTooLong(Fine):
    def send(self, events: Sequence[Event]) -> None:
        if events:
            time.sleep(checks.BOUND_SECONDS + 0.1)
            raise RetryLater("at last")


class AsksForThePast(Fine):
    def send(self, events: Sequence[Event]) -> None:
        if events:
            raise RetryLater("a moment ago", -1.0)


class WritesToEvents(Fine):
    def send(self, events: Sequence[Event]) -> None:
        for event in events:
            data: Any = event.data
            data["sent"] = True
        super().send(events)


class FailsOnNothing(Fine):
    def send(self, events: Sequence[Event]) -> None:
        raise RetryLater(f"cannot send, first is {events[0] if events else None}")


class LeavesAThread(Fine):
    def open(self) -> None:
        threading.Thread(target=time.sleep, args=(checks.SETTLE_SECONDS + 1,), daemon=True).start()


class LogsItsKey(Fine):
    def open(self) -> None:
        logging.getLogger("test").debug("key %s", self.key.reveal())


class ShowsItsKey(Fine):
    def __repr__(self) -> str:
        return f"ShowsItsKey({self.key.reveal()!r})"


class RaisesItsKey(Fine):
    def send(self, events: Sequence[Event]) -> None:
        if events:
            raise RetryLater("failed") from OSError(f"GET /?key={self.key.reveal()}")


BROKEN: Mapping[Callable[..., None], Sequence[Sink]] = {
    checks.check_close_is_always_safe: (ClosesOnlyWhenOpen(), ClosesOnce()),
    checks.check_failures_are_the_two: (
        LeaksTheClientsError(),
        ClaimsDelivery(),
        WaitsTooLong(),
        AsksForThePast(),
    ),
    checks.check_events_stay_unchanged: (WritesToEvents(),),
    checks.check_nothing_to_send_is_nothing: (FailsOnNothing(),),
    checks.check_no_thread_is_left: (LeavesAThread(),),
    checks.check_secrets_are_never_shown: (LogsItsKey(), ShowsItsKey(), RaisesItsKey()),
}


class Loses(Fine):
    def send(self, events: Sequence[Event]) -> None:
        self.taken.extend(event.id for event in events[:1])


class Reverses(Fine):
    def send(self, events: Sequence[Event]) -> None:
        super().send(list(reversed(events)))


class Renames(Fine):
    def send(self, events: Sequence[Event]) -> None:
        self.taken.extend(f"{event.id}/{len(self.taken)}" for event in events)


class Doubles(Fine):
    def send(self, events: Sequence[Event]) -> None:
        self.taken.extend(event.id for event in events)


@dataclass(frozen=True)
class EndsForGood(Fine):
    closed: list[bool] = field(default_factory=list, init=False, repr=False)

    def send(self, events: Sequence[Event]) -> None:
        if not self.closed:
            super().send(events)

    def close(self) -> None:
        self.closed.append(True)


BROKEN_LIVE: Mapping[Callable[..., None], Sequence[Callable[[], Live]]] = {
    checks.check_delivers_in_order: (Loses("").live, Reverses("").live),
    checks.check_repeats_can_be_dropped: (Doubles("").live, Renames("").live),
    checks.check_works_again_after_close: (EndsForGood("").live,),
    checks.check_leaves_no_thread_behind_when_delivering: (LeavesAThread("").live,),
}


def test_a_sink_without_fault_passes() -> None:
    for check in checks.CHECKS:
        check(Fine())
    for live_check in checks.LIVE_CHECKS:
        live_check(Fine("").live())
