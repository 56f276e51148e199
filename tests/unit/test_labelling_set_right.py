"""How labels set the estimate of wrong answers right: slope and offset of the log odds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import EXPECTED_ERROR, Calibration
from oodmon.errors import StateError
from oodmon.labelling import set_right


def _at(odds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-odds))


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 0.3), (2.0, -1.0), (0.9, 1.5)])
def test_slope_and_offset_are_found(slope: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(-1.5, 1.5, size=20_000)
    wrong = rng.random(20_000) < _at(slope * odds + offset)
    assert set_right(_at(odds), wrong) == pytest.approx((slope, offset), abs=0.08)


def test_few_labels_leave_the_estimate_nearly_as_it_is() -> None:
    expected = np.array([0.1, 0.2, 0.3])
    assert set_right(expected, np.zeros(3, np.bool_)) == pytest.approx((1.0, 0.0), abs=0.4)
    slope, offset = set_right(np.full(200, 0.2), np.ones(200, np.bool_))
    assert _at(np.array([slope * np.log(0.25) + offset]))[0] > 0.9


def test_more_doubt_never_means_fewer_errors() -> None:
    rng = np.random.default_rng(1)
    odds = rng.normal(size=5_000)
    wrong = rng.random(5_000) < _at(-odds)
    slope, offset = set_right(_at(odds), wrong)
    assert slope == 0.05
    assert _at(slope * odds + offset).mean() == pytest.approx(wrong.mean(), abs=0.01)


def test_noughts_and_ones_become_the_two_rates() -> None:
    """As `expected_error` of kind threshold scores."""
    rng = np.random.default_rng(2)
    doubtful = rng.random(10_000) < 0.2
    wrong = rng.random(10_000) < np.where(doubtful, 0.4, 0.05)
    slope, offset = set_right(doubtful.astype(np.float64), wrong)
    made = Calibration(
        "e", "", np.array([0.0, 1.0], np.float32), measures=EXPECTED_ERROR, slope=slope,
        offset=offset,
    )  # fmt: skip
    assert made.wrong_at(made.scores) == pytest.approx([0.05, 0.4], abs=0.03)


def test_a_calibration_keeps_it_and_ranks_are_not_touched(tmp_path: object) -> None:
    scores = np.linspace(0.01, 0.6, 200)
    plain = Calibration.from_scores("e", "d", scores, measures=EXPECTED_ERROR)
    right = Calibration("e", "d", plain.scores, measures=EXPECTED_ERROR, slope=0.5, offset=1.0)
    path = f"{tmp_path}/e.safetensors"
    right.save(path)
    loaded = Calibration.load(path)
    assert (loaded.slope, loaded.offset) == (0.5, 1.0)
    assert loaded.fingerprint == right.fingerprint != plain.fingerprint
    known, before = right.reference().histogram("e"), plain.reference().histogram("e")
    np.testing.assert_array_equal(known.counts, before.counts)
    assert known.accuracy == pytest.approx(
        1.0 - _at(0.5 * np.log(scores / (1 - scores)) + 1.0).mean(), abs=1e-4
    )
    odd = np.array([np.nan, 0.0, 1.0], np.float32)
    np.testing.assert_array_equal(np.isnan(right.wrong_at(odd)), [True, False, False])
    with pytest.raises(StateError, match="slope 0"):
        Calibration("e", "d", plain.scores, slope=0.0)
