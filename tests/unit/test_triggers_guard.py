"""The guard: cooldown, quota, dry run, one request per episode, and what survives a restart."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oodmon.checks.sinks import event
from oodmon.contracts import Trigger, TriggerRequest
from oodmon.errors import ContractError, Rejected, RetryLater, StoreError
from oodmon.triggers.guard import DAY_SECONDS, Guard, Remembered

SECOND = 1_000_000_000


@dataclass(frozen=True)
class Noted(Trigger):
    """A trigger that notes what it is fired for, or fails as it is told."""

    fired: list[TriggerRequest] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def open(self) -> None:
        self.calls.append("open")

    def fire(self, request: TriggerRequest) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.fired.append(request)

    def close(self) -> None:
        self.calls.append("close")


class Clock:
    def __init__(self, seconds: float = 1_000_000) -> None:
        self.seconds = seconds

    def __call__(self) -> int:
        return int(self.seconds * SECOND)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Hypothesis makes thousands of decisions; nobody reads their log lines."""
    logger = logging.getLogger("oodmon.triggers")
    logger.disabled = True
    yield
    logger.disabled = False


class World:
    """A guard with everything around it; `restart` keeps the history and the clock only."""

    def __init__(self, cooldown: float = 3600, quota: int = 2, *, dry_run: bool = False) -> None:
        self.options = (cooldown, quota, dry_run)
        self.trigger = Noted()
        self.clock = Clock()
        self.history = Remembered()
        self.told: list[tuple[str, str]] = []
        self.restart()

    def restart(self, *, dry_run: bool | None = None) -> None:
        cooldown, quota, dry = self.options
        self.guard = Guard(
            "retrain", self.trigger, cooldown, quota, dry if dry_run is None else dry_run
        )
        self.guard.remember(
            self.history,
            self.clock,
            lambda request, outcome: self.told.append((request.id, outcome)),
        )

    def outcome(self, number: int) -> str:
        self.guard.send([event(number)])
        return self.told[-1][1]


def test_a_firing_alert_fires_once_with_the_episodes_key() -> None:
    world = World()
    assert world.outcome(1) == "fired"
    (request,) = world.trigger.fired
    assert request.id == f"retrain-{event(1).id}"
    assert request.alert == event(1)
    assert request.requested_at == world.clock()
    assert request.labels["model"] == "digits"


def test_resolved_alerts_and_other_events_pass() -> None:
    world = World()
    world.guard.send([event(1, status="resolved")])
    assert not world.told
    assert not world.trigger.fired


def test_the_cooldown_ends_to_the_second() -> None:
    world = World(cooldown=3600)
    assert world.outcome(1) == "fired"
    world.clock.seconds += 3599
    assert world.outcome(2) == "cooldown"
    world.clock.seconds += 1
    assert world.outcome(3) == "fired"


def test_the_quota_is_that_of_any_24_hours() -> None:
    world = World(cooldown=0, quota=2)
    assert [world.outcome(n) for n in range(3)] == ["fired", "fired", "quota"]
    world.clock.seconds += DAY_SECONDS - 1
    assert world.outcome(3) == "quota"
    world.clock.seconds += 1
    assert world.outcome(4) == "fired"


def test_a_quota_of_nothing_never_fires() -> None:
    assert World(quota=0).outcome(1) == "quota"


def test_a_restart_keeps_cooldown_and_quota() -> None:
    world = World(cooldown=3600, quota=2)
    world.outcome(1)
    world.restart()
    assert world.outcome(2) == "cooldown"
    world.clock.seconds += 3600
    assert world.outcome(3) == "fired"
    world.restart()
    world.clock.seconds += 3600
    assert world.outcome(4) == "quota"


def test_an_alert_that_is_delivered_again_does_not_fire_again() -> None:
    world = World(cooldown=3600, quota=5)
    assert world.outcome(1) == "fired"
    for _ in range(3):
        world.restart()
        world.guard.send([event(1)])
        world.clock.seconds += 10 * DAY_SECONDS
    assert len(world.trigger.fired) == 1
    assert world.told == [(f"retrain-{event(1).id}", "fired")]
    assert world.history.outcomes == {f"retrain-{event(1).id}": "fired"}


def test_dry_run_is_the_default_and_never_fires(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "oodmon.triggers")
    trigger = Noted()
    guard = Guard("retrain", trigger)
    guard.open()
    guard.send([event(1)])
    guard.close()
    assert not trigger.fired
    assert trigger.calls == ["close"]  # and no connection was made
    assert "would have fired (dry run)" in caplog.text


def test_dry_run_shows_the_rate_of_a_live_trigger() -> None:
    rehearsed, live = World(dry_run=True), World()
    for number in range(60):
        for world in (rehearsed, live):
            world.clock.seconds += 1000
            world.outcome(number)
    seen = [outcome.replace("dry run", "fired") for _, outcome in rehearsed.told]
    assert seen == [outcome for _, outcome in live.told]
    assert not rehearsed.trigger.fired


def test_what_was_rehearsed_does_not_hold_up_the_live_trigger() -> None:
    world = World(dry_run=True)
    assert world.outcome(1) == "dry run"
    world.restart(dry_run=False)
    assert world.outcome(1) == "fired"
    assert world.history.outcomes == {f"retrain-{event(1).id}": "fired"}


def test_a_failure_that_may_pass_is_not_counted() -> None:
    world = World(quota=1)
    world.trigger.failures.append(RetryLater("later", 5.0))
    with pytest.raises(RetryLater, match="later"):
        world.guard.send([event(1)])
    assert not world.told
    assert world.outcome(1) == "fired"


def test_a_rejection_is_told_and_does_not_use_up_the_quota() -> None:
    world = World(cooldown=3600, quota=1)
    world.trigger.failures.append(Rejected("no"))
    with pytest.raises(Rejected):
        world.guard.send([event(1)])
    assert world.told == [(f"retrain-{event(1).id}", "rejected")]
    assert world.outcome(2) == "fired"


def test_without_its_history_it_does_not_fire() -> None:
    class Gone(Remembered):
        def fired(self, trigger_id: str, since_ns: int) -> Sequence[int]:
            raise StoreError("disk full")

    trigger = Noted()
    guard = Guard("retrain", trigger, dry_run=False, history=Gone(), clock=Clock())
    with pytest.raises(RetryLater, match="disk full"):
        guard.send([event(1)])
    assert not trigger.fired


def test_a_clock_that_was_set_back_does_not_open_the_gate() -> None:
    world = World(cooldown=3600)
    world.outcome(1)
    world.clock.seconds -= 10 * DAY_SECONDS
    assert world.outcome(2) == "cooldown"


def test_without_a_clock_the_alerts_own_time_counts() -> None:
    trigger = Noted()
    guard = Guard("retrain", trigger, cooldown_seconds=10, daily_quota=100, dry_run=False)
    guard.send([event(0), event(9), event(10)])  # event n is n seconds after event 0
    assert [request.alert for request in trigger.fired] == [event(0), event(10)]


def test_negative_options_are_an_error() -> None:
    for options in ({"cooldown_seconds": -1.0}, {"daily_quota": -1}):
        with pytest.raises(ContractError, match="retrain"):
            Guard("retrain", Noted(), **options)
    with pytest.raises(ContractError, match="retrain"):
        Guard("retrain", Noted(), cooldown_seconds=float("nan"))


def test_guards_of_the_same_options_are_equal() -> None:
    trigger = Noted()
    assert Guard("a", trigger) == Guard("a", trigger)
    assert hash(Guard("a", trigger)) == hash(Guard("a", trigger))
    assert Guard("a", trigger) != Guard("a", trigger, dry_run=False)


@pytest.mark.usefixtures("quiet")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30_000), st.booleans()), max_size=40),
    st.integers(0, 20_000),
    st.integers(0, 3),
)
def test_never_more_often_than_promised(
    steps: list[tuple[int, int, bool]], cooldown: int, quota: int
) -> None:
    """Whatever arrives, again and again, over restarts: cooldown and quota hold."""
    world = World(cooldown=cooldown, quota=quota)
    for number, wait, restart in steps:
        world.clock.seconds += wait
        if restart:
            world.restart()
        world.guard.send([event(number)])
    times = [request.requested_at / SECOND for request in world.trigger.fired]
    assert all(b - a >= cooldown for a, b in pairwise(times))
    asked = [request.id for request in world.trigger.fired]
    assert len(set(asked)) == len(asked)
    for end in times:
        assert sum(end - DAY_SECONDS < at <= end for at in times) <= quota
