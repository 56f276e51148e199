"""What every sink has to do, whatever it talks to.

It fails in two ways only and within a bounded time, leaves events and threads as they were, keeps
its secrets, and delivers so that repeats can be dropped.

A sink's class may define the classmethod ``examples() -> Sequence[Mapping[str, Any]]``: the options
to be checked with. ``{address}`` within an option stands for ``host:port`` of the server, which the
checks replace by servers that misbehave. A sink without ``{address}`` is taken to need no server.

`CHECKS` need nothing but the sink. `LIVE_CHECKS` need a receiver that works: a test hands over a
`Live`, made by a factory of its own:

    @pytest.mark.parametrize("check", LIVE_CHECKS, ids=lambda check: check.__name__)
    def test_delivery(check, my_server):
        check(Live(MySink(url=my_server.url), received=my_server.ids))
"""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from oodmon.checks import examples_of
from oodmon.checks.hostile import MANNERS, THREAD_NAME, hostile
from oodmon.contracts import Sink
from oodmon.errors import Rejected, RetryLater
from oodmon.records import Event
from oodmon.secret import Secret

__all__ = ["CHECKS", "LIVE_CHECKS", "Live", "at", "cases", "event"]

ADDRESS: Final = "{address}"

BOUND_SECONDS = 60.0
"""A call may take this long when the server misbehaves; examples set their timeouts well below."""

SETTLE_SECONDS = 30.0
"""Time for threads to end after `close`."""

MARKER: Final = "s3cret-never-to-be-shown"


@dataclass(frozen=True, slots=True)
class Live:
    """A sink and the receiver that it is connected to.

    Attributes:
        component: the sink, its options pointing at the receiver; not yet open.
        received: ids of the events that the receiver has taken, in order, as a consumer sees them
            that drops an id which it has seen.
    """

    component: Sink
    received: Callable[[], Sequence[str]]


def event(number: int = 0, *, status: str = "firing") -> Event:
    """An alert's event; the same number and status give the same id."""
    started = 1_700_000_000_000_000_000 + number * 1_000_000_000
    fingerprint = f"{number:016x}"
    ended = started + 60_000_000_000
    return Event(
        id=f"{fingerprint}-{started}-{status}",
        type=f"oodmon.alert.{status}.v1",
        source="/oodmon/digits/1",
        subject=fingerprint,
        time=started if status == "firing" else ended,
        data={
            "rule": "novelty",
            "status": status,
            "severity": "critical",
            "started_at": f"2023-11-14T22:{13 + (20 + number) // 60:02d}:{(20 + number) % 60:02d}Z",
            "ended_at": None if status == "firing" else "2023-11-14T22:30:00Z",
            "fingerprint": fingerprint,
            "labels": {"model": "digits", "version": "1", "detector": "*"},
            "evidence": {"statistic": 12.5, "threshold": 9.2, "novel": ["a", "b\nc", "<d>"]},
            "model": "digits",
            "version": "1",
        },
    )


def cases(cls: type[Any]) -> list[Any]:
    """Instances with the options of `examples`, or with the defaults."""
    return [cls(**options) for options in examples_of(cls)]


def at(component: Any, address: str) -> Any:
    """The component with ``{address}`` in its options replaced; it shares nothing that is open."""
    return _changed(
        component,
        lambda value: value.replace(ADDRESS, address) if isinstance(value, str) else value,
    )


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Options changed one by one, within tuples and within components that are options."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{
                option.name: _changed(getattr(value, option.name), change)
                for option in dataclasses.fields(value)
                if option.init
            },
        )
    if isinstance(value, tuple):
        return tuple(_changed(item, change) for item in value)
    return change(value)


def _remote(component: Any) -> bool:
    """Whether the options name a server."""
    found: list[bool] = []

    def look(value: Any) -> Any:
        found.append(isinstance(value, str) and ADDRESS in value)
        return value

    _changed(component, look)
    return any(found)


@contextmanager
def _against(component: Sink, manner: str) -> Iterator[Sink]:
    """The component, pointed at a server of these manners, and closed afterwards."""
    with hostile(manner) as address:
        placed = at(component, address)
        try:
            yield placed
        finally:
            placed.close()


def check_close_is_always_safe(sink: Sink) -> None:
    """Without `open`, twice, and after an `open` that failed."""
    with hostile("refuses") as address:
        for opened in (False, True):
            placed = at(sink, address)
            if opened:
                with suppress(RetryLater, Rejected):
                    placed.open()
            for attempt in ("first", "second"):
                try:
                    placed.close()
                except Exception as error:
                    state = "after open" if opened else "without open"
                    raise AssertionError(f"the {attempt} close {state} raised {error!r}") from error


def check_failures_are_the_two(sink: Sink) -> None:
    """Against every misbehaving server: `RetryLater` or `Rejected`, within a bounded time."""
    for manner in MANNERS:
        with _against(sink, manner) as placed:
            for name, call in (
                ("open", placed.open),
                ("send", lambda placed=placed: placed.send([event()])),
            ):
                began = time.monotonic()
                try:
                    call()
                except (RetryLater, Rejected) as error:
                    if isinstance(error, RetryLater) and not error.after_seconds >= 0:
                        raise AssertionError(
                            f"{name}: after_seconds is {error.after_seconds}"
                        ) from error
                except Exception as error:
                    raise AssertionError(
                        f"{name} against a server that {manner} raised {error!r}; "
                        "a sink fails with RetryLater or Rejected"
                    ) from error
                else:
                    assert name == "open" or not _remote(sink), (
                        f"send against a server that {manner} claims to have delivered"
                    )
                took = time.monotonic() - began
                assert took < BOUND_SECONDS, (
                    f"{name} against a server that {manner} took {took:.1f} s; "
                    f"at most {BOUND_SECONDS:g} s"
                )


def check_events_stay_unchanged(sink: Sink) -> None:
    """`send` writes to nothing that it is given, whether it works or fails."""
    events = [event(0), event(1), event(0, status="resolved")]
    before = copy.deepcopy(events)
    with _against(sink, "refuses") as placed, suppress(RetryLater, Rejected):
        placed.send(events)
    assert events == before, "send changed the events that it was given"


def check_nothing_to_send_is_nothing(sink: Sink) -> None:
    """An empty batch needs no server."""
    with _against(sink, "refuses") as placed:
        try:
            placed.send([])
        except Exception as error:
            raise AssertionError(f"send([]) raised {error!r}") from error


def check_no_thread_is_left(sink: Sink) -> None:
    """After `close`, whatever happened before, no thread of the sink runs."""
    for manner in ("refuses", "is silent", "hangs up"):
        with hostile(manner) as address:
            before = set(threading.enumerate())
            placed = at(sink, address)
            with suppress(RetryLater, Rejected):
                placed.open()
            with suppress(RetryLater, Rejected):
                placed.send([event()])
            placed.close()
            left = _left(before)
        assert not left, f"after close, with a server that {manner}, these threads run: {left}"


def _left(before: set[threading.Thread]) -> list[str]:
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        left = [
            thread.name
            for thread in threading.enumerate()
            if thread not in before and thread.name != THREAD_NAME
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def check_secrets_are_never_shown(sink: Sink) -> None:
    """No secret option stands in repr, in the logs (at any level) or in an error's traceback."""
    armed = _changed(sink, lambda value: Secret(MARKER) if isinstance(value, Secret) else value)
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        for manner in ("refuses", "hangs up", "talks nonsense"):
            with _against(armed, manner) as placed:
                shown.write(f"{placed!r} {placed}")
                try:
                    placed.open()
                    placed.send([event()])
                except (RetryLater, Rejected) as error:
                    shown.write("".join(traceback.format_exception(error)))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    for text in (MARKER, repr(MARKER.encode())[2:-1]):
        assert text not in shown.getvalue(), "a secret is shown in repr, logs or errors"


def check_delivers_in_order(live: Live) -> None:
    """Every event arrives, in the order given, over several calls."""
    _deliver(live, [[event(0), event(1)], [event(2)]])
    _expect(live, [event(n).id for n in range(3)])


def check_repeats_can_be_dropped(live: Live) -> None:
    """An event that is sent again, also after a new `open`, is known to the receiver by its id."""
    for _ in range(2):
        _deliver(live, [[event(0), event(1)], [event(1), event(0)]])
    _expect(live, [event(0).id, event(1).id])


def check_works_again_after_close(live: Live) -> None:
    """`close` ends nothing for good."""
    live.component.open()
    live.component.close()
    _deliver(live, [[event(0)]])
    _expect(live, [event(0).id])


def check_leaves_no_thread_behind_when_delivering(live: Live) -> None:
    """After `close` of a sink that worked, none of its threads runs."""
    before = set(threading.enumerate())
    _deliver(live, [[event(0)]])
    _expect(live, [event(0).id])
    left = _left(before)
    assert not left, f"after close these threads run: {left}"


def _deliver(live: Live, calls: Sequence[Sequence[Event]]) -> None:
    live.component.open()
    try:
        for events in calls:
            live.component.send(events)
    finally:
        live.component.close()


def _expect(live: Live, ids: Sequence[str]) -> None:
    received = list(live.received())
    doubled = [one for one, count in Counter(received).items() if count > 1]
    assert not doubled, f"the receiver cannot tell that these are repeats: {doubled}"
    assert received == list(ids), f"sent {list(ids)}, received {received}"


CHECKS: Final[tuple[Callable[[Any], None], ...]] = (
    check_close_is_always_safe,
    check_failures_are_the_two,
    check_events_stay_unchanged,
    check_nothing_to_send_is_nothing,
    check_no_thread_is_left,
    check_secrets_are_never_shown,
)

LIVE_CHECKS: Final[tuple[Callable[[Live], None], ...]] = (
    check_delivers_in_order,
    check_repeats_can_be_dropped,
    check_works_again_after_close,
    check_leaves_no_thread_behind_when_delivering,
)
