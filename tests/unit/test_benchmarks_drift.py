"""The drift benchmark's short cuts change nothing: its windows are those of the product."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drift.ours import OURS, Budgeted, Ours
from benchmarks.drift.side import DETECTOR, SECOND, Panes, Side
from benchmarks.drift.streams import Change, Stream
from benchmarks.drift.worker import Plan, delay, run_length
from oodmon.calibration import Calibration
from oodmon.drift.budget import Budget
from oodmon.records import ScoreBatch
from oodmon.windows import Windowing, Windows


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_panes_are_those_of_the_product(rows: int) -> None:
    rng = np.random.default_rng(0)
    known = Calibration.from_scores(DETECTOR, "", rng.standard_normal(200))
    scores = rng.standard_normal((5, 6 * rows)).astype(np.float32)
    bins = np.stack([known.bins(row) for row in scores])
    panes = Panes(bins, rows)
    names = tuple(f"{stream:04}" for stream in range(len(scores)))
    windows = Windows("m", "1", Windowing(1.0, allowed_lateness_seconds=0.0))
    for place in range(panes.count):
        taken = slice(place * rows, (place + 1) * rows)
        batch = ScoreBatch(
            "m",
            "1",
            "s",
            place,
            (1 + place) * SECOND,
            {DETECTOR: scores[:, taken].ravel()},
            {},
            segment=np.arange(len(names), dtype=np.int32).repeat(rows),
            segments=names,
        )
        windows.add(batch, {DETECTOR: bins[:, taken].ravel()})
        theirs = [closed.pane for closed in windows.advance((2 + place) * SECOND)]
        ours = panes.at(place, np.arange(len(names)))
        assert len(theirs) == len(ours) == len(names)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.segment, one.start, one.end, one.samples) == (
                other.segment,
                other.start,
                other.end,
                other.samples,
            )
            mine, found = one.histogram(DETECTOR), other.histogram(DETECTOR)
            assert np.array_equal(mine.counts, found.counts)
            assert (mine.pairs, mine.jumps, mine.swings) == (
                found.pairs,
                found.jumps,
                found.swings,
            )


def test_streams_side_by_side_are_judged_as_alone() -> None:
    stream, change = Stream("gauss"), Change("shifted", mean=1.0)
    budget = Budget("1 per 100 windows", tolerated_fraction=0.0)
    references = [stream.reference(run, 200, {}) for run in range(6)]
    values = [stream.draw(stream.generator("", run), 150, 60, change, {}) for run in range(6)]
    found = Side(budget, 1, references, values).first_alarms(150)
    assert all(150 < at <= 210 for at, _ in found)
    # The first has the same place, and so the same random numbers, alone and among others.
    assert Side(budget, 1, references[:1], values[:1]).first_alarms(150) == found[:1]
    assert sum(before for _, before in found) > 0
    assert Side(budget, 1, references, values).first_alarms()[0][1] == 0


def test_a_cell_adds_up() -> None:
    plan = Plan(repetitions=3, seconds=1.0, reference=200, control=400, after=300)
    stream = Stream("gauss")
    quiet = run_length(Budgeted(100), "budget", stream, plan, {})
    assert quiet.repetitions == 3
    assert 0 < quiet.values <= 3 * 400
    assert quiet.state_bytes > 0
    shifted = delay(Budgeted(100), "budget", stream, Change("mean", mean=2.0), plan, {})
    assert shifted.alarms == 3
    assert 3 <= shifted.values < 3 * 300
    assert shifted.squares >= shifted.values**2 / 3


def test_real_scores_have_no_ties() -> None:
    pool = np.unique(np.random.default_rng(1).standard_normal(50))
    stream, change = Stream("s", pool="known"), Change("c", share=0.5, novel="novel")
    pools = {"known": pool, "novel": pool + 10.0}
    values = stream.draw(stream.generator("c", 0), 2_000, 2_000, change, pools)
    assert len(np.unique(values)) == len(values)
    assert values[:2_000].max() <= pool[-1]
    assert np.mean(values[2_000:] > 5.0) == pytest.approx(0.5, abs=0.05)
    assert np.median(values[:2_000]) == pytest.approx(np.median(pool), abs=0.1)


@pytest.mark.parametrize("name", [name for name in OURS if "budget" in name])
def test_a_budget_keeps_the_promise_that_it_is_named_by(name: str) -> None:
    made = OURS[name]()
    assert isinstance(made, Budgeted | Ours)
    assert f"budget {made.promise:,.0f}" in name
    window = made.window if isinstance(made, Ours) else 1
    assert made.test.run_length(1.0) * window == pytest.approx(made.promise)
