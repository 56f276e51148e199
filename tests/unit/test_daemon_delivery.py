"""The outbox → one receiver: order, backoff, dead letters, isolation, hanging calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from oodmon.daemon import delivery
from oodmon.daemon.backoff import Backoff
from oodmon.daemon.delivery import Delivery
from oodmon.daemon.metrics import Metrics
from oodmon.errors import ContractError, Rejected, RetryLater, StoreError
from oodmon.records import Event
from oodmon.store.events import Store
from tests.waiting import PATIENCE_SECONDS, eventually

NAME = "sinks.box"
FAST = Backoff(initial_seconds=0.01, max_seconds=0.02, timeout_seconds=0.05)
NEVER = Backoff(initial_seconds=1000.0, max_seconds=1000.0)
"""What failed once is not tried again while a test runs."""


class Box:
    """A receiver that keeps what it is sent and fails as it is told."""

    def __init__(self, fail: Callable[[Sequence[Event]], object] = len) -> None:
        self.fail = fail
        self.taken: list[str] = []
        self.calls: list[list[str]] = []
        self.opened = 0
        self.closed = 0
        self.open_error: Exception | None = None

    def open(self) -> None:
        self.opened += 1
        if self.open_error is not None:
            raise self.open_error

    def send(self, events: Sequence[Event]) -> None:
        self.calls.append([event.id for event in events])
        self.fail(events)
        self.taken += [event.id for event in events]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/oodmon.db")
    store.open()
    yield store
    store.close()


def event(name: str, subject: str = "s") -> Event:
    return Event(name, "oodmon.notice.v1", "/oodmon/m/1", subject, 1, {"text": name})


def queue(store: Store, *events: Event, receiver: str = NAME) -> None:
    store.emit([(receiver, one) for one in events])


class Served:
    """A delivery thread that the test ends."""

    def __init__(
        self,
        store: Store,
        box: Box,
        backoff: Backoff = FAST,
        name: str = NAME,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self.delivery = Delivery(
            name,
            box,
            store,
            backoff=backoff,
            clock=time.time_ns,
            metrics=self.metrics,
            seed=7,
            monotonic=monotonic,
        )
        self.delivery.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.delivery.stop(0.0)
        assert self.delivery.join(PATIENCE_SECONDS)

    def count(self, result: str) -> float:
        return self.metrics.value("oodmon_sink_deliveries_total", sink=NAME, result=result)


def drained(store: Store, receiver: str = NAME) -> bool:
    depth = store.depths().get(receiver)
    return depth is None or depth.pending == 0


def test_events_are_delivered_in_order_and_once(store: Store) -> None:
    names = [f"e{n}" for n in range(250)]
    queue(store, *(event(name, f"s{n % 3}") for n, name in enumerate(names)))
    box = Box()
    with Served(store, box) as served:
        eventually(lambda: drained(store))
        assert served.count("delivered") == 250
    assert box.taken == names
    assert [len(call) for call in box.calls] == [100, 100, 50]
    assert (box.opened, box.closed) == (1, 1)


def test_what_the_store_does_not_take_note_of_is_not_sent_again(tmp_path: Path) -> None:
    class Full(Store):
        refused = 0

        def settle(self, receiver: str, seqs: Sequence[int]) -> None:
            if self.refused < 5:
                self.refused += 1
                raise StoreError("the disk is full", retryable=True)
            super().settle(receiver, seqs)

    store = Full(f"sqlite:///{tmp_path}/oodmon.db")
    store.open()
    queue(store, *(event(f"e{n}") for n in range(3)))
    box = Box()
    with Served(store, box):
        eventually(lambda: drained(store))
        queue(store, event("later"))
        eventually(lambda: "later" in box.taken)
    assert store.refused == 5
    assert box.taken == ["e0", "e1", "e2", "later"]
    store.close()


def test_a_woken_delivery_does_not_wait_for_its_next_look(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_IDLE_SECONDS", 10 * PATIENCE_SECONDS)
    looks: list[int] = []
    found = store.pending

    def pending(*args: Any) -> Any:
        rows = found(*args)
        looks.append(len(rows))
        return rows

    monkeypatch.setattr(store, "pending", pending)
    box = Box()
    with Served(store, box) as served:
        eventually(lambda: looks == [0])  # it has found nothing, and waits
        queue(store, event("e"))
        served.delivery.wake()
        eventually(lambda: box.taken == ["e"])


def test_a_receiver_that_is_unwell_gets_everything_later_and_in_order(store: Store) -> None:
    failures = iter([RetryLater("busy"), RetryLater("busy"), RetryLater("busy")])

    def fail(events: Sequence[Event]) -> None:
        error = next(failures, None)
        if error is not None:
            raise error

    box = Box(fail)
    queue(store, event("a1", "a"), event("b1", "b"), event("a2", "a"))
    with Served(store, box) as served:
        eventually(lambda: len(box.taken) == 3)
        assert served.count("retried") == 9
        eventually(lambda: served.metrics.value("oodmon_sink_up", sink=NAME) == 1)
    assert box.taken == ["a1", "b1", "a2"]


def test_a_receivers_own_wish_is_honoured(store: Store) -> None:
    times: list[float] = []

    def fail(events: Sequence[Event]) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            raise RetryLater("slow down", after_seconds=0.4)

    queue(store, event("e"))
    with Served(store, Box(fail)):
        eventually(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.39


def test_what_is_rejected_is_found_and_buried_and_the_rest_arrives(store: Store) -> None:
    bad = {"e3", "e11"}

    def fail(events: Sequence[Event]) -> None:
        if bad & {one.id for one in events}:
            raise Rejected("too large")

    box = Box(fail)
    queue(store, *(event(f"e{n}", f"s{n}") for n in range(16)))
    with Served(store, box) as served:
        eventually(lambda: drained(store))
        assert served.count("rejected") == 2
        assert served.metrics.value("oodmon_dead_letters_total", sink=NAME) == 2
    assert box.taken == [f"e{n}" for n in range(16) if f"e{n}" not in bad]
    dead = store.dead(NAME)
    assert {row.event.id for row in dead} == bad
    assert "too large" in dead[0].error


def test_one_event_that_breaks_the_sink_holds_up_its_own_subject_only(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    healed = threading.Event()

    def fail(events: Sequence[Event]) -> None:
        if not healed.is_set() and any(one.id == "bad" for one in events):
            raise KeyError("the sink's own bug")

    box = Box(fail)
    queue(store, event("a1", "a"), event("bad", "b"), event("b2", "b"), event("c1", "c"))
    with Served(store, box):
        eventually(lambda: set(box.taken) >= {"a1", "c1"})
        assert "b2" not in box.taken, "it must not overtake the event before it"
        healed.set()
        eventually(lambda: drained(store))
    assert box.taken[-2:] == ["bad", "b2"]
    assert caplog.text.count("must not raise") == 1, "told once, not at every try"


def test_a_sink_that_is_broken_altogether_is_not_called_for_every_event(store: Store) -> None:
    def fail(events: Sequence[Event]) -> None:
        raise OSError("no such host")

    box = Box(fail)
    queue(store, *(event(f"e{n}", f"s{n}") for n in range(64)))
    with Served(store, box, NEVER) as served:
        eventually(lambda: served.delivery.failing and served.count("retried") >= 64)
    # 64, 32, …, 1 and one more single that fails too.
    assert len(box.calls) <= 9
    assert store.depths()[NAME].pending == 64


def test_what_fails_for_too_long_becomes_a_dead_letter(store: Store) -> None:
    def fail(events: Sequence[Event]) -> None:
        raise RetryLater("down")

    backoff = Backoff(initial_seconds=0.01, max_seconds=0.02, max_age_seconds=3600.0)
    hours = [0.0]
    queue(store, event("e"))
    with Served(store, Box(fail), backoff, monotonic=lambda: 3600.0 * hours[0]) as served:
        eventually(lambda: served.count("retried") >= 2)
        assert store.depths()[NAME].dead == 0
        hours[0] = 1.0
        eventually(lambda: store.depths()[NAME].dead == 1)
        assert served.count("expired") == 1
    assert "gave up" in store.dead(NAME)[0].error
    assert "down" in store.dead(NAME)[0].error


def test_opening_is_tried_again_and_nothing_is_buried_meanwhile(store: Store) -> None:
    box = Box()
    box.open_error = Rejected("wrong password")
    queue(store, event("e"))
    with Served(store, box):
        eventually(lambda: box.opened >= 3)
        assert store.depths()[NAME].dead == 0
        box.open_error = None
        eventually(lambda: box.taken == ["e"])


def test_a_receiver_that_is_away_is_told_before_there_is_anything_to_send(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    box = Box()
    box.open_error = RetryLater("nobody listens on hooks:443")
    with Served(store, box) as served:
        eventually(lambda: box.opened >= 3)
        assert served.delivery.failing
        assert served.metrics.value("oodmon_sink_up", sink=NAME) == 0
        assert caplog.text.count("nobody listens on hooks:443") == 1, "told once, not at every try"
        box.open_error = None
        eventually(lambda: not served.delivery.failing)
        assert served.metrics.value("oodmon_sink_up", sink=NAME) == 1
    assert f"{NAME} works again" in caplog.text


def test_what_a_receiver_says_against_an_event_is_in_the_log(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    away = [True]

    def answer(_: Any) -> None:
        if away[0]:
            raise RetryLater("503 from hooks")

    queue(store, event("e"))
    with Served(store, Box(answer)) as served:
        eventually(lambda: served.count("retried") >= 2)
        away[0] = False
        eventually(lambda: drained(store))
    assert caplog.text.count("503 from hooks") == 1
    assert f"{NAME} works again" in caplog.text


def test_a_hanging_receiver_is_shown_and_does_not_hold_up_others_or_the_end(store: Store) -> None:
    release = threading.Event()
    hanging = Box(lambda _: release.wait(PATIENCE_SECONDS))
    queue(store, event("e"))
    queue(store, event("f"), receiver="sinks.other")
    metrics = Metrics()
    stuck = Delivery(NAME, hanging, store, backoff=FAST, clock=time.time_ns, metrics=metrics)
    stuck.start()
    other = Box()
    with Served(store, other, name="sinks.other"):
        eventually(lambda: other.taken == ["f"])
    eventually(lambda: stuck.stalled)
    assert metrics.value("oodmon_sink_stalled", sink=NAME) == 1
    stuck.stop(0.1)
    assert not stuck.join(0.1), "it waited for the call"
    assert store.depths()[NAME].pending == 1, "it will be sent again"
    release.set()
    assert stuck.join(PATIENCE_SECONDS)
    assert drained(store), "a call that ends after all settles what it delivered"


def test_the_outbox_failing_is_survived(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/oodmon.db")
    box = Box()
    with Served(store, box) as served:  # not open yet: every call is a StoreError
        eventually(lambda: served.delivery.failing)
        store.open()
        queue(store, event("e"))
        eventually(lambda: box.taken == ["e"])
    store.close()


def test_stop_delivers_what_is_left_within_the_grace_period(store: Store) -> None:
    box = Box()
    metrics = Metrics()
    serving = Delivery(NAME, box, store, backoff=FAST, clock=time.time_ns, metrics=metrics)
    queue(store, *(event(f"e{n}") for n in range(250)))
    serving.start()
    serving.stop(PATIENCE_SECONDS)
    assert serving.join(PATIENCE_SECONDS)
    assert len(box.taken) == 250
    assert box.closed == 1


def test_waits_grow_to_a_bound_and_depend_on_the_draw() -> None:
    backoff = Backoff(initial_seconds=5, max_seconds=30, factor=1.5)
    longest = [backoff.wait(failures, 1.0) for failures in range(1, 400)]
    assert longest[:3] == pytest.approx([5.0, 7.5, 11.25])
    assert longest == sorted(longest)
    assert longest[-1] == pytest.approx(30.0)
    assert backoff.wait(3, 0.0) == pytest.approx(1.125)


@pytest.mark.parametrize(
    "options",
    [
        {"initial_seconds": 0},
        {"initial_seconds": 40},
        {"factor": 0.5},
        {"batch": 0},
        {"max_age_seconds": 0},
        {"timeout_seconds": 0},
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        Backoff(**options)  # type: ignore[arg-type]
