"""The budget over many streams: what one may learn from, and how far its evidence may go."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.pipeline.streams import Streams
from oodmon.records import ALL, DriftResult, Histogram, Window
from tests.streams import EPOCH, SECOND

ROWS = 8
NONE = np.empty(0, np.uint64), np.empty(0, np.float32)
PROMISE = 100


def _calibration(n: int, seed: int = 0) -> Calibration:
    return Calibration.from_scores("d", "", np.random.default_rng(seed).normal(size=n))


def _window(
    known: Calibration, scores: npt.NDArray[np.float64], at: int, segment: str = "0"
) -> Window:
    counts = np.bincount(known.bins(scores), minlength=64).astype(np.int64)
    start = EPOCH + at * SECOND
    histogram = Histogram(counts, 0, *NONE)
    return Window("m", "1", segment, start, start + SECOND, len(scores), detectors={"d": histogram})


def _streams(known: Calibration, budget: Budget) -> Streams:
    return Streams({"b": budget}, {"d": known.reference()})


def _seen(streams: Streams) -> dict[str, int]:
    """Segment → good samples that its pool holds."""
    arrays, state = streams.freeze()
    found = {}
    for index, members in enumerate(state["streams"]):
        for row, (_, _, segment) in enumerate(members):
            found[segment] = int(arrays[f"drift/{index}/seen"][row].sum())
    return found


def _overall(results: list[DriftResult]) -> DriftResult:
    return next(result for result in results if result.detector == ALL)


def test_a_stream_learns_until_all_of_them_alarm_together() -> None:
    """Ranks among a pool that stands still are not sequential ones: the promise would not hold."""
    known = _calibration(500)
    streams = _streams(known, Budget(f"1 per {PROMISE} windows", tolerated_fraction=0.0))
    alone, together = 0, False
    rng = np.random.default_rng(1)
    for at in range(60):
        moved = 0.8 if at >= 20 else 0.0
        windows = [
            _window(known, rng.normal(size=ROWS) + (moved if name == 0 else 0.0), at, str(name))
            for name in range(40)
        ]
        before = _seen(streams).get("0", 0)
        results = streams.judge(windows, windows)
        one = next(result for result in results if result.segment == "0")
        learnt = _seen(streams)["0"] - before
        shared = one.statistic < one.threshold + math.log10(40)
        if together:
            assert learnt == (0 if one.statistic >= one.threshold else ROWS)
        else:
            assert learnt == (ROWS if shared else 0)
            alone += one.statistic >= one.threshold
        together = _overall(results).drifted
    assert together
    assert alone > 1  # windows in which the stream alone had an alarm's evidence, and learnt


def test_that_an_alarm_goes_on_survives_a_restart() -> None:
    known = _calibration(500)
    budget = Budget(f"1 per {PROMISE} windows", tolerated_fraction=0.0)
    streams = _streams(known, budget)
    rng = np.random.default_rng(2)
    for at in range(20):
        windows = [_window(known, rng.normal(size=ROWS) + 2.0, at, str(n)) for n in range(5)]
        results = streams.judge(windows, windows)
    assert _overall(results).drifted
    again, other = _streams(known, budget), Streams({"b": replace(budget, ranks="frozen")}, {})
    again.thaw(*streams.freeze(), {"d"})
    other.thaw(*streams.freeze(), {"d"})
    windows = [_window(known, rng.normal(size=ROWS) + 2.0, 20, str(n)) for n in range(5)]
    streams.judge(windows, windows)
    again.judge(windows, windows)
    assert _seen(again) == _seen(streams)
    assert again.freeze()[1]["alarming"] == ["b"]
    # A test with other options begins anew.
    assert other.freeze()[1]["alarming"] == []


@pytest.mark.parametrize("sharing", [10, 3000])
def test_one_stream_of_thousands_can_raise_the_alarm(sharing: int) -> None:
    known = _calibration(5_000)
    budget = Budget(f"1 per {PROMISE} windows", tolerated_fraction=0.0)
    state = budget.start(known.reference())
    rng = np.random.default_rng(3)
    for at in range(40):
        window = _window(known, rng.normal(size=50) + 2.0, at)
        ((state, result),) = budget.step_all([state], [window], ["d"], sharing=sharing)
    others = [replace(result, segment=str(n), statistic=-9.0) for n in range(sharing - 1)]
    assert [r.detector for r in budget.combine([result], others) if r.drifted] == ["d", ALL]
    # No more than that takes: the episode has to end.
    assert result.statistic <= result.threshold + math.log10(max(1024, 2 * sharing)) + 1e-5


@pytest.mark.slow
def test_the_promise_of_many_streams_holds_with_a_small_reference() -> None:
    """One reference of 20 for 120 streams, so that its chance is the chance of all of them."""
    promise, streams = 30, 120
    total = alarms = 0
    for seed in range(12):
        known = _calibration(20, seed)
        budget = Budget(f"1 per {promise} windows", tolerated_fraction=0.0)
        judged = _streams(known, budget)
        rng = np.random.default_rng([4, seed])
        for at in range(3 * promise):
            windows = [
                _window(known, rng.normal(size=ROWS), at, str(name)) for name in range(streams)
            ]
            total += 1
            if _overall(judged.judge(windows, windows)).drifted:
                alarms += 1
                break
    assert total / max(alarms, 1) >= promise
