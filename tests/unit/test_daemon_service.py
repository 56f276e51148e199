"""The daemon's life in one process, on a real store, a real feed and the real pipeline."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from oodmon.contracts import Delivery, Reader, Sink, Trigger, TriggerRequest
from oodmon.daemon.asked import Asked
from oodmon.daemon.backoff import Backoff, Receiver
from oodmon.daemon.parts import Pace, Parts
from oodmon.daemon.routes import Routes
from oodmon.daemon.service import Service
from oodmon.daemon.signals import Signals
from oodmon.drift.budget import Budget
from oodmon.errors import ConfigError, ContractError, FeedError, RetryLater, StoreError
from oodmon.feeds.spool import Spool
from oodmon.pipeline import Pipeline
from oodmon.records import Event, ScoreBatch
from oodmon.rules import Rule
from oodmon.store.database import Database
from oodmon.store.events import Store
from oodmon.store.tables import leases
from oodmon.triggers.guard import Guard
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, calibration, stream
from tests.waiting import PATIENCE_SECONDS, eventually

FAST = Pace(
    poll_seconds=0.02,
    group_seconds=0.05,
    advance_seconds=0.05,
    sample_seconds=0.05,
    retry_seconds=0.01,
    max_retry_seconds=0.05,
    grace_seconds=PATIENCE_SECONDS / 2,
)
MODEL = {"model": "m", "model_version": "1"}


@dataclass(frozen=True)
class Box(Sink):
    """Keeps what it is sent; two of one label are equal, as a sink of one configuration is."""

    name = "box"
    label: str = ""
    events: list[Event] = field(default_factory=list, compare=False)
    log: list[str] = field(default_factory=list, compare=False)

    def open(self) -> None:
        self.log.append("open")

    def send(self, events: Sequence[Event]) -> None:
        self.events.extend(events)

    def close(self) -> None:
        self.log.append("close")

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.events]


@dataclass(frozen=True)
class Lever(Trigger):
    """Keeps what it is asked for."""

    name = "lever"
    requests: list[TriggerRequest] = field(default_factory=list, compare=False)

    def open(self) -> None:
        """Nothing."""

    def fire(self, request: TriggerRequest) -> None:
        self.requests.append(request)

    def close(self) -> None:
        """Nothing."""


class Weak(Store):
    """A store whose appends fail while it is told to; some only after they are committed."""

    failing = ""

    def append(self, *args: Any, **kwargs: Any) -> None:
        if self.failing == "before":
            raise StoreError("the disk is full", retryable=True)
        super().append(*args, **kwargs)
        if self.failing == "after":
            raise StoreError("the answer was lost", retryable=True)


def pipeline(model: str = "m", windows: Windowing | None = None) -> Pipeline:
    return Pipeline(
        model,
        "1",
        {"msp": calibration()},
        windows or Windowing(10, 0, 2),
        {"budget": Budget("1 per 10000 windows")},
        {"novelty": Rule("budget", severity="critical")},
    )


def parts(receivers: Mapping[str, Receiver], made: Pipeline | None = None) -> Parts:
    kinds = ("alert", "notice")
    sinks = {name.partition(".")[2]: kinds for name in receivers if name.startswith("sinks.")}
    triggers = [name.partition(".")[2] for name in receivers if name.startswith("triggers.")]
    return Parts(made or pipeline(), Routes(sinks, {"novelty": triggers}), receivers)


def put(folder: Path, batches: Sequence[ScoreBatch], source: str = "agent") -> None:
    writer = Spool(str(folder)).writer(source)
    for batch in batches:
        assert writer.put(batch)
    writer.close()


@contextmanager
def running(service: Service) -> Iterator[Service]:
    thread = threading.Thread(target=service.run, name="daemon")
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def make(
    tmp_path: Path,
    receivers: Mapping[str, Receiver] | None = None,
    store: Store | None = None,
    reader: Reader | None = None,
    **options: Any,
) -> Service:
    return Service(
        parts=options.pop("parts", None) or parts(receivers or {}),
        reader=(lambda: reader) if reader else Spool(str(tmp_path / "spool")).reader,
        store=store or Store(f"sqlite:///{tmp_path}/oodmon.db"),
        pace=options.pop("pace", FAST),
        backoff=Backoff(initial_seconds=0.01, max_seconds=0.05),
        **options,
    )


def taken(service: Service) -> float:
    return service.metrics.value("oodmon_batches_total", result="accepted")


def closed_until(service: Service) -> float:
    """End of the newest window, seconds after `EPOCH`."""
    name = "oodmon_window_last_closed_timestamp_seconds"
    return service.metrics.value(name, **MODEL) - EPOCH / SECOND


def reopened(tmp_path: Path) -> Store:
    store = Store(f"sqlite:///{tmp_path}/oodmon.db")
    store.open()
    return store


def rows(tmp_path: Path) -> dict[str, Any]:
    store = reopened(tmp_path)
    try:
        return {
            "windows": store.windows(),
            "drift": store.drift_results(),
            "alerts": store.alerts(),
            "flagged": store.exceedances(),
            "agents": store.agents(),
            "positions": [row["partition"] for row in store.positions()],
        }
    finally:
        store.close()


def test_from_the_feed_to_database_sink_and_trigger(tmp_path: Path) -> None:
    put(tmp_path / "spool", list(stream(200, shift_at=120)))
    box, lever = Box(), Lever()
    guard = Guard("retrain", lever, 3600, 1, dry_run=False)
    service = make(tmp_path, {"sinks.box": box, "triggers.retrain": guard})
    with running(service):
        eventually(lambda: box.types == ["oodmon.alert.firing.v1"])
        eventually(lambda: len(lever.requests) == 1)
        eventually(lambda: service.readiness().ready)
        value = service.metrics.value
        eventually(
            lambda: (
                value("oodmon_retrain_requests_total", trigger="retrain", result="fired") == 1
                and value("oodmon_outbox_pending", sink="sinks.box") == 0
                and value("oodmon_feed_backlog_bytes") == 0
            )
        )
        assert value("oodmon_samples_total", **MODEL) == 200 * 64
        assert service.readiness().parts["sinks.box"] == "ok"
    assert not service.readiness().ready
    assert box.log == ["open", "close"]
    found = rows(tmp_path)
    assert sum(row["samples"] for row in found["windows"]) == 200 * 64
    (alert,) = found["alerts"]
    assert alert["rule"] == "novelty"
    (agent,) = found["agents"]
    assert (agent["sequence"], agent["samples"], agent["lost"]) == (199, 200 * 64, 0)


def test_stopping_anywhere_and_going_on_writes_the_rows_of_one_run(tmp_path: Path) -> None:
    batches = list(stream(300, shift_at=200, rows=16))
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    put(tmp_path / "whole" / "spool", batches)
    whole = make(tmp_path / "whole")
    with running(whole):
        eventually(lambda: closed_until(whole) >= 300)
    place = tmp_path / "parts"
    pace = Pace(**{**vars(FAST), "group_batches": 7})
    sent = 0
    for cut in (50, 51, 130, 300):
        put(place / "spool", batches[sent:cut], source=f"agent-{sent}")
        # Time must not close windows that the next part belongs to.
        service = make(place, pace=pace, clock=lambda: EPOCH)
        with running(service):
            eventually(lambda: taken(service) >= 1 or cut == 51)  # noqa: B023
        sent = cut
    last = make(place, pace=pace)
    with running(last):
        eventually(lambda: closed_until(last) >= 300)
    found, expected = rows(place), rows(tmp_path / "whole")
    assert sum(row["samples"] for row in expected["windows"]) == 300 * 16
    assert expected["alerts"]
    for kind in ("windows", "drift", "alerts", "flagged"):
        assert found[kind] == expected[kind], kind


@pytest.mark.parametrize("failing", ["before", "after"])
def test_a_failing_store_stops_intake_and_readiness_until_it_works(
    tmp_path: Path, failing: str
) -> None:
    box = Box()
    store = Weak(f"sqlite:///{tmp_path}/oodmon.db")
    service = make(tmp_path, {"sinks.box": box}, store)
    with running(service):
        eventually(lambda: service.readiness().ready)
        store.failing = failing
        put(tmp_path / "spool", list(stream(100, shift_at=60)))
        eventually(lambda: not service.readiness().ready)
        assert service.readiness().parts["store"]
        assert service.metrics.value("oodmon_store_up") == 0
        before = taken(service)
        time.sleep(0.1)
        assert taken(service) == before, "consumption stands while the store does not work"
        store.failing = ""
        eventually(lambda: taken(service) == 100)
        eventually(lambda: box.types == ["oodmon.alert.firing.v1"])
        eventually(lambda: service.readiness().ready)
    found = rows(tmp_path)
    assert sum(row["samples"] for row in found["windows"]) == 100 * 64
    assert found["agents"][0]["samples"] == 100 * 64, "counted once, also if the answer was lost"


def test_ending_while_the_store_fails_loses_nothing(tmp_path: Path) -> None:
    put(tmp_path / "spool", list(stream(50)))
    store = Weak(f"sqlite:///{tmp_path}/oodmon.db")
    store.failing = "before"
    service = make(tmp_path, store=store)
    with running(service):
        eventually(lambda: service.metrics.value("oodmon_store_failures_total") >= 2)
    again = make(tmp_path)
    with running(again):
        eventually(lambda: taken(again) == 50)


def test_a_second_daemon_stands_by_and_takes_over(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    with running(first):
        eventually(lambda: first.readiness().ready)
        put(tmp_path / "spool", list(stream(20)))
        eventually(lambda: taken(first) == 20)
        with running(second):
            eventually(lambda: "holds pipeline" in second.readiness().parts.get("lease", ""))
            assert not second.readiness().ready
            assert second.metrics.value("oodmon_lease_held") == 0
            first.stop()
            eventually(lambda: second.readiness().ready)
            assert second.metrics.value("oodmon_lease_held") == 1
            put(tmp_path / "spool", list(stream(25))[20:], source="again")
            eventually(lambda: taken(second) == 5)
    assert rows(tmp_path)["agents"][0]["samples"] == 25 * 64


def test_a_daemon_that_was_replaced_steps_down_and_comes_back(tmp_path: Path) -> None:
    box = Box()
    service = make(tmp_path, {"sinks.box": box}, clock=lambda: EPOCH)
    other = reopened(tmp_path)
    with running(service):
        put(tmp_path / "spool", list(stream(60)))
        eventually(lambda: [one["sequence"] for one in other.agents()] == [59])
        database = Database(f"sqlite:///{tmp_path}/oodmon.db")
        database.open()
        with database.write() as connection:  # as if it had hung for a lease, and another came
            connection.execute(leases.update().values(holder="other", beats=0))
        put(tmp_path / "spool", list(stream(90, shift_at=70))[60:], source="later")
        eventually(lambda: not service.readiness().ready)
        assert other.agents()[0]["sequence"] == 59, "what it took meanwhile is not committed"
        eventually(lambda: "standing by" in service.readiness().parts["lease"])
        Spool(str(tmp_path / "spool")).reader().close()  # it let go of the feed
        with database.write() as connection:
            connection.execute(leases.delete())
        database.close()
        eventually(lambda: service.readiness().ready)
        eventually(lambda: box.types == ["oodmon.alert.firing.v1"])
    assert other.agents()[0]["samples"] == 90 * 64, "each counted once"
    other.close()


def test_what_waiting_will_not_mend_is_told_loudly_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Store):
        tries = 0

        def append(self, *args: Any, **kwargs: Any) -> None:
            self.tries += 1
            if self.tries < 4:
                raise StoreError("no such column: p_value")
            super().append(*args, **kwargs)

    put(tmp_path / "spool", list(stream(10)))
    service = make(tmp_path, store=Broken(f"sqlite:///{tmp_path}/oodmon.db"))
    with running(service):
        eventually(lambda: taken(service) == 10 and service.readiness().ready)
    loud = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert len(loud) == 1
    assert "no such column" in loud[0].getMessage()


class Shaky(Reader):
    """A feed that fails at times."""

    def __init__(self, inner: Reader) -> None:
        self.inner = inner
        self.broken = False

    def seek(self, positions: Mapping[str, str]) -> None:
        self.inner.seek(positions)

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        if self.broken:
            raise FeedError("the folder is gone")
        return self.inner.poll(limit, timeout_seconds)

    def settle(self, positions: Mapping[str, str]) -> None:
        if self.broken:
            raise FeedError("the folder is gone")
        self.inner.settle(positions)

    def backlog_bytes(self) -> int:
        if self.broken:
            raise FeedError("the folder is gone")
        return self.inner.backlog_bytes()

    def close(self) -> None:
        self.inner.close()


def test_a_failing_feed_is_shown_and_recovered_from(tmp_path: Path) -> None:
    reader = Shaky(Spool(str(tmp_path / "spool")).reader())
    service = make(tmp_path, reader=reader)
    with running(service):
        put(tmp_path / "spool", list(stream(10)))
        eventually(lambda: taken(service) == 10)
        reader.broken = True
        eventually(lambda: service.readiness().parts["feed"] == "the folder is gone")
        assert not service.readiness().ready
        reader.broken = False
        eventually(lambda: service.readiness().ready)
        put(tmp_path / "spool", list(stream(5, source="other")), source="other")
        eventually(lambda: taken(service) == 15)


def test_damage_and_unreadable_parts_of_the_feed_are_told(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    put(spool, list(stream(10)))
    (segment,) = spool.glob("*/*.seg")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 4
    segment.write_bytes(data)
    head = b"OODSPOOL" + (9).to_bytes(4, "little")
    (spool / "newer-00000000").mkdir()
    newer = spool / "newer-00000000" / "0000000000.seg"
    newer.write_bytes(head + zlib.crc32(head).to_bytes(4, "little"))
    service = make(tmp_path)
    with running(service):
        eventually(lambda: taken(service) == 9)
        eventually(lambda: service.metrics.value("oodmon_feed_damaged_total") == 1)
        eventually(lambda: "newer release" in service.readiness().parts["partitions"])
        assert service.metrics.value("oodmon_feed_problems") == 1
        assert not service.readiness().ready
        eventually(lambda: service.metrics.value("oodmon_feed_max_bytes") == 1 << 30)


def test_a_failing_sink_waits_in_the_outbox_and_does_not_disturb(tmp_path: Path) -> None:
    class Down(Box):
        def send(self, events: Sequence[Event]) -> None:
            raise RetryLater("connection refused")

    put(tmp_path / "spool", list(stream(100, shift_at=60)))
    good = Box("good")
    service = make(tmp_path, {"sinks.down": Down("down"), "sinks.good": good})
    with running(service):
        eventually(lambda: len(good.events) == 1)
        eventually(lambda: service.readiness().parts["sinks.down"] == "failing")
        assert service.readiness().ready
    store = reopened(tmp_path)
    assert store.depths()["sinks.down"].pending == 1
    store.close()
    back = Box("down")
    again = make(tmp_path, {"sinks.down": back})
    with running(again):
        eventually(lambda: len(back.events) == 1)
    assert back.events[0].id == good.events[0].id


def test_the_end_waits_for_a_sink_that_hangs_until_it_is_forced(tmp_path: Path) -> None:
    released = threading.Event()

    class Hanging(Box):
        def send(self, events: Sequence[Event]) -> None:
            self.log.append("send")
            released.wait(2 * PATIENCE_SECONDS)

    put(tmp_path / "spool", list(stream(100, shift_at=60)))
    box = Hanging()
    pace = Pace(**{**vars(FAST), "grace_seconds": 10 * PATIENCE_SECONDS})
    service = make(tmp_path, {"sinks.box": box}, pace=pace)
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(service.run()), name="daemon")
    thread.start()
    try:
        eventually(lambda: "send" in box.log)
        service.stop()
        eventually(lambda: service.readiness().parts["daemon"] == "stopping")
        thread.join(0.2)
        assert not status, "it gives the sink its grace period"
        service.stop(force=True)
        thread.join(PATIENCE_SECONDS)
        assert status == [130]
    finally:
        service.stop(force=True)
        released.set()
        thread.join(PATIENCE_SECONDS)


def test_reload_swaps_what_changed_and_keeps_the_evidence(tmp_path: Path) -> None:
    kept, gone, new = Box("kept"), Box("gone"), Box("new")
    box: dict[str, Receiver] = {"sinks.kept": kept, "sinks.gone": gone}
    service = make(
        tmp_path,
        box,
        rebuild=lambda: parts({"sinks.kept": Box("kept"), "sinks.new": new}),
        clock=lambda: EPOCH,  # today's would make what comes after the reload late
    )
    with running(service):
        put(tmp_path / "spool", list(stream(100)))
        eventually(lambda: taken(service) == 100)
        assert service.reload(PATIENCE_SECONDS) is None
        assert gone.log[-1:] == ["close"]
        shifted = list(stream(200, shift_at=100))[100:]
        put(tmp_path / "spool", shifted, source="later")
        eventually(lambda: len(kept.events) == len(new.events) == 1)
        assert service.metrics.value("oodmon_config_last_reload_successful") == 1
        assert kept.events[0].data["evidence"]["samples"] > 100 * 64, "the state went on"
    assert gone.events == []
    assert kept.log == ["open", "close"], "an unchanged sink goes on undisturbed"


@pytest.mark.parametrize(
    ("rebuild", "why"),
    [
        (ConfigError(["oodmon.yaml:3:1: daemon.feed: is required"]), "daemon.feed: is required"),
        (RuntimeError("a plugin's bug"), "a plugin's bug"),
        (parts({}, pipeline("another")), "needs a restart"),
        (None, "without a configuration"),
    ],
)
def test_a_reload_that_fails_changes_nothing_and_is_told(
    tmp_path: Path, rebuild: Exception | Parts | None, why: str
) -> None:
    def again() -> Parts:
        if isinstance(rebuild, Exception):
            raise rebuild
        assert rebuild is not None
        return rebuild

    box = Box()
    service = make(tmp_path, {"sinks.box": box}, rebuild=again if rebuild else None)
    with running(service):
        eventually(lambda: service.readiness().ready)
        assert why in (service.reload(PATIENCE_SECONDS) or "")
        put(tmp_path / "spool", list(stream(10)))
        eventually(lambda: taken(service) == 10)
        if rebuild is not None:
            assert service.metrics.value("oodmon_config_last_reload_successful") == 0
            eventually(lambda: box.types == ["oodmon.daemon.reload_failed.v1"])
            assert why in box.events[0].data["error"]
    assert service.reload() == "the daemon is stopping"


def test_a_state_that_cannot_be_read_begins_anew_and_is_told(tmp_path: Path) -> None:
    store = reopened(tmp_path)
    store.append([], state=b"not a state", positions={})
    store.close()
    put(tmp_path / "spool", list(stream(10)))
    box = Box()
    service = make(tmp_path, {"sinks.box": box})
    with running(service):
        eventually(lambda: taken(service) == 10)
        eventually(lambda: box.types == ["oodmon.daemon.state_discarded.v1"])


def test_what_is_wrong_at_startup_is_raised_and_everything_is_closed(tmp_path: Path) -> None:
    (tmp_path / "dir.db").mkdir()
    box = Box()
    service = make(
        tmp_path,
        {"sinks.box": box},
        Store(f"sqlite:///{tmp_path}/dir.db"),
        http=("127.0.0.1", 0),
    )
    with pytest.raises(StoreError):
        service.run()
    assert service.port == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deliver")]
    assert box.log == []


def test_waiting_for_a_reload_ends_with_the_daemon_or_the_timeout() -> None:
    asked = Asked()
    assert asked.reload() == "the daemon is starting"
    asked.open()
    assert asked.reload(0.01) == "the reload did not end within 0.01 s"
    outcome: list[str | None] = []
    waiting = threading.Thread(target=lambda: outcome.append(asked.reload(PATIENCE_SECONDS)))
    waiting.start()
    time.sleep(0.05)
    asked.close()
    waiting.join(PATIENCE_SECONDS)
    assert outcome == ["the daemon is stopping"]
    assert asked.reload() == "the daemon is stopping"


def test_signals_only_set_flags() -> None:
    import signal

    asked = Asked()
    before = signal.getsignal(signal.SIGTERM)
    with Signals(asked):
        signal.raise_signal(signal.SIGHUP)
        assert asked.reloads() == (True, [])
        assert asked.reloads() == (False, [])
        assert not asked.stopping
        signal.raise_signal(signal.SIGINT)
        assert asked.stopping
        assert not asked.forced
        signal.raise_signal(signal.SIGTERM)
        assert not asked.forced, "the second of two different ones is no impatience"
        signal.raise_signal(signal.SIGINT)
        assert asked.forced
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("options", [{"group_batches": 0}, {"retry_seconds": 0}])
def test_paces_that_make_no_sense_are_named(options: dict[str, int]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        Pace(**options)
