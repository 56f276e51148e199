"""Memory that learning takes when a reference of a million rows is streamed: MB per detector.

    python -m benchmarks.fit_memory [--rows 1000000] [--only mahalanobis vim] [--strict]

Each detector learns in a process of its own from batches of 256 × 512 features that are made on
demand, so nothing but what the detector keeps can grow. Printed is the growth of the peak resident
set over the one before learning, and CPU seconds. Methods that are not registered are passed over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from oodmon.detectors import Reference, Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

METHODS = ("mahalanobis", "relative_mahalanobis", "vim", "gram", "react", "gmm", "she", "knn")
WIDTH, CLASSES, BATCH = 512, 10, 256
POOL_BATCHES = 16
GOAL_MB = 300.0


def batches(rows: int) -> Iterator[Activations]:
    """A pool of rows over and over, each time at another size: no two batches are equal."""
    draw = torch.Generator().manual_seed(0)
    pool = torch.randn((POOL_BATCHES, BATCH, WIDTH), generator=draw).relu_()
    head = torch.randn((CLASSES, WIDTH), generator=draw) / WIDTH**0.5
    for number in range(rows // BATCH):
        features = pool[number % POOL_BATCHES] * (1.0 + 0.1 * (number % 101) / 101)
        logits = features @ head.T
        yield Activations({"features": features}, logits, labels=logits.argmax(dim=1))


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1e3
    raise SystemExit(f"/proc/self/status has no {what}: this needs Linux")


def measure(method: str, rows: int) -> dict[str, float]:
    """Learn once from a few rows, so that libraries are set up, then from all of them."""
    torch.set_num_threads(1)
    head = (torch.zeros((CLASSES, WIDTH)), torch.zeros(CLASSES))
    options = {"layers": ("features",)} if method == "gram" else {"layer": "features"}
    detector = detectors.create(method, **options)
    Scorer.learn(detector, Reference.from_batches(lambda: batches(8 * BATCH), head=head))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began = resident("VmRSS"), time.process_time()
    Scorer.learn(detector, Reference.from_batches(lambda: batches(rows), head=head))
    return {"mb": resident("VmHWM") - before, "seconds": time.process_time() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="*", default=[], help="methods to measure")
    parser.add_argument("--strict", action="store_true", help=f"exit 1 above {GOAL_MB:.0f} MB")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.rows)))
        return 0
    known, missed = set(detectors.names()), []
    print(f"learning from {options.rows:,} × {WIDTH} rows, streamed\n")
    print(f"{'detector':24}{'peak MB':>10}{'goal':>8}{'CPU s':>10}")
    for method in options.only or METHODS:
        if method not in known:
            continue
        command = [sys.executable, "-m", "benchmarks.fit_memory", "--one", method]
        command += ["--rows", str(options.rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{method:24}{done.stderr.strip().splitlines()[-1]}")
            missed.append(method)
            continue
        found = json.loads(done.stdout)
        if found["mb"] > GOAL_MB:
            missed.append(method)
        print(
            f"{method:24}{found['mb']:10.0f}{f'<{GOAL_MB:.0f}':>8}{found['seconds']:10.1f}"
            f"{'  MISSED' if method in missed else ''}",
            flush=True,
        )
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
