"""Does the budget's promise hold while a tolerated change is there? Simulated, not proved.

python -m benchmarks.drift.tolerated [--runs 100] [--ranks auto,sequential]

Many streams side by side, each with its own calibration: the run length to a false alarm at a
promise of 10,000 samples (1,000 windows of 10) where a share δ of the traffic differs from the
reference, in the ways that the bets find best: novel scores above all that was seen, or scores that
left one end for the other. From the start, later, and in turns: the pool that sequential ranks are
taken among has learnt the one change when the opposite one comes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np

from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.records import BIN_EDGES, Histogram, Window

PROMISE = 1_000
"""Windows."""
ROWS = 10
SECOND = 1_000_000_000
BLOCK = 100
MOST = 2 * PROMISE
"""Windows after which a run is cut: without an alarm it counts as so long."""

F8 = np.ndarray[Any, Any]


def up(z: F8, share: float, rng: np.random.Generator) -> F8:
    """Novel samples, above all others."""
    return np.where(rng.random(z.shape) < share, 8.0 + rng.standard_normal(z.shape), z)


def mixture(z: F8, share: float, rng: np.random.Generator) -> F8:
    """Samples of N(3, 1)."""
    return np.where(rng.random(z.shape) < share, 3.0 + rng.standard_normal(z.shape), z)


def across(z: F8, share: float, rng: np.random.Generator) -> F8:
    """The least novel samples become the most novel: the worst that a share of δ can do."""
    del rng
    return np.where(z < NormalDist().inv_cdf(share), 4.0, z)


def back(z: F8, share: float, rng: np.random.Generator) -> F8:
    """The most novel samples become the least novel."""
    del rng
    return np.where(z > NormalDist().inv_cdf(1.0 - share), -4.0, z)


Change = Callable[[F8, float, np.random.Generator], F8]
CASES: dict[str, list[tuple[int, Change]]] = {
    "novel from the start": [(0, up)],
    "N(3, 1) from the start": [(0, mixture)],
    "end to end from the start": [(0, across)],
    "novel after 1,000 samples": [(100, up)],
    "end to end after 1,000": [(100, across)],
    "end to end after 5,000": [(500, across)],
    "end to end, its opposite after 5,000": [(0, across), (500, back)],
    "in turns every 2,000": [(200 * i, across if i % 2 else back) for i in range(MOST // 200)],
}
"""From which window on, what."""


def run_lengths(budget: Budget, case: str, share: float, n: int, runs: int) -> F8:
    """Windows up to the alarm of each run, at most `MOST`."""
    rng = np.random.default_rng(7)
    known = [Calibration.from_scores("d", "", rng.normal(size=n)) for _ in range(runs)]
    found = np.full(runs, MOST)
    alive = list(range(runs))
    states = {run: budget.start(known[run].reference()) for run in alive}
    for first in range(0, MOST, BLOCK):
        counts = {run: _counts(known[run], first, case, share, rng) for run in alive}
        for at in range(first, first + BLOCK):
            windows = [_window(counts[run][at - first], at, f"s{run}") for run in alive]
            taken = budget.step_all([states[run] for run in alive], windows, ["d"] * len(alive))
            for run, (state, result) in zip(alive, taken, strict=True):
                states[run] = state
                if result.statistic >= result.threshold:
                    found[run] = at + 1
            alive = [run for run in alive if found[run] == MOST]
            if not alive:
                return found
    return found


def _counts(
    known: Calibration, first: int, case: str, share: float, rng: np.random.Generator
) -> F8:
    """(BLOCK, 64) counts of the windows from `first` on."""
    scores = rng.standard_normal((BLOCK, ROWS))
    change = next((change for start, change in reversed(CASES[case]) if first >= start), None)
    if change is not None:
        scores = change(scores, share, rng)
    bins = len(BIN_EDGES) - 1
    places = known.bins(scores.ravel().astype(np.float32)).reshape(scores.shape)
    places = places + bins * np.arange(BLOCK)[:, None]
    return np.bincount(places.ravel(), minlength=BLOCK * bins).reshape(BLOCK, bins)


def _window(counts: F8, at: int, segment: str) -> Window:
    histogram = Histogram(counts, 0, np.empty(0, np.uint64), np.empty(0, np.float32))
    start = (at + 1) * SECOND
    return Window("m", "1", segment, start, start + SECOND, ROWS, detectors={"d": histogram})


def main() -> None:
    """One line per kind of ranks, size of the calibration, δ and change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--ranks", default="auto,sequential")
    parser.add_argument("--shares", default="0.01,0.05,0.1")
    parser.add_argument("--sizes", default="1000,10000")
    parser.add_argument("--only", default="", help="part of a case's name")
    asked = parser.parse_args()
    for ranks in asked.ranks.split(","):
        for n in map(int, asked.sizes.split(",")):
            for share in map(float, asked.shares.split(",")):
                budget = Budget(f"1 per {PROMISE} windows", share, ranks=ranks)
                for case in (name for name in CASES if asked.only in name):
                    found = run_lengths(budget, case, share, n, asked.runs)
                    alarms = int((found < MOST).sum())
                    length = ROWS * found.sum() / max(alarms, 1)
                    least = ">" if not alarms else ""
                    print(
                        f"{ranks}, n {n:,}, δ {share:g}, {case}: {alarms} alarms in "
                        f"{asked.runs} runs, run length {least}{length:,.0f} samples",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
