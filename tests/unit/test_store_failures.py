"""Killed in the middle, server gone, disk busy: a transaction is there or not, and work goes on."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oodmon.errors import StoreError
from oodmon.store.events import Store
from tests.servers.postgres import PostgresServer
from tests.unit import store_facts as made
from tests.unit.store_killed import append, state_of
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def child(url: str, rows: int, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.store_killed", url, str(rows), str(number)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def committed(url: str, rows: int) -> int:
    """The last append that is in the database, having checked that it and all before are whole."""
    store = Store(url)
    store.open()
    snapshot = store.load()
    assert snapshot is not None
    last = int(snapshot.positions["p0"])
    assert snapshot.positions == {"p0": str(last), "p1": str(last)}
    assert snapshot.state == state_of(last)
    windows = store.windows()
    assert len(windows) == (last + 1) * rows
    assert windows[-1]["window_start_ns"] == made.window(last).start
    assert len(store.drift_results()) == len(store.alerts()) == last + 1
    queued = [row.event.id for row in store.pending("sinks.log", made.START, 10**6)]
    assert queued == [f"e{i}-{row}" for i in range(last + 1) for row in range(rows)]
    assert [seen.samples for seen in store.agents_seen()] == [last]
    store.close()
    return last


# begin, state, windows, drift results, alerts, outbox, agents, positions, commit
@pytest.mark.parametrize("number", [2, 4, 6, 8, 9])
def test_killed_at_a_statement(number: int, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    process = child(url, 50, number)
    told, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert told.split() == ["0", "1"]
    assert committed(url, 50) == 1


def test_nine_statements_make_an_append(tmp_path: Path) -> None:
    """The test above kills at every kind of place only as long as this holds."""
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    process = child(url, 50, 10)
    told, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert told.split() == ["0", "1", "2"]
    assert committed(url, 50) == 2


def test_killed_at_random_moments(store_url: str) -> None:
    """Four kill -9s in one database: nothing told is lost, at most the last is not told."""
    draw = random.Random(7)
    rows = 40
    last = -1
    for _ in range(4):
        process = child(store_url, rows, 0)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first
        assert int(first) == last + 1
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        told = [int(first), *map(int, process.stdout.read().split())]
        process.stdout.close()
        process.wait(PATIENCE_SECONDS)
        last = committed(store_url, rows)
        assert last - told[-1] in (0, 1)


def test_restarted_server(postgres_server: PostgresServer, postgres_url: str) -> None:
    store = Store(postgres_url)
    store.open()
    append(store, 0, 3)
    postgres_server.stop()
    try:
        for _ in range(2):
            with pytest.raises(StoreError) as caught:
                append(store, 1, 3)
            assert caught.value.retryable
        with pytest.raises(StoreError):
            store.pending("sinks.log", made.START, 10)
    finally:
        postgres_server.start()
    append(store, 1, 3)
    store.close()
    assert committed(postgres_url, 3) == 1


def test_connections_cut_by_the_server(postgres_url: str) -> None:
    import psycopg

    store = Store(postgres_url)
    store.open()
    append(store, 0, 3)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    append(store, 1, 3)  # noticed before it is used
    store.close()
    assert committed(postgres_url, 3) == 1


def test_a_lost_acknowledgement_is_no_other_daemon(tmp_path: Path) -> None:
    """The commit went through, its answer did not: the same append again is accepted."""
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    store = Store(url)
    store.open()
    assert store.load() is None
    append(store, 0, 3)
    store._commits._appended = False  # as after an exception out of the commit
    append(store, 0, 3)
    append(store, 1, 3)
    store.close()
    assert committed(url, 3) == 1


def test_a_locked_database_is_retryable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodmon.store.database._BUSY_SECONDS", 0.1)
    path = tmp_path / "oodmon.db"
    store = Store(f"sqlite:///{path}")
    store.open()
    append(store, 0, 3)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked") as caught:
        append(store, 1, 3)
    assert caught.value.retryable
    assert store.load() is not None  # readers are not held up
    other.execute("ROLLBACK")
    other.close()
    append(store, 1, 3)
    store.close()
    assert committed(f"sqlite:///{path}", 3) == 1


def test_a_full_disk_is_retryable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'oodmon.db'}"
    store = Store(url)
    store.open()
    append(store, 0, 3)
    with store._database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full") as caught:
        append(store, 1, 500)
    assert caught.value.retryable
    with store._database.read() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    append(store, 1, 3)
    store.close()
    assert committed(url, 3) == 1


def test_numbers_that_no_column_takes_are_not_retryable(store_url: str) -> None:
    store = Store(store_url)
    store.open()
    append(store, 0, 3)
    with pytest.raises(StoreError) as caught:
        store.append([], state=b"", positions={}, outbox=[("s", made.event("e", at_ns=2**70))])
    assert not caught.value.retryable
    append(store, 1, 3)
    store.close()
    assert committed(store_url, 3) == 1
