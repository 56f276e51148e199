"""Odd input has a defined result: each row of the table in docs/alarms.md."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.pipeline import Pipeline
from oodmon.ranks import MOST, ranked
from oodmon.records import ALL, BIN_EDGES, DriftResult, Fact, Histogram, Notice, Window
from oodmon.rules import Rule
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, alerts, batch, calibration


def _pipeline(known: Calibration, promise: int = 100, **options: float) -> Pipeline:
    budget = Budget(f"1 per {promise} windows", **{"tolerated_fraction": 0.0, **options})  # type: ignore[arg-type]
    return Pipeline(
        "m", "1", {known.detector: known}, Windowing(1, 0, 0), {"b": budget}, {"r": Rule("b")}
    )


def _overall(facts: list[Fact]) -> list[DriftResult]:
    return [fact for fact in facts if isinstance(fact, DriftResult) and fact.detector == ALL]


def _fed(pipeline: Pipeline, columns: list[npt.NDArray[np.float64]], first: int = 0) -> list[Fact]:
    facts: list[Fact] = []
    for at, column in enumerate(columns, first):
        facts += pipeline.step(batch(column, at, at))
    return facts


def test_constant_scores_are_a_change_only_where_the_reference_was_not_constant() -> None:
    flat = Calibration.from_scores("msp", "digest-msp", np.full(500, 0.25))
    constant = [np.full(50, 0.25)] * 100
    assert alerts(_fed(_pipeline(flat), constant)) == []
    varied = calibration(500)
    (alert,) = alerts(_fed(_pipeline(varied), constant))
    assert alert.evidence["effect"] > 0.3


def test_windows_of_nothing_but_nan_are_no_evidence_and_do_not_spoil_what_there_is() -> None:
    rng = np.random.default_rng(0)
    pipeline, other = _pipeline(calibration()), _pipeline(calibration())
    good = [rng.normal(size=50) for _ in range(20)]
    _fed(pipeline, good)
    before = _overall(pipeline.advance(EPOCH + 20 * SECOND))[-1]
    facts = _fed(pipeline, [np.full(50, np.nan)] * 20, 20)
    assert {r.statistic for r in _overall(facts)} == {before.statistic}
    assert not any(result.drifted for result in _overall(facts))
    # With holes in every batch the decision is that of the rest.
    holed = [np.concatenate([column, np.full(50, np.nan)]) for column in good]
    _fed(other, holed)
    assert _overall(other.advance(EPOCH + 20 * SECOND))[-1].statistic == before.statistic


def test_a_reference_of_20_finds_what_20_can_tell() -> None:
    """Sequential ranks are exact at any size: false alarms stay rare, great changes are found."""
    lengths, delays = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pipeline = _pipeline(calibration(20, seed))
        calm = _overall(_fed(pipeline, [rng.normal(size=8) for _ in range(130)]))
        first = next((at for at, result in enumerate(calm) if result.drifted), len(calm))
        lengths.append(first + 1)
        late = _pipeline(calibration(20, seed))
        _fed(late, [rng.normal(size=8) for _ in range(25)])
        found = _overall(_fed(late, [rng.normal(size=8) + 3 for _ in range(25)], 25))
        delays.append(next((at for at, r in enumerate(found) if r.drifted), 1000))
    assert np.mean(lengths) >= 100
    assert np.median(delays) <= 10
    words = Budget().outlook(calibration(20).reference())
    assert "20 calibration scores" in words


def test_a_segment_seen_first_shares_the_promise_from_then_on() -> None:
    rng = np.random.default_rng(1)
    pipeline = _pipeline(calibration())
    facts: list[Fact] = []
    for at in range(80):
        names = ("old", "new") if at >= 40 else ("old",)
        segment = (np.arange(60) % len(names)).astype(np.int32)
        scores = rng.normal(size=60) + 3.0 * (segment == 1) * (at >= 60)
        facts += pipeline.step(batch(scores, at, at, segment=segment, segments=names))
    assert len({r.segment for r in facts if isinstance(r, DriftResult)} - {ALL}) == 2
    fired = [r.start for r in _overall(facts) if r.drifted]
    assert min(fired) == EPOCH + 60 * SECOND
    (alert,) = alerts(facts)
    assert alert.evidence["streams"][0]["segment"] == "new"


def test_a_scorer_that_changed_under_way_is_invalid_and_told_once() -> None:
    rng = np.random.default_rng(2)
    pipeline = _pipeline(calibration())
    facts: list[Fact] = []
    for at in range(60):
        one = batch(rng.normal(size=50) + (5.0 if at >= 30 else 0.0), at, at)
        if at >= 30:
            one = dataclasses.replace(one, digests={"msp": "another"})
        facts += pipeline.step(one)
    assert alerts(facts) == []
    (told,) = [fact for fact in facts if isinstance(fact, Notice)]
    assert "another" in told.text
    windows = [fact for fact in facts if isinstance(fact, Window)]
    assert windows[-1].histogram("msp").invalid == 50
    assert windows[-1].histogram("msp").scored == 0


def test_a_thousandfold_burst_is_no_change_and_takes_bounded_time() -> None:
    known = calibration(5000)
    rng = np.random.default_rng(3)
    columns = [rng.normal(size=50) for _ in range(30)]
    columns += [rng.normal(size=50_000)] + [rng.normal(size=50) for _ in range(30)]
    pipeline = _pipeline(known, promise=1000)
    assert alerts(_fed(pipeline, columns)) == []

    # However many samples a window counts, at most MOST of them are ranked.
    law = np.diff(BIN_EDGES)
    counts = rng.multinomial(10_000_000, law).astype(np.int64)
    pool = np.maximum(np.round(5001 * law), 1).astype(np.int64)
    began = time.process_time()
    found = ranked(counts[None], pool[None], np.array([7], np.uint64))[0]
    assert found.sum() == MOST
    assert time.process_time() - began < 60.0
    # And a burst that is a change is one.
    novel = [np.where(rng.random(50_000) < 0.2, 6.0, rng.normal(size=50_000))]
    burst = _pipeline(known, promise=1000)
    _fed(burst, columns[:30])
    facts = _fed(burst, novel, 30) + burst.advance(EPOCH + 31 * SECOND)
    assert [alert.status for alert in alerts(facts)] == ["firing"]


def test_hours_of_silence_change_nothing() -> None:
    rng = np.random.default_rng(4)
    columns = [rng.normal(size=50) for _ in range(60)]
    silent = _pipeline(calibration())
    first = _fed(silent, columns[:30])
    quiet: list[Fact] = []
    quiet += silent.advance(EPOCH + 60 * SECOND)
    for minute in range(2, 600):
        assert silent.advance(EPOCH + minute * 60 * SECOND) == []
    rest = _fed(silent, columns[30:], 40_000)
    assert alerts([*first, *quiet, *rest]) == []
    assert len(_overall([*first, *quiet])) == 30


def test_ranks_are_uniform_and_independent_for_a_small_reference() -> None:
    """The heart of sequential ranks: over the draw of reference and stream, exact for n = 9."""
    total = np.zeros(64)
    products = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        known = Calibration.from_scores("d", "", rng.normal(size=9))
        pool = known.reference().histogram("d").counts.copy()
        pool[np.searchsorted(BIN_EDGES, 0.1) - 1] += 1
        low = []
        for window in range(3):
            counts = np.bincount(known.bins(rng.normal(size=6)), minlength=64)
            seeds = np.array([seed * 3 + window], np.uint64)
            found = ranked(counts[None], pool[None], seeds)[0]
            total += found
            low.append(found[BIN_EDGES[1:] <= 0.1 + 1e-9].sum() / 6 - 0.1)
            pool = pool + counts
        products.append([low[0] * low[1], low[1] * low[2], low[0] * low[2]])
    expected = total.sum() * np.diff(BIN_EDGES)
    wide = expected > 5
    assert ((total - expected)[wide] ** 2 / expected[wide]).sum() < wide.sum() + 4 * np.sqrt(
        2 * wide.sum()
    )
    for column in np.array(products).T:
        assert abs(column.mean()) < 3.5 * column.std() / np.sqrt(len(column))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_pool_learns_from_good_traffic_only(frozen: bool) -> None:
    """A stream that alarms teaches nothing: its evidence does not fade while the change lasts."""
    known = calibration(1000)
    budget = Budget(
        "1 per 100 windows", tolerated_fraction=0.0, ranks="auto" if frozen else "sequential"
    )
    rng = np.random.default_rng(5)
    state = budget.start(known.reference())
    results = []
    for at in range(300):
        counts = np.bincount(
            known.bins(rng.normal(size=50) + (1.5 if at >= 20 else 0)), minlength=64
        )
        histogram = Histogram(
            counts.astype(np.int64), 0, np.empty(0, np.uint64), np.empty(0, np.float32)
        )
        start = EPOCH + at * SECOND
        window = Window("m", "1", "", start, start + SECOND, 50, detectors={"d": histogram})
        state, result = budget.step(state, window, "d")
        results.append(result)
    assert all(result.statistic >= result.threshold for result in results[30:])
    assert state.seen.sum() <= 23 * 50
    assert results[-1].since == EPOCH + 20 * SECOND
