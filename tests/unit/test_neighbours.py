"""The correlation that the budget reckons with: measured, doubted, and not confused by a shift."""

from __future__ import annotations

import numpy as np
import pytest

from oodmon.calibration import NORMAL_SCORES
from oodmon.neighbours import Neighbours

NONE = np.zeros(64, np.int64)


def _met(phi: float, pairs: int, variance: float = 1.0) -> Neighbours:
    return Neighbours().met(pairs, round(1e6 * pairs * 2 * variance * (1 - phi)))


def test_jumps_tell_the_correlation_against_the_variance_of_the_traffic() -> None:
    assert _met(0.6, 1000).autocorrelation(NONE, 1.0) == pytest.approx(0.6)
    assert _met(-0.4, 1000).autocorrelation(NONE, 1.0) == 0.0
    assert Neighbours().autocorrelation(NONE, 1.0) == 0.0
    # Traffic of twice the reference's variance, seen for long: it is what counts.
    wide = np.zeros(64, np.int64)
    wide[[20, 63]] = 500_000
    mean = NORMAL_SCORES[[20, 63]].mean()
    own = float(((NORMAL_SCORES[[20, 63]] - mean) ** 2).mean())
    found = _met(0.5, 1000, own).autocorrelation(wide, 1.0)
    assert found == pytest.approx(0.5, abs=0.01)


def test_what_is_not_significant_is_not_believed_and_what_is_gets_its_error() -> None:
    assert Neighbours().believed(NONE, 1.0) == 0.0
    assert _met(0.02, 1000).believed(NONE, 1.0) == 0.0
    assert _met(0.02, 100_000).believed(NONE, 1.0) == pytest.approx(0.0232, abs=2e-4)
    assert _met(0.6, 1000).believed(NONE, 1.0) == pytest.approx(0.627, abs=2e-3)
    assert _met(0.9999, 10_000).believed(NONE, 1.0) == 0.98
    # The first few pairs are taken for correlated even if they are not: nothing is known yet.
    assert _met(0.55, 10).believed(NONE, 1.0) > 0.5


def test_old_pairs_count_less() -> None:
    found = _met(0.9, 2**21)
    for _ in range(12):
        found = found.met(2**21, 2 * 10**6 * 2**21)
    assert found.autocorrelation(NONE, 1.0) < 0.01
    assert found.pairs < 2**23
