"""From a checked config to its parts: what is missing is said with what to do about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oodmon.calibration import Calibration
from oodmon.config import build
from oodmon.config.parse import load
from oodmon.config.schema import Config
from oodmon.errors import ConfigError, StateError
from oodmon.records import ScoreBatch
from oodmon.sinks.log import Log

TEXT = """\
model: {name: digits, version: "1"}
agent:
  detectors: {msp: {type: msp}}
  states: states/
  feed: {type: spool, path: spool/}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  windows: {length_seconds: 10, allowed_lateness_seconds: 0}
  drift: {slow: {type: ks}}
  rules: {drift: {drift: slow, detectors: [msp], triggers: [retrain]}}
  sinks: {log: {type: log, events: [window]}}
  triggers: {retrain: {type: webhook, url: "https://ci", cooldown_seconds: 60, daily_quota: 3}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT)
    return load(path, "daemon")


def _calibrate(config: Config, name: str, detector: str = "") -> None:
    folder = Path(build.daemon_half(config).calibration.path)
    folder.mkdir(exist_ok=True)
    scores = np.random.default_rng(0).normal(size=500).astype(np.float32)
    calibration = Calibration.from_scores(detector or name, "0123456789abcdef", scores)
    calibration.save(build.calibration_path(str(folder), name))


def test_calibrations_say_what_to_run_where_they_are_missing(config: Config) -> None:
    with pytest.raises(StateError, match=r"there is no folder .*states; run `oodmon fit"):
        build.calibrations(config)
    _calibrate(config, "energy")
    with pytest.raises(StateError, match=r"no msp\.calibration\.safetensors; run `oodmon fit"):
        build.calibrations(config)
    _calibrate(config, "msp", detector="other")
    with pytest.raises(StateError, match="is the calibration of 'other'"):
        build.calibrations(config)
    _calibrate(config, "msp")
    assert list(build.calibrations(config)) == ["msp"]


def test_a_daemon_without_the_agent_half_takes_what_the_folder_holds(tmp_path: Path) -> None:
    path = tmp_path / "daemon.yaml"
    start, _, rest = TEXT.partition("agent:")
    path.write_text(start + rest[rest.index("daemon:") :].replace(", detectors: [msp]", ""))
    config = load(path)
    for name in ("b", "a"):
        _calibrate(config, name)
    assert list(build.calibrations(config)) == ["a", "b"]


def test_a_rule_of_a_detector_that_is_not_calibrated(tmp_path: Path) -> None:
    path = tmp_path / "daemon.yaml"
    start, _, rest = TEXT.partition("agent:")
    path.write_text(start + rest[rest.index("daemon:") :])
    config = load(path)
    _calibrate(config, "energy")
    with pytest.raises(StateError, match=r"'msp' has no calibration in .*; there are energy"):
        build.pipeline(config)


def test_the_pipeline_runs_as_configured(config: Config) -> None:
    _calibrate(config, "msp")
    pipeline = build.pipeline(config)
    assert pipeline.windowing.length_seconds == 10
    assert list(pipeline.tests) == ["slow"]
    scores = np.random.default_rng(1).normal(size=64).astype(np.float32)
    digest = {"msp": "0123456789abcdef"}
    facts = []
    for sequence, seconds in enumerate((5, 15)):
        at = seconds * 1_000_000_000
        facts += pipeline.step(
            ScoreBatch("digits", "1", "a", sequence, at, {"msp": scores}, digest)
        )
    assert {type(fact).__name__ for fact in facts} >= {"Window", "DriftResult"}


def test_sinks_triggers_and_store(config: Config, tmp_path: Path) -> None:
    (built,) = build.sinks(config).values()
    assert isinstance(built.component, Log)
    assert built.events == ("window",)
    guard = build.triggers(config)["retrain"]
    assert (guard.id, guard.cooldown_seconds, guard.daily_quota, guard.dry_run) == (
        "retrain",
        60,
        3,
        True,
    )
    assert build.rule_triggers(config) == {"drift": ("retrain",)}
    store = build.store(config)
    store.open()
    store.close()
    assert (tmp_path / "oodmon.db").exists()


def test_scorers_are_those_that_were_fitted_for_these_options(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from oodmon.detectors import Reference, Scorer

    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT)
    config = load(path, "agent")
    half = build.agent_half(config)
    with pytest.raises(StateError, match=r"detector 'msp' has not been fitted: .*oodmon fit"):
        build.scorers(config)
    Path(half.states).mkdir()
    reference = Reference.from_arrays(logits=torch.zeros(4, 3))
    Scorer.learn(half.detectors["msp"].component, reference).save(
        build.state_path(half.states, "msp")
    )
    assert build.scorers(config)["msp"].detector == half.detectors["msp"].component
    path.write_text(TEXT.replace("{type: msp}", "{type: msp, temperature: 2}"))
    with pytest.raises(StateError, match=r"was fitted as .* the config says .*temperature=2"):
        build.scorers(load(path, "agent"))


def test_open_layers_may_be_chosen_by_fitting(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from oodmon.detectors import Reference, Scorer

    path = tmp_path / "oodmon.yaml"
    path.write_text(TEXT.replace("{msp: {type: msp}}", "{msp: {type: gram}}"))
    config = load(path, "agent")
    half = build.agent_half(config)
    Path(half.states).mkdir()
    draw = torch.Generator().manual_seed(0)
    reference = Reference.from_arrays(
        layers={name: torch.rand(64, 4, 3, 3, generator=draw) for name in ("one", "two")},
        logits=torch.rand(64, 2, generator=draw),
        labels=torch.arange(64) % 2,
    )
    Scorer.learn(half.detectors["msp"].component, reference).save(
        build.state_path(half.states, "msp")
    )
    assert build.scorers(config)["msp"].reads().layers == ("one", "two")


def test_a_half_that_was_not_read(config: Config) -> None:
    with pytest.raises(ConfigError, match="agent: is required and missing"):
        build.agent_half(config)
