"""Every registered detector holds to its contract, and every check notices a broken one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from oodmon.checks import checks_for, subjects
from oodmon.contracts import Detector
from oodmon.registry import detectors
from tests.contracts.broken_detectors import BROKEN

Check = Callable[[Detector], None]
SUBJECTS = [subject for name in detectors.names() for subject in subjects("detectors", name)]


def _told(detector: Detector) -> str:
    """Its options, without the random part of a temporary folder: the same in every process."""
    return re.sub(r"(oodmon-check)-\w+", r"\1", repr(detector))


@pytest.mark.parametrize("check", checks_for("detectors"), ids=lambda check: check.__name__)
@pytest.mark.parametrize("detector", SUBJECTS, ids=_told)
def test_contract(detector: Detector, check: Check) -> None:
    check(detector)


@pytest.mark.parametrize("check", checks_for("detectors"), ids=lambda check: check.__name__)
def test_check_rejects_a_broken_one(check: Check) -> None:
    culprits = BROKEN[check]
    assert culprits
    for culprit in culprits:
        with pytest.raises(AssertionError):
            check(culprit)
