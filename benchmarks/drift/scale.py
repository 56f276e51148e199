"""Many streams on one core: what a window of each costs, and what is written with it.

python -m benchmarks.drift.scale [--detectors 40] [--segments 250] [--rows 16] [--spans 8]

A pipeline with the budget over detectors times segments, one window a second in each stream. Told
are processor seconds per second of traffic: below 1 it keeps up on one core. Beside that, what one
commit of such a second to SQLite takes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.pipeline import Pipeline
from oodmon.records import DriftResult, ScoreBatch
from oodmon.rules import Rule
from oodmon.store.events import Store
from oodmon.windows import Windowing

SECOND = 1_000_000_000
EPOCH = 1_700_000_000 * SECOND


def main() -> None:
    """One line per number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--detectors", type=int, default=40)
    parser.add_argument("--segments", type=int, default=250)
    parser.add_argument("--rows", type=int, default=16, help="samples per window and stream")
    parser.add_argument("--spans", type=int, default=8, help="seconds of traffic")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oodmon-bench-") as folder:
        store = Store(f"sqlite:///{folder}/oodmon.db")
        store.open()
        try:
            measure(asked, store)
        finally:
            store.close()


def measure(asked: argparse.Namespace, store: Store) -> None:
    """Some seconds of traffic through pipeline and store."""
    rng = np.random.default_rng(0)
    names = [f"d{index}" for index in range(asked.detectors)]
    segments = tuple(f"s{index}" for index in range(asked.segments))
    pipeline = Pipeline(
        "m",
        "1",
        {name: Calibration.from_scores(name, "x", rng.normal(size=10_000)) for name in names},
        Windowing(1.0, allowed_lateness_seconds=0.0),
        {"budget": Budget()},
        {"rule": Rule("budget")},
    )
    rows = asked.segments * asked.rows
    segment = np.arange(rows, dtype=np.int32) % asked.segments
    spent, frozen, stored, results, size = [], [], [], 0, 0
    for span in range(asked.spans + 2):
        batch = ScoreBatch(
            "m",
            "1",
            "agent",
            span,
            EPOCH + span * SECOND,
            {name: rng.normal(size=rows).astype(np.float32) for name in names},
            dict.fromkeys(names, "x"),
            segment=segment,
            segments=segments,
        )
        began = time.process_time()
        facts = pipeline.step(batch)
        spent.append(time.process_time() - began)
        results = sum(isinstance(fact, DriftResult) for fact in facts)
        began = time.process_time()
        state = pipeline.freeze()
        size = len(state)
        frozen.append(time.process_time() - began)
        began = time.process_time()
        store.append(facts, state=state, positions={})
        stored.append(time.process_time() - began)
    # The first closes no window, the second starts the streams.
    step, freeze = float(np.mean(spent[2:])), float(np.mean(frozen[2:]))
    streams = max(results - 1, 1)
    print(f"{streams:,} streams, {asked.rows} samples a window: {rows:,} samples a second")
    print(
        f"scores to facts: {step:.3f} s of processor a second, {step / streams * 1e6:.0f} µs each"
    )
    print(f"state: {size / 1e6:.1f} MB, {freeze:.3f} s of processor to freeze, once a commit")
    into = float(np.mean(stored[2:]))
    print(f"facts and state into the store: {into:.3f} s of processor")
    print(f"all of it, with a commit a second: {step + freeze + into:.2f} cores")


if __name__ == "__main__":
    main()
