"""`oodmon accept`: the new law is the reference, the old one a change; it survives a restart."""

from __future__ import annotations

import http.server
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from oodmon.calibration import Calibration
from oodmon.cli import main, promised
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.drift import thresholds
from oodmon.drift.thresholds import Threshold
from oodmon.pipeline import Pipeline
from oodmon.records import Fact, Notice
from tests.streams import EPOCH, SECOND, alerts, batch

TEXT = """\
model: {name: m}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  windows: {length_seconds: 1, allowed_lateness_seconds: 0}
  drift:
    budget: {type: budget, false_alarms: "1 per 1000 windows", tolerated_fraction: 0}
  rules:
    r: {drift: budget, resolve_after_windows: 2}
  http: {port: PORT}
"""
CHANGE = 60
SHIFT = 2.5


def _traffic(pipeline: Pipeline, first: int, last: int, *, seed: int = 0) -> list[Fact]:
    facts: list[Fact] = []
    for at in range(first, last):
        rng = np.random.default_rng([seed, at])
        scores = rng.normal(size=40) + (SHIFT if at >= CHANGE else 0.0)
        facts += pipeline.step(batch(scores, at, at))
    return facts


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A daemon that fires since CHANGE: its calibration, its store and its state."""
    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT.replace("PORT", "9"))
    (tmp_path / "states").mkdir()
    held_out = np.random.default_rng(1).normal(size=3000)
    Calibration.from_scores("msp", "digest-msp", held_out).save(_file(path))
    checked = load(path, "daemon")
    pipeline = build.pipeline(checked)
    facts = _traffic(pipeline, 0, 200)
    assert [alert.status for alert in alerts(facts)] == ["firing"]
    store = build.store(checked)
    store.open()
    store.append(facts, state=pipeline.freeze(), positions={}, outbox=[], agents=[])
    store.close()
    return path


def _file(config: Path) -> Path:
    return build.calibration_path(str(config.parent / "states"), "msp")


def _accept(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["accept", str(config), *arguments], catch_exceptions=False)


def _restarted(config: Path) -> Pipeline:
    checked = load(config, "daemon")
    pipeline = build.pipeline(checked)
    store = build.store(checked)
    store.open()
    snapshot = store.load()
    store.close()
    assert snapshot is not None
    pipeline.thaw(snapshot.state)
    return pipeline


def test_what_is_accepted_is_no_change_and_its_opposite_is_one(config: Path) -> None:
    done = _accept(config, "--yes")
    assert done.exit_code == 0, done.output
    assert "no daemon answers" in done.output
    fresh = Calibration.load(_file(config))
    # Of the windows since the change alone, although an hour was asked for.
    assert fresh.digest == "digest-msp"
    assert len(fresh) > 3000
    assert np.mean(fresh.scores) == pytest.approx(SHIFT, abs=0.1)
    assert np.std(fresh.scores) == pytest.approx(1.0, abs=0.05)

    pipeline = _restarted(config)
    facts = _traffic(pipeline, 200, 300)
    told = [fact.text for fact in facts if isinstance(fact, Notice)]
    assert len(told) == 1
    for words in ("'msp' has a new reference", "accepted by", "in place of 3000"):
        assert words in told[0]
    assert [alert.status for alert in alerts(facts)] == ["resolved"]
    # Killed before anything of this was committed: the same facts once more, notice included.
    again = _traffic(_restarted(config), 200, 300)
    assert [fact.text for fact in again if isinstance(fact, Notice)] == told
    assert [alert.id for alert in alerts(again)] == [alert.id for alert in alerts(facts)]
    # Committed meanwhile: it is not told twice.
    later = build.pipeline(load(config, "daemon"))
    later.thaw(pipeline.freeze())
    more = [*later.step(batch(np.zeros(40), 301, 301)), *later.advance(EPOCH + 330 * SECOND)]
    assert not [fact for fact in more if isinstance(fact, Notice)]
    # Traffic as it was before is now what differs.
    facts = []
    for at in range(310, 330):
        scores = np.random.default_rng(at).normal(size=40)
        facts += pipeline.step(batch(scores, at, at))
    assert [alert.status for alert in alerts(facts)] == ["firing"]


DAY = 86_400
LEVEL = 6.0
"""How far the two contexts lie apart: were they mixed up, every rank would be another."""


def _in_contexts(pipeline: Pipeline, begin: int, shift: float) -> list[Fact]:
    """A minute of batches and one an hour later, of two classes and segments; the second is moved.

    Which is the second: class 1, segment b, or the later hour.
    """
    facts: list[Fact] = []
    for hour in (0, 1):
        for at in range(60):
            rng = np.random.default_rng([3, hour, at])
            second = rng.random(40) < 0.5
            place = np.full(40, hour == 1) if pipeline.context.of == ("hour",) else second
            scores = rng.normal(size=40) + (LEVEL + shift) * place
            facts += pipeline.step(
                batch(
                    scores,
                    begin + 3600.0 * hour + at,
                    begin + 1000 * hour + at,
                    predicted=second.astype(np.int32),
                    segment=second.astype(np.int32),
                    segments=("a", "b"),
                )
            )
    return facts


@pytest.mark.parametrize("context", ["predicted", "segment", "hour"])
def test_within_a_context_what_is_accepted_is_no_change(config: Path, context: str) -> None:
    rng = np.random.default_rng(4)
    second = rng.random(4000) < 0.5
    held_out = rng.normal(size=4000) + LEVEL * second
    # A third context has no traffic of late.
    third = np.arange(4000) < 200
    Calibration.from_scores(
        "msp",
        "digest-msp",
        np.where(third, 50.0 + held_out, held_out),
        np.where(third, 2, second).astype(np.int32),
        segments=np.where(third, "c", np.where(second, "b", "a")),
        times=EPOCH + 3600 * SECOND * np.where(third, 5, second),
    ).save(_file(config))
    text = config.read_text()
    config.write_text(text.replace("{path: states/}", f"{{path: states/, context: {context}}}"))
    assert not alerts(_in_contexts(build.pipeline(load(config, "daemon")), 0, 0.0))
    pipeline = build.pipeline(load(config, "daemon"))
    facts = _in_contexts(pipeline, 0, 1.5)
    assert [alert.status for alert in alerts(facts)] == ["firing"]
    store = build.store(load(config, "daemon"))
    store.open()
    store.load()
    store.prune(2**62)
    store.append(facts, state=pipeline.freeze(), positions={}, outbox=[], agents=[])
    store.close()
    done = _accept(config, "--yes", "--last", "2h")
    assert done.exit_code == 0, done.output
    # The first hour was over when the change began: it keeps its reference as well.
    stay = 200 + (1900 if context == "hour" else 0)
    told = re.search(r"; (\d+) scores of contexts that were hardly seen then stay", done.output)
    assert told
    assert int(told[1]) == pytest.approx(stay, rel=0.05)
    fresh = Calibration.load(_file(config))
    assert np.count_nonzero(fresh.scores > 40.0) == 200
    restarted = _restarted(config)
    again = _in_contexts(restarted, DAY, 1.5)
    assert [alert.status for alert in alerts(again)] == ["resolved"]
    back = _in_contexts(restarted, 2 * DAY, 0.0)
    assert "firing" in [alert.status for alert in alerts(back)]


def test_undo_brings_the_old_reference_back(config: Path) -> None:
    before = Calibration.load(_file(config))
    assert _accept(config, "--yes").exit_code == 0
    assert _accept(config, "--undo").exit_code == 0
    assert Calibration.load(_file(config)).fingerprint == before.fingerprint
    again = _accept(config, "--undo")
    assert again.exit_code == 1
    assert "nothing was accepted" in again.output


def test_nothing_changes_without_a_yes_or_with_too_little(config: Path) -> None:
    before = _file(config).read_bytes()
    assert CliRunner().invoke(main, ["accept", str(config)], input="n\n").exit_code == 1
    short = _accept(config, "--yes", "--last", "1s")
    assert short.exit_code == 1
    assert "at least 100 are needed" in short.output
    # The stored scores know no predicted classes: none came with them.
    text = config.read_text()
    config.write_text(text.replace("{path: states/}", "{path: states/, context: predicted}"))
    refused = _accept(config, "--yes")
    assert refused.exit_code == 1
    assert "predicted classes" in refused.output
    # Two hours in one window: nobody knows which of them a score is of.
    hours = text.replace("{path: states/}", "{path: states/, context: hour}")
    config.write_text(hours.replace("length_seconds: 1,", "length_seconds: 7200,"))
    assert "within one hour" in _accept(config, "--yes", "--last", "2h").output
    assert _file(config).read_bytes() == before


def test_thresholds_of_other_tests_are_found_anew(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the daemon would not start: a threshold is bound to the calibrations it was found on."""
    monkeypatch.setattr(thresholds, "WINDOWS", 5_000)
    text = config.read_text()
    config.write_text(
        text.replace(
            "  drift:\n", '  drift:\n    shape: {type: ks, false_alarms: "1 per 200 windows"}\n'
        )
    )
    checked = load(config, "daemon")
    path = build.threshold_path(str(config.parent / "states"), "shape")
    known = build.calibrations(checked)
    for at, threshold in promised.renewed(checked, known).items():
        assert at == path
        # As where the data was in order: stricter than independent samples need.
        replace(threshold, nominal=1e4, samples=40).save(at)
    build.drift_tests(checked, known)
    before = path.read_bytes()
    done = _accept(config, "--yes")
    assert done.exit_code == 0, done.output
    assert "shape: its threshold is found anew" in done.output
    assert "shape" in build.drift_tests(checked, build.calibrations(checked))
    assert Threshold.load(path).nominal == 1e4
    assert Threshold.load(path).samples == 40
    restarted = _restarted(config)
    facts = _traffic(restarted, 200, 260)
    assert [alert.status for alert in alerts(facts)] == ["resolved"]
    assert _accept(config, "--undo").exit_code == 0
    assert path.read_bytes() == before
    build.drift_tests(checked, build.calibrations(checked))


def test_a_daemon_that_runs_is_asked_to_reload(config: Path) -> None:
    asked = []

    class Daemon(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) == 1 else 409)
            self.end_headers()
            self.wfile.write(b"another model")

        def log_message(self, *arguments: object) -> None:
            del arguments

    server = http.server.HTTPServer(("127.0.0.1", 0), Daemon)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        config.write_text(config.read_text().replace("port: 9}", f"port: {server.server_port}}}"))
        done = _accept(config, "--yes")
        assert (done.exit_code, asked) == (0, ["/-/reload"])
        assert "has reloaded" in done.output
        folder = config.parent / "states"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for arguments in (["--undo"], ["--yes"]):
            refused = _accept(config, *arguments)
            assert refused.exit_code == 1
            assert "another model; everything is as it was" in refused.output
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
