"""The lease: one daemon at a time, taken over when it may be, fenced when it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import update

from oodmon.errors import Superseded
from oodmon.store import leases as module
from oodmon.store.database import Database
from oodmon.store.events import Store
from oodmon.store.tables import leases


class Hands:
    """A monotonic clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    found = Hands()
    monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def pair(store_url: str) -> Iterator[tuple[Store, Store]]:
    first, second = Store(store_url, lease_seconds=5), Store(store_url, lease_seconds=5)
    first.open()
    second.open()
    yield first, second
    first.close()
    second.close()


def change(url: str, **values: Any) -> None:
    """Of the one lease, behind everybody's back."""
    database = Database(url)
    database.open()
    with database.write() as connection:
        connection.execute(update(leases).values(**values))
    database.close()


def commit(store: Store) -> None:
    store.append([], state=b"s", positions={"p": "1"})


def test_the_second_is_told_who_holds_it(pair: tuple[Store, Store]) -> None:
    first, second = pair
    assert first.acquire() == ""
    assert f"process {os.getpid()} on " in second.acquire()
    assert first.acquire() == "", "its own is renewed"
    first.release()
    assert second.acquire() == ""
    assert "process" in first.acquire()


def test_a_lease_that_is_renewed_is_never_taken(pair: tuple[Store, Store], hands: Hands) -> None:
    first, second = pair
    first.acquire()
    for _ in range(8):
        assert second.acquire()
        hands.now += 2.0
        first.renew()


def test_one_that_hangs_is_replaced_and_may_not_commit(
    pair: tuple[Store, Store], hands: Hands
) -> None:
    first, second = pair
    first.acquire()
    commit(first)
    assert second.acquire()
    hands.now += 4.9
    assert second.acquire()
    hands.now += 0.2
    assert second.acquire() == ""
    for call in (first.renew, lambda: commit(first)):
        with pytest.raises(Superseded, match="another daemon has taken over") as caught:
            call()
        assert not caught.value.retryable
    assert second.load() is not None
    commit(second)
    assert first.acquire(), "who was replaced waits like everybody else"
    second.release()
    assert first.acquire() == ""
    first.load()
    commit(first)


def test_a_commit_renews(pair: tuple[Store, Store], hands: Hands) -> None:
    first, second = pair
    first.acquire()
    for _ in range(4):
        assert second.acquire()
        hands.now += 4.0
        commit(first)


def test_a_dead_process_of_this_machine_is_replaced_at_once(
    pair: tuple[Store, Store], store_url: str
) -> None:
    code = (
        "import os, sys; from oodmon.store.events import Store; s = Store(sys.argv[1]); s.open();"
        "assert s.acquire() == ''; os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, store_url]).returncode == 9
    assert pair[0].acquire() == ""


def test_a_process_number_that_was_given_out_again_is_no_sign_of_life(
    pair: tuple[Store, Store], store_url: str
) -> None:
    first, second = pair
    first.acquire()
    assert second.acquire()
    change(store_url, started=1)
    assert second.acquire() == ""


def test_elsewhere_the_database_clock_decides(pair: tuple[Store, Store], store_url: str) -> None:
    first, second = pair
    first.acquire()
    change(store_url, place="another machine", pid=2**22 + 1)
    assert second.acquire(), "its end has not come"
    change(store_url, expires_at_ns=1)
    assert second.acquire() == ""


def test_a_clock_that_was_set_back_keeps_no_lease_alive(
    pair: tuple[Store, Store], store_url: str, hands: Hands
) -> None:
    first, second = pair
    first.acquire()
    change(store_url, place="another machine", expires_at_ns=2**62)
    assert second.acquire()
    hands.now += 5.1
    assert second.acquire() == ""


def test_the_lease_ends_in_so_many_seconds_of_the_database(
    pair: tuple[Store, Store], store_url: str
) -> None:
    import time

    first, _ = pair
    first.acquire()
    database = Database(store_url)
    database.open()
    with database.read() as connection:
        row = connection.execute(leases.select()).one()
    database.close()
    assert abs(row.expires_at_ns - time.time_ns() - 5e9) < 2e9
    assert (row.epoch, row.pid) == (1, os.getpid())


def test_pipelines_have_leases_of_their_own(store_url: str) -> None:
    for name in ("a", "b"):
        store = Store(store_url, name)
        store.open()
        assert store.acquire() == ""
        store.close()
