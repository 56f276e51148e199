"""Every registered feed against every check; and for each check, that it rejects broken ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from oodmon.checks import checks_for, subjects
from oodmon.checks import feeds as checks
from oodmon.checks.feeds import cases
from oodmon.contracts import Feed
from oodmon.registry import feeds
from tests.contracts.broken_feeds import BROKEN
from tests.servers.kafka import Broker

FEEDS = [case for name in feeds.names() for case in subjects("feeds", name)]
PAIRS = [(check, broken) for check, several in BROKEN.items() for broken in several]


@pytest.mark.parametrize("check", checks_for("feeds"), ids=lambda check: check.__name__)
@pytest.mark.parametrize("feed", FEEDS, ids=lambda feed: feed.name)
def test_feed_holds_to_its_contract(feed: Feed, check: Callable[[Feed], None]) -> None:
    check(feed)


@pytest.fixture(scope="module")
def served() -> list[Feed]:
    """Feeds that need a server; made once, because the checks may share one."""
    return []


@pytest.mark.parametrize("check", checks_for("feeds"), ids=lambda check: check.__name__)
def test_feed_on_a_broker_holds_to_its_contract(
    served: list[Feed], kafka: Broker, check: Callable[[Feed], None]
) -> None:
    served[:] = served or cases(feeds.get("kafka"), kafka.address)
    (feed,) = served
    check(feed)


@pytest.mark.parametrize("check", checks_for("feeds"), ids=lambda check: check.__name__)
def test_check_has_a_broken_counterpart(check: Callable[[Feed], None]) -> None:
    assert BROKEN[check]


@pytest.mark.parametrize(
    ("check", "broken"),
    PAIRS,
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_check_rejects_its_broken_counterpart(
    check: Callable[[Feed], None], broken: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_PATIENCE_SECONDS", 0.2)  # what does not come never will
    monkeypatch.setattr(checks, "_POLL_SECONDS", 2.0)
    with pytest.raises(AssertionError, match=r"\w"):
        check(broken)
