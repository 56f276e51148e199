"""Facts and events as a pipeline would make them, for the tests of the store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oodmon.records import (
    Alert,
    DriftResult,
    Event,
    Exceedance,
    Fact,
    Histogram,
    Notice,
    Window,
)

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


def histogram(seed: int) -> Histogram:
    """Some 1,000 scores of an in-distribution stream."""
    counts = np.random.default_rng(seed).integers(0, 32, 64).astype(np.int64)
    return Histogram(counts, 3, np.arange(4, dtype=np.uint64), np.zeros(4, np.float32))


def window(index: int, segment: str = "", detectors: Sequence[str] = ("gram", "msp")) -> Window:
    """The index-th window of ten seconds."""
    start = START + index * 10 * SECOND
    return Window(
        "digits",
        "1",
        segment,
        start,
        start + 10 * SECOND,
        samples=1000 + index,
        dropped=2,
        late=1,
        detectors={name: histogram(index) for name in detectors},
        predicted={7: 400, 1: 600 + index},
    )


def drift(index: int, *, drifted: bool = False, test: str = "budget") -> DriftResult:
    """A decision on the index-th window."""
    start = START + index * 10 * SECOND
    return DriftResult(
        *("digits", "1", test, "*", "*", start, start + 10 * SECOND),
        statistic=1.5 + index,
        threshold=10.0,
        drifted=drifted,
        effect=0.25,
        samples=1000,
        reference_samples=5000,
    )


def alert(index: int, ended: int = 0, rule: str = "novelty") -> Alert:
    """An episode that began with the index-th window; `ended` is the window that ended it."""
    return Alert(
        rule,
        "resolved" if ended else "firing",
        "critical",
        START + index * 10 * SECOND,
        START + ended * 10 * SECOND if ended else 0,
        {"model": "digits", "version": "1", "test": "budget", "detector": "*", "segment": "*"},
        {"statistic": 12.5, "windows": ended - index if ended else 1, "novel": ["a", "b"]},
    )


def flagged(index: int, sample_id: str = "") -> Exceedance:
    """A sample of the index-th window."""
    return Exceedance(
        *("digits", "1", sample_id or f"sample-{index}", "gram", ""),
        observed_at=START + index * 10 * SECOND + 5,
        score=10.0 + index,
        p=0.001 / (1 + index),
    )


def notice(index: int) -> Notice:
    """Something that an agent told."""
    return Notice(
        *("digits", "1", "agent-a", START + index * 10 * SECOND, f"breaker/{index}"),
        "breaker of `gram` opened: out of memory",
    )


def facts(index: int) -> list[Fact]:
    """One of each kind."""
    return [
        flagged(index),
        notice(index),
        window(index),
        window(index, segment="eu"),
        drift(index),
        drift(index, test="ks"),
        alert(index),
    ]


def event(name: str, subject: str = "s", at_ns: int = START) -> Event:
    """An event on its way to a receiver."""
    data = {"rule": "novelty", "value": 0.5, "list": [1, 2]}
    return Event(name, "oodmon.alert.firing.v1", "/oodmon/digits/1", subject, at_ns, data)
