"""A checked config → the parts that it names, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodmon.calibration import Calibration
from oodmon.config.schema import AgentSection, Config, DaemonSection, EventKind
from oodmon.contracts import Detector, DriftTest, Sink
from oodmon.drift.thresholds import Threshold, tuned
from oodmon.drift.tuned import Tunable
from oodmon.errors import ConfigError, StateError
from oodmon.labelling import LABELS
from oodmon.pipeline import Pipeline
from oodmon.registry import names_path
from oodmon.rules import Rule
from oodmon.store.events import Store
from oodmon.triggers.guard import Guard

if TYPE_CHECKING:
    from oodmon.detectors import Scorer

__all__ = [
    "Built",
    "agent_half",
    "calibration_path",
    "calibrations",
    "daemon_half",
    "drift_tests",
    "label_rules",
    "pipeline",
    "rule_triggers",
    "scorers",
    "sinks",
    "state_path",
    "store",
    "threshold_path",
    "triggers",
    "window_seconds",
]

_CALIBRATION = ".calibration.safetensors"
_THRESHOLD = ".threshold.json"


@dataclass(frozen=True, slots=True)
class Built:
    """A sink and the kinds of events that it takes."""

    component: Sink
    events: tuple[EventKind, ...]


def agent_half(config: Config) -> AgentSection:
    """The `agent` half; `ConfigError` where the file has none (or it was not asked for)."""
    if config.agent is None:
        raise ConfigError([f"{config.path}:1:1: agent: is required and missing"])
    return config.agent


def daemon_half(config: Config) -> DaemonSection:
    """The `daemon` half; `ConfigError` where the file has none (or it was not asked for)."""
    if config.daemon is None:
        raise ConfigError([f"{config.path}:1:1: daemon: is required and missing"])
    return config.daemon


def state_path(folder: str, detector: str) -> Path:
    """Where `fit` keeps what a detector learnt."""
    return Path(folder) / f"{detector}.safetensors"


def calibration_path(folder: str, detector: str) -> Path:
    """Where `fit` keeps a detector's held-out scores."""
    return Path(folder) / f"{detector}{_CALIBRATION}"


def scorers(config: Config, device: str = "cpu") -> dict[str, Scorer]:
    """Detector id → what was fitted; `StateError` names what is missing or was fitted otherwise."""
    from oodmon.detectors import Scorer

    half = agent_half(config)
    loaded = {}
    for name, detector in half.detectors.items():
        path = state_path(half.states, name)
        if not path.is_file():
            raise StateError(
                f"detector {name!r} has not been fitted: {path} is not there; "
                f"run `oodmon fit {config.path} DATA`"
            )
        scorer = Scorer.load(path, device=device)
        made_for = (scorer.model, scorer.version)
        if any(made_for) and made_for != (config.model.name, config.model.version):
            raise StateError(
                f"{path} was fitted for model {scorer.model!r} version {scorer.version!r}, the "
                f"config is of {config.model.name!r} version {config.model.version!r}; "
                f"run `oodmon fit {config.path} DATA`"
            )
        # What was left open was chosen when it was fitted; the same choice must come out now.
        if _but_paths(detector.component.pin(scorer.reads().layers)) != _but_paths(scorer.detector):
            raise StateError(
                f"{path} was fitted as {scorer.detector}, the config says {detector.component}; "
                f"run `oodmon fit {config.path} DATA` again"
            )
        loaded[name] = scorer
    return loaded


def _but_paths(detector: Detector) -> tuple[str, dict[str, Any]]:
    """Name and options, but for where files lay that were read while learning."""
    options = {f.name: getattr(detector, f.name) for f in fields(detector)}  # type: ignore[arg-type]
    return detector.name, {n: v for n, v in options.items() if not names_path(n)}


def calibrations(config: Config) -> dict[str, Calibration]:
    """Detector id → calibration, for every file in the folder (and every detector of the file).

    The daemon's file need not have an agent half: what the folder holds is what is watched.
    """
    folder = Path(daemon_half(config).calibration.path)
    advice = f"run `oodmon fit {config.path} DATA` where the model is, and copy the folder here"
    if not folder.is_dir():
        raise StateError(f"there is no folder {folder}; {advice}")
    found = {
        path.name.removesuffix(_CALIBRATION): Calibration.load(path)
        for path in sorted(folder.glob(f"*{_CALIBRATION}"))
    }
    wanted = config.detectors or tuple(found)
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        what = " or ".join(f"{name}{_CALIBRATION}" for name in missing) or f"*{_CALIBRATION}"
        raise StateError(f"{folder} holds no {what}; {advice}")
    for name in wanted:
        if found[name].detector != name:
            raise StateError(
                f"{calibration_path(str(folder), name)} is the calibration of "
                f"{found[name].detector!r}; {advice}"
            )
    return {name: found[name] for name in wanted}


def threshold_path(folder: str, test: str) -> Path:
    """Where `fit` keeps the threshold that it found for a drift test with `false_alarms`."""
    return Path(folder) / f"{test}{_THRESHOLD}"


def window_seconds(config: Config, test: DriftTest[Any]) -> float:
    """Length of the windows that a drift test is given."""
    windows = daemon_half(config).windows
    return (windows.step if test.disjoint else windows.length) / 1e9


def drift_tests(config: Config, known: Mapping[str, Calibration]) -> dict[str, DriftTest[Any]]:
    """Drift test id → test, at the threshold that `fit` found where it has one to find.

    `StateError` names the file whose threshold was found for other options or calibrations.
    """
    half = daemon_half(config)
    tests = {}
    for name, entity in half.drift.items():
        test = entity.component
        if isinstance(test, Tunable) and test.false_alarms:
            path = threshold_path(half.calibration.path, name)
            try:
                found = Threshold.load(path)
                seconds = window_seconds(config, test)
                test = tuned(test, found, known, seconds, half.calibration.ranked_within)
            except StateError as error:
                told = str(error) if str(path) in str(error) else f"{path}: {error}"
                raise StateError(
                    f"drift test {name!r}: {told}; run `oodmon fit {config.path} DATA`"
                ) from None
        tests[name] = test
    return tests


def pipeline(config: Config) -> Pipeline:
    """The pure middle of the daemon, before its first batch."""
    half = daemon_half(config)
    known = calibrations(config)
    rules = {name: rule for name, rule in half.rules.items() if rule.drift != LABELS}
    for name, rule in rules.items():
        for detector in rule.detectors:
            if detector not in known and detector != "*":
                raise StateError(
                    f"daemon.rules.{name}.detectors: {detector!r} has no calibration in "
                    f"{half.calibration.path}; there are {', '.join(known)}"
                )
    return Pipeline(
        config.model.name,
        config.model.version,
        known,
        half.windows,
        drift_tests(config, known),
        rules,
        half.flag_level,
        half.flag_fdr,
        half.calibration.ranked_within,
    )


def label_rules(config: Config) -> dict[str, Rule]:
    """The rules on labels that come late; they are none of the fold's."""
    return {n: rule for n, rule in daemon_half(config).rules.items() if rule.drift == LABELS}


def store(config: Config) -> Store:
    """The database, not yet opened."""
    section = daemon_half(config).store
    return Store(section.url, section.pipeline, section.lease_seconds)


def sinks(config: Config) -> dict[str, Built]:
    """Sink id → sink and the events that it takes."""
    return {
        name: Built(section.component.component, section.events)
        for name, section in daemon_half(config).sinks.items()
    }


def triggers(config: Config) -> dict[str, Guard]:
    """Trigger id → its guard, which the daemon joins to the store and the clock."""
    return {
        name: Guard(
            name,
            section.component.component,
            section.cooldown_seconds,
            section.daily_quota,
            section.dry_run,
        )
        for name, section in daemon_half(config).triggers.items()
    }


def rule_triggers(config: Config) -> Mapping[str, tuple[str, ...]]:
    """Rule id → ids of the triggers that its firing alerts set going."""
    return {name: rule.triggers for name, rule in daemon_half(config).rules.items()}
