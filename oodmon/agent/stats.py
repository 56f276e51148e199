"""Counters of an agent: what it did in this process, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass

from oodmon.agent.gate import Gate
from oodmon.agent.sampling import Sampler
from oodmon.agent.scoring import Scoring

__all__ = ["Stats", "count"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of one agent in this process; samples are rows.

    Attributes:
        passes: forward passes that started.
        seen: samples in them, as far as their inputs told.
        sampled: samples that were read and scored.
        scored: samples that the feed accepted.
        dropped: samples shed: queue full, feed full, tap or feed failing.
        batches: score batches that the feed accepted.
        failures: of tap, scorers and feed together.
        fraction: share of the passes that is read at present.
        tap_seconds: serving-thread time of reading.
        scoring_seconds: scoring-thread CPU time, plus device time on CUDA.
        serving_seconds: forward time of the sampled passes.
        overhead: (tap + scoring) / serving time of all passes, estimated from the sampled ones.
    """

    passes: int
    seen: int
    sampled: int
    scored: int
    dropped: int
    batches: int
    failures: int
    fraction: float
    tap_seconds: float
    scoring_seconds: float
    serving_seconds: float
    overhead: float


def count(gate: Gate, sampler: Sampler, scoring: Scoring | None) -> Stats:
    """What one scoring thread, or none yet, made of the passes of a gate."""
    if scoring is None:
        return Stats(
            gate.passes, gate.seen, 0, 0, 0, 0, gate.failures, sampler.fraction, 0.0, 0.0, 0.0, 0.0
        )
    tally = scoring.tally
    spent = tally.tap_seconds + tally.scoring_seconds
    served = tally.serving_seconds
    share = tally.sampled / max(gate.seen, 1)
    return Stats(
        passes=gate.passes,
        seen=gate.seen,
        sampled=tally.sampled,
        scored=tally.scored,
        dropped=scoring.dropped,
        batches=tally.batches,
        failures=tally.failures + gate.failures,
        fraction=sampler.fraction,
        tap_seconds=tally.tap_seconds,
        scoring_seconds=tally.scoring_seconds,
        serving_seconds=served,
        overhead=spent * share / served if served else 0.0,
    )
