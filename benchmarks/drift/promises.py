"""Does `false_alarms` hold for the classical tests? Tuned as `oodmon fit` does, then fresh data.

python -m benchmarks.drift.promises [TEST …]

For independent and for AR(1) scores: several calibration sets, the threshold found on each by
resampling it, then consecutive windows of a fresh stream of the same law against that calibration.
The promise is one false alarm per 500 windows of 256 samples.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.drift.streams import autoregressive
from oodmon.calibration import Calibration
from oodmon.drift.resampling import Held, block_length
from oodmon.drift.thresholds import tune, tuned
from oodmon.drift.tuned import Tunable
from oodmon.records import BIN_EDGES, Histogram, Window
from oodmon.registry import drift

PROMISE = 500
SAMPLES = 256
SETS = 6
WINDOWS = 4_000
REFERENCE = 10_000


def alarms(name: str, phi: float, index: int) -> tuple[int, int]:
    """Alarms on a fresh stream, and the block length that was found."""
    rng = np.random.default_rng([index, round(100 * phi)])
    scores = autoregressive(rng, REFERENCE, phi).astype(np.float32)
    calibration = Calibration.from_scores("d", "digest", scores, (scores > 0).astype(np.int32))
    held = Held(calibration, scores, (scores > 0).astype(np.int64), block_length(scores))
    test = drift.create(name, false_alarms=f"1 per {PROMISE} windows")
    assert isinstance(test, Tunable)
    made = tuned(test, tune(test, {"d": held}, SAMPLES, 1.0), {"d": calibration}, 1.0)
    fresh = autoregressive(rng, WINDOWS * SAMPLES, phi).astype(np.float32).reshape(-1, SAMPLES)
    state: Any = made.start(calibration.reference())
    found = 0
    empty = Histogram.empty()
    for at, values in enumerate(fresh):
        counts = np.bincount(calibration.bins(values), minlength=len(BIN_EDGES) - 1)
        above = int((values > 0).sum())
        window = Window(
            "",
            "",
            "",
            at,
            at + 1,
            SAMPLES,
            detectors={"d": Histogram(counts, 0, empty.keys, empty.sample)},
            predicted={0: SAMPLES - above, 1: above},
        )
        state, result = made.step(state, window, "d")
        found += result.drifted
    return found, held.block


def main() -> None:
    """One line per test and correlation."""
    names = sys.argv[1:] or [
        name for name in drift.names() if name not in ("budget", "accuracy_loss")
    ]
    for phi in (0.0, 0.3, 0.6):
        for name in names:
            each = [alarms(name, phi, index) for index in range(SETS)]
            total = sum(found for found, _ in each)
            print(
                f"phi {phi}: {name:13} promised {PROMISE}, measured "
                f"{SETS * WINDOWS / max(total, 1):8,.0f} windows ({total} alarms, by calibration "
                f"{[found for found, _ in each]}; blocks of {each[0][1]})",
                flush=True,
            )


if __name__ == "__main__":
    main()
