"""Every registered tap against every check; and for each check, that it rejects broken ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from oodmon.checks import checks_for, subjects
from oodmon.contracts import Tap
from oodmon.registry import taps
from tests.contracts.broken_taps import BROKEN

TAPS = [case for name in taps.names() for case in subjects("taps", name)]
PAIRS = [(check, broken) for check, several in BROKEN.items() for broken in several]


@pytest.mark.parametrize("check", checks_for("taps"), ids=lambda check: check.__name__)
@pytest.mark.parametrize("tap", TAPS, ids=lambda tap: tap.name)
def test_tap_holds_to_its_contract(tap: Tap, check: Callable[[Tap], None]) -> None:
    check(tap)


@pytest.mark.parametrize("check", checks_for("taps"), ids=lambda check: check.__name__)
def test_check_has_a_broken_counterpart(check: Callable[[Tap], None]) -> None:
    assert BROKEN[check]


@pytest.mark.parametrize(
    ("check", "broken"),
    PAIRS,
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_check_rejects_its_broken_counterpart(check: Callable[[Tap], None], broken: Tap) -> None:
    with pytest.raises(AssertionError, match=r"\w"):
        check(broken)
