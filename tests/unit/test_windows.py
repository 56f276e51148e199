"""Windows by event time: tumbling, sliding, lateness, silence, bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from oodmon.calibration import NORMAL_SCORES
from oodmon.errors import ContractError
from oodmon.records import SAMPLE_SIZE, Histogram, ScoreBatch, Window
from oodmon.windows import OTHER, Closed, Windowing, Windows
from tests.streams import EPOCH, SECOND, batch, calibration, plain

CALIBRATION = calibration()


def _windows(length: float = 10, every: float = 0, lateness: float = 0) -> Windows:
    return Windows("m", "1", Windowing(length, every, lateness))


def _add(windows: Windows, *batches: ScoreBatch) -> list[Closed]:
    closed = []
    for one in batches:
        bins = {name: CALIBRATION.bins(column) for name, column in one.scores.items()}
        windows.add(one, bins)
        closed += list(windows.close())
    return closed


def test_tumbling_windows_are_half_open_and_close_by_the_watermark() -> None:
    windows = _windows()
    assert _add(windows, batch([0.0], 0), batch([1.0, 2.0], 9.999)) == []
    (closed,) = _add(windows, batch([3.0], 10))
    assert (closed.window.start, closed.window.end) == (EPOCH, EPOCH + 10 * SECOND)
    assert closed.window.samples == 3
    assert closed.window.histogram("msp").scored == 3


def test_lateness_waits_then_counts() -> None:
    windows = _windows(lateness=5)
    assert _add(windows, batch([0.0], 1), batch([0.0], 14)) == []
    assert _add(windows, batch([0.5], 2)) == [], "a straggler within the lateness is merged"
    (first,) = _add(windows, batch([0.0], 15))
    assert first.window.samples == 2
    assert _add(windows, batch([9.0, 9.0], 3)) == []
    (second,) = list(windows.advance(EPOCH + 25 * SECOND))
    assert (second.window.samples, second.window.late) == (2, 2)
    assert second.window.histogram("msp").scored == 2, "late samples are counted, not merged"


def test_windows_close_without_traffic_and_silence_makes_none() -> None:
    windows = _windows()
    _add(windows, batch([0.0], 1))
    assert list(windows.advance(EPOCH + 9 * SECOND)) == []
    assert len(list(windows.advance(EPOCH + 10 * SECOND))) == 1
    assert list(windows.advance(EPOCH + 86_400 * SECOND)) == []
    assert len(_add(windows, batch([0.0], 86_500), batch([0.0], 86_510))) == 1


def test_sliding_windows_are_sums_of_panes() -> None:
    windows = _windows(length=30, every=10)
    closed = _add(windows, *(batch([0.0] * (i + 1), 10 * i) for i in range(5)))
    closed += list(windows.advance(EPOCH + 1000 * SECOND))
    spans = [((c.window.end - EPOCH) // SECOND, c.window.samples) for c in closed]
    assert spans == [(10, 1), (20, 3), (30, 6), (40, 9), (50, 12), (60, 9), (70, 5)]
    assert all(c.window.end - c.window.start == 30 * SECOND for c in closed)
    assert sum(c.pane.samples for c in closed) == 15, "every sample is in one pane"


def test_segments_classes_and_invalid_scores_are_counted_apart() -> None:
    windows = _windows()
    one = batch(
        [0.0, np.nan, 2.0, 3.0],
        segment=np.array([0, 1, 1, 1], np.int32),
        segments=("eu", "us"),
        predicted=np.array([7, 1, 1, -1], np.int32),
        dropped=5,
    )
    _add(windows, one)
    closed = {c.window.segment: c.window for c in windows.advance(EPOCH + 10 * SECOND)}
    assert sorted(closed) == ["", "eu", "us"]
    assert closed[""].dropped == 5
    us = closed["us"]
    assert (us.samples, us.histogram("msp").invalid, us.histogram("msp").scored) == (3, 1, 2)
    assert us.predicted == {1: 2}
    assert not np.isnan(us.histogram("msp").sample).any(), "NaN never gets past the windows"


def test_neighbours_are_paired_over_batches_and_not_over_invalid_scores_or_sources() -> None:
    windows = _windows()
    known = calibration()
    values = np.linspace(-2.0, 2.0, 9).astype(np.float32)
    values[4] = np.nan
    first, second = batch(values[:5], 0, 0), batch(values[5:], 1, 1)
    name = next(iter(first.scores))
    closed = _add(windows, first, second, batch([], 99, 2))
    histogram = closed[0].window.histogram(name)
    z = NORMAL_SCORES[known.bins(values[~np.isnan(values)])]
    assert histogram.pairs == 7
    assert histogram.jumps == pytest.approx(1e6 * (np.diff(z) ** 2).sum(), rel=0.01)
    assert histogram.swings == pytest.approx(1e6 * (np.diff(z**2) ** 2).sum(), rel=0.01)
    both = histogram + histogram
    assert (both.pairs, both.swings) == (14, 2 * histogram.swings)


def test_detectors_counted_together_are_counted_as_each_alone() -> None:
    rng = np.random.default_rng(3)
    names = ("a", "b", "c")
    whole, alone = _windows(), {name: _windows() for name in names}
    columns = []
    for at in range(12):
        rows = int(rng.integers(1, 40))
        scores = {name: rng.normal(size=rows).astype(np.float32) for name in names}
        if at % 3 == 1:
            scores["b"][rng.random(rows) < 0.5] = np.nan
        if at == 7:
            del scores["c"]
        segment = rng.integers(0, 2, rows).astype(np.int32)
        columns.append((scores, segment, rng.integers(0, 3, rows).astype(np.int32)))

    def fed(windows: Windows, kept: tuple[str, ...]) -> list[Window]:
        closed = []
        for at, (scores, segment, predicted) in enumerate(columns):
            mine = {name: scores[name] for name in kept if name in scores}
            if not mine:
                continue
            one = replace(
                batch([0.0] * len(segment), at, at),
                scores=mine,
                digests=dict.fromkeys(mine, "x"),
                segment=segment,
                segments=("x", "y"),
                predicted=predicted,
            )
            closed += _add(windows, one)
        return [c.window for c in (*closed, *windows.advance(EPOCH + 99 * SECOND))]

    together = fed(whole, names)
    assert len(together) == 4
    for name in names:
        for mine, window in zip(fed(alone[name], (name,)), together, strict=True):
            found, expected = window.histogram(name), mine.histogram(name)
            assert expected.pairs > 0
            for part in ("invalid", "pairs", "jumps", "swings"):
                assert getattr(found, part) == getattr(expected, part), part
            for part in ("counts", "keys", "sample", "classes"):
                assert np.array_equal(getattr(found, part), getattr(expected, part)), part


def test_segments_are_bounded() -> None:
    windows = _windows()
    for i in range(300):
        one = batch([0.0], 0, i, segment=np.zeros(1, np.int32), segments=(f"s{i}",))
        _add(windows, one)
    closed = {c.window.segment: c.window for c in windows.advance(EPOCH + 10 * SECOND)}
    assert len(closed) == 257
    assert closed[OTHER].samples == 300 - 256


def test_the_raw_sample_is_uniform_mergeable_and_bounded() -> None:
    rng = np.random.default_rng(3)
    batches = [batch(rng.normal(size=100), 0.01 * i, i) for i in range(40)]
    whole, left, right = _windows(), _windows(), _windows()
    _add(whole, *batches)
    _add(left, *batches[::2])
    _add(right, *reversed(batches[1::2]))
    end = EPOCH + 10 * SECOND
    one = next(whole.advance(end)).window
    parts = [next(w.advance(end)).window for w in (left, right)]
    assert plain(parts[0] + parts[1]) == plain(one)
    assert plain(parts[1] + parts[0]) == plain(one)
    histogram = one.histogram("msp")
    assert len(histogram.keys) == SAMPLE_SIZE
    assert (np.diff(histogram.keys.astype(object)) > 0).all()
    assert abs(float(histogram.sample.mean())) < 4 / SAMPLE_SIZE**0.5


def test_zero_of_addition_and_foreign_windows() -> None:
    windows = _windows()
    _add(windows, batch([0.0, 1.0]))
    window = next(windows.advance(EPOCH + 10 * SECOND)).window
    zero = Window("m", "1", "", window.start, window.end, detectors={"msp": Histogram.empty()})
    assert plain(window + zero) == plain(window) == plain(zero + window)
    with pytest.raises(ContractError, match="only windows of one model"):
        window + Window("m", "2", "", window.start, window.end)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"length_seconds": 0}, "length_seconds"),
        ({"length_seconds": float("nan")}, "length_seconds"),
        ({"length_seconds": 10, "every_seconds": 3}, "does not divide"),
        ({"length_seconds": 10, "every_seconds": 20}, "does not divide"),
        ({"allowed_lateness_seconds": -1}, "allowed_lateness_seconds"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], what: str) -> None:
    with pytest.raises(ContractError, match=what):
        Windowing(**options)
