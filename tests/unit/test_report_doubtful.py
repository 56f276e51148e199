"""Bounds on false flags: they hold at all thresholds at once, and are of use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import Calibration
from oodmon.records import BIN_EDGES
from oodmon.report.doubtful import at_most

BINS = len(BIN_EDGES) - 1


def _counts(calibration: Calibration, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.bincount(calibration.bins(scores), minlength=BINS)


def _correlated(rng: np.random.Generator, count: int, phi: float) -> npt.NDArray[np.float64]:
    noise = rng.normal(size=count) * np.sqrt(1.0 - phi * phi)
    found = np.empty(count)
    last = rng.normal()
    for place in range(count):
        last = found[place] = phi * last + noise[place]
    return found


@pytest.mark.parametrize(
    ("reference", "ordinary", "novel", "phi"),
    [
        (1_000, 1_000, 0, 0.0),
        (50, 2_000, 0, 0.0),
        (5_000, 2_000, 200, 0.0),
        (2_000, 1_000, 0, 0.6),
    ],
)
def test_no_threshold_has_more_false_flags_in_19_runs_of_20(
    reference: int, ordinary: int, novel: int, phi: float
) -> None:
    rng = np.random.default_rng(0)
    runs, broken = 120, 0
    block = (1.0 + phi) / (1.0 - phi)
    for _ in range(runs):
        calibration = Calibration.from_scores("d", "", rng.normal(size=reference))
        scores = _correlated(rng, ordinary, phi) if phi else rng.normal(size=ordinary)
        false = _counts(calibration, scores)
        found = false + _counts(calibration, rng.normal(size=novel) + 3.0)
        broken += bool((np.cumsum(false) > at_most(found, reference, block)).any())
    # 6 are expected; of a binomial, more than 14 come once in 1,000 such tests.
    assert broken <= 14


def test_each_threshold_taken_alone_would_break_the_promise() -> None:
    """What a test of one threshold calls unlikely happens somewhere: hence the simultaneous one."""
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(60):
        calibration = Calibration.from_scores("d", "", rng.normal(size=5_000))
        false = np.cumsum(_counts(calibration, rng.normal(size=2_000)))
        share = BIN_EDGES[1:]
        alone = 2_000 * share + 1.645 * np.sqrt(2_000 * share * (1.0 - share) * 1.4)
        broken += bool((false > alone).any())
    assert broken > 10


def test_novel_samples_are_told_from_chance() -> None:
    rng = np.random.default_rng(2)
    calibration = Calibration.from_scores("d", "", rng.normal(size=10_000))
    found = _counts(calibration, np.concatenate([rng.normal(size=9_000), np.full(1_000, 9.0)]))
    bound, flagged = at_most(found, 10_000), np.cumsum(found)
    at = int(np.searchsorted(BIN_EDGES[1:], 0.001 - 1e-9))
    assert flagged[at] >= 1_000
    assert 5 < bound[at] < 40, "some 9 are false"
    # What is novel at one threshold is so at every higher one.
    assert (np.diff(flagged - bound) >= 0).all()
    assert (np.diff(bound) >= 0).all()
    assert (bound <= flagged).all()
    # Few samples, each of which could be chance.
    few = _counts(calibration, rng.normal(size=50))
    assert (np.cumsum(few) - at_most(few, 10_000)).max() <= 1


def test_odd_sizes() -> None:
    none = np.zeros(BINS, np.int64)
    assert not at_most(none, 100).any()
    one = none.copy()
    one[0] = 1
    assert at_most(one, 20_000)[0] <= 1
    assert at_most(one, 20_000)[-1] <= 1
    # Three reference scores: below p = 1/4 nobody can be, so nothing is said to be novel there.
    everything = none.copy()
    everything[-1] = 500
    assert at_most(everything, 3)[-1] == 500
    assert at_most(everything, 0).tolist() == [0] * BINS
    # A thousandfold: the bound grows with the samples, and no number overflows.
    many = np.full(BINS, 10**9, np.int64)
    assert (at_most(many, 1_000) <= np.cumsum(many)).all()


def test_the_same_counts_give_the_same_bound() -> None:
    counts = np.arange(BINS, dtype=np.int64)[::-1].copy()
    np.testing.assert_array_equal(at_most(counts, 400), at_most(counts, 400))
    assert (at_most(counts, 400, block=4.0) >= at_most(counts, 400)).all()
    assert (at_most(counts, 400, risk=0.5) <= at_most(counts, 400, risk=0.01)).all()
