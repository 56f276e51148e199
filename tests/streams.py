"""Streams of score batches for the tests of the pure middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oodmon.calibration import Calibration
from oodmon.records import Alert, Exceedance, Fact, ScoreBatch, Window

SECOND = 1_000_000_000
EPOCH = 1_700_000_000 * SECOND
"""Where the tests' event time begins: a whole multiple of every window used."""


def calibration(n: int = 5000, seed: int = 0, detector: str = "msp") -> Calibration:
    """Scores from N(0, 1)."""
    scores = np.random.default_rng(seed).normal(size=n)
    return Calibration.from_scores(detector, f"digest-{detector}", scores)


def batch(
    scores: Sequence[float] | np.ndarray[Any, Any],
    seconds: float = 0.0,
    sequence: int = 0,
    source: str = "agent",
    detectors: Sequence[str] = ("msp",),
    **fields: Any,
) -> ScoreBatch:
    """One batch at `seconds` after `EPOCH`, the same column for every detector."""
    column = np.asarray(scores, np.float32)
    return ScoreBatch(
        "m",
        "1",
        source,
        sequence,
        EPOCH + round(seconds * SECOND),
        dict.fromkeys(detectors, column),
        {name: f"digest-{name}" for name in detectors},
        **fields,
    )


def stream(
    count: int,
    rows: int = 64,
    seed: int = 1,
    shift_at: int | None = None,
    shift: float = 3.0,
    every_seconds: float = 1.0,
    **fields: Any,
) -> Iterator[ScoreBatch]:
    """Batches of N(0, 1) scores that move by `shift` from batch `shift_at` on."""
    rng = np.random.default_rng(seed)
    for sequence in range(count):
        scores = rng.normal(size=rows)
        if shift_at is not None and sequence >= shift_at:
            scores += shift
        yield batch(scores, sequence * every_seconds, sequence, **fields)


def plain(fact: Fact) -> Any:
    """A fact as something that compares by value."""
    if isinstance(fact, Window):
        return (
            "window",
            fact.segment,
            fact.start,
            fact.end,
            fact.samples,
            fact.dropped,
            fact.late,
            dict(fact.predicted),
            {
                name: (
                    h.counts.tolist(),
                    h.invalid,
                    h.keys.tolist(),
                    h.sample.tolist(),
                    (h.judged, h.errors),
                )
                for name, h in fact.detectors.items()
            },
        )
    return fact


def alerts(facts: Sequence[Fact]) -> list[Alert]:
    """The alerts among facts."""
    return [fact for fact in facts if isinstance(fact, Alert)]


def exceedances(facts: Sequence[Fact]) -> list[Exceedance]:
    """The flagged samples among facts."""
    return [fact for fact in facts if isinstance(fact, Exceedance)]
