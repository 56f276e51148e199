"""Checks of what a drift test promises: few false alarms, and alarms where something changed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Final

import numpy as np
from scipy.special import pdtr

from oodmon.checks.drift.traffic import SAMPLES, SPAN, Replica, alone, shifted, stream
from oodmon.contracts import DriftTest
from oodmon.records import ALL

Test = DriftTest[Any]

QUIET_WINDOWS: Final = 8_000
"""Windows without drift that a false-alarm rate is measured on, over all seeds together."""

SEEDS: Final = 8

PATIENCE: Final = 200
"""Windows within which a change has to be found."""

LUCK: Final = 1e-4
"""Chance that a test which holds its promise exactly is rejected here."""


def check_says_how_often_it_is_wrong(test: Test) -> None:
    """The run length is a number of windows, and the promise says it in words."""
    length = test.run_length(SPAN / 1e9)
    assert length >= 0.0, f"run_length is {length}; it counts windows"
    assert math.isfinite(length), f"run_length is {length}: no test is never wrong"
    words = test.promise(SPAN / 1e9)
    assert words.strip(), "promise() says nothing; an alert has to tell how often it may be wrong"


def check_false_alarms_stay_within_the_promise(test: Test) -> None:
    """Over many seeds without drift, no more alarms than the run length allows."""
    length = test.run_length(SPAN / 1e9)
    if length <= 0.0:
        return
    windows = QUIET_WINDOWS // SEEDS
    alarms = sum(
        sum(alone(test, stream(1_000 + seed, (windows, shifted())))) for seed in range(SEEDS)
    )
    _assert_few(alarms, QUIET_WINDOWS / length, f"{QUIET_WINDOWS} windows without drift")


def check_streams_together_stay_within_the_promise(test: Test) -> None:
    """Four streams at once: a promise for all of them together holds for all of them together."""
    length = test.run_length(SPAN / 1e9)
    if length <= 0.0:
        return
    streams, windows = 4, QUIET_WINDOWS // 4
    replicas = [Replica(test) for _ in range(streams)]
    traffic = [stream(2_000 + seed, (windows, shifted())) for seed in range(streams)]
    alarms, shared = 0, False
    for seen in zip(*traffic, strict=True):
        results = [
            dataclasses.replace(replica.step(one), segment=f"s{place}")
            for place, (replica, one) in enumerate(zip(replicas, seen, strict=True))
        ]
        combined = test.combine(results)
        overall = [result for result in combined if result.detector == result.segment == ALL]
        shared = shared or bool(overall)
        alarms += sum(result.drifted for result in overall or combined)
    allowed = windows / length * (1 if shared else streams)
    kind = "shared by" if shared else "made to each of"
    _assert_few(alarms, allowed, f"{windows} windows of {streams} streams, a promise {kind} them,")


def _assert_few(alarms: int, allowed: float, where: str) -> None:
    most = next(k for k in itertools.count() if 1.0 - pdtr(k, allowed) < LUCK)
    assert alarms <= most, (
        f"{alarms} alarms in {where} where {allowed:.1f} are promised at most; "
        f"chance explains up to {most}"
    )


def check_fires_on_a_shift_and_sooner_on_a_larger_one(test: Test) -> None:
    """A change of the scores is found, and a larger one at least as soon."""
    delays = {}
    for shift in (0.4, 1.5):
        found = []
        for seed in range(SEEDS):
            traffic = stream(3_000 + seed, (150, shifted()), (PATIENCE, shifted(shift)))
            decisions = list(alone(test, traffic))[150:]
            found.append(decisions.index(True) + 1 if any(decisions) else math.inf)
        delays[shift] = float(np.median(found))
        assert math.isfinite(delays[shift]), (
            f"a shift by {shift} standard deviations was missed for {PATIENCE} windows of "
            f"{SAMPLES} samples in most of {SEEDS} runs"
        )
    assert delays[1.5] <= delays[0.4], (
        f"a shift by 1.5 standard deviations took {delays[1.5]:g} windows, "
        f"one by 0.4 only {delays[0.4]:g}"
    )
