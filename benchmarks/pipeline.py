"""Samples per second through calibrate → windows → drift → store, on one core.

    python benchmarks/pipeline.py [--batches N] [--rows N]

Every line is CPU time of this process, one thread. The last column is the ratio to one pass that
any monitor of scores has to make: a histogram of the same raw scores by numpy, batch by batch.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from oodmon import wire
from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.feeds.spool import Spool
from oodmon.pipeline import Pipeline
from oodmon.records import ScoreBatch
from oodmon.rules import Rule
from oodmon.store.events import Store
from oodmon.windows import Windowing

SECOND = 1_000_000_000
EPOCH = 1_700_000_000 * SECOND
GROUP = 256
"""Batches per transaction, as the daemon commits them."""


def _batches(count: int, rows: int, detectors: int) -> list[ScoreBatch]:
    rng = np.random.default_rng(0)
    names = [f"d{index}" for index in range(detectors)]
    return [
        ScoreBatch(
            "m",
            "1",
            "agent",
            at,
            EPOCH + at * SECOND // 100,
            {name: rng.normal(size=rows).astype(np.float32) for name in names},
            dict.fromkeys(names, "digest"),
            predicted=rng.integers(0, 10, rows).astype(np.int32),
        )
        for at in range(count)
    ]


def _pipeline(detectors: int) -> Pipeline:
    rng = np.random.default_rng(1)
    calibrations = {
        f"d{index}": Calibration.from_scores(f"d{index}", "digest", rng.normal(size=10_000))
        for index in range(detectors)
    }
    return Pipeline("m", "1", calibrations, Windowing(10.0), {"b": Budget()}, {"r": Rule("b")})


def _fold(batches: list[ScoreBatch], detectors: int) -> None:
    pipeline = _pipeline(detectors)
    for batch in batches:
        pipeline.step(batch)


def _histogram(batches: list[ScoreBatch]) -> None:
    edges = np.linspace(-4, 4, 65)
    total = np.zeros(64, np.int64)
    for batch in batches:
        total += np.histogram(batch.scores["d0"], edges)[0]


def _stored(batches: list[ScoreBatch], detectors: int, folder: Path) -> None:
    store = Store(f"sqlite:///{folder / 'oodmon.db'}")
    store.open()
    pipeline = _pipeline(detectors)
    for start in range(0, len(batches), GROUP):
        facts = [fact for batch in batches[start : start + GROUP] for fact in pipeline.step(batch)]
        store.append(facts, state=pipeline.freeze(), positions={"p": f"{start}"})
    store.close()


def _from_spool(batches: list[ScoreBatch], detectors: int, folder: Path) -> Callable[[], None]:
    feed = Spool(str(folder / "spool"), fsync_seconds=60.0)
    writer = feed.writer("agent")
    for batch in batches:
        if not writer.put(batch):
            raise SystemExit("the spool is full: fewer batches, please")
    writer.close()

    def run() -> None:
        store = Store(f"sqlite:///{folder / 'spooled.db'}")
        store.open()
        pipeline, reader, seen = _pipeline(detectors), feed.reader(), 0
        reader.seek({})
        while seen < len(batches):
            found = reader.poll(GROUP, 1.0)
            facts = [fact for one in found for fact in pipeline.step(one.batch)]
            positions = {one.partition: one.position for one in found}
            store.append(facts, state=pipeline.freeze(), positions=positions)
            seen += len(found)
        reader.close()
        store.close()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8_000)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    rows, count = arguments.rows, arguments.batches
    one, four = _batches(count, rows, 1), _batches(count // 2, rows, 4)
    frames = [wire.encode_batch(batch) for batch in one]

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("one", "four", "spool"):
            (folder / name).mkdir()
        spooled = _from_spool(one, 1, folder / "spool")
        work: list[tuple[str, int, Callable[[], object]]] = [
            ("numpy histogram of raw scores (the yardstick)", count, lambda: _histogram(one)),
            ("wire: encode", count, lambda: [wire.encode_batch(batch) for batch in one]),
            ("wire: decode", count, lambda: [wire.decode_batch(frame) for frame in frames]),
            ("calibrate → windows → drift → rules, 1 detector", count, lambda: _fold(one, 1)),
            ("the same, 4 detectors", count // 2, lambda: _fold(four, 4)),
            ("… → SQLite, 1 detector", count, lambda: _stored(one, 1, folder / "one")),
            ("… → SQLite, 4 detectors", count // 2, lambda: _stored(four, 4, folder / "four")),
            ("spool → … → SQLite, 1 detector", count, spooled),
        ]
        print(f"pipeline: batches of {rows}, one thread, CPU time")
        print(f"{'stage':<52}{'samples/s':>14}{'ratio':>8}")
        base = 0.0
        for name, batches, run in work:
            began = time.process_time()
            run()
            rate = batches * rows / (time.process_time() - began)
            base = base or rate
            print(f"{name:<52}{rate:>14,.0f}{rate / base:>8.2f}")


if __name__ == "__main__":
    main()
