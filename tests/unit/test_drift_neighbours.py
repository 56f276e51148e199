"""The correlation that the budget reckons with: measured, doubted, and not confused by a shift."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from scipy.signal import lfilter
from scipy.special import ndtri

from oodmon.calibration import NORMAL_SCORES
from oodmon.drift.neighbours import Alike, Neighbours
from oodmon.records import BIN_EDGES, Histogram

NONE = np.zeros(64, np.int64)
_UNITS: Final = np.round(1000 * NORMAL_SCORES[::-1]).astype(np.int64)
_SQUARES: Final = np.round(1000 * NORMAL_SCORES[::-1] ** 2).astype(np.int64)
_EDGES: Final = ndtri(1.0 - BIN_EDGES[1:-1])[::-1]
"""Of normal scores, ascending; so bins count from the least novel on."""


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


def test_squares_tell_whether_neighbours_are_alike_in_more_than_their_mean() -> None:
    phi, pairs, of_squares = 0.6, 4000, 2.0

    def met(squares: float) -> Alike:
        jumps = round(1e6 * pairs * 2 * (1 - phi))
        swings = round(1e6 * pairs * 2 * of_squares * (1 - squares))
        return Neighbours().met(pairs, jumps, swings).alike(NONE, 1.0, of_squares)

    gaussian, repeated, between = met(phi**2), met(phi), met((phi + phi**2) / 2)
    assert gaussian.correlation == pytest.approx(phi, abs=0.02)
    assert gaussian.sticky == 0.0
    assert repeated.sticky > 0.85
    assert repeated.lasting >= repeated.correlation
    assert 0.3 < between.sticky < 0.6
    # Restless and quiet hours: the mean of neighbours is not alike, their spread is.
    restless = Neighbours().met(pairs, round(2e6 * pairs), round(4e6 * pairs * 0.7))
    found = restless.alike(NONE, 1.0, of_squares)
    assert found.correlation == 0.0
    assert found.sticky > 0.9
    assert found.lasting == pytest.approx(0.3, abs=0.05)
    # Nothing seen, or nothing significant: nothing believed.
    for none in (Neighbours(), Neighbours().met(1000, 2_000_000_000, 3_900_000_000)):
        alike = none.alike(NONE, 1.0, of_squares)
        assert [float(value) for value in alike] == [0.0, 0.0, 0.0]


def test_the_swings_of_old_pairs_count_less() -> None:
    found = Neighbours().met(2**21, 0, 10**12).met(1, 0, 0)
    assert found.swings == pytest.approx(5e5)


def test_one_stream_as_numbers_is_the_same_as_in_an_array() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        pairs = int(rng.integers(0, 2000))
        jumps, swings = (int(pairs * rng.uniform(0, 3e6)) for _ in range(2))
        seen = rng.integers(0, 50, 64)
        one = Neighbours().met(pairs, jumps, swings)
        two = Neighbours(*(np.full(2, value) for value in (one.pairs, one.jumps, one.swings)))
        alone = one.alike(seen, 0.9, 1.8)
        for value, both in zip(alone, two.alike(np.stack([seen, seen]), 0.9, 1.8), strict=True):
            assert np.asarray(both).tolist() == pytest.approx([value, value], rel=1e-12)


def _windows(values: npt.NDArray[np.float64], rows: int, sources: int = 1) -> Neighbours:
    """After windows of normal scores in event order, dealt out to so many sources in turn."""
    found = Neighbours()
    bins = np.searchsorted(_EDGES, values)
    for at in range(0, len(bins) - rows + 1, rows):
        mine = bins[at : at + rows]
        counts = np.bincount(63 - mine, minlength=64).astype(np.int64)
        jumps = [np.diff(_UNITS[mine[source::sources]]) for source in range(sources)]
        swings = [np.diff(_SQUARES[mine[source::sources]]) for source in range(sources)]
        pairs = sum(len(each) for each in jumps)
        told = [sum(int(each @ each) for each in kind) for kind in (jumps, swings)]
        one = Histogram(counts, 0, NONE[:0].astype(np.uint64), np.empty(0, np.float32), pairs)
        one = replace(one, jumps=told[0], swings=told[1])
        found = found.after([one], counts[None])
    return found


def _autoregressive(phi: float, count: int) -> npt.NDArray[np.float64]:
    noise = np.random.default_rng(3).normal(size=count + 200) * np.sqrt(1 - phi**2)
    found: npt.NDArray[np.float64] = lfilter([1], [1, -phi], noise)[200:]
    return found


@pytest.mark.parametrize("phi", [0.6, 0.9])
def test_traffic_that_is_dealt_out_to_replicas_is_as_alike_as_it_was(phi: float) -> None:
    """Neighbours of one source are far apart then: how far apart windows lie tells."""
    values = _autoregressive(phi, 60_000)
    dealt, whole = _windows(values, 200, sources=8), _windows(values, 200)
    assert dealt.autocorrelation(NONE, 1.0) < phi / 2
    assert whole.believed(NONE, 1.0) == pytest.approx(phi, abs=0.03)
    assert dealt.believed(NONE, 1.0) == pytest.approx(phi, abs=0.12)
    assert dealt.alike(NONE, 1.0, 2.0).correlation == pytest.approx(dealt.believed(NONE, 1.0))


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_windows_of_independent_samples_lie_no_further_apart_than_they_should(rows: int) -> None:
    calm = np.random.default_rng(5).normal(size=40 * rows if rows > 1 else 500)
    assert _windows(calm, rows).believed(NONE, 1.0) == 0.0
    # A shift is one couple of windows, however far apart these are; a spread is in both.
    assert _windows(np.concatenate([calm, calm + 1.5]), rows).believed(NONE, 1.0) == 0.0
    assert _windows(np.concatenate([calm, 1.5 * calm]), rows).believed(NONE, 1.0) == 0.0


def test_windows_are_the_same_for_one_stream_and_for_many() -> None:
    rng = np.random.default_rng(5)
    alone = [Neighbours(), Neighbours()]
    many = Neighbours.of(np.zeros((2, 9)))
    for at in range(30):
        counts = rng.multinomial(40, np.full(64, 1 / 64), size=2).astype(np.int64)
        counts[1, at] += 30
        one = [replace(Histogram.empty(), counts=each, pairs=39) for each in counts]
        alone = [near.after([o], c[None]) for near, o, c in zip(alone, one, counts, strict=True)]
        many = many.after(one, counts)
    np.testing.assert_allclose(many.numbers(), np.stack([near.numbers() for near in alone]))
    np.testing.assert_array_equal(Neighbours.of(alone[1].numbers()).numbers(), alone[1].numbers())
    told = many.believed(np.zeros((2, 64), np.int64), 1.0)
    np.testing.assert_allclose(told, [float(n.believed(NONE, 1.0)) for n in alone])
