"""Housekeeping: old facts go and what is needed stays, space is given back, sizes are told."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from oodmon.config.schema import RETENTION_DAYS, StoreSection
from oodmon.contracts import Delivery, Reader
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.upkeep import Retention, Upkeep
from oodmon.errors import ContractError
from oodmon.feeds.spool import Spool
from oodmon.store.events import AgentSeen, Store
from oodmon.store.retention import KINDS
from tests.unit import store_facts as made
from tests.waiting import PATIENCE_SECONDS

DAY = 86_400 * made.SECOND


class Still(Reader):
    """A feed in which nothing happens."""

    capacity_bytes = 1000

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.names = names

    def seek(self, positions: Mapping[str, str]) -> None:
        """Nothing."""

    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        return ()

    def settle(self, positions: Mapping[str, str]) -> None:
        """Nothing."""

    def backlog_bytes(self) -> int:
        return 0

    def partitions(self) -> Collection[str] | None:
        return self.names

    def close(self) -> None:
        """Nothing."""


def opened(url: str) -> Store:
    store = Store(url)
    store.open()
    return store


def window_at(days: float, **fields: object) -> object:
    one = made.window(0)
    start = made.START + round(days * DAY)
    return replace(one, start=start, end=start + one.end - one.start, **fields)  # type: ignore[arg-type]


def test_old_facts_go_and_what_is_unsent_or_open_stays(store_url: str) -> None:
    store = opened(store_url)
    facts = [window_at(days) for days in (0, 5, 10)]
    store.append(
        [*facts, made.alert(0)],  # type: ignore[list-item]
        state=b"s",
        positions={"gone": "1", "there": "2"},
        outbox=[("sinks.a", made.event(f"e{at}")) for at in range(3)],
        agents=[AgentSeen("old", "m", "1", 0, made.START, 1)],
    )
    store.settle("sinks.a", [store.pending("sinks.a", 2**62, 1)[0].seq])
    metrics = Metrics()
    upkeep = Upkeep(store, metrics, Retention(dict.fromkeys(KINDS, 6.0)), 60.0)
    upkeep.round(Still(["there"]))
    assert sorted({row["window_start_ns"] for row in store.windows()}) == [
        made.START + 5 * DAY,
        made.START + 10 * DAY,
    ]
    assert len(store.alerts()) == 1, "an episode that fires is kept"
    assert len(store.pending("sinks.a", 2**62, 9)) == 2, "what is unsent is kept"
    assert [row["partition"] for row in store.positions()] == ["there"]
    assert store.agents() == []
    assert metrics.value("oodmon_store_pruned_total", kind="outbox") == 1
    assert metrics.value("oodmon_store_pruned_total", kind="agents") == 1
    assert metrics.value("oodmon_store_size_bytes") > 10_000
    assert metrics.value("oodmon_feed_max_bytes") == 1000
    upkeep.round(Still(None))
    assert len(store.positions()) == 1, "a feed that cannot tell what is there loses no position"
    store.close()


def test_zero_days_keep_for_ever(tmp_path: Path) -> None:
    store = opened(f"sqlite:///{tmp_path / 'a.db'}")
    store.append([window_at(0), window_at(10_000)], state=b"", positions={})  # type: ignore[list-item]
    Upkeep(store, Metrics(), Retention(dict.fromkeys(KINDS, 0.0)), 60.0).round(Still())
    assert len({row["window_start_ns"] for row in store.windows()}) == 2
    store.close()


def test_a_file_over_its_limit_gives_up_its_oldest_history_and_the_space(tmp_path: Path) -> None:
    store = opened(f"sqlite:///{tmp_path / 'a.db'}")
    for day in range(64):
        segments = [window_at(day, segment=f"s{at}") for at in range(60)]
        store.append(segments, state=b"", positions={})  # type: ignore[arg-type]
    before = store.size_bytes(live=True)
    limit = before // 2
    Upkeep(store, Metrics(), Retention({}, limit), 60.0).round(Still())
    assert limit * 0.5 < store.size_bytes(live=True) <= limit
    left = sorted({row["window_start_ns"] for row in store.windows()})
    assert left[-1] == made.START + 63 * DAY, "the newest stays"
    store.close()
    assert (tmp_path / "a.db").stat().st_size < limit + (2 << 20)


def letters(store: Store, days: Sequence[float], receiver: str = "sinks.a") -> list[int]:
    """One event at each of these days, with a kilobyte and a half of data; their numbers."""
    for at, day in enumerate(days):
        data = {"text": "é" * 500, "more": "x" * 500}
        time = made.START + round(day * DAY)
        event = replace(made.event(f"{receiver}-{at}"), time=time, data=data)
        store.emit([(receiver, event)])
    return [row.seq for row in store.pending(receiver, 2**62, len(days))]


def test_a_file_that_is_still_too_large_gives_up_dead_letters_but_nothing_unsent(
    tmp_path: Path,
) -> None:
    store = opened(f"sqlite:///{tmp_path / 'a.db'}")
    for day in range(64):
        store.append([window_at(day)], state=b"", positions={})  # type: ignore[list-item]
    days = [63.9 * at / 500 for at in range(500)]
    store.bury("sinks.a", letters(store, days), "no")
    letters(store, days, "sinks.b")
    metrics = Metrics()
    upkeep = Upkeep(store, metrics, Retention({}, 1_200_000), 60.0)
    upkeep.round(Still())
    upkeep.round(Still())
    assert metrics.value("oodmon_store_pruned_total", kind="windows") > 0, "history goes first"
    gone = metrics.value("oodmon_store_pruned_total", kind="dead_letters")
    assert 0 < gone < 500
    assert [row.event.time for row in store.dead("sinks.a")][-1] == made.START + round(
        days[-1] * DAY
    ), "the newest stay"
    assert store.depths()["sinks.b"].pending == 500
    store.close()


def test_what_letters_and_disks_hold_is_told(store_url: str, tmp_path: Path) -> None:
    store = opened(store_url)
    store.bury("sinks.a", letters(store, [0.0, 0.1])[:1], "no")
    letters(store, [0.0], "sinks.b")
    metrics, reader = Metrics(), Still()
    upkeep = Upkeep(store, metrics, Retention(), 60.0)
    upkeep.round(reader)
    text = metrics.render().decode()
    assert 'oodmon_disk_free_bytes{part="feed"}' not in text, "this feed has no folder"
    for name, dead, waits in (("sinks.a", 1, 1), ("sinks.b", 0, 1)):
        waiting = metrics.value("oodmon_outbox_pending_bytes", sink=name)
        buried = metrics.value("oodmon_dead_letters_bytes", sink=name)
        assert 1500 * waits < waiting < 3600 * waits + 1  # in UTF-8, or with escapes
        assert 1500 * dead <= buried < 3600 * dead + 1
    store.revive("sinks.a", [row.seq for row in store.dead("sinks.a")])
    store.settle("sinks.b", [row.seq for row in store.pending("sinks.b", 2**62, 9)])
    spool = Spool(str(tmp_path / "spool")).reader()
    assert spool.folder == str(tmp_path / "spool")
    upkeep.round(spool)
    spool.close()
    assert metrics.value("oodmon_dead_letters_bytes", sink="sinks.a") == 0
    assert metrics.value("oodmon_outbox_pending_bytes", sink="sinks.b") == 0
    parts = ("feed", "store") if store_url.startswith("sqlite") else ("feed",)
    for part in parts:
        free = metrics.value("oodmon_disk_free_bytes", part=part)
        assert 0 < free <= metrics.value("oodmon_disk_size_bytes", part=part)
    reader.folder = str(tmp_path / "gone")
    upkeep.round(reader)
    assert 'oodmon_disk_free_bytes{part="feed"}' not in metrics.render().decode()
    store.close()


def test_the_thread_goes_on_after_a_failure_and_ends(tmp_path: Path) -> None:
    class Failing(Still):
        rounds = 0
        enough = threading.Event()

        def partitions(self) -> Collection[str] | None:
            self.rounds += 1
            if self.rounds > 2:
                self.enough.set()
            raise RuntimeError("a plugin's bug")

    store = opened(f"sqlite:///{tmp_path / 'a.db'}")
    reader = Failing()
    upkeep = Upkeep(store, Metrics(), Retention(), 0.01)
    upkeep.start(reader)
    assert reader.enough.wait(PATIENCE_SECONDS)
    upkeep.stop()
    upkeep.stop()
    assert "upkeep" not in [thread.name for thread in threading.enumerate()]
    store.close()


def test_every_kind_has_a_default_and_is_checked() -> None:
    assert set(RETENTION_DAYS) == set(KINDS)
    section = StoreSection(retention_days={"windows": 7})
    assert section.retention_days == {**RETENTION_DAYS, "windows": 7}
    for bad in ({"window": 7.0}, {"windows": -1.0}, {"windows": float("nan")}):
        with pytest.raises(ContractError, match="retention_days"):
            StoreSection(retention_days=bad)
    with pytest.raises(ContractError, match="lease_seconds"):
        StoreSection(lease_seconds=0.1)
    with pytest.raises(ContractError, match="max_bytes"):
        StoreSection(max_bytes=-1)


def test_the_store_has_a_limit_unless_somebody_wants_none() -> None:
    assert StoreSection().max_bytes == 10 << 30
    assert StoreSection(max_bytes=0).max_bytes == 0
