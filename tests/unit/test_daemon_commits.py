"""A commit that takes long is not followed by the next one at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from oodmon.daemon.commits import Commits
from oodmon.daemon.intake import Group
from oodmon.errors import StoreError


class Slow:
    """A store, a pipeline and a clock: an append moves the clock by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.takes = 0.0
        self.fails = 0

    def monotonic(self) -> float:
        return self.now

    def append(self, facts: object, **fields: object) -> None:
        del facts, fields
        self.now += self.takes
        if self.fails:
            self.fails -= 1
            raise StoreError("gone", retryable=True)

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False


def _nothing(*given: object, **named: object) -> float:
    del given, named
    return 60.0


def _commits(slow: Slow) -> Commits:
    quiet = SimpleNamespace(
        put=_nothing, add=_nothing, observe=_nothing, mend=_nothing, fail=_nothing, wake=_nothing
    )
    return Commits(
        cast("Any", slow),
        health=cast("Any", quiet),
        metrics=cast("Any", quiet),
        observer=cast("Any", SimpleNamespace(facts=_nothing)),
        couriers=cast("Any", quiet),
        asked=cast("Any", slow),
        clock=lambda: 0,
        monotonic=slow.monotonic,
    )


def _commit(commits: Commits) -> bool:
    intake = SimpleNamespace(
        group=Group(), pipeline=SimpleNamespace(freeze=lambda: b""), committed=_nothing
    )
    reader = SimpleNamespace(settle=_nothing)
    return commits.commit(cast("Any", intake), cast("Any", _nothing), cast("Any", reader))


def test_as_long_as_the_last_commit_took_there_is_no_other() -> None:
    slow = Slow()
    commits = _commits(slow)
    assert commits.rested
    assert _commit(commits)
    assert commits.rested  # it took no time
    slow.takes = 0.3
    assert _commit(commits)
    assert not commits.rested
    slow.now += 0.29
    assert not commits.rested
    slow.now += 0.02
    assert commits.rested


def test_a_store_that_was_away_is_not_waited_for_again() -> None:
    slow = Slow()
    commits = _commits(slow)
    slow.fails, slow.takes = 3, 0.1
    assert _commit(commits)
    slow.now += 0.11
    assert commits.rested
    # And never longer than a second.
    slow.takes = 30.0
    assert _commit(commits)
    slow.now += 1.01
    assert commits.rested
