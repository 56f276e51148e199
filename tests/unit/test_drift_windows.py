"""The tests that judge a window by itself, and the law of each statistic under no change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency, ks_2samp

from oodmon.calibration import NORMAL_SCORES
from oodmon.contracts import DriftTest
from oodmon.drift import cvm, mmd, wasserstein
from oodmon.drift.chi_squared import ChiSquared
from oodmon.drift.cvm import CramerVonMises
from oodmon.drift.js import JensenShannon
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.drift.mmd import MaximumMeanDiscrepancy
from oodmon.drift.psi import FLOOR_COUNTS, PopulationStability
from oodmon.drift.wasserstein import Wasserstein
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES, DriftResult, Histogram, Window

CALIBRATIONS = 300


def window(counts: np.ndarray) -> Window:
    histogram = Histogram(
        np.asarray(counts, np.int64), 0, np.empty(0, np.uint64), np.empty(0, np.float32)
    )
    return Window("m", "1", "", 0, 60, samples=int(counts.sum()), detectors={"d": histogram})


def judge(test: DriftTest[Any], seen: np.ndarray, known: np.ndarray) -> DriftResult:
    return test.step(test.start(window(known)), window(seen), "d")[1]


def calibrated(rng: np.random.Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Bin counts of a window and of the calibration set that its samples were ranked against."""
    calibration = np.sort(rng.standard_normal(m))
    places = [calibration, rng.standard_normal(n)]
    known, seen = ((1 + m - np.searchsorted(calibration, x)) / (m + 1) for x in places)
    return np.histogram(seen, BIN_EDGES)[0], np.histogram(known, BIN_EDGES)[0]


RATED = [
    KolmogorovSmirnov(0.05),
    PopulationStability(0.05),
    CramerVonMises(0.05),
    JensenShannon(0.05),
    Wasserstein(0.05),
    MaximumMeanDiscrepancy(0.05),
]


@pytest.mark.parametrize("test", RATED, ids=repr)
@pytest.mark.parametrize(("n", "m"), [(10, 100), (50, 1_000), (100, 1_000), (500, 500)])
def test_false_alarms_over_calibration_sets_and_windows(
    test: DriftTest[Any], n: int, m: int
) -> None:
    rng = np.random.default_rng(n * m)
    runs = 2_000
    alarms = sum(judge(test, *calibrated(rng, n, m)).drifted for _ in range(runs))
    assert alarms <= 0.05 * runs + 4.0 * math.sqrt(0.05 * 0.95 * runs)


@pytest.mark.parametrize("bins", [5, 10])
@pytest.mark.parametrize("n", [20, 50, 100, 200, 1_000])
def test_psi_keeps_a_small_rate_on_small_windows(bins: int, n: int) -> None:
    test, rng = PopulationStability(0.001, bins=bins), np.random.default_rng(n)
    known = np.floor(np.diff(BIN_EDGES) * 20_000).astype(np.int64)
    seen = rng.multinomial(n, known / known.sum(), size=20_000)
    starts = np.unique(
        np.abs(BIN_EDGES[:-1, None] - np.linspace(0, 1, bins + 1)[:-1]).argmin(axis=0)
    )
    a = np.add.reduceat(seen, starts, axis=1) + FLOOR_COUNTS
    b = np.add.reduceat(known, starts) + FLOOR_COUNTS
    a, b = a / a.sum(axis=1, keepdims=True), b / b.sum()
    index = ((a - b) * np.log(a / b)).sum(axis=1)
    one = judge(test, seen[0], known)
    assert one.statistic == pytest.approx(index[0])
    alarms = int((index >= one.threshold).sum())
    assert alarms <= 20 + 4.0 * math.sqrt(20)


def test_ks_is_the_textbook_distance_and_never_a_smaller_p_value() -> None:
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.1, 0.3):
        seen, known = (
            np.histogram(x, BIN_EDGES)[0]
            for x in (rng.beta(1.0, 1.0 + shift, 400), rng.uniform(size=2_000))
        )
        result = judge(KolmogorovSmirnov(), seen, known)
        values = np.arange(64)
        wanted = ks_2samp(np.repeat(values, seen), np.repeat(values, known), method="asymp")
        assert result.statistic == pytest.approx(wanted.statistic)
        assert result.p_value is not None
        assert result.p_value >= wanted.pvalue - 1e-3
        assert result.drifted == (result.p_value <= 0.001)


def test_psi_threshold_is_the_law_for_large_windows() -> None:
    known = np.floor(np.diff(BIN_EDGES) * 1e6).astype(np.int64)
    result = judge(PopulationStability(0.01), known, known)
    n = int(known.sum())
    assert result.statistic == 0.0
    assert result.threshold == pytest.approx(2.0 / n * chi2.isf(0.01, 9), rel=1e-3)
    assert result.p_value == 1.0


def test_a_fixed_psi_threshold_promises_nothing() -> None:
    test = PopulationStability(threshold=0.25)
    assert test.run_length(60.0) == 0.0
    assert "none" in test.promise(60.0)
    known = np.full(64, 100)
    seen = np.zeros(64)
    seen[:30] = 10
    result = judge(test, seen, known)
    assert result.threshold == 0.25
    assert result.drifted


@pytest.mark.parametrize("test", [KolmogorovSmirnov(), PopulationStability()], ids=repr)
def test_without_a_reference_there_is_no_decision(test: DriftTest[Any]) -> None:
    result = judge(test, np.full(64, 5), np.zeros(64))
    assert not result.drifted
    assert math.isfinite(result.statistic)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (KolmogorovSmirnov, {"alpha": 0.0}),
        (KolmogorovSmirnov, {"alpha": math.nan}),
        (PopulationStability, {"alpha": 1.0}),
        (PopulationStability, {"bins": 1}),
        (PopulationStability, {"threshold": -0.1}),
        (MaximumMeanDiscrepancy, {"frequencies": 0}),
        (MaximumMeanDiscrepancy, {"seed": -1}),
    ],
)
def test_options_out_of_range_are_named(cls: Any, options: dict[str, float]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        cls(**options)


def test_promises_speak_of_the_window_that_they_are_given() -> None:
    assert "16.7 hours" in KolmogorovSmirnov(0.001).promise(60.0)
    assert "2.8 hours" in PopulationStability(0.001).promise(10.0)


def test_cvm_knows_the_quantiles_of_its_limit_law() -> None:
    # Anderson and Darling 1952, table 1.
    for statistic, p in ((0.34730, 0.1), (0.46136, 0.05), (0.74346, 0.01), (1.16786, 0.001)):
        assert cvm.p_value(statistic) == pytest.approx(p, rel=1e-4)
        assert cvm.critical(p) == pytest.approx(statistic, rel=1e-4)
    assert cvm.p_value(3.0) < 1e-6 < cvm.p_value(2.0)


def test_wasserstein_knows_the_law_of_the_area_under_a_bridge() -> None:
    # Shepp, Ann. Probab. 1982: the mean is sqrt(pi / 32), the mean square 7 / 60.
    x = np.linspace(0.0, 3.0, 3_001)
    tail = np.exp([-wasserstein._logarithm(value) for value in x])
    assert np.trapezoid(tail, x) == pytest.approx(math.sqrt(math.pi / 32), rel=0.03)
    assert np.trapezoid(2.0 * x * tail, x) == pytest.approx(7.0 / 60.0, rel=0.05)
    for alpha in (0.3, 0.01, 1e-6):
        assert math.exp(-wasserstein._logarithm(wasserstein._critical(alpha))) == pytest.approx(
            alpha, rel=1e-6
        )


def test_wasserstein_is_the_mean_move_of_the_tail_probabilities() -> None:
    known = np.full(64, 1_000)
    seen = np.zeros(64)
    seen[0] = 10
    # All samples move to the first of 64 equal bins: on average by half of the range.
    assert judge(Wasserstein(), seen, known).effect == pytest.approx(0.5, abs=0.01)
    assert judge(Wasserstein(), known // 100, known).effect == pytest.approx(0.0, abs=1e-12)


def test_js_is_one_between_laws_that_share_nothing() -> None:
    low, high = np.zeros(64), np.zeros(64)
    low[0], high[63] = 1e6, 1e6
    assert judge(JensenShannon(), low, high).effect == pytest.approx(1.0, abs=1e-3)
    assert judge(JensenShannon(), low, low).effect == 0.0


@pytest.mark.parametrize("degrees", [1, 3, 20])
def test_mmd_knows_the_law_of_weighted_squares(degrees: int) -> None:
    for alpha in (0.9, 0.5, 0.1, 0.01, 1e-6, 1e-12):
        value = float(chi2.isf(alpha, degrees))
        found = mmd.p_value(np.full(degrees, 3.0), 3.0 * value)
        assert found == pytest.approx(alpha, rel=0.12), alpha
    weights = np.array([1.0, 0.5, 0.2, 0.01])
    drawn = np.random.default_rng(0).standard_normal((200_000, 4)) ** 2 @ weights
    for alpha in (0.5, 0.1, 0.01):
        value = float(np.quantile(drawn, 1.0 - alpha))
        assert mmd.p_value(weights, value) == pytest.approx(alpha, rel=0.05)
    # Beside the mean, where the formula is 0 / 0, it goes on without a step.
    around = [mmd.p_value(weights, float(weights.sum()) * (1.0 + d)) for d in (-1e-3, 0.0, 1e-3)]
    assert around == sorted(around, reverse=True)
    assert around[0] - around[2] < 1e-3


def test_mmd_is_the_distance_in_the_gaussian_kernel() -> None:
    rng = np.random.default_rng(5)
    known = np.floor(np.diff(BIN_EDGES) * 1e5)
    seen = np.histogram(rng.beta(1.0, 1.5, 400), BIN_EDGES)[0]
    shares = known / known.sum()
    apart = np.abs(NORMAL_SCORES[:, None] - NORMAL_SCORES)
    order = np.argsort(apart, axis=None)
    below = np.cumsum(np.outer(shares, shares).ravel()[order])
    width = apart.ravel()[order][np.searchsorted(below, 0.5)]
    gap = seen / seen.sum() - shares
    wanted = math.sqrt(gap @ np.exp(-0.5 * (apart / width) ** 2) @ gap)
    result = judge(MaximumMeanDiscrepancy(frequencies=1024), seen, known)
    assert result.statistic == pytest.approx(wanted, rel=0.1)
    assert result.drifted
    assert judge(MaximumMeanDiscrepancy(), known // 10, known).effect < 0.01


def classes(*counts: int) -> Window:
    total = sum(counts)
    scored = np.zeros(64, np.int64)
    scored[63] = total
    histogram = Histogram(scored, 0, np.empty(0, np.uint64), np.empty(0, np.float32))
    return Window(
        "m", "1", "", 0, 60, total, detectors={"d": histogram}, predicted=dict(enumerate(counts))
    )


def test_chi_squared_is_pearsons() -> None:
    seen, known = (30, 50, 20), (400, 400, 200)
    result = ChiSquared().step(classes(*known), classes(*seen), "d")[1]
    wanted = chi2_contingency([seen, known], correction=False)
    assert result.statistic == pytest.approx(wanted.statistic)
    assert result.p_value == pytest.approx(wanted.pvalue)


def test_chi_squared_counts_rare_classes_together_and_needs_a_reference() -> None:
    rare = ChiSquared().step(classes(500, 500, 1, 1, 1), classes(50, 50, 1, 0, 0), "d")[1]
    assert not rare.drifted
    assert ChiSquared().step(classes(500, 500, 1), classes(50, 20, 30), "d")[1].drifted
    blind = classes(500, 500)
    bare = Window("m", "1", "", 0, 0, 1_000, detectors=blind.detectors)
    result = ChiSquared().step(bare, classes(50, 0), "d")[1]
    assert (result.drifted, result.statistic, result.p_value) == (False, 0.0, 1.0)
    assert "nothing" in ChiSquared().outlook(bare)


def test_a_promise_needs_a_threshold_that_was_found() -> None:
    with pytest.raises(ContractError, match="`oodmon fit` finds"):
        KolmogorovSmirnov(false_alarms="1 per 30 days").start(classes(10))
    with pytest.raises(ContractError, match="expected `1 per"):
        KolmogorovSmirnov(false_alarms="sometimes")
