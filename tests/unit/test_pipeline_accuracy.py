"""Estimated accuracy on its way: the fold, the alert's words, the metric, the row, the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oodmon.calibration import EXPECTED_ERROR, Calibration, expected_errors
from oodmon.cells import Cells
from oodmon.cli.replay import stored_windows
from oodmon.contexts import Context
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.observe import Observer
from oodmon.drift.accuracy_loss import AccuracyLoss
from oodmon.drift.budget import Budget
from oodmon.pipeline import Pipeline
from oodmon.pipeline.accuracy import Accuracy
from oodmon.records import Fact, Histogram, Window
from oodmon.report import build
from oodmon.report.accuracy import estimates
from oodmon.rules import Rule
from oodmon.store.events import Store
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, alerts, batch


def _calibration(
    name: str = "error", mean: float = 0.1, measures: str = EXPECTED_ERROR
) -> Calibration:
    scores = np.random.default_rng(1).beta(2 * mean, 2 * (1 - mean), 2_000)
    return Calibration.from_scores(name, f"digest-{name}", scores, measures=measures)


def _pane(judged: int, accuracy: float, start: int = 0) -> Window:
    empty = Histogram.empty()
    errors = round((1.0 - accuracy) * judged * 1e6)
    histogram = Histogram(empty.counts, 0, empty.keys, empty.sample, judged=judged, errors=errors)
    return Window("m", "1", "", start, start + 1, judged, detectors={"error": histogram})


def _fold() -> Accuracy:
    return Accuracy({"error": _calibration().reference().histogram("error")})


def test_before_is_the_quiet_traffic_and_now_what_came_since() -> None:
    fold = _fold()
    assert fold.told() == {}
    fold.take([_pane(100, 0.95)], suspicious=False)
    fold.take([_pane(300, 0.91)], suspicious=False)
    fold.take([_pane(50, 0.80), _pane(50, 0.60)], suspicious=True)
    (row,) = fold.told()["accuracy"]
    assert row["before"] == pytest.approx(0.92)
    assert row["now"] == pytest.approx(0.70)
    assert row["samples"] == 100
    assert row["uncertainty"] == pytest.approx(2 * (0.7 * 0.3 / 100) ** 0.5)
    assert row["reference"] == pytest.approx(0.9, abs=0.02)
    fold.take([_pane(400, 0.9)], suspicious=False)
    assert fold.told() == {}
    fold.take([_pane(10, 0.5)], suspicious=True)
    assert fold.told()["accuracy"][0]["before"] == pytest.approx((0.92 * 4 + 0.7 + 0.9 * 4) / 9)


def test_where_no_traffic_was_quiet_the_reference_is_what_was_before() -> None:
    fold = _fold()
    fold.take([_pane(10, 0.5)], suspicious=True)
    (row,) = fold.told()["accuracy"]
    assert row["before"] == row["reference"]


def test_detectors_that_measure_nothing_have_no_part() -> None:
    known = _calibration(measures="").reference().histogram("error")
    assert np.isnan(known.accuracy)
    fold = Accuracy({"error": known})
    fold.take([_pane(10, 0.5)], suspicious=True)
    assert fold.told() == {}


def test_the_fold_survives_a_restart_and_a_detector_that_is_gone() -> None:
    fold, again = _fold(), _fold()
    fold.take([_pane(100, 0.95)], suspicious=False)
    fold.take([_pane(100, 0.7)], suspicious=True)
    again.thaw(fold.freeze())
    assert again.told() == fold.told()
    gone = Accuracy({})
    gone.thaw(fold.freeze())
    assert gone.told() == {}


def test_old_traffic_counts_less_after_a_million_samples() -> None:
    fold = _fold()
    fold.take([_pane(2**21, 1.0)], suspicious=False)
    fold.take([_pane(2**20, 0.0)], suspicious=False)
    fold.take([_pane(1, 0.5)], suspicious=True)
    assert fold.told()["accuracy"][0]["before"] == pytest.approx(0.5)


def test_sums_are_whole_and_what_is_no_probability_is_clipped() -> None:
    assert expected_errors(np.array([0.25, np.nan, 2.0, -1.0], np.float32)) == 1_250_000
    assert expected_errors(np.array([], np.float32)) == 0


def test_the_calibration_keeps_what_it_measures(tmp_path: Path) -> None:
    made = _calibration()
    made.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.measures == EXPECTED_ERROR
    known = loaded.reference().histogram("error")
    assert known.judged == 2_000
    assert known.accuracy == pytest.approx(1.0 - float(made.scores.astype(float).mean()), abs=1e-6)


def test_ranks_within_a_class_leave_the_estimate_as_it_is() -> None:
    plain = _calibration()
    classes = np.arange(2_000) % 2
    made = Calibration.from_scores("error", "d", plain.scores, classes, EXPECTED_ERROR)
    ranked = Cells(made, Context(("predicted",))).reference("m", "1").histogram("error")
    assert ranked.accuracy == made.reference().histogram("error").accuracy


def _pipeline() -> Pipeline:
    return Pipeline(
        "m",
        "1",
        {"error": _calibration(), "msp": _calibration("msp", measures="")},
        Windowing(10.0, 5.0, 0.0),
        {"budget": Budget("1 per 10000 windows"), "loss": AccuracyLoss("1 per 10000 windows")},
        {"changed": Rule("budget"), "worse": Rule("loss")},
    )


def _facts(pipeline: Pipeline, means: list[float]) -> list[Fact]:
    rng = np.random.default_rng(2)
    facts: list[Fact] = []
    for sequence, mean in enumerate(means):
        scores = rng.beta(2 * mean, 2 * (1 - mean), 50).astype(np.float32)
        scores[0] = np.nan
        one = batch(scores, float(sequence), sequence, detectors=("error", "msp"))
        facts += pipeline.step(one)
    return facts + pipeline.advance(EPOCH + 10_000 * SECOND)


def test_rows_metrics_replay_and_report_agree(tmp_path: Path) -> None:
    pipeline = _pipeline()
    metrics = Metrics()
    observer = Observer(metrics)
    observer.configured(pipeline, 0.001, {})
    facts = _facts(pipeline, [0.1] * 60 + [0.5] * 60)
    observer.facts(facts)
    windows = [fact for fact in facts if isinstance(fact, Window) and fact.samples]
    whole = [w for w in windows if w.start % (10 * SECOND) == 0]
    stream = {"model": "m", "model_version": "1", "segment": ""}
    shown = metrics.value("oodmon_estimated_accuracy_ratio", **stream, detector="error")
    assert shown == whole[-1].histogram("error").accuracy
    assert whole[-1].histogram("error").judged == 490
    known = metrics.value("oodmon_reference_accuracy_ratio", detector="error")
    assert known == pytest.approx(0.9, abs=0.02)
    text = metrics.render().decode()
    assert 'oodmon_reference_accuracy_ratio{detector="msp"}' not in text
    assert 'oodmon_estimated_accuracy_ratio{detector="msp"' not in text

    url = f"sqlite:///{tmp_path / 'o.db'}"
    store = Store(url)
    store.open()
    store.append(facts, state=pipeline.freeze(), positions={})
    rows = store.windows(model="m", version="1")
    store.close()
    told = {row["detector"]: row for row in rows if row["window_start_ns"] == whole[-1].start}
    assert told["error"]["estimated_accuracy"] == shown
    assert told["msp"]["estimated_accuracy"] is None
    back = {w.start: w for w in stored_windows(rows)}
    for window in whole:
        for name in ("error", "msp"):
            found, wanted = back[window.start].histogram(name), window.histogram(name)
            assert (found.judged, found.errors) == (wanted.judged, wanted.errors)

    page = build(url, tmp_path / "r.html").read_text()
    assert "<h2>Estimated accuracy</h2>" in page
    assert page.count("The estimated accuracy fell from") == 1
    once = [row for row in rows if row["window_start_ns"] % (10 * SECOND) == 0]
    (row,) = estimates(once, EPOCH + 60 * SECOND)
    assert row.before == pytest.approx(0.9, abs=0.03)
    assert row.after == pytest.approx(0.5, abs=0.05)
    assert row.samples == 120 * 49
    assert row.lowest <= 0.5
    assert row.lowest_at >= EPOCH + 60 * SECOND
    assert estimates(once, 0)[0].after is None


def test_alerts_say_whether_it_matters() -> None:
    facts = _facts(_pipeline(), [0.1] * 60 + [0.5] * 60)
    worse = next(alert for alert in alerts(facts) if alert.rule == "worse")
    (row,) = worse.evidence["accuracy"]
    assert f"The estimated accuracy fell from {row['before']:.1%}" in worse.evidence["summary"]
    # Surer than before: a change, and no loss.
    facts = _facts(_pipeline(), [0.1] * 60 + [0.01] * 60)
    (changed,) = [alert for alert in alerts(facts) if alert.status == "firing"]
    assert changed.rule == "changed"
    assert "The estimated accuracy rose from" in changed.evidence["summary"]
