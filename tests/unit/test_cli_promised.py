"""What `oodmon fit` finds for drift tests and tells of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from oodmon.calibration import Calibration
from oodmon.cli.promised import promise
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.drift import thresholds
from oodmon.fitting import Fitted, Fitting

CONFIG = """\
model: {name: m}
daemon:
  feed: {type: memory}
  calibration: {path: states/}
  windows: {length_seconds: 60}
  flag_level: 0.00001
  drift:
    main: {type: budget}
    shape: {type: ks, false_alarms: 1 per 100 windows}
    mix: {type: chi_squared}
"""


def _fitting(phi: float) -> Fitting:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1_000)
    scores = noise.astype(np.float32)
    for at in range(1, len(scores)):
        scores[at] = phi * scores[at - 1] + np.sqrt(1.0 - phi**2) * noise[at]
    fitted = {}
    for name in ("a", "b"):
        calibration = Calibration.from_scores(name, f"digest-{name}", scores)
        no_classes = np.empty(0, np.int64)
        no_scorer = cast("Any", None)
        fitted[name] = Fitted(no_scorer, calibration, 0, 0.0, 0.0, scores, no_classes)
    return Fitting(fitted, (), 1_000, 1_000, 1.0)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(thresholds, "WINDOWS", 1_000)
    (tmp_path / "states").mkdir()
    path = tmp_path / "oodmon.yaml"
    path.write_text(CONFIG)
    return path


def _tell(config: Path, capsys: pytest.CaptureFixture[str], phi: float, *, in_order: bool) -> str:
    fitting = _fitting(phi)
    for name, fitted in fitting.detectors.items():
        path = build.calibration_path(str(config.parent / "states"), name)
        fitted.calibration.save(path)
    promise(str(config), fitting, 32, in_order=in_order, seed=0)
    return capsys.readouterr().out


def test_thresholds_promises_and_outlooks(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _tell(config, capsys, 0.0, in_order=False)
    assert "1000 calibration samples" in told
    assert "flag_level 1e-05 needs 99999" in told
    assert "drift test shape: threshold found" in told
    assert "drawn in blocks of 1;" in told
    assert "drift test shape: about 1 per 100 windows on average over 2 detectors" in told
    assert "drift test main: false alarms come at most 1 per 30 days" in told
    assert "drift test main, a, b: 1000 calibration scores" in told
    assert "drift test mix, a, b: the calibration holds no predicted classes" in told
    assert build.pipeline(load(config, "daemon")).promises()["shape"].startswith("about 1 per 100")


def test_data_in_order_is_drawn_in_blocks(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _tell(config, capsys, 0.6, in_order=True)
    assert "drawn in blocks of 1;" not in told
    found = thresholds.Threshold.load(config.parent / "states" / "shape.threshold.json")
    _tell(config, capsys, 0.6, in_order=False)
    blind = thresholds.Threshold.load(config.parent / "states" / "shape.threshold.json")
    assert found.nominal > 10.0 * blind.nominal, "correlation has to be paid for"
