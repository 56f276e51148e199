"""How late the budget is, many streams side by side: at its promise, and at equal run length.

python -m benchmarks.drift.delays [--runs 100] [--sizes 1000] [--phis 0,0.3,0.6] [--rows 1]

Each run has a reference, 1,000 quiet samples and a change of its own. Two figures for each change:
the delay at the promise, against the best that is possible (CUSUM that knows both laws) at the run
length that was *measured* there, and the delay with the bar lowered until the measured run length
*is* the promise, against the best at the promise. The first is what a user gets, the second says
what the method costs without the margin of the promise. Beside that the run length where samples
repeat the one before them.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from benchmarks.drift.best import best
from benchmarks.drift.contender import F8
from benchmarks.drift.side import evidence
from benchmarks.drift.streams import QUIET, SYNTHETIC, Change, Stream
from oodmon.drift.budget import Budget

AT_A_TIME = 100
"""Runs that are judged together."""
AFTER = {"mean +0.5 sd": 1_000, "mean +1 sd": 400, "spread x1.25": 1_500, "5 % novel": 2_000}
"""Samples after a change, on independent scores."""


def repeated(rng: np.random.Generator, size: int, phi: float) -> F8:
    """Each value is the one before it with probability φ, and N(0, 1) otherwise."""
    values = rng.standard_normal(size)
    fresh = np.where(rng.random(size) < phi, 0, np.arange(size))
    found: F8 = values[np.maximum.accumulate(fresh)]
    return found


def measured(
    budget: Budget, rows: int, stream: Stream, change: Change, shape: tuple[int, int, int, int]
) -> F8:
    """`evidence` of (runs, reference, quiet, after) samples of a stream."""
    runs, size, quiet, after = shape
    found = []
    for first in range(0, runs, AT_A_TIME):
        numbers = range(first, min(first + AT_A_TIME, runs))
        rngs = [stream.generator(change.name, run) for run in numbers]
        references = [stream.reference(run, size, {}) for run in numbers]
        if stream.name == "repeated":
            values = [repeated(rng, quiet + after, stream.phi) for rng in rngs]
        else:
            values = [stream.draw(rng, quiet, after, change, {}) for rng in rngs]
        found.append(evidence(budget, rows, references, values))
    return np.concatenate(found, axis=1)


def run_length(found: F8, bar: float, rows: int) -> tuple[float, int]:
    """Samples at risk per alarm, and the alarms."""
    hit = found >= bar
    alarms = int(hit.any(0).sum())
    first = np.where(hit.any(0), hit.argmax(0) + 1, len(found))
    return rows * float(first.sum()) / max(alarms, 1), alarms


def bar_for(found: F8, wanted: float, rows: int) -> float:
    """The bar at which the measured run length is the wanted one."""
    low, high = 0.0, float(found.max())
    for _ in range(30):
        middle = (low + high) / 2.0
        low, high = (middle, high) if run_length(found, middle, rows)[0] < wanted else (low, middle)
    return high


def delays(found: F8, bar: float, rows: int) -> tuple[float, float, int]:
    """Mean delay in samples, its standard error, and how many changes were missed."""
    begin = QUIET // rows
    hit = found[begin:] >= bar
    some = hit.any(0)
    waited = ((begin + hit.argmax(0) + 1) * rows - QUIET)[some]
    error = float(waited.std()) / math.sqrt(max(int(some.sum()), 1))
    return float(waited.mean()) if some.any() else math.nan, error, int((~some).sum())


def main() -> None:
    """A block per size of reference and correlation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--sizes", default="1000")
    parser.add_argument("--phis", default="0,0.3,0.6")
    parser.add_argument("--rows", type=int, default=1, help="samples in a window")
    parser.add_argument("--promise", type=float, default=10_000.0, help="samples")
    parser.add_argument("--control", type=int, default=20_000, help="samples without a change")
    asked = parser.parse_args()
    rows, promise, runs = asked.rows, asked.promise, asked.runs
    budget = Budget(f"1 per {promise / rows:.12g} windows", tolerated_fraction=0.0)
    bar = math.log10(promise / rows)
    for size in map(int, asked.sizes.split(",")):
        for phi in map(float, asked.phis.split(",")):
            name = f"gauss, AR {phi:g}" if phi else "gauss"
            stream = Stream(name, phi=phi, changes=SYNTHETIC[0].changes)
            control = (runs, size, 0, asked.control)
            quiet = measured(budget, rows, stream, Change(""), control)
            length, alarms = run_length(quiet, bar, rows)
            equal = bar_for(quiet, promise, rows)
            print(f"n {size:,}, φ {phi:g}: run length {length:,.0f} ({alarms} alarms)", flush=True)
            for change in stream.changes:
                slower = (1.0 + phi) / (1.0 - phi)
                after = round(AFTER[change.name] * slower)
                found = measured(budget, rows, stream, change, (runs, size, QUIET, after))
                limit = best(stream, change, {})
                text = []
                for what, at, of in (("promise", bar, length), ("equal", equal, promise)):
                    delay, error, missed = delays(found, at, rows)
                    ratio = f"{delay / limit.delay(of):.2f}" if limit else "-"
                    lost = f", {missed} missed" if missed else ""
                    text.append(f"at the {what} {delay:6.1f} ± {error:4.1f} ({ratio}{lost})")
                print(f"  {change.name:14} {'; '.join(text)}", flush=True)
            if phi:
                other = Stream("repeated", phi=phi)
                quiet = measured(budget, rows, other, Change(""), control)
                length, alarms = run_length(quiet, bar, rows)
                print(f"  repeated with probability φ: run length {length:,.0f} ({alarms} alarms)")


if __name__ == "__main__":
    main()
