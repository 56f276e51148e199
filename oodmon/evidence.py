"""What an alert tells a person: plain values from the results behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from oodmon.records import ALL, DriftResult, Exceedance
from oodmon.wire import rfc3339

__all__ = ["evidence"]

_MOST: Final = 10
"""Streams and samples that are named; the rest is in the store."""


def evidence(
    result: DriftResult,
    results: Sequence[DriftResult],
    novel: Sequence[Exceedance],
    promise: str,
) -> Mapping[str, Any]:
    """The numbers of a decision, the streams that it rests on, and the most novel samples.

    Args:
        result: what the rule decided on.
        results: all results of the span, of all tests.
        novel: flagged samples of late, most novel first.
        promise: how often the test may be wrong, in words.
    """
    streams = [r for r in results if r.test == result.test and r.detector != ALL]
    streams.sort(key=lambda stream: -stream.statistic)
    return {
        "statistic": result.statistic,
        "threshold": result.threshold,
        "effect": result.effect,
        "p_value": result.p_value,
        "since": rfc3339(result.since) if result.since else None,
        "window_start": rfc3339(result.start),
        "window_end": rfc3339(result.end),
        "promise": promise,
        "streams": [
            {
                "detector": stream.detector,
                "segment": stream.segment,
                "statistic": stream.statistic,
                "effect": stream.effect,
                "drifted": stream.drifted,
            }
            for stream in streams[:_MOST]
        ],
        "novel": list(dict.fromkeys(sample.sample_id for sample in novel))[:_MOST],
    }
