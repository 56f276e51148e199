"""The tests that feed one value per window to river: `adwin`, `page_hinkley`, `kswin`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from oodmon.checks.drift.traffic import Replica, shifted, stream, window
from oodmon.contracts import DriftTest
from oodmon.drift import adwin, page_hinkley
from oodmon.drift.adwin import Adwin
from oodmon.drift.kswin import Kswin
from oodmon.drift.page_hinkley import PageHinkley
from oodmon.drift.series import HISTORY
from oodmon.errors import ContractError

TESTS: list[DriftTest[Any]] = [Adwin(1_000.0), PageHinkley(1_000.0), Kswin(1_000.0)]


@pytest.mark.parametrize("test", TESTS, ids=repr)
def test_live_equals_restarted_across_the_cut_of_the_memory(test: DriftTest[Any]) -> None:
    windows = stream(5, (2 * HISTORY + 40, shifted()), (20, shifted(1.0)))
    live, restarted = Replica(test), Replica(test)
    for index, seen in enumerate(windows):
        if index % 97 == 0 or abs(index - 2 * HISTORY) < 3:
            restarted.restart()
        assert live.step(seen) == restarted.step(seen)
    assert len(test.freeze(live.state)["values"]) < 2 * HISTORY


@pytest.mark.parametrize("test", TESTS, ids=repr)
def test_one_alarm_per_change_in_either_direction(test: DriftTest[Any]) -> None:
    for shift in (1.0, -1.0):
        windows = stream(6, (150, shifted()), (80, shifted(shift)))
        drifted = [result.drifted for result in Replica(test).run(windows)]
        assert not any(drifted[:150])
        assert sum(drifted[150:]) == 1
        assert drifted.index(True) < 190


@pytest.mark.parametrize("test", TESTS, ids=repr)
def test_what_cannot_be_scored_never_reaches_river(test: DriftTest[Any]) -> None:
    replica = Replica(test)
    replica.run(stream(7, (50, shifted())))
    before = test.freeze(replica.state)["values"]
    replica.step(window(np.zeros(64, np.int64), 51, invalid=200))
    after = test.freeze(replica.state)["values"]
    assert np.array_equal(before, after)
    assert np.isfinite(after).all()


def test_statistics_reach_their_thresholds_exactly_at_the_alarm() -> None:
    windows = stream(8, (150, shifted()), (40, shifted(0.5)))
    for test in TESTS:
        for result in Replica(test).run(windows):
            assert result.drifted == (result.statistic >= result.threshold)


def test_tables_are_monotone_and_their_ends_are_continued() -> None:
    lengths = np.geomspace(400.0, 1e9, 60)
    assert (np.diff([page_hinkley._threshold(length) for length in lengths]) > 0).all()
    assert (np.diff([adwin._delta(length) for length in lengths]) < 0).all()
    assert page_hinkley._threshold(2_879.0) == pytest.approx(12.0)
    assert adwin._delta(7_872.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Adwin, {"run_length_windows": 100.0}),
        (PageHinkley, {"run_length_windows": 10.0}),
        (Kswin, {"run_length_windows": float("nan")}),
        (Kswin, {"recent_windows": 60}),
        (Kswin, {"recent_windows": 5}),
    ],
)
def test_options_out_of_range_are_named(cls: Any, options: dict[str, float]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        cls(**options)


def test_neither_pandas_nor_torch_comes_with_river() -> None:
    code = (
        "import sys, oodmon.drift.adwin, oodmon.drift.kswin, oodmon.drift.page_hinkley;"
        "assert not {'pandas', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
