"""Expected run lengths of the river tests on N(0, 1) values: makes the tables in `oodmon/drift`.

python benchmarks/run_lengths.py page_hinkley|adwin|kswin

Each figure is time at risk / alarms, lowered by two standard errors so that a table never promises
more than was seen. The cut of the memory after 2 x HISTORY values is part of the simulation.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from river.drift import ADWIN

from oodmon.drift.series import HISTORY


def lower(exposure: float, alarms: int) -> float:
    """The estimate of the run length, lowered by two standard errors."""
    return exposure / (alarms + 2.0 * math.sqrt(alarms)) if alarms else math.inf


class Sums:
    """Many Page-Hinkley detectors side by side, step by step as river.drift.PageHinkley does it."""

    def __init__(self, paths: int, delta: float, least: int) -> None:
        self.delta, self.least = delta, least
        self.seen = np.zeros(paths)
        self.mean = np.zeros(paths)
        self.up = np.zeros(paths)
        self.down = np.zeros(paths)
        self.lowest = np.full(paths, np.inf)
        self.highest = np.full(paths, -1.0)

    def update(self, x: np.ndarray) -> np.ndarray:
        """The statistic after one more value on each path."""
        self.seen += 1
        self.mean += (x - self.mean) / self.seen
        deviation = x - self.mean
        self.up += deviation - self.delta
        self.down += deviation + self.delta
        np.minimum(self.lowest, self.up, out=self.lowest)
        np.maximum(self.highest, self.down, out=self.highest)
        largest = np.maximum(self.up - self.lowest, self.highest - self.down)
        return np.where(self.seen >= self.least, largest, 0.0)

    def reset(self, where: np.ndarray) -> None:
        """Forget everything on these paths."""
        for array, value in (
            (self.seen, 0.0),
            (self.mean, 0.0),
            (self.up, 0.0),
            (self.down, 0.0),
            (self.lowest, np.inf),
            (self.highest, -1.0),
        ):
            array[where] = value

    def keep(self, where: np.ndarray) -> None:
        """Leave out all other paths."""
        for name in ("seen", "mean", "up", "down", "lowest", "highest"):
            setattr(self, name, getattr(self, name)[where])


def page_hinkley() -> None:
    """Threshold → run length. Paths that alarmed leave; the others go on."""
    from oodmon.drift.page_hinkley import MIN_WINDOWS, TOLERANCE

    for threshold in (2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0):
        rng = np.random.default_rng(int(threshold * 10))
        paths, steps = 4_000, 40_000
        sums = Sums(paths, TOLERANCE, MIN_WINDOWS)
        memory = np.empty((2 * HISTORY, paths), np.float32)
        filled, exposure, alarms = 0, 0, 0
        for _ in range(steps):
            x = rng.standard_normal(sums.seen.size)
            exposure += x.size
            memory[filled] = x
            filled += 1
            fired = sums.update(x) > threshold
            if fired.any():
                alarms += int(fired.sum())
                sums.keep(~fired)
                memory = memory[:, ~fired]
                if not sums.seen.size:
                    break
            if filled == 2 * HISTORY:
                memory[:HISTORY] = memory[HISTORY:]
                filled = HISTORY
                sums = Sums(sums.seen.size, TOLERANCE, MIN_WINDOWS)
                fired = np.zeros(sums.seen.size, bool)
                for row in memory[:HISTORY]:
                    # river starts over at the first value after an alarm, in a replay as well.
                    if fired.any():
                        sums.reset(fired)
                    fired = sums.update(row) > threshold
            if alarms >= 3_000:
                break
        print(f"    ({threshold}, {lower(exposure, alarms):.0f}),  # {alarms} alarms", flush=True)


def adwin() -> None:
    """river's delta → run length, on river's own objects."""
    for delta in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        rng = np.random.default_rng(round(delta * 100))
        values: list[float] = []
        make: Any = ADWIN
        detector, alarms, exposure = make(delta=delta, clock=1), 0, 0
        for _ in range(200):
            for value in rng.standard_normal(100_000).tolist():
                detector.update(value)
                values.append(value)
                if detector.drift_detected:
                    alarms += 1
                    values = []
                    detector = make(delta=delta, clock=1)
                elif len(values) == 2 * HISTORY:
                    values = values[HISTORY:]
                    detector = make(delta=delta, clock=1)
                    for kept in values:
                        detector.update(kept)
            exposure += 100_000
            if alarms >= 1_000:
                break
        print(f"    ({delta}, {lower(exposure, alarms):.0f}),  # {alarms} alarms", flush=True)


def kswin() -> None:
    """Run length of the KS distance k / 30 (memory 100) beside the one that is stated for it."""
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    paths, recent, memory = 2_000, 30, 100
    for distance in (12, 13, 14):
        sample = [0.0] * distance + [0.5] * (recent - distance)
        other = [0.5] * (recent - distance) + [1.0] * distance
        alpha = float(ks_2samp(sample, other, method="exact").pvalue)
        values = rng.standard_normal((paths, memory))
        exposure, alarms = memory * paths, 0
        age = np.full(paths, memory)
        for _ in range(1_500):
            values = np.concatenate([values[:, 1:], rng.standard_normal((paths, 1))], axis=1)
            age += 1
            drawn = rng.permuted(values[:, :-recent], axis=1)[:, :recent]
            order = np.concatenate([drawn, values[:, -recent:]], axis=1).argsort(axis=1)
            walk = np.abs(np.cumsum(np.where(order < recent, 1, -1), axis=1)).max(axis=1)
            exposure += paths
            fired = (walk >= distance) & (age >= memory)
            alarms += int(fired.sum())
            age[fired] = 0
        print(
            f"k {distance}: p {alpha:.2e}, stated run length {0.5 / alpha:,.0f}, "
            f"measured {lower(exposure, alarms):,.0f} ({alarms} alarms)",
            flush=True,
        )


if __name__ == "__main__":
    {"page_hinkley": page_hinkley, "adwin": adwin, "kswin": kswin}[sys.argv[1]]()
