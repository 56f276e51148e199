"""The alarm budget: what it promises, how soon it is, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.errors import ContractError
from oodmon.records import ALL, BIN_EDGES, DriftResult, Histogram, Window
from oodmon.windows import Windowing, Windows
from tests.streams import EPOCH, SECOND, batch

SPAN = 10 * SECOND


def _calibration(n: int, seed: int = 0) -> Calibration:
    return Calibration.from_scores("d", "", np.random.default_rng(seed).normal(size=n))


def _window(counts: npt.NDArray[np.int64], at: int = 0) -> Window:
    histogram = Histogram(counts, 0, np.empty(0, np.uint64), np.empty(0, np.float32))
    start = EPOCH + at * SPAN
    return Window("m", "1", "", start, start + SPAN, int(counts.sum()), detectors={"d": histogram})


def _law(calibration: Calibration, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bin probabilities of a large sample of scores."""
    return np.bincount(calibration.bins(scores), minlength=len(BIN_EDGES) - 1) / len(scores)


def _first_alarm(
    budget: Budget,
    calibration: Calibration,
    law: npt.NDArray[np.float64],
    rng: np.random.Generator,
    rows: int = 16,
    limit: int = 1000,
) -> int:
    """Windows up to the alarm; `limit` + 1 if there was none."""
    state = budget.start(calibration.reference())
    for at in range(limit):
        window = _window(rng.multinomial(rows, law).astype(np.int64), at)
        state, result = budget.step(state, window, "d")
        if result.statistic >= result.threshold:
            return at + 1
    return limit + 1


@pytest.mark.parametrize("n", [50, 500, 10_000])
@pytest.mark.parametrize("tolerated", [0.0, 0.02, 0.2])
def test_no_bet_gains_on_average_under_any_law_in_the_ball(n: int, tolerated: float) -> None:
    """The heart of the promise, checked against the worst laws that there are for each bet."""
    calibration = _calibration(n)
    table = Budget("1 per 100 windows", tolerated).start(calibration.reference()).table
    eps = np.sqrt(np.log(2 / 0.05) / (2 * n))
    uniform = np.diff(BIN_EDGES)
    for log_bet in table.log_bets[: table.sequential]:
        bet = np.exp(log_bet)
        # Against a pool that has changed by δ, a law that has changed by δ is up to 2 δ away.
        assert bet @ uniform + 2 * tolerated * (bet.max() - bet.min()) <= 1 + 1e-9
    for log_bet in table.log_bets[table.sequential :]:
        bet = np.exp(log_bet)
        worst = bet @ table.q + tolerated * (bet.max() - bet.min())
        # The reference's distribution function may be off by eps everywhere: the law that moves
        # that much towards each rise of the bet.
        worst += eps * np.abs(np.diff(bet)).sum()
        assert worst <= 1 + 1e-9


def test_large_calibrations_afford_more_bets() -> None:
    sizes = [
        len(Budget(tolerated_fraction=0.0).start(_calibration(n).reference()).log_m)
        for n in (20, 200, 2_000, 20_000)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 40
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("n", [200, 2_000])
def test_run_length_is_at_least_as_promised(n: int) -> None:
    """Frozen ranks against small calibrations: the fault that this test is there to avoid."""
    promise, runs = 50, 40
    budget = Budget(f"1 per {promise} windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(1)
    lengths = []
    for seed in range(runs):
        calibration = _calibration(n, seed)
        law = _law(calibration, np.random.default_rng(99).normal(size=200_000))
        lengths.append(_first_alarm(budget, calibration, law, rng, limit=6 * promise))
    assert np.mean(lengths) >= promise


def test_a_tolerated_change_does_not_alarm_and_a_larger_one_does() -> None:
    calibration = _calibration(20_000)
    rng = np.random.default_rng(2)
    normal = rng.normal(size=400_000)
    for share, alarms in ((0.02, False), (0.25, True)):
        novel = np.where(rng.random(len(normal)) < share, normal + 5, normal)
        budget = Budget("1 per 1000 windows", tolerated_fraction=0.03)
        found = _first_alarm(budget, calibration, _law(calibration, novel), rng, 100, 300)
        assert (found <= 300) is alarms


@pytest.mark.parametrize(
    ("change", "samples"),
    [
        ((0.5, 1.0, 0.0), 200),
        ((1.0, 1.0, 0.0), 64),
        ((0.0, 1.5, 0.0), 220),
        ((0.0, 1.0, 0.2), 96),
    ],
)
def test_delay(change: tuple[float, float, float], samples: int) -> None:
    """Mean delay at a promise of 10,000 windows of 16, n = 10,000, averaged over 20 runs."""
    shift, spread, novel = change
    rng = np.random.default_rng(3)
    scores = shift + spread * rng.normal(size=400_000) + 4 * (rng.random(400_000) < novel)
    calibration = _calibration(10_000)
    law = _law(calibration, scores)
    budget = Budget("1 per 10000 windows", tolerated_fraction=0.0)
    delays = [16 * _first_alarm(budget, calibration, law, rng) for _ in range(20)]
    assert np.mean(delays) <= samples


def _result(statistic: float, detector: str, **fields: object) -> DriftResult:
    result = DriftResult(
        "m", "1", "b", detector, "", 0, SPAN, statistic, 3.0, False, 0.1, 10, 100, since=5
    )
    return replace(result, **fields)  # type: ignore[arg-type]


def test_streams_share_one_promise() -> None:
    budget = Budget("1 per 1000 windows")
    alone = budget.combine([_result(3.1, "a")])
    assert [r.drifted for r in alone] == [True, True]
    assert (alone[-1].detector, alone[-1].segment) == (ALL, ALL)

    # The mean of 1258 and nine times nothing is below 1000: no alarm, nothing named.
    many = [_result(3.1, "a"), *(_result(-9.0, f"x{i}") for i in range(9))]
    shared = budget.combine(many)
    assert not any(r.drifted for r in shared)
    assert shared[-1].statistic == pytest.approx(2.1, abs=1e-6)

    # 10^4.1 / 10 is above, and e-d-BH names the one stream that has it.
    strong = budget.combine([_result(4.1, "a"), *many[1:]])
    assert [r.detector for r in strong if r.drifted] == ["a", ALL]
    # A stream that is silent keeps its evidence and its share of the promise.
    silent = budget.combine(many[1:], [_result(4.1, "a", effect=0.7, since=9)])
    assert [r.detector for r in silent if r.drifted] == [ALL]
    assert (silent[-1].effect, silent[-1].since) == (0.7, 9)


def test_evidence_is_capped_so_that_an_episode_can_end() -> None:
    calibration = _calibration(5_000)
    budget = Budget("1 per 1000 windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(4)
    calm = _law(calibration, rng.normal(size=200_000))
    novel = _law(calibration, rng.normal(size=200_000) + 2)
    state = budget.start(calibration.reference())
    for at in range(200):
        state, result = budget.step(state, _window(rng.multinomial(100, novel), at), "d")
    assert result.statistic < result.threshold + 3.1
    windows = 0
    while result.statistic >= result.threshold:
        windows += 1
        state, result = budget.step(state, _window(rng.multinomial(100, calm), 200), "d")
    assert windows <= 3


def test_effect_and_onset_tell_how_much_and_since_when() -> None:
    calibration = _calibration(5_000)
    budget = Budget("1 per 1000 windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(5)
    normal = rng.normal(size=200_000)
    calm = _law(calibration, normal)
    novel = _law(calibration, np.where(rng.random(200_000) < 0.3, normal + 6, normal))
    state = budget.start(calibration.reference())
    for at in range(30):
        law = novel if at >= 20 else calm
        state, result = budget.step(state, _window(rng.multinomial(50, law), at), "d")
    assert result.effect == pytest.approx(0.3, abs=0.06)
    assert result.since == EPOCH + 20 * SPAN


def test_promise_reads_as_written() -> None:
    assert Budget("1 per 30 days").run_length(10.0) == 259_200
    assert Budget("1 per 2 Hours").run_length(60.0) == 120
    assert Budget("1 per 500 windows").run_length(10.0) == 500
    words = Budget("1 per 30 days").promise(10.0)
    assert "1 per 30 days" in words
    assert "259,200 windows" in words


@pytest.mark.parametrize(
    "options",
    [
        {"false_alarms": "often"},
        {"false_alarms": "2 per day"},
        {"false_alarms": "1 per 0 days"},
        {"false_alarms": "1 per 3 fortnights"},
        {"tolerated_fraction": -0.1},
        {"tolerated_fraction": float("nan")},
        {"calibration_risk": 1.0},
    ],
)
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        Budget(**options)  # type: ignore[arg-type]


def test_a_reference_too_small_to_bet_on_never_alarms() -> None:
    calibration = _calibration(3)
    budget = Budget("1 per 10 windows")
    state = budget.start(calibration.reference())
    counts = np.zeros(len(BIN_EDGES) - 1, np.int64)
    counts[0] = 10_000
    for at in range(5):
        state, result = budget.step(state, _window(counts, at), "d")
    assert not budget.combine([result])[-1].drifted
    again = budget.thaw(calibration.reference(), budget.freeze(state))
    assert again.log_m.shape == state.log_m.shape


def _correlated(rng: np.random.Generator, phi: float, count: int) -> npt.NDArray[np.float64]:
    """AR(1) with N(0, 1) marginals."""
    values = rng.normal(size=count)
    for at in range(1, count):
        values[at] = phi * values[at - 1] + np.sqrt(1 - phi**2) * values[at]
    return values


def _repeated(rng: np.random.Generator, phi: float, count: int) -> npt.NDArray[np.float64]:
    """Each value repeats the one before it with probability phi, N(0, 1) otherwise."""
    values = rng.normal(size=count)
    fresh = np.where(rng.random(count) < phi, 0, np.arange(count))
    repeated: npt.NDArray[np.float64] = values[np.maximum.accumulate(fresh)]
    return repeated


@pytest.mark.parametrize(
    ("law", "phi"), [(_correlated, 0.0), (_correlated, 0.6), (_repeated, 0.3), (_repeated, 0.8)]
)
def test_the_promise_holds_on_correlated_traffic(
    law: Callable[[np.random.Generator, float, int], npt.NDArray[np.float64]], phi: float
) -> None:
    """Counting each of these samples in full would alarm within some 140 of them at phi 0.6.

    And counting repeated ones as if only their mean were alike breaks the promise fivefold.
    """
    rows, promise, runs = 32, 60, 8
    calibration = _calibration(5_000)
    budget = Budget(f"1 per {promise} windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(6)
    total = alarms = 0
    for _ in range(runs):
        windows = Windows("m", "1", Windowing(1))
        state = budget.start(calibration.reference())
        scores = law(rng, phi, rows * 2 * promise).astype(np.float32)
        for at, chunk in enumerate(np.split(scores, 2 * promise)):
            windows.add(batch(chunk, at, at, detectors=("d",)), {"d": calibration.bins(chunk)})
            for closed in windows.close():
                state, result = budget.step(state, closed.window, "d")
                total += 1
            if at > 10 and result.statistic >= result.threshold:
                alarms += 1
                break
    assert total / max(alarms, 1) >= promise
    measured = budget.measurements(state)
    assert measured["autocorrelation_ratio"] == pytest.approx(phi, abs=0.08)
    assert measured["block_length_samples"] == pytest.approx((1 + phi) / (1 - phi), rel=0.3)


def test_a_shift_does_not_pass_for_correlation() -> None:
    calibration = _calibration(5_000)
    budget = Budget("1 per 100 windows")
    rng = np.random.default_rng(7)
    windows = Windows("m", "1", Windowing(1))
    state = budget.start(calibration.reference())
    for at in range(40):
        scores = (rng.normal(size=64) + (2.0 if at >= 20 else 0.0)).astype(np.float32)
        windows.add(batch(scores, at, at, detectors=("d",)), {"d": calibration.bins(scores)})
        for closed in windows.close():
            state, _ = budget.step(state, closed.window, "d")
    assert budget.measurements(state)["autocorrelation_ratio"] < 0.1


def test_one_changed_stream_among_many_raises_the_alarm_and_is_named() -> None:
    """Its wealth has to outweigh that of hundreds which have none."""
    calibration = _calibration(5_000)
    budget = Budget("1 per 1000 windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(8)
    novel = _law(calibration, rng.normal(size=200_000) + 2)
    state = budget.start(calibration.reference())
    for at in range(20):
        state, result = budget.step(state, _window(rng.multinomial(50, novel), at), "d")
    others = [_result(-9.0, f"x{index}") for index in range(500)]
    found = budget.combine([replace(result, test="b"), *others])
    assert [r.detector for r in found if r.drifted] == ["d", ALL]


@pytest.mark.parametrize(
    ("change", "samples"), [((0.5, 1.0), 90), ((0.0, 1.25), 220), ((-0.5, 1.0), 120)]
)
def test_delay_at_a_promise_of_ten_thousand_samples(
    change: tuple[float, float], samples: int
) -> None:
    """Windows of 10, 1,000 calibration scores, 1,000 good samples before: mean of 24 runs."""
    shift, spread = change
    budget = Budget("1 per 1000 windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(9)
    delays = []
    for seed in range(24):
        calibration = _calibration(1_000, seed)
        state = budget.start(calibration.reference())
        normal = rng.normal(size=100_000)
        state = replace(state, seen=rng.multinomial(1_000, _law(calibration, normal)))
        law, at = _law(calibration, shift + spread * normal), 0
        drifted = False
        while not drifted:
            state, result = budget.step(state, _window(rng.multinomial(10, law), at), "d")
            drifted, at = result.statistic >= result.threshold, at + 1
        delays.append(10 * at)
    assert np.mean(delays) <= samples


def test_rearming_forgets_the_evidence_and_keeps_what_was_learnt() -> None:
    calibration = _calibration(2_000)
    budget = Budget("1 per 1000 windows", tolerated_fraction=0.0)
    rng = np.random.default_rng(10)
    law = _law(calibration, rng.normal(size=200_000))
    state = budget.start(calibration.reference())
    for at in range(20):
        state, _ = budget.step(state, _window(rng.multinomial(50, law), at), "d")
    again = budget.rearm(state, calibration.reference())
    assert again.log_mean == -np.inf
    assert again.onset == 0
    np.testing.assert_array_equal(again.seen, state.seen)
    assert again.neighbours == state.neighbours
    assert again.recent.sum() == 0
