"""What a config's drift tests would do, before they are switched on: run lengths and delays.

The pipeline itself is run on scores that are drawn from the calibrations, without a change and with
named ones, and compared with the CUSUM that knows the change (`oodmon.drift.yardstick`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from oodmon.calibration import Calibration
from oodmon.contracts import DriftTest
from oodmon.drift.yardstick import Yardstick
from oodmon.pipeline import Pipeline
from oodmon.records import ALL, DriftResult, ScoreBatch
from oodmon.windows import Windowing

__all__ = ["CHANGES", "Change", "Outcome", "Plan", "Quiet", "best"]

F8 = npt.NDArray[np.float64]

_SECOND: Final = 1_000_000_000
_EPOCH: Final = 1_700_000_000 * _SECOND
_POINTS: Final = 20_000
"""Quantiles that stand for the law of a change in the yardstick."""
WARM: Final = 20
"""Windows before a change."""
_LEAST: Final = 20
"""Windows after a change that even a plan in a hurry follows."""


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to the normal scores z of all detectors.

    Attributes:
        name: as printed.
        mean, scale: z becomes mean + scale z.
        novel: share of samples that lie at N(3, 1) instead.
    """

    name: str
    mean: float = 0.0
    scale: float = 1.0
    novel: float = 0.0

    def draw(self, rng: np.random.Generator, count: int) -> F8:
        """(count,) normal scores after the change."""
        z = self.mean + self.scale * rng.standard_normal(count)
        if not self.novel:
            return z
        return np.where(rng.random(count) < self.novel, 3.0 + rng.standard_normal(count), z)

    def log_ratio(self, z: F8) -> F8:
        """ln f1/f0 at these normal scores."""
        moved = (z - self.mean) / self.scale
        known = 0.5 * z**2 - 0.5 * moved**2 - math.log(self.scale)
        if not self.novel:
            return known
        return np.logaddexp(known + math.log1p(-self.novel), 3.0 * z - 4.5 + math.log(self.novel))


CHANGES: Final = (
    Change("shift 0.5 σ", mean=0.5),
    Change("shift 1 σ", mean=1.0),
    Change("spread x1.25", scale=1.25),
    Change("5 % novel", novel=0.05),
    Change("20 % novel", novel=0.2),
)
"""What a plan tells of; σ is the standard deviation of the normal score, novel samples lie at 3."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """One test without a change.

    Attributes:
        promised: windows between false alarms, per stream or over all; 0 promises nothing.
        windows, alarms: that were simulated.
    """

    promised: float
    windows: int
    alarms: int

    @property
    def run_length(self) -> float:
        """The promise, or without one what was measured, in windows."""
        return self.promised or self.windows / max(self.alarms, 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One test after one change.

    Attributes:
        windows: mean delay in windows, NaN where it was never found.
        found, runs: how often, of how many.
        within: windows after the change for which those runs were followed that missed it.
        best: least mean delay possible at the test's run length, in windows; at least 1, since
            nothing is decided before a window ends.
    """

    windows: float
    found: int
    runs: int
    within: int
    best: float


class Plan:
    """Simulations of one config.

    Args:
        calibrations: detector id → calibration.
        windows: how event time is cut.
        tests: drift test id → test.
        samples: in a base window.
        seed: of all draws.
    """

    def __init__(
        self,
        calibrations: Mapping[str, Calibration],
        windows: Windowing,
        tests: Mapping[str, DriftTest[Any]],
        samples: int,
        seed: int = 0,
    ) -> None:
        self.calibrations = dict(calibrations)
        self.windows = windows
        self.tests = dict(tests)
        self.samples = samples
        self.seed = seed

    def quiet(self, most: int, seconds: float, clock: Callable[[], float]) -> dict[str, Quiet]:
        """Up to `most` windows without a change, at most about so many seconds of work."""
        pipeline = self._pipeline()
        rng = np.random.default_rng([self.seed, 0])
        count = dict.fromkeys(self.tests, 0)
        raised = dict.fromkeys(self.tests, False)
        seen, begun = 0, clock()
        unchanged = Change("")
        while seen < most and clock() - begun < seconds:
            spoken = self._step(pipeline, unchanged.draw(rng, self.samples), seen)
            seen += 1
            for name in self.tests:
                drifted = _drifted(spoken, name)
                # A test that stays above its threshold is one alarm, not many.
                count[name] += drifted and not raised[name]
                raised[name] = drifted
        return {
            name: Quiet(test.run_length(self._seconds(test)), seen, count[name])
            for name, test in self.tests.items()
        }

    def delays(
        self,
        change: Change,
        quiet: Mapping[str, Quiet],
        runs: int,
        most: int,
        seconds: float,
        clock: Callable[[], float],
    ) -> dict[str, Outcome]:
        """Windows from the change to the alarm of each test; up to `most` of them per run."""
        waited: dict[str, list[int]] = {name: [] for name in self.tests}
        done, within, begun = 0, most, clock()
        for run in range(runs):
            rng = np.random.default_rng([self.seed, 1, run])
            pipeline = self._pipeline()
            found: dict[str, int] = {}
            unchanged = Change("")
            for at in range(WARM + most):
                law = change if at >= WARM else unchanged
                spoken = self._step(pipeline, law.draw(rng, self.samples), at)
                for name in self.tests:
                    ends = [r.end for r in spoken if r.test == name and r.drifted]
                    after = [(end - _EPOCH) // self.windows.step - WARM for end in ends]
                    if name not in found and any(windows > 0 for windows in after):
                        found[name] = int(min(windows for windows in after if windows > 0))
                late = at >= WARM + _LEAST and clock() - begun > seconds
                if len(found) == len(self.tests) or late:
                    break
            missed = len(found) < len(self.tests)
            if missed and late and run:
                break  # a run that was cut short says nothing of the tests that had not alarmed yet
            if missed:
                within = min(within, at + 1 - WARM)
            done += 1
            for name, windows in found.items():
                waited[name].append(windows)
            if late:
                break
        return {
            name: Outcome(
                float(np.mean(windows)) if windows else math.nan,
                len(windows),
                done,
                max(within, 0),
                self._best(change, quiet[name]),
            )
            for name, windows in waited.items()
        }

    def _best(self, change: Change, quiet: Quiet) -> float:
        return max(best(change).delay(quiet.run_length * self.samples) / self.samples, 1.0)

    def _seconds(self, test: DriftTest[Any]) -> float:
        span = self.windows.step if test.disjoint else self.windows.length
        return span / _SECOND

    def _pipeline(self) -> Pipeline:
        return Pipeline("plan", "1", self.calibrations, self.windows, self.tests, {})

    def _step(self, pipeline: Pipeline, z: F8, at: int) -> list[DriftResult]:
        """One window of samples with these normal scores; the results that were ready then."""
        p = ndtr(-z)
        scores, predicted = {}, np.empty(0, np.int32)
        for name, calibration in self.calibrations.items():
            n = len(calibration)
            # Of a tail probability p, about p (n + 1) of the n scores are as high or higher.
            places = n - np.ceil(p * (n + 1)).astype(np.int64)
            inside = np.clip(places, 0, n - 1)
            above = np.nextafter(calibration.scores[-1], np.float32(np.inf))
            below = np.nextafter(calibration.scores[0], np.float32(-np.inf))
            column = np.where(places > n - 1, above, calibration.scores[inside])
            scores[name] = np.where(places < 0, below, column).astype(np.float32)
            if not len(predicted) and len(calibration.predicted):
                predicted = calibration.predicted[inside]
        digests = {name: calibration.digest for name, calibration in self.calibrations.items()}
        batch = ScoreBatch(
            "plan",
            "1",
            "plan",
            at,
            _EPOCH + at * self.windows.step,
            scores,
            digests,
            predicted=predicted,
        )
        facts = pipeline.step(batch)
        return [fact for fact in facts if isinstance(fact, DriftResult)]


def _drifted(results: Sequence[DriftResult], test: str) -> bool:
    """Whether this test decided on drift: over all streams where it speaks of them together."""
    own = [result for result in results if result.test == test]
    shared = [result for result in own if result.detector == ALL]
    return any(result.drifted for result in shared or own)


_KNOWN: dict[Change, Yardstick] = {}


def best(change: Change) -> Yardstick:
    """The CUSUM that knows this change, on the normal scores of independent samples."""
    if change not in _KNOWN:
        z: F8 = ndtri((np.arange(_POINTS) + 0.5) / _POINTS)
        share = round(_POINTS * change.novel)
        moved = change.mean + change.scale * _quantiles(_POINTS - share)
        after = np.concatenate([moved, 3.0 + _quantiles(share)])
        _KNOWN[change] = Yardstick(change.log_ratio(z), change.log_ratio(after))
    return _KNOWN[change]


def _quantiles(count: int) -> F8:
    z: F8 = ndtri((np.arange(count) + 0.5) / max(count, 1))
    return z


def simulate(
    plan: Plan, changes: Sequence[Change] = CHANGES, seconds: float = 20.0
) -> Iterator[tuple[Change | None, Mapping[str, Quiet] | Mapping[str, Outcome]]]:
    """First what happens without a change (under None), then each change.

    In about so much processor time: a busy machine takes longer and tells as much.
    """
    each = seconds / (len(changes) + 1)
    quiet = plan.quiet(4_000, each, time.process_time)
    yield None, quiet
    for change in changes:
        yield change, plan.delays(change, quiet, 20, 1_000, each, time.process_time)
