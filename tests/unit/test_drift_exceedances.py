"""The tests that follow the share of exceedances: `hddm` and `ddm`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from river.drift.binary import DDM

from oodmon.contracts import DriftTest
from oodmon.drift.ddm import Ddm
from oodmon.drift.hddm import Hddm
from oodmon.drift.series import exceeding
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES, DriftResult, Histogram, Window

TESTS = [Hddm(), Hddm(decay=0.05), Ddm(deviations=5.0)]


def window(exceedances: int, samples: int, at: int = 0) -> Window:
    counts = np.zeros(len(BIN_EDGES) - 1, np.int64)
    counts[0], counts[-1] = exceedances, samples - exceedances
    histogram = Histogram(counts, 0, np.empty(0, np.uint64), np.empty(0, np.float32))
    return Window("m", "1", "", at, at + 1, samples, detectors={"d": histogram})


def run(test: DriftTest[Any], exceedances: list[int], samples: int) -> list[DriftResult]:
    state = test.start(window(500, 10_000))
    results = []
    for at, count in enumerate(exceedances):
        state, result = test.step(state, window(count, samples, at), "d")
        results.append(result)
    return results


@pytest.mark.parametrize("test", TESTS, ids=repr)
def test_more_exceedances_alarm_fewer_do_not(test: DriftTest[Any]) -> None:
    rng = np.random.default_rng(0)
    quiet = rng.binomial(200, 0.05, 200).tolist()
    assert not any(result.drifted for result in run(test, quiet, 200))
    more = run(test, quiet + rng.binomial(200, 0.15, 100).tolist(), 200)
    first = [result.drifted for result in more].index(True)
    assert 200 <= first < 240
    assert 0.005 < more[first].effect < 0.15
    assert not any(r.drifted for r in run(test, quiet + rng.binomial(200, 0.0, 100).tolist(), 200))


@pytest.mark.parametrize("test", TESTS, ids=repr)
def test_after_an_alarm_it_starts_over(test: DriftTest[Any]) -> None:
    rng = np.random.default_rng(1)
    counts = rng.binomial(500, 0.05, 100).tolist() + rng.binomial(500, 0.3, 300).tolist()
    drifted = [result.drifted for result in run(test, counts, 500)]
    first = drifted.index(True)
    assert not any(drifted[first + 1 :]), "what followed is its new normal"


def test_ddm_decides_as_river_does() -> None:
    rng = np.random.default_rng(2)
    for seed in range(5):
        values = rng.random(6_000) < np.where(np.arange(6_000) < 3_000, 0.05, 0.12)
        river: Any = DDM(warm_start=500)
        theirs = -1
        for at, value in enumerate(values.tolist()):
            river.update(value)
            if river.drift_detected:
                theirs = at
                break
        ours = [r.drifted for r in run(Ddm(), [int(v) for v in values], 1)]
        found = ours.index(True) if any(ours) else -1
        assert abs(found - theirs) <= 1, (seed, found, theirs)


def test_a_bin_that_the_level_cuts_counts_in_part() -> None:
    counts = np.zeros(64, np.int64)
    counts[-1] = 100
    histogram = Histogram(counts, 0, np.empty(0, np.uint64), np.empty(0, np.float32))
    assert exceeding(histogram, 1.0) == pytest.approx(100.0)
    assert exceeding(histogram, 1.0 - np.diff(BIN_EDGES)[-1] / 2.0) == pytest.approx(50.0)
    assert exceeding(histogram, 0.05) == 0.0


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: Hddm(alpha=0.0), "alpha"),
        (lambda: Hddm(level=0.6), "level"),
        (lambda: Hddm(decay=1.0), "decay"),
        (lambda: Ddm(deviations=1.0), "deviations"),
        (lambda: Ddm(least_samples=3), "least_samples"),
        (lambda: Ddm(false_alarms="1 per blue moon"), "false_alarms"),
    ],
)
def test_bad_options_are_named(make: Any, option: str) -> None:
    with pytest.raises(ContractError, match=option):
        make()
