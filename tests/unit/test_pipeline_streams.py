"""The streams of all drift tests: stored in few arrays, and back as if nothing had happened."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from oodmon.calibration import Calibration
from oodmon.contracts import DriftTest
from oodmon.pipeline.streams import Streams
from oodmon.records import Histogram, Window
from oodmon.registry import drift
from oodmon.wire import pack, unpack

SEGMENTS = ("x", "y", "z")
SECOND = 1_000_000_000


def _span(rng: np.random.Generator, known: Calibration, at: int) -> list[Window]:
    found = []
    for segment in SEGMENTS[: 1 + at % 3]:
        scores = rng.normal(size=40).astype(np.float32)
        histogram = Histogram(
            np.bincount(known.bins(scores), minlength=64).astype(np.int64),
            0,
            np.arange(40, dtype=np.uint64),
            scores,
            pairs=39,
            jumps=30_000_000,
            judged=40,
            errors=4_000_000,
        )
        start, end = at * SECOND, (at + 1) * SECOND
        found.append(
            Window("m", "1", segment, start, end, 40, 0, 0, {"d": histogram}, {0: 20, 1: 20})
        )
    return found


def test_every_test_goes_on_from_the_stored_streams() -> None:
    rng = np.random.default_rng(0)
    known = Calibration.from_scores("d", "x", rng.normal(size=500), np.arange(500) % 2)
    tests: dict[str, DriftTest[Any]] = {name: drift.create(name) for name in drift.names()}
    references = {"d": known.reference("m", "1")}
    whole = Streams(tests, references)
    thawed = whole
    for at in range(1, 13):
        span = _span(rng, known, at)
        wanted = [repr(result) for result in whole.judge(span, span)]
        if thawed is not whole:
            assert [repr(result) for result in thawed.judge(span, span)] == wanted
        arrays, state = whole.freeze()
        back, meta = unpack(pack(arrays, {"state": json.dumps(state)}))
        thawed = Streams(tests, references)
        thawed.thaw(back, json.loads(meta["state"]), {"d"})


def test_streams_lie_in_few_arrays_and_start_anew_with_another_reference() -> None:
    rng = np.random.default_rng(1)
    known = Calibration.from_scores("d", "x", rng.normal(size=500))
    tests: dict[str, DriftTest[Any]] = {"budget": drift.create("budget")}
    before = Streams(tests, {"d": known.reference("m", "1")})
    span = _span(rng, known, 2)
    before.judge(span, span)
    arrays, state = before.freeze()
    # One array of each field for all three streams, not one for each.
    assert len(arrays) == len(tests["budget"].freeze(tests["budget"].start(known.reference())))
    after = Streams(tests, {"d": known.reference("m", "1")})
    after.thaw(arrays, json.loads(json.dumps(state)), ())
    assert after.measurements() == {}
    assert len(before.measurements()) == 3
