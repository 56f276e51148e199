"""Every registered drift test against every check; and for each check, a test that it rejects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oodmon.checks import checks_for, subjects
from oodmon.contracts import DriftTest
from oodmon.registry import drift
from tests.contracts.broken_drift import BROKEN

TESTS = [case for name in drift.names() for case in subjects("drift", name)]


@pytest.mark.parametrize("check", checks_for("drift"), ids=lambda check: check.__name__)
@pytest.mark.parametrize("test", TESTS, ids=repr)
def test_drift_test_holds_to_its_contract(
    test: DriftTest[Any], check: Callable[[DriftTest[Any]], None]
) -> None:
    check(test)


@pytest.mark.parametrize("check", checks_for("drift"), ids=lambda check: check.__name__)
def test_check_rejects_its_broken_counterpart(check: Callable[[DriftTest[Any]], None]) -> None:
    assert BROKEN[check], f"{check.__name__} has no counterpart that it must reject"
    for broken in BROKEN[check]:
        with pytest.raises(AssertionError, match=r"\w"):
            check(broken)
