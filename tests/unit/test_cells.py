"""Ranks within the predicted class: blind to the mix of traffic, not to a change within a class."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import Calibration
from oodmon.cells import Cells
from oodmon.drift.budget import Budget
from oodmon.errors import ContractError
from oodmon.pipeline import Pipeline
from oodmon.records import ALL, BIN_EDGES, DriftResult, ScoreBatch
from oodmon.windows import Windowing
from tests.streams import batch

LEVELS = np.array([0.0, 2.0, 4.0])
"""Mean score of each class: the mix of classes makes the law of all scores."""


def _traffic(
    rng: np.random.Generator, rows: int, shares: list[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    classes = rng.choice(3, rows, p=shares).astype(np.int32)
    return (rng.normal(size=rows) + LEVELS[classes]).astype(np.float32), classes


def _calibration(rows: int = 4000, shares: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Calibration:
    scores, classes = _traffic(np.random.default_rng(0), rows, list(shares))
    return Calibration.from_scores("msp", "digest-msp", scores, classes)


def _batch(rng: np.random.Generator, rows: int, shares: list[float], at: int = 0) -> ScoreBatch:
    scores, classes = _traffic(rng, rows, shares)
    return batch(scores, at, at, predicted=classes)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
def test_the_law_of_the_bins_does_not_depend_on_the_mix(shares: list[float]) -> None:
    cells = Cells(_calibration())
    reference = cells.reference("m", "1").histogram("msp").counts
    bins = cells.bins(_batch(np.random.default_rng(1), 200_000, shares))
    found = np.cumsum(np.bincount(bins, minlength=64)) / 200_000
    expected = np.cumsum(reference) / reference.sum()
    # The cells' own sampling error: the smallest has some 800 scores.
    assert np.abs(found - expected).max() < 1.6 / np.sqrt(cells.least)


def test_places_are_those_that_the_reference_counts() -> None:
    """Against itself, averaged over what is drawn, each cell fills its places evenly."""
    rng = np.random.default_rng(2)
    total = np.zeros(64)
    for seed in range(400):
        draw = np.random.default_rng(seed)
        scores = draw.normal(size=60).astype(np.float32)
        cells = Cells(Calibration.from_scores("msp", "", scores, np.zeros(60, np.int32)))
        fresh = dataclasses.replace(
            batch(rng.normal(size=50), sequence=seed), predicted=np.zeros(50, np.int32)
        )
        total += np.bincount(cells.bins(fresh), minlength=64)
    places = cells.reference("m", "1").histogram("msp").counts.astype(float)
    places[np.searchsorted(BIN_EDGES, 1 / 61) - 1] += 1
    expected = 20_000 * places / 61
    assert np.all(total[expected == 0] == 0)
    full = expected > 0
    assert ((total - expected)[full] ** 2 / expected[full]).sum() < 3 * full.sum()


def test_bins_are_the_same_on_replay_and_nan_stays_out() -> None:
    cells = Cells(_calibration())
    one = _batch(np.random.default_rng(3), 20_000, [0.4, 0.3, 0.3])
    np.testing.assert_array_equal(cells.bins(one), cells.bins(one))
    assert (cells.bins(one) != cells.bins(dataclasses.replace(one, sequence=1))).any()
    hole = batch([np.nan, 0.0], predicted=np.array([0, 1], np.int32))
    assert (cells.bins(hole)[0], cells.bins(hole)[1] >= 0) == (-1, True)


def test_rare_and_unknown_classes_share_a_cell() -> None:
    rng = np.random.default_rng(4)
    classes = np.repeat(np.array([0, 1, 2, 3], np.int32), [500, 40, 30, 2])
    cells = Cells(Calibration.from_scores("msp", "", rng.normal(size=572), classes))
    assert cells.least == 72
    for label in (1, 3, 99, -1):
        same = batch(rng.normal(size=5000), predicted=np.full(5000, label, np.int32))
        assert np.mean(cells.bins(same)) == pytest.approx(45, abs=4)
    # No predicted classes at all: ranked with the rare ones.
    assert (cells.bins(batch([50.0])) < 32).all()
    few = np.repeat(np.array([0, 1], np.int32), [500, 3])
    whole = Cells(Calibration.from_scores("msp", "", rng.normal(size=503), few))
    assert whole.least == 500


def _alarms(context: str, shares: list[float], shift: float) -> bool:
    rng = np.random.default_rng(5)
    tests = {"b": Budget("1 per 1000 windows", tolerated_fraction=0.0)}
    pipeline = Pipeline(
        "m", "1", {"msp": _calibration()}, Windowing(1, 0, 0), tests, {}, context=context
    )
    facts = []
    for at in range(120):
        one = _batch(rng, 64, shares if at >= 40 else [0.5, 0.3, 0.2], at)
        moved = one.scores["msp"] + np.float32(shift) * (one.predicted == 1) * (at >= 40)
        facts += pipeline.step(dataclasses.replace(one, scores={"msp": moved.astype(np.float32)}))
    found = [f for f in facts if isinstance(f, DriftResult) and f.detector == ALL]
    return any(result.drifted for result in found)


def test_another_mix_is_a_change_only_without_context() -> None:
    assert _alarms("", [0.2, 0.3, 0.5], 0.0)
    assert not _alarms("predicted", [0.2, 0.3, 0.5], 0.0)
    assert _alarms("predicted", [0.5, 0.3, 0.2], 1.5)


def test_a_calibration_without_classes_is_refused() -> None:
    with pytest.raises(ContractError, match=r"context.*oodmon fit"):
        Cells(Calibration.from_scores("msp", "", np.arange(9.0)))
    with pytest.raises(ContractError, match="context"):
        Pipeline("m", "1", {}, Windowing(), {}, {}, context="weather")
