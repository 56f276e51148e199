"""Thresholds for `false_alarms`: found on resampled windows, bound to what they were found for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodmon.calibration import Calibration
from oodmon.cells import Cells
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.contexts import Context
from oodmon.drift import thresholds
from oodmon.drift.adwin import Adwin
from oodmon.drift.ddm import Ddm
from oodmon.drift.hddm import Hddm
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.drift.page_hinkley import PageHinkley
from oodmon.drift.resampling import Held, block_length, resampled
from oodmon.drift.thresholds import Threshold, tune, tuned
from oodmon.drift.tuned import Tunable
from oodmon.errors import StateError
from oodmon.records import BIN_EDGES, Histogram, ScoreBatch, Window

SAMPLES = 64
KS = KolmogorovSmirnov(false_alarms="1 per 100 windows")


@pytest.fixture(autouse=True)
def _fewer_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "WINDOWS", 12_000)
    monkeypatch.setattr(thresholds, "EACH", 8_000)


def correlated(rng: np.random.Generator, size: int, phi: float) -> np.ndarray[Any, Any]:
    noise = rng.standard_normal(size) * np.sqrt(1.0 - phi**2)
    values = np.empty(size, np.float32)
    last = rng.standard_normal()
    for at, shock in enumerate(noise.tolist()):
        last = phi * last + shock
        values[at] = last
    return values


def held(phi: float = 0.0, n: int = 4_000, seed: int = 0, block: int | None = None) -> Held:
    scores = correlated(np.random.default_rng(seed), n, phi)
    classes = (scores > 0).astype(np.int64)
    calibration = Calibration.from_scores("d", "digest", scores, classes)
    return Held(calibration, scores, classes, block_length(scores) if block is None else block)


def run_length(test: Any, one: Held, phi: float, windows: int = 3_000) -> float:
    """Windows per alarm on a fresh stream of the same law."""
    fresh = correlated(np.random.default_rng(99), windows * SAMPLES, phi).reshape(-1, SAMPLES)
    state = test.start(one.calibration.reference())
    alarms = 0
    for at, values in enumerate(fresh):
        counts = np.bincount(one.calibration.bins(values), minlength=len(BIN_EDGES) - 1)
        empty = Histogram.empty()
        histogram = Histogram(counts, 0, empty.keys, empty.sample)
        window = Window("", "", "", at, at + 1, SAMPLES, detectors={"d": histogram})
        state, result = test.step(state, window, "d")
        alarms += result.drifted
    return windows / max(alarms, 1)


def test_the_block_grows_with_the_correlation() -> None:
    assert held().block == 1
    assert 20 <= held(0.3).block <= 40
    assert 60 <= held(0.6).block <= 100
    assert block_length(np.zeros(100, np.float32)) in range(1, 11), "constant scores are defined"


def test_resampled_windows_hold_what_was_held_out() -> None:
    one = held(0.6)
    reference, windows = resampled(one, SAMPLES, 20, np.random.default_rng(1))
    seen = list(windows)
    assert reference.histogram("d").scored == 4_000
    assert [window.histogram("d").scored for window in seen] == [SAMPLES] * 20
    assert all(sum(window.predicted.values()) == SAMPLES for window in seen)
    assert np.isin(seen[3].histogram("d").sample, one.scores).all()


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_the_promised_run_length_holds(phi: float) -> None:
    one = held(phi)
    found = tune(KS, {"d": one}, SAMPLES, 60.0)
    test = tuned(KS, found, {"d": one.calibration}, 60.0)
    # 3,000 windows: 30 alarms are expected, and one calibration set may be off by chance.
    assert 55 <= run_length(test, one, phi) <= 400
    assert test.run_length(60.0) == 100.0
    assert "1 per 100 windows" in test.promise(60.0)


def test_correlation_that_is_not_told_breaks_the_promise() -> None:
    one = held(0.6)
    blind = tuned(
        KS, tune(KS, {"d": held(0.6, block=1)}, SAMPLES, 60.0), {"d": one.calibration}, 60.0
    )
    assert run_length(blind, one, 0.6) < 40


@pytest.mark.parametrize(
    "test",
    [
        PageHinkley(false_alarms="1 per 100 windows"),
        Ddm(false_alarms="1 per 100 windows"),
        Hddm(false_alarms="1 per 100 windows"),
    ],
    ids=["page_hinkley", "ddm", "hddm"],
)
def test_tests_with_a_memory_are_tuned_too(test: Tunable[Any]) -> None:
    one = held()
    made = tuned(test, tune(test, {"d": one}, SAMPLES, 1.0), {"d": one.calibration}, 1.0)
    # Rarely enough, and not so rarely that the test is as good as switched off.
    assert 55 <= run_length(made, one, 0.0) <= 600


def test_a_scale_begins_where_it_makes_a_difference() -> None:
    # Textbook run lengths below 400 windows are not in adwin's table, and come to the same.
    assert thresholds._first(Adwin()) == pytest.approx(400.0)
    assert thresholds._first(PageHinkley()) == pytest.approx(50.0)
    assert thresholds._first(KS) == pytest.approx(thresholds.FIRST)


def test_within_contexts_the_promise_holds_whatever_the_mix() -> None:
    """Ranks among all scores would alarm at any other mix of the two classes."""
    rng, classes = np.random.default_rng(3), Context(("predicted",))

    def drawn(size: int, share: float) -> tuple[Any, Any]:
        labels = (rng.random(size) < share).astype(np.int32)
        return (rng.standard_normal(size) + 4.0 * labels).astype(np.float32), labels

    scores, labels = drawn(3_000, 0.5)
    calibration = Calibration.from_scores("d", "digest", scores, labels)
    whole = Held(calibration, scores, labels.astype(np.int64))
    one = whole.within(classes, in_order=False)
    found = tune(KS, {"d": one}, SAMPLES, 60.0, context=classes)
    test = tuned(KS, found, {"d": calibration}, 60.0, classes)
    cells = Cells(calibration, classes)
    state, alarms = test.start(cells.reference("", "")), 0
    for at in range(3_000):
        values, seen = drawn(SAMPLES, 0.1)
        batch = ScoreBatch("", "", "s", at, at, {"d": values}, {"d": "digest"}, predicted=seen)
        counts = np.bincount(cells.bins(batch), minlength=len(BIN_EDGES) - 1)
        empty = Histogram.empty()
        histogram = Histogram(counts, 0, empty.keys, empty.sample)
        window = Window("", "", "", at, at + 1, SAMPLES, detectors={"d": histogram})
        state, result = test.step(state, window, "d")
        alarms += result.drifted
    assert 55 <= 3_000 / max(alarms, 1) <= 600
    with pytest.raises(StateError, match=r"ranks within Context.*the config says nothing"):
        tuned(KS, found, {"d": calibration}, 60.0)


def test_neighbours_stay_together_within_contexts() -> None:
    one = held(0.6)
    ranked = one.within(Context(("predicted",)), in_order=True)
    # Within its half of the scores a sample is less like its neighbour than among all.
    assert 1 < ranked.block < one.block
    assert np.all((ranked.ranked > 0.0) & (ranked.ranked < 1.0))
    low = one.scores <= 0
    order = np.argsort(one.scores[low])
    assert np.all(np.diff(ranked.ranked[low][order]) >= 0.0), "the order within a class is kept"
    assert ranked.ranked[~low].min() < 0.01, "each class begins at 0"
    assert ranked.reference == min(low.sum(), (~low).sum())


def test_a_promise_is_shared_and_a_longer_one_is_stricter() -> None:
    one = held()
    alone = tune(KS, {"d": one}, SAMPLES, 60.0)
    both = tune(KS, {"d": one, "e": one}, SAMPLES, 60.0)
    longer = tune(replace(KS, false_alarms="1 per 30 days"), {"d": one}, SAMPLES, 60.0)
    assert alone.nominal < both.nominal < longer.nominal
    assert longer.longest < 43_200, "beyond what was simulated it goes on along the line"


def test_what_it_was_not_found_for_is_refused(tmp_path: Path) -> None:
    one, other = held(n=500), held(n=500, seed=1)
    found = Threshold(repr(KS), 60.0, SAMPLES, 100.0, 100.0, {})
    found = replace(found, calibrations=tune(KS, {"d": one}, 16, 60.0).calibrations)
    path = tmp_path / "shape.threshold.json"
    found.save(path)
    assert Threshold.load(path) == found
    with pytest.raises(StateError, match="other calibrations of d"):
        tuned(KS, found, {"d": other.calibration}, 60.0)
    with pytest.raises(StateError, match="the config says"):
        tuned(replace(KS, alpha=0.5), found, {"d": one.calibration}, 60.0)
    with pytest.raises(StateError, match="windows of 60 s, the config cuts 30 s"):
        tuned(KS, found, {"d": one.calibration}, 30.0)
    for text in ("[]", "{", json.dumps({"schema": "oodmon.threshold/1", "test": "x"})):
        path.write_text(text)
        with pytest.raises(StateError, match=r"shape\.threshold\.json"):
            Threshold.load(path)


CONFIG = """
model: {name: m}
daemon:
  feed: {type: memory}
  calibration: {path: states/}
  windows: {length_seconds: 60}
  drift:
    shape: {type: ks, false_alarms: 1 per 100 windows}
  rules:
    moved: {drift: shape}
"""


def test_the_daemon_needs_the_threshold_and_takes_it(tmp_path: Path) -> None:
    one = held(n=500)
    states = tmp_path / "states"
    states.mkdir()
    one.calibration.save(states / "d.calibration.safetensors")
    path = tmp_path / "oodmon.yaml"
    path.write_text(CONFIG)
    config = load(path, "daemon")
    with pytest.raises(StateError, match=r"drift test 'shape'.*shape\.threshold\.json.*oodmon fit"):
        build.pipeline(config)
    tune(KS, {"d": one}, 16, 60.0).save(build.threshold_path(str(states), "shape"))
    assert "1 per 100 windows" in build.pipeline(config).promises()["shape"]
    held(n=500, seed=1).calibration.save(states / "d.calibration.safetensors")
    with pytest.raises(StateError, match="other calibrations"):
        build.pipeline(config)
