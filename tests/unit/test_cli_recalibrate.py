"""`oodmon recalibrate`: labels set the estimate right, in windows, predictions and reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from oodmon.calibration import EXPECTED_ERROR, Calibration
from oodmon.cli import main
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.daemon.labels import predictions, tell
from oodmon.daemon.metrics import Metrics
from oodmon.labelling import Labelling
from oodmon.pipeline import Pipeline
from oodmon.records import Fact, Notice, ScoreBatch, Window
from oodmon.store.labels import Prediction
from tests.streams import EPOCH, alerts, batch

TEXT = """\
model: {name: m}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  windows: {length_seconds: 1, allowed_lateness_seconds: 0}
  drift:
    loss: {type: accuracy_loss, false_alarms: "1 per 1000 windows"}
  rules:
    r: {drift: loss}
  labels: {least_labels: 50}
  http: {port: 9}
"""
SLOPE, OFFSET = 0.6, 0.5
"""How doubt is to be read in truth."""


def _doubt(at: int, rows: int = 40) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    odds = np.random.default_rng([1, at]).normal(-2.5, 1.0, size=rows)
    return (1.0 / (1.0 + np.exp(-odds))).astype(np.float32)


def _batch(at: int) -> ScoreBatch:
    return batch(
        _doubt(at),
        at,
        at,
        detectors=("error",),
        predicted=np.zeros(40, np.int32),
        sample_ids=tuple(f"{at}/{row}" for row in range(40)),
    )


def _wrong(at: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    doubt = _doubt(at).astype(np.float64)
    truth = 1.0 / (1.0 + np.exp(-(SLOPE * np.log(doubt / (1.0 - doubt)) + OFFSET)))
    return np.random.default_rng([2, at]).random(40) < truth


def _serve(config: Path, first: int, last: int) -> list[Fact]:
    """Batches and, at once, the labels of all of them: what a daemon does, without its threads."""
    checked = load(config, "daemon")
    store = build.store(checked)
    store.open()
    pipeline = build.pipeline(checked)
    if (snapshot := store.load()) is not None:
        pipeline.thaw(snapshot.state)
    facts: list[Fact] = []
    kept: list[Prediction] = []
    labels: dict[str, int] = {}
    for at in range(first, last):
        one = _batch(at)
        facts += pipeline.step(one)
        kept += predictions(Labelling(), one, "error")
        labels |= {f"{at}/{row}": int(wrong) for row, wrong in enumerate(_wrong(at))}
    store.append(facts, state=pipeline.freeze(), positions={}, predictions=kept)
    store.add_labels(labels)
    store.join_labels(EPOCH)
    store.close()
    return facts


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT)
    (tmp_path / "states").mkdir()
    held = np.concatenate([_doubt(-1 - at & 0xFFFF) for at in range(25)])
    Calibration.from_scores("error", "digest-error", held, measures=EXPECTED_ERROR).save(
        _file(path)
    )
    return path


def _file(config: Path) -> Path:
    return build.calibration_path(str(config.parent / "states"), "error")


def _recalibrate(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["recalibrate", str(config), *arguments])


def _told(metrics: Metrics, name: str) -> float:
    return metrics.value(name, model="m", model_version="1")


def _estimated(facts: list[Fact]) -> float:
    found = [fact.histogram("error") for fact in facts if isinstance(fact, Window)]
    return 1.0 - sum(one.errors for one in found) / 1e6 / sum(one.judged for one in found)


def test_the_estimate_follows_the_labels_from_then_on(config: Path) -> None:
    before = _serve(config, 0, 100)
    truth = 1.0 - np.mean([_wrong(at).mean() for at in range(100)])
    assert _estimated(before) - truth > 0.1
    done = _recalibrate(config, "--yes")
    assert done.exit_code == 0, done.output
    assert "by 4000 labels" in done.output
    made = Calibration.load(_file(config))
    assert (made.slope, made.offset) == pytest.approx((SLOPE, OFFSET), abs=0.1)

    after = _serve(config, 200, 290)
    truth = 1.0 - np.mean([_wrong(at).mean() for at in range(200, 290)])
    assert _estimated(after) == pytest.approx(truth, abs=0.03)
    (told,) = [fact.text for fact in after if isinstance(fact, Notice)]
    assert "by 4000 labels the model is right in" in told
    # What it is compared with was judged in the same way: nothing has changed.
    assert alerts([*before, *after]) == []
    # A second time it goes by all labels: what was kept is what the detector said.
    again = _recalibrate(config, "--yes")
    assert again.exit_code == 0, again.output
    assert "by 7600 labels" in again.output
    made = Calibration.load(_file(config))
    assert (made.slope, made.offset) == pytest.approx((SLOPE, OFFSET), abs=0.1)
    # How far off it is is told of the estimate as it is now.
    store, metrics = build.store(load(config, "daemon")), Metrics()
    store.open()
    tell(Labelling(), store, metrics, store.newest_ns(), made)
    assert abs(_told(metrics, "oodmon_estimate_shift_ratio")) < 0.01
    tell(Labelling(), store, metrics, store.newest_ns())
    assert _told(metrics, "oodmon_estimate_shift_ratio") < -0.1
    assert _told(metrics, "oodmon_corrected_accuracy_ratio") == pytest.approx(
        _told(metrics, "oodmon_accuracy_ratio"), abs=0.01
    )
    store.close()

    assert _recalibrate(config, "--undo", "--yes").exit_code == 0
    back = Calibration.load(_file(config))
    assert (back.slope, back.offset) == (1.0, 0.0)
    twice = _recalibrate(config, "--undo", "--yes")
    assert twice.exit_code == 1
    assert "as it was fitted" in twice.output


def test_a_loss_beyond_the_reference_so_judged_still_alarms(config: Path) -> None:
    _serve(config, 0, 60)
    assert _recalibrate(config, "--yes").exit_code == 0
    pipeline: Pipeline = build.pipeline(load(config, "daemon"))
    facts: list[Fact] = []
    for at in range(200, 260):
        one = _batch(at)
        doubtful = np.clip(one.scores["error"] * 4.0, 0.0, 0.99).astype(np.float32)
        facts += pipeline.step(replace(one, scores={"error": doubtful}))
    assert [alert.status for alert in alerts(facts)] == ["firing"]


def test_what_is_missing_is_told_and_nothing_is_written(config: Path) -> None:
    before = _file(config).read_bytes()
    _serve(config, 0, 1)
    few = _recalibrate(config, "--yes")
    assert few.exit_code == 1
    assert "40 labels of samples" in few.output
    assert "at least 50" in few.output
    _serve(config, 1, 20)
    assert CliRunner().invoke(main, ["recalibrate", str(config)], input="n\n").exit_code == 1
    text = config.read_text()
    config.write_text(text.replace("  labels: {least_labels: 50}\n", ""))
    assert "no section daemon.labels" in _recalibrate(config).output
    assert _file(config).read_bytes() == before
    Calibration.from_scores("error", "digest-error", np.linspace(0, 1, 200)).save(_file(config))
    config.write_text(text)
    assert "expected_error" in _recalibrate(config).output
