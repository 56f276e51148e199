"""Checks of single results: every window, however odd, gives a well-formed one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from oodmon.checks.drift.traffic import (
    DETECTOR,
    REFERENCE_SAMPLES,
    SAMPLES,
    Replica,
    mixed,
    shifted,
    stream,
    window,
)
from oodmon.contracts import DriftTest
from oodmon.records import ALL, BIN_EDGES, DriftResult, Window

Test = DriftTest[Any]


def check_empty_windows_never_drift(test: Test) -> None:
    """No samples, or none that could be scored, is no evidence: defined, finite, not drifted."""
    nothing = np.zeros(len(BIN_EDGES) - 1, np.int64)
    replica = Replica(test)
    replica.run(stream(4, (80, shifted()), (3, shifted(1.5))))
    for index, empty in enumerate(
        (
            window(nothing, 200),
            window(nothing, 201, invalid=50),
            window(nothing, 202, detector="another"),
        )
    ):
        result = replica.step(empty)
        assert not result.drifted, f"empty window {index} is drifted: {result}"
        assert result.samples == 0, f"empty window {index} counts {result.samples} samples"
        _assert_well_formed(result, empty)
    fresh = Replica(test)
    assert not fresh.step(window(nothing)).drifted, "an empty first window is drifted"


def check_constant_windows_are_defined(test: Test) -> None:
    """All samples in one bin, again and again, in each of the extreme bins: finite results."""
    for place in (0, 1, len(BIN_EDGES) // 2, len(BIN_EDGES) - 2):
        counts = np.zeros(len(BIN_EDGES) - 1, np.int64)
        counts[place] = SAMPLES
        replica = Replica(test)
        for index in range(130):
            seen = window(counts, index)
            _assert_well_formed(replica.step(seen), seen)


def check_results_are_well_formed(test: Test) -> None:
    """Names, bounds and sizes are the window's, p in [0, 1], drifted is statistic >= threshold."""
    tiny = [window(row, 240 + i) for i, row in enumerate(np.eye(64, dtype=np.int64)[::9])]
    replica = Replica(test)
    for seen in (*mixed(5), *tiny):
        result = replica.step(seen)
        _assert_well_formed(result, seen)
        assert result.reference_samples == REFERENCE_SAMPLES, (
            f"reference_samples is {result.reference_samples}, "
            f"the reference holds {REFERENCE_SAMPLES}"
        )
        for one in test.combine([result]):
            assert one.drifted == (one.statistic >= one.threshold) or one.detector != ALL, (
                f"statistic, threshold and drifted contradict each other: {one}"
            )
            if one.drifted:
                assert one.statistic >= one.threshold, f"drifted below its threshold: {one}"


def _assert_well_formed(result: DriftResult, seen: Window) -> None:
    wanted: Mapping[str, Any] = {
        "model": seen.model,
        "version": seen.version,
        "test": "",
        "detector": DETECTOR,
        "segment": seen.segment,
        "start": seen.start,
        "end": seen.end,
        "samples": seen.histogram(DETECTOR).scored,
    }
    for field, value in wanted.items():
        found = getattr(result, field)
        assert found == value, f"{field} is {found!r}, the window's is {value!r}"
    for field in ("statistic", "threshold", "effect"):
        number = getattr(result, field)
        assert isinstance(number, float), f"{field} is a {type(number).__name__}, not a float"
        assert math.isfinite(number), f"{field} is {number}"
    assert isinstance(result.drifted, bool), f"drifted is a {type(result.drifted).__name__}"
    if result.p_value is not None:
        assert 0.0 <= result.p_value <= 1.0, f"p_value is {result.p_value}"
