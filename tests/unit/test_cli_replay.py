"""`oodmon replay` says what the pipeline itself would have said, from feed and from store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from oodmon.calibration import Calibration
from oodmon.cli import main
from oodmon.cli.replay import rehearse, stored_windows
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.records import Alert, DriftResult, Fact, ScoreBatch

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
DIGEST = "0123456789abcdef"
TEXT = """\
model: {name: m}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  windows: {length_seconds: 4, every_seconds: EVERY, allowed_lateness_seconds: 0}
  drift:
    budget: {type: budget, false_alarms: "1 per 30 days", tolerated_fraction: 0.02}
    classic: {type: psi}
    mix: {type: chi_squared}
  rules:
    a: {drift: budget, resolve_after_windows: 2}
    b: {drift: classic, segments: [web], for_windows: 2}
    c: {drift: mix, segments: [web]}
"""


@pytest.fixture(params=[0, 2], ids=["tumbling", "sliding"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A config, its calibration, and sixty batches in the spool: calm, novel, calm."""
    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT.replace("EVERY", str(request.param)))
    (tmp_path / "states").mkdir()
    draw = np.random.default_rng(0)
    held_out = draw.normal(size=2000).astype(np.float32)
    mix = np.random.default_rng(1)
    Calibration.from_scores("d", DIGEST, held_out, mix.integers(0, 4, 2000)).save(
        build.calibration_path(str(tmp_path / "states"), "d")
    )
    half = build.daemon_half(load(path, "daemon"))
    writer = half.feed.component.writer("agent")
    for index in range(60):
        shift = 2.0 if 20 <= index < 30 else 0.0
        batch = ScoreBatch(
            model="m",
            version="1",
            source="agent",
            sequence=index,
            observed_at=START + index * SECOND,
            scores={"d": (draw.normal(size=100) + shift).astype(np.float32)},
            digests={"d": DIGEST},
            segment=np.arange(100, dtype=np.int32) % 2,
            segments=("web", "app"),
            predicted=mix.integers(0, 2 if shift else 4, 100).astype(np.int32),
        )
        assert writer.put(batch)
    writer.close()
    return path


def _told(config: Path, *arguments: str) -> list[tuple[str, str, int]]:
    shown = CliRunner().invoke(main, ["replay", str(config), "--json", *arguments])
    assert shown.exit_code == 0, shown.output
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    return [(row["rule"], row["status"], row["at_ns"]) for row in rows]


def test_feed_and_store_agree_with_the_pipeline(config: Path) -> None:
    checked = load(config, "daemon")
    pipeline = build.pipeline(checked)
    reader = build.daemon_half(checked).feed.component.reader()
    reader.seek({})
    facts: list[Fact] = []
    for delivery in reader.poll(1000, 1.0):
        facts += pipeline.step(delivery.batch)
    reader.close()
    facts += pipeline.advance(START + 100 * SECOND)
    truth = [
        (fact.rule, fact.status, fact.ended_at or fact.started_at)
        for fact in facts
        if isinstance(fact, Alert)
    ]
    assert {(rule, status) for rule, status, _ in truth} >= {(rule, "firing") for rule in "abc"}
    assert _told(config, "--source", "feed") == truth
    store = build.store(checked)
    store.open()
    store.append(facts, state=pipeline.freeze(), positions={})
    store.close()
    # Under sliding windows the pipeline gives `budget` the panes, and the store has their sums.
    exact = "abc" if pipeline.windowing.step == pipeline.windowing.length else "bc"
    told = _told(config)
    assert [row for row in told if row[0] in exact] == [row for row in truth if row[0] in exact]
    assert {row[:2] for row in told} == {row[:2] for row in truth}
    # Nothing was settled: the feed can be replayed again.
    assert _told(config, "--source", "feed") == truth


@pytest.mark.parametrize("config", [0], indirect=True)
def test_the_store_holds_all_that_decisions_rest_on(config: Path) -> None:
    """Correlated traffic, ranks within the predicted class, an alarm and what came after it.

    Of tumbling windows. Where evidence is reckoned with another correlation, with other ranks, or
    without what was learnt before an episode ended, the statistics differ.
    """
    config.write_text(
        config.read_text().replace("path: states/}", "path: states/, context: predicted}")
    )
    checked = load(config, "daemon")
    pipeline = build.pipeline(checked)
    draw = np.random.default_rng(5)
    facts: list[Fact] = []
    last = 0.0
    for index in range(240):
        noise, scores = draw.normal(size=40) * 0.8, np.empty(40)
        for row in range(40):
            last = scores[row] = 0.6 * last + noise[row]
        shift = 2.0 if 100 <= index < 120 else 0.0
        facts += pipeline.step(
            ScoreBatch(
                model="m",
                version="1",
                source="agent",
                sequence=index,
                observed_at=START + index * SECOND,
                scores={"d": (scores + shift).astype(np.float32)},
                digests={"d": DIGEST},
                predicted=draw.integers(0, 4, 40).astype(np.int32),
            )
        )
    truth = [fact for fact in facts if isinstance(fact, DriftResult)]
    ends = [fact.ended_at for fact in facts if isinstance(fact, Alert) and fact.ended_at]
    assert any(result.end > min(ends) for result in truth if result.test == "budget")
    ((_, measured),) = pipeline.measurements().items()
    assert measured["autocorrelation_ratio"] > 0.4
    store = build.store(checked)
    store.open()
    store.append(facts, state=pipeline.freeze(), positions={})
    rows = store.windows(model="m", version="1")
    store.close()
    found, _ = rehearse(checked, stored_windows(rows))
    assert [repr(result) for result in found] == [repr(result) for result in truth]


def test_another_config_may_look_at_the_same_store(config: Path, tmp_path: Path) -> None:
    test_feed_and_store_agree_with_the_pipeline(config)
    other = tmp_path / "other.yaml"
    text = (
        config.read_text()
        .replace("oodmon.db", "none.db")
        .replace("for_windows: 2", "for_windows: 40")
    )
    other.write_text(text + '  store: {url: "sqlite:///none.db"}\n')
    rules = {rule for rule, _, _ in _told(other, "--store-config", str(config))}
    assert rules == {"a", "c"}
    summary = CliRunner().invoke(main, ["replay", str(other), "--store-config", str(config)])
    assert "classic: " in summary.stdout
    assert "decisions" in summary.stdout


def test_last_is_for_the_store(config: Path) -> None:
    shown = CliRunner().invoke(main, ["replay", str(config), "--source", "feed", "--last", "1h"])
    assert shown.exit_code == 2
