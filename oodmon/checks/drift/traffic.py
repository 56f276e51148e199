"""Simulated windows for the checks of drift tests, and a stream as the pipeline runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from oodmon.contracts import DriftTest
from oodmon.records import ALL, BIN_EDGES, SAMPLE_SIZE, DriftResult, Histogram, Window

__all__ = [
    "DETECTOR",
    "REFERENCE_SAMPLES",
    "SAMPLES",
    "SPAN",
    "Replica",
    "alone",
    "decided",
    "reference",
    "shifted",
    "stream",
    "window",
]

Test = DriftTest[Any]

SPAN: Final = 60_000_000_000
"""Length of a simulated window, ns."""

SAMPLES: Final = 200
"""Samples in a simulated window."""

REFERENCE_SAMPLES: Final = 20_000
"""Calibration samples: so many that their own sampling error is small beside the windows'."""

DETECTOR: Final = "scored"

_RAW: Final = -ndtri(np.clip(BIN_EDGES[1:], 1e-9, 1.0 - 1e-9)).astype(np.float32)
"""A raw score for each bin; it falls as the tail probability rises."""

_ERRORS: Final = np.rint(1e6 * (1.0 - (BIN_EDGES[1:] + BIN_EDGES[:-1]) / 2.0) ** 4).astype(np.int64)
"""Millionths: the scores pass for the probability of a wrong answer, 0.2 on average."""

_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: its multiples lie far apart (Knuth, Fibonacci hashing)."""


def shifted(shift: float = 0.0, novel: float = 0.0) -> npt.NDArray[np.float64]:
    """Bin probabilities (64,) of traffic that moved.

    The normal scores are `shift` standard deviations up, and a share `novel` is three of them up.
    """
    edges = -ndtri(BIN_EDGES)
    moved = np.diff(ndtr(shift - edges))
    far = np.diff(ndtr(3.0 - edges))
    law: npt.NDArray[np.float64] = (1.0 - novel) * moved + novel * far
    law /= law.sum()
    return law


def window(
    counts: npt.NDArray[np.int64],
    index: int = 0,
    *,
    detector: str = DETECTOR,
    segment: str = "",
    invalid: int = 0,
    classes: Sequence[int] = (0, 1),
) -> Window:
    """A window that holds these counts (64,), with a raw sample that goes with them."""
    counts = np.asarray(counts, np.int64)
    scored = int(counts.sum())
    kept = min(scored, SAMPLE_SIZE)
    # Keys are a hash of window and place: distinct, and in another order than the bins.
    salt = np.uint64(hash((index, *counts.tolist())) & 0xFFFFFFFF) << np.uint64(32)
    hashed = np.arange(kept, dtype=np.uint64) * _SPREAD + salt
    order = np.argsort(hashed)
    places = np.repeat(np.arange(len(counts)), counts)[np.linspace(0, scored - 1, kept).astype(int)]
    histogram = Histogram(
        counts,
        invalid,
        hashed[order],
        _RAW[places[order]],
        judged=scored,
        errors=int(counts @ _ERRORS),
    )
    total = scored + invalid
    # The first 40 bins, p <= 0.4, are one class: its share moves with the scores.
    novel = int(counts[:40].sum())
    predicted = {0: novel, 1: scored - novel}
    if tuple(classes) != (0, 1):
        predicted = dict.fromkeys(classes, total // len(classes)) if total else {}
    return Window(
        "model",
        "1",
        segment,
        index * SPAN,
        (index + 1) * SPAN,
        samples=total,
        detectors={detector: histogram},
        predicted=predicted,
    )


def reference(segment: str = "", detector: str = DETECTOR) -> Window:
    """The calibration scores as a drift test is given them: uniform tail probabilities."""
    counts = np.floor(np.diff(BIN_EDGES) * REFERENCE_SAMPLES).astype(np.int64)
    counts[-1] += REFERENCE_SAMPLES - counts.sum()
    return window(counts, 0, detector=detector, segment=segment)


def stream(
    seed: int, *stretches: tuple[int, npt.NDArray[np.float64]], samples: int = SAMPLES
) -> list[Window]:
    """Windows of independent samples: for each stretch so many, from these bin probabilities."""
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(samples, law, size=length) for length, law in stretches]
    return [window(row, index) for index, row in enumerate(np.concatenate(counts))]


class Replica:
    """One test on one stream, as the pipeline runs it."""

    def __init__(self, test: Test, *, detector: str = DETECTOR, segment: str = "") -> None:
        self.test, self.detector = test, detector
        self.reference = reference(segment, detector)
        self.state = test.start(self.reference)

    def step(self, seen: Window) -> DriftResult:
        """Take one window."""
        self.state, result = self.test.step(self.state, seen, self.detector)
        return result

    def run(self, windows: Iterable[Window]) -> list[DriftResult]:
        """Take these windows; the results of the stream."""
        return [self.step(seen) for seen in windows]

    def restart(self) -> None:
        """Leave and come back with nothing but the frozen state."""
        arrays = {name: np.array(array) for name, array in self.test.freeze(self.state).items()}
        self.state = self.test.thaw(self.reference, arrays)


def decided(test: Test, results: Sequence[DriftResult]) -> bool:
    """Whether the streams of one span, judged together, drifted."""
    combined = test.combine(results)
    shared = [result for result in combined if result.detector == result.segment == ALL]
    return any(result.drifted for result in shared or combined)


def alone(test: Test, windows: Iterable[Window]) -> Iterator[bool]:
    """The decisions on one stream."""
    replica = Replica(test)
    return (decided(test, [replica.step(seen)]) for seen in windows)


def mixed(seed: int) -> list[Window]:
    """Quiet, shifted, quiet again: alarms and what comes after them."""
    return stream(seed, (120, shifted()), (60, shifted(0.8)), (60, shifted()))
