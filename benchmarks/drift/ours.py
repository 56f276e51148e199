"""oodmon's drift tests as contenders: calibration → base windows → DriftTest.step and combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.drift.contender import F8, Contender, SideBySide
from benchmarks.drift.side import Side
from oodmon.calibration import Calibration
from oodmon.contracts import DriftTest
from oodmon.drift.budget import Budget
from oodmon.drift.resampling import Held
from oodmon.drift.thresholds import tune, tuned
from oodmon.drift.tuned import Tunable
from oodmon.records import ALL, ScoreBatch, Window
from oodmon.registry import drift
from oodmon.windows import Windowing, Windows

__all__ = ["OURS", "Ours"]

SECOND = 1_000_000_000
WINDOW = 16
"""Samples in a base window: one second of event time here."""
PROMISE = 10_000
"""Values between false alarms that our tests are asked for."""


class Ours(Contender):
    """One drift test on one stream, windows of `window` samples.

    Args:
        test: the test.
        window: samples per base window.
        promise: values between false alarms that it is asked for.
    """

    def __init__(self, test: DriftTest[Any], window: int, promise: float) -> None:
        self.test = test
        self.window = window
        self.promise = promise

    def begin(self, reference: F8) -> None:
        self._calibration = Calibration.from_scores("d", "digest", reference)
        self._reference = self._calibration.reference("m", "1")
        self._state = self.test.start(self._reference)
        self._windows = Windows("m", "1", Windowing(1.0, allowed_lateness_seconds=0.0))
        self._sequence = 0

    def first_alarm(self, values: F8) -> int:
        step, combine, state = self.test.step, self.test.combine, self._state
        done = 0
        for window in self._closed(values):
            done += self.window
            state, result = step(state, window, "d")
            judged = combine([result])
            alarmed = any(r.drifted for r in judged if r.detector == ALL or len(judged) == 1)
            if alarmed:
                self._state = state
                return done
        self._state = state
        return 0

    def _closed(self, values: F8) -> Iterator[Window]:
        scores = values.astype(np.float32)
        bins = self._calibration.bins(scores)
        for begin in range(0, len(values) - self.window + 1, self.window):
            rows = slice(begin, begin + self.window)
            self._windows.add(
                ScoreBatch(
                    "m",
                    "1",
                    "s",
                    self._sequence,
                    (1 + self._sequence) * SECOND,
                    {"d": scores[rows]},
                    {"d": "digest"},
                ),
                {"d": bins[rows]},
            )
            self._sequence += 1
            for closed in self._windows.close():
                yield closed.pane
        # Time passes after the last value, too.
        for closed in self._windows.advance((2 + self._sequence) * SECOND):
            yield closed.pane

    def state_bytes(self) -> int:
        return sum(array.nbytes for array in self.test.freeze(self._state).values())


class Budgeted(SideBySide):
    """The budget with windows of one sample: as the public tests, it may alarm after each.

    Args:
        promise: values between false alarms that it is asked for.
        tolerated: its `tolerated_fraction`.
    """

    def __init__(self, promise: float, tolerated: float = 0.0) -> None:
        self.promise = promise
        self.test = _budget(promise, 1, tolerated)

    def begin(self, reference: F8) -> None:
        self._reference = reference

    def first_alarm(self, values: F8) -> int:
        return self.first_alarms([self._reference], [values], 0)[0][0]

    def first_alarms(
        self, references: Sequence[F8], values: Sequence[F8], quiet: int
    ) -> list[tuple[int, int]]:
        side = Side(self.test, 1, references, values)
        found = side.first_alarms(quiet)
        self._state = side.states[0]
        return found

    def state_bytes(self) -> int:
        return sum(array.nbytes for array in self.test.freeze(self._state).values())


def _budget(promise: float, window: int, tolerated: float = 0.0) -> Budget:
    return Budget(f"1 per {promise / window:.12g} windows", tolerated_fraction=tolerated)


def _tuned(name: str, window: int, **options: Any) -> Ours:
    """At the threshold that `oodmon fit` finds for the promise.

    It is found once, on independent scores: their ranks have the same law whatever the scores.
    """
    scores = np.random.default_rng(7).standard_normal(10_000).astype(np.float32)
    held = Held(Calibration.from_scores("d", "digest", scores), scores, np.empty(0, np.int64))
    asked = f"1 per {PROMISE / window:g} windows"
    test = drift.create(name, false_alarms=asked, **options)
    if not isinstance(test, Tunable):
        raise TypeError(f"{name} has no threshold to be found")
    found = tune(test, {"d": held}, window, 1.0)
    return Ours(tuned(test, found, {"d": held.calibration}, 1.0), window, PROMISE)


OURS: dict[str, Callable[[], Contender]] = {
    "oodmon budget 10,000": lambda: Budgeted(PROMISE),
    "oodmon budget 1,000": lambda: Budgeted(1_000),
    "oodmon budget 100": lambda: Budgeted(100),
    "oodmon budget 100,000": lambda: Budgeted(100_000),
    "oodmon budget 1,000,000": lambda: Budgeted(1_000_000),
    "oodmon budget 10,000, tolerated 1 %": lambda: Budgeted(PROMISE, tolerated=0.01),
    "oodmon budget 100,000, windows of 256": lambda: Ours(_budget(100_000, 256), 256, 100_000),
    "oodmon ks": lambda: _tuned("ks", 64),
    "oodmon cvm": lambda: _tuned("cvm", 64),
    "oodmon js": lambda: _tuned("js", 64),
    "oodmon psi": lambda: _tuned("psi", 64),
    "oodmon wasserstein": lambda: _tuned("wasserstein", 64),
    "oodmon mmd": lambda: _tuned("mmd", 64),
    "oodmon adwin": lambda: _tuned("adwin", WINDOW),
    "oodmon page_hinkley": lambda: _tuned("page_hinkley", WINDOW),
    "oodmon kswin": lambda: _tuned("kswin", WINDOW),
    "oodmon hddm": lambda: _tuned("hddm", WINDOW),
    "oodmon ddm": lambda: _tuned("ddm", WINDOW),
}
"""Name → how to make it."""
