"""`oodmon labels`: from a file to the accuracy that the daemon tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from oodmon.calibration import Calibration
from oodmon.cli import main
from oodmon.cli.run import parts_of
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.store.labels import Prediction
from tests.streams import EPOCH

TEXT = """\
model: {name: m}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  labels: {share: 0.5, least_labels: 1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT)
    states = tmp_path / "states"
    states.mkdir()
    held = np.random.default_rng(1).normal(size=300)
    Calibration.from_scores("msp", "d", held).save(build.calibration_path(str(states), "msp"))
    store = build.store(load(path, "daemon"))
    store.open()
    kept = [Prediction(name, "m", "1", "", EPOCH, 1, 0.2) for name in ("a", "b,c", "d")]
    store.append([], state=b"", positions={}, predictions=kept)
    store.close()
    return path


def _labels(config: Path, file: str, given: str = "") -> Result:
    return CliRunner().invoke(main, ["labels", str(config), file], input=given)


def test_labels_of_a_file_and_of_standard_input_reach_their_predictions(config: Path) -> None:
    file = config.parent / "labels.csv"
    file.write_text('sample_id,label\na,1\n"b,c",0\n\nelse,3\n')
    done = _labels(config, str(file))
    assert (done.exit_code, done.output) == (0, "3 labels handed over\n"), done.output
    assert _labels(config, "-", "d,1\nd,0\n").output == "1 labels handed over\n"
    store = build.store(load(config, "daemon"))
    store.open()
    assert store.join_labels(EPOCH) == 3
    (found,) = store.measured(0, 2**62)
    assert found.labelled == 3
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.shift == pytest.approx(1 / 3 - 0.8)
    store.close()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a", "-:2: expected sample_id,label; found a"),
        (",1", "-:2: expected sample_id,label"),
        ("a,1,2", "-:2: expected sample_id,label"),
        ("a,cat", "-:2: the label is the number of a class, 0 or more; found 'cat'"),
        ("a,-1", "found '-1'"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_taken(config: Path, line: str, said: str) -> None:
    done = _labels(config, "-", f"a,1\n{line}\n")
    assert done.exit_code == 1
    assert said in done.output
    store = build.store(load(config, "daemon"))
    store.open()
    assert store.join_labels(EPOCH) == 0
    store.close()


def test_a_daemon_that_keeps_no_predictions_says_so(config: Path) -> None:
    assert parts_of(load(config, "daemon")).labelling is not None
    config.write_text(TEXT.replace("  labels: {share: 0.5, least_labels: 1}\n", ""))
    assert parts_of(load(config, "daemon")).labelling is None
    done = _labels(config, "-", "a,1\n")
    assert done.exit_code == 1
    assert "has no section daemon.labels" in done.output


def test_options_are_checked_in_their_place(config: Path) -> None:
    config.write_text(TEXT.replace("share: 0.5", "share: 2"))
    done = _labels(config, "-", "")
    assert done.exit_code == 2
    assert "oodmon.yaml:5:" in done.output
    assert "daemon.labels" in done.output
    assert "share: 2.0 is not in (0, 1]" in done.output
