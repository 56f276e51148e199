"""Tail probabilities: the formula, ties, bins, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from oodmon.calibration import Calibration
from oodmon.errors import StateError
from oodmon.records import BIN_EDGES


def _slow_p(reference: np.ndarray, score: float) -> float:
    return float(1 + sum(r >= score for r in reference)) / (len(reference) + 1)


@pytest.mark.parametrize("n", [1, 2, 19, 20, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_formula_and_bins(n: int, tied: bool) -> None:
    rng = np.random.default_rng(n)
    reference = rng.normal(size=n).round(1 if tied else 6).astype(np.float32)
    scores = np.concatenate([rng.normal(size=300).round(1), reference, [np.inf, -np.inf, np.nan]])
    scores = scores.astype(np.float32)
    calibration = Calibration.from_scores("msp", "d", reference)
    p = calibration.tail_probabilities(scores)
    expected = [np.nan if np.isnan(s) else _slow_p(reference, s) for s in scores]
    np.testing.assert_allclose(p, expected, rtol=0, atol=1e-15)
    bins = calibration.bins(scores)
    assert bins[-1] == -1
    for found, probability in zip(bins[:-1], p[:-1], strict=True):
        # Half-open from below, with room for the rounding of an edge such as 0.3.
        assert BIN_EDGES[found] < probability + 1e-12
        assert probability <= BIN_EDGES[found + 1] + 1e-12


def test_false_alarm_share_is_at_most_alpha() -> None:
    """Marginally over calibrations, P(p <= α) <= α: the point of the +1."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(2000):
        reference, fresh = rng.normal(size=99), rng.normal(size=1)
        p = Calibration.from_scores("a", "", reference).tail_probabilities(fresh)
        hits.append(p[0] <= 0.05)
    assert np.mean(hits) == pytest.approx(0.05, abs=0.015)


def test_score_at_is_the_least_flagged_score() -> None:
    rng = np.random.default_rng(1)
    calibration = Calibration.from_scores("a", "", rng.normal(size=999).round(2))
    grid = np.unique(np.concatenate([calibration.scores, calibration.scores + np.float32(0.005)]))
    for level in (0.5, 0.05, 0.01, 0.001):
        flagged = grid >= calibration.score_at(level)
        np.testing.assert_array_equal(flagged, calibration.tail_probabilities(grid) <= level)
    beyond = calibration.score_at(1e-6)
    assert beyond > calibration.scores[-1]


def test_reference_window_counts_every_score_once() -> None:
    calibration = Calibration.from_scores("a", "", np.arange(1000.0))
    histogram = calibration.reference("m", "1", "").histogram("a")
    assert histogram.scored == 1000
    # A fresh sample has 1,001 places; the one above them all is not beside any of the scores.
    expected = np.diff(np.floor(BIN_EDGES * 1001 + 1e-9))
    expected[np.flatnonzero(expected)[0]] -= 1
    np.testing.assert_array_equal(histogram.counts, expected)


def test_file_round_trip_and_errors(tmp_path: Path) -> None:
    calibration = Calibration.from_scores("gram", "0123", np.array([3.0, np.nan, 1.0, np.inf]))
    path = tmp_path / "gram.calibration.safetensors"
    calibration.save(path)
    again = Calibration.load(path)
    assert (again.detector, again.digest) == ("gram", "0123")
    np.testing.assert_array_equal(again.scores, np.array([1.0, 3.0, np.inf], np.float32))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    classes = np.array([2, 5, 0, 7])
    scores = np.array([3.0, np.nan, 1.0, np.inf])
    named = Calibration.from_scores("gram", "0123", scores, classes)
    assert named.predicted.tolist() == [0, 2, 7]
    assert named.fingerprint != calibration.fingerprint == again.fingerprint
    dataclasses.replace(named, origin="accepted").save(path)
    again = Calibration.load(path)
    assert (again.predicted.tolist(), again.origin) == ([0, 2, 7], "accepted")
    with pytest.raises(StateError, match="2 scores"):
        Calibration("a", "", np.array([1.0, 2.0], np.float32), np.array([1], np.int32))
    save_file({"scores": np.array(calibration.scores)}, path, {"schema": "oodmon.calibration/9"})
    with pytest.raises(StateError, match="calibration/9"):
        Calibration.load(path)

    with pytest.raises(StateError, match="oodmon fit"):
        Calibration.load(tmp_path / "absent")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StateError, match="not a calibration"):
        Calibration.load(path)
    with pytest.raises(StateError, match="no scores"):
        Calibration.from_scores("a", "", np.array([np.nan]))
    with pytest.raises(StateError, match="not sorted"):
        Calibration("a", "", np.array([2.0, 1.0], np.float32))
