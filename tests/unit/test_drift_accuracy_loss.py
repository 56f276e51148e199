"""The test that asks whether a change matters: its promise, its silence, and what it tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import EXPECTED_ERROR, Calibration, expected_errors
from oodmon.drift.accuracy_loss import AccuracyLoss
from oodmon.errors import ContractError
from oodmon.records import ALL, DriftResult, Histogram, Window

SECOND = 1_000_000_000
F4 = npt.NDArray[np.float32]


def _scores(error: float, count: int, rng: np.random.Generator, coins: bool = False) -> F4:
    """Expected errors with this mean: probabilities, or noughts and ones."""
    if coins:
        return (rng.random(count) < error).astype(np.float32)
    return rng.beta(2.0 * error, 2.0 * (1.0 - error), count).astype(np.float32)


class Stream:
    """A reference of 4,000 samples with an error of 0.1, and one stream against it."""

    def __init__(self, test: AccuracyLoss, *, coins: bool = False, seed: int = 0) -> None:
        self.rng, self.coins, self.test = np.random.default_rng(seed), coins, test
        scores = _scores(0.1, 4_000, self.rng, coins)
        self.calibration = Calibration.from_scores("error", "d", scores, measures=EXPECTED_ERROR)
        self.reference = self.calibration.reference()
        self.state: Any = test.start(self.reference)
        self.index = 0

    def step(self, error: float, count: int = 100, scores: F4 | None = None) -> DriftResult:
        values = _scores(error, count, self.rng, self.coins) if scores is None else scores
        empty = Histogram.empty()
        histogram = Histogram(
            np.bincount(self.calibration.bins(values), minlength=64),
            0,
            empty.keys,
            empty.sample,
            judged=len(values),
            errors=expected_errors(values),
        )
        span = (self.index * SECOND, (self.index + 1) * SECOND)
        self.index += 1
        window = Window("m", "1", "", *span, len(values), detectors={"error": histogram})
        self.state, result = self.test.step(self.state, window, "error")
        return self.test.combine([result])[-1]


@pytest.mark.parametrize("coins", [False, True])
def test_a_loss_beyond_what_is_tolerated_is_found_with_its_size_and_beginning(coins: bool) -> None:
    stream = Stream(AccuracyLoss("1 per 100000 windows"), coins=coins)
    for _ in range(300):
        assert not stream.step(0.1).drifted
    for _ in range(60):
        last = stream.step(0.25)
        if last.drifted:
            break
    assert last.drifted
    assert last.detector == ALL
    assert 290 <= last.since / SECOND <= 303
    told = stream.test.moved(stream.state)
    assert told["accuracy_reference"] == pytest.approx(0.9, abs=0.015)
    assert told["accuracy_since"] == pytest.approx(0.75, abs=0.03)
    assert last.effect == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("error", [0.0, 0.05, 0.1, 0.11])
def test_improvements_and_tolerated_losses_do_not_alarm(error: float) -> None:
    test = AccuracyLoss("1 per 2000 windows", tolerated_loss=0.02)
    for seed in range(5):
        stream = Stream(test, coins=True, seed=seed)
        assert not any(stream.step(error).drifted for _ in range(400))


def test_the_promise_holds_at_the_edge_of_what_is_tolerated() -> None:
    # Nothing tolerated, and a reference that is exact: errors are as frequent as they may be.
    test = AccuracyLoss("1 per 100 windows", tolerated_loss=0.0)
    waits = []
    for seed in range(40):
        stream = Stream(test, coins=True, seed=100 + seed)
        worst = test._tolerated(stream.reference.histogram("error"))
        waits.append(next((i for i in range(400) if stream.step(worst, 20).drifted), 400) + 1)
    assert np.mean(waits) >= 100


@pytest.mark.parametrize(("errors", "exact"), [(0, 0.0147), (10, 0.0968)])
def test_the_reference_is_believed_as_far_as_its_size_allows(errors: int, exact: float) -> None:
    # 0 of 200: 1 - 0.05 ** (1 / 200). 10 of 200: 200 KL(0.05 || 0.0968) = ln 20.
    scores = np.repeat([1.0, 0.0], [errors, 200 - errors])
    known = Calibration.from_scores("e", "d", scores, measures=EXPECTED_ERROR).reference()
    test = AccuracyLoss(tolerated_loss=0.0)
    found = test._tolerated(known.histogram("e"))
    assert found == pytest.approx(exact, abs=2e-4)
    loose = AccuracyLoss(tolerated_loss=0.1)._tolerated(known.histogram("e"))
    assert loose == pytest.approx(found + 0.1)


def test_detectors_that_measure_nothing_are_left_alone_and_take_no_share_of_the_promise() -> None:
    test = AccuracyLoss("1 per 1000 windows")
    stream = Stream(test)
    plain = Calibration.from_scores("msp", "d", np.arange(1_000.0)).reference()
    state = test.start(plain)
    window = Window("m", "1", "", 0, SECOND, 500, detectors={"msp": plain.histogram("msp")})
    state, silent = test.step(state, window, "msp")
    assert silent.statistic == -9.0
    assert silent.reference_samples == 0
    assert test.moved(state) == {}
    assert not test.combine([silent])[-1].drifted
    stream.step(0.4)
    _, one = test.step(stream.state, replace(window, detectors={}), "error")
    alone = test.combine([one])[-1].statistic
    assert test.combine([silent] * 20, [one])[-1].statistic == pytest.approx(alone)
    assert "nothing to look at" in test.outlook(plain)
    assert "looks for less than" in test.outlook(stream.reference)


def test_what_is_alike_counts_for_less() -> None:
    test = AccuracyLoss("1 per 1000 windows")
    apart, alike = Stream(test, coins=True), Stream(test, coins=True)
    scores = _scores(0.25, 100, np.random.default_rng(5), coins=True)
    for stream, jumps in ((apart, 0), (alike, 1)):
        known = stream.state.neighbours
        # what a long stream has measured: neighbours as far apart as chance has them, or near
        stream.state = replace(stream.state, neighbours=known.met(20_000, 0) if jumps else known)
        stream.step(0.25, scores=scores)
    assert alike.state.block > 20.0
    assert alike.state.log_mean < apart.state.log_mean


def test_evidence_goes_down_again_and_an_episode_can_end() -> None:
    stream = Stream(AccuracyLoss("1 per 1000 windows"), coins=True)
    assert any(stream.step(0.6).drifted for _ in range(200))
    calm = [stream.step(0.05).drifted for _ in range(60)]
    assert not calm[-1]


def test_a_state_of_another_reference_kind_starts_anew() -> None:
    test = AccuracyLoss()
    stream = Stream(test)
    stream.step(0.5)
    plain = Calibration.from_scores("error", "d", np.arange(100.0)).reference()
    assert not len(test.thaw(plain, test.freeze(stream.state)).log_m)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tolerated_loss": 0.6}, "tolerated_loss: 0.6"),
        ({"calibration_risk": 0.0}, "calibration_risk: 0.0"),
        ({"false_alarms": "seldom"}, "false_alarms"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        AccuracyLoss(**options)
