from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import ndtr, ndtri

from oodmon.calibration import NORMAL_SCORES
from oodmon.drift.series import HISTORY, Series, standing
from oodmon.records import BIN_EDGES, Histogram


def histogram(counts: np.ndarray) -> Histogram:
    return Histogram(
        np.asarray(counts, np.int64), 0, np.empty(0, np.uint64), np.empty(0, np.float32)
    )


class Recorder:
    """Remembers what it was fed and alarms at a value above 100."""

    def __init__(self) -> None:
        self.fed: list[float] = []
        self.drift_detected = False

    def update(self, x: float) -> None:
        self.fed.append(x)
        self.drift_detected = x > 100.0


@pytest.mark.parametrize("place", [0, 5, 30, 62, 63])
def test_normal_scores_are_the_mean_over_their_bin(place: int) -> None:
    low, high = BIN_EDGES[place], BIN_EDGES[place + 1]
    area, _ = quad(lambda p: -ndtri(p), max(low, 1e-15), min(high, 1 - 1e-15))
    assert NORMAL_SCORES[place] == pytest.approx(area / (high - low), rel=1e-4)


@pytest.mark.parametrize(("n", "m"), [(20, 200), (200, 200), (1_000, 5_000)])
def test_standing_is_standard_normal_over_calibration_sets_and_windows(n: int, m: int) -> None:
    rng = np.random.default_rng(n + m)
    values = []
    for _ in range(1_500):
        calibration = np.sort(rng.standard_normal(m))
        window = rng.standard_normal(n)
        known = (1 + m - np.searchsorted(calibration, calibration)) / (m + 1)
        seen = (1 + m - np.searchsorted(calibration, window)) / (m + 1)
        stands = standing(
            histogram(np.histogram(seen, BIN_EDGES)[0]),
            histogram(np.histogram(known, BIN_EDGES)[0]),
        )
        assert stands is not None
        values.append(stands.value)
    assert abs(np.mean(values)) < 4 / math.sqrt(1_500)
    assert np.std(values) == pytest.approx(1.0, abs=0.08)


def test_standing_says_how_far_the_scores_moved() -> None:
    edges = -ndtri(BIN_EDGES)
    known = histogram(np.rint(1e6 * np.diff(BIN_EDGES)))
    moved = histogram(np.rint(1e6 * np.diff(ndtr(0.3 - edges))))
    stands = standing(moved, known)
    assert stands is not None
    assert stands.effect == pytest.approx(0.3, abs=0.02)
    assert stands.value == pytest.approx(stands.effect * math.sqrt(5e5), rel=1e-3)


def test_nothing_stands_where_either_side_is_empty() -> None:
    some = histogram(np.ones(64))
    assert standing(Histogram.empty(), some) is None
    assert standing(some, Histogram.empty()) is None


def test_a_reference_in_one_bin_is_not_divided_by_its_spread() -> None:
    constant = np.zeros(64)
    constant[-1] = 500
    moved = np.zeros(64)
    moved[0] = 50
    stands = standing(histogram(moved), histogram(constant))
    assert stands is not None
    assert stands.effect == pytest.approx(NORMAL_SCORES[0] - NORMAL_SCORES[-1], rel=0.05)


def test_series_is_cut_and_built_again_from_the_newer_half() -> None:
    series: Series[Recorder] = Series(Recorder)
    for value in range(2 * HISTORY):
        series, detector = series.feed(value / 1e6)
    assert len(detector.fed) == 2 * HISTORY
    assert series.detector() is not detector
    assert series.detector().fed == [value / 1e6 for value in range(HISTORY, 2 * HISTORY)]


def test_series_starts_over_after_an_alarm() -> None:
    series: Series[Recorder] = Series(Recorder)
    for value in (1.0, 2.0, 101.0):
        series, detector = series.feed(value)
    assert detector.drift_detected
    assert len(series.values) == 0
    assert series.detector().fed == []


def test_a_series_can_be_fed_twice() -> None:
    series: Series[Recorder] = Series(Recorder)
    series, _ = series.feed(1.0)
    one, _ = series.feed(2.0)
    other, _ = series.feed(3.0)
    assert one.detector().fed == [1.0, 2.0]
    assert other.detector().fed == [1.0, 3.0]
