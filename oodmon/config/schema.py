"""The sections of the YAML file: what each is called, what it takes, what it is when left out.

Field names are the YAML names. A `Component` is an entity with a `type`: its options are the
fields of the registered class and are checked by building it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from oodmon.admission import Admission
from oodmon.contexts import Context
from oodmon.errors import ContractError
from oodmon.feeds.labels import LabelTopic
from oodmon.labelling import Labelling
from oodmon.rules import Rule
from oodmon.windows import Windowing

__all__ = [
    "RETENTION_DAYS",
    "AgentSection",
    "CalibrationSection",
    "Component",
    "Config",
    "DaemonSection",
    "EventKind",
    "HttpSection",
    "LabelsSection",
    "ModelSection",
    "SinkSection",
    "StoreSection",
    "TapSection",
    "TriggerSection",
]

EventKind = Literal["alert", "notice", "window", "drift", "sample"]
"""What can be sent to a sink; `daemon` events travel with `notice`."""

_PORTS: Final = 65_536
_LONGEST_NAME: Final = 200
_DAY_SECONDS: Final = 86_400.0

RETENTION_DAYS: Final[Mapping[str, float]] = {
    "windows": 90.0,
    "drift_results": 90.0,
    "alerts": 400.0,
    "flagged_samples": 30.0,
    "notices": 90.0,
    "outbox": 7.0,
    "dead_letters": 30.0,
    "trigger_firings": 400.0,
    "agents": 90.0,
    "predictions": 30.0,
    "labels": 30.0,
}
"""How long each kind of fact is kept where the file says nothing."""


@dataclass(frozen=True, slots=True)
class Component:
    """An entity of the config.

    Attributes:
        id: its name in the file (the section's name where there is only one).
        kind: taps, detectors, feeds, drift, sinks or triggers.
        type: the registered name.
        component: the built component, a frozen dataclass of options.
    """

    id: str
    kind: str
    type: str
    component: Any


@dataclass(frozen=True, slots=True)
class ModelSection:
    """What is served; both programs put it on everything that they write."""

    name: str
    version: str = "1"

    def __post_init__(self) -> None:
        for option, text in (("name", self.name), ("version", self.version)):
            if not (text and text == text.strip() and text.isprintable() and "/" not in text):
                raise ContractError(
                    f"{option}: expected printable text without `/` or spaces around it"
                )
            if len(text) > _LONGEST_NAME:
                raise ContractError(f"{option}: longer than {_LONGEST_NAME} characters")


@dataclass(frozen=True, slots=True)
class TapSection:
    """`agent.tap`: the tap, and what the agent may cost.

    Attributes:
        overhead_budget: share of the serving time that tapping and scoring may take, (0, 1]; the
            sampled fraction is adapted to keep it.
        shadow_budget: the same for detectors that need further passes through the model, beside it.
    """

    component: Component
    overhead_budget: float = 0.01
    shadow_budget: float = 0.01

    def __post_init__(self) -> None:
        for option in ("overhead_budget", "shadow_budget"):
            share = getattr(self, option)
            if not 0.0 < share <= 1.0:
                raise ContractError(f"{option}: {share} is not in (0, 1]")


@dataclass(frozen=True, slots=True)
class AgentSection:
    """`agent`: what runs beside the model.

    Attributes:
        tap: where activations are read.
        detectors: id → detector.
        states: folder that `oodmon fit` writes and the agent reads.
        feed: the way to the daemon.
        check_weights: scores count only on the weights that `oodmon fit` saw.
    """

    tap: TapSection
    detectors: Mapping[str, Component]
    states: str
    feed: Component
    check_weights: bool = True


@dataclass(frozen=True, slots=True)
class CalibrationSection:
    """`daemon.calibration`.

    Attributes:
        path: the folder that holds ``<detector>.calibration.safetensors``.
        context: what each score is ranked within: `predicted`, `segment`, `hour`, or several.
        time_zone: whose hours of the day.
    """

    path: str
    context: str | tuple[str, ...] = ()
    time_zone: str = "UTC"

    def __post_init__(self) -> None:
        # Looked at here, so that problems are told at their place.
        object.__setattr__(self, "context", self.ranked_within.of)

    @property
    def ranked_within(self) -> Context:
        """The context of the ranks."""
        names = (self.context,) if isinstance(self.context, str) else self.context
        return Context(tuple(name for name in names if name), self.time_zone)


@dataclass(frozen=True, slots=True)
class StoreSection:
    """`daemon.store`.

    Attributes:
        url: SQLAlchemy URL; never shown, it may hold a password. A relative SQLite path is
            relative to the config file.
        pipeline: whose rows these are; daemons that share a database need different names.
        lease_seconds: how long a daemon that fell silent keeps a second one from working.
        retention_days: kind of fact → days that it is kept, counted back from the newest window; 0
            for ever. Kinds that are not named keep their default.
        max_bytes: beyond it the oldest history of a SQLite file goes early, then dead letters; a
            PostgreSQL database is only measured against it. 0: no limit.
    """

    url: str = field(default="sqlite:///oodmon.db", repr=False)
    pipeline: str = "default"
    lease_seconds: float = 10.0
    retention_days: Mapping[str, float] = field(default_factory=lambda: dict(RETENTION_DAYS))
    max_bytes: int = 10 << 30

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise ContractError("pipeline: expected a name, found none")
        if not 1.0 <= self.lease_seconds <= _DAY_SECONDS:
            raise ContractError(f"lease_seconds: {self.lease_seconds} is not in [1, 86400]")
        if self.max_bytes < 0:
            raise ContractError(f"max_bytes: {self.max_bytes} is not at least 0")
        for kind, days in self.retention_days.items():
            if kind not in RETENTION_DAYS:
                known = ", ".join(RETENTION_DAYS)
                raise ContractError(f"retention_days: unknown {kind!r}; known: {known}")
            if not (math.isfinite(days) and days >= 0):
                raise ContractError(f"retention_days: {kind}: {days} is not at least 0")
        merged = {**RETENTION_DAYS, **self.retention_days}
        object.__setattr__(self, "retention_days", merged)


@dataclass(frozen=True, slots=True)
class SinkSection:
    """One of `daemon.sinks`: where events go, and which."""

    component: Component
    events: tuple[EventKind, ...] = ("alert", "notice")


@dataclass(frozen=True, slots=True)
class TriggerSection:
    """One of `daemon.triggers`: what an alert may set going, and how often.

    Attributes:
        cooldown_seconds: at least this long between two requests.
        daily_quota: at most so many requests within any 24 hours; 0 never fires.
        dry_run: decide and record, but send nothing. True until it is switched off.
    """

    component: Component
    cooldown_seconds: float = 86_400.0
    daily_quota: int = 1
    dry_run: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cooldown_seconds) and self.cooldown_seconds >= 0):
            raise ContractError(f"cooldown_seconds: {self.cooldown_seconds} is not at least 0")
        if self.daily_quota < 0:
            raise ContractError(f"daily_quota: {self.daily_quota} is not at least 0")


@dataclass(frozen=True, slots=True)
class HttpSection:
    """`daemon.http`: where health and metrics are served. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 9464

    def __post_init__(self) -> None:
        if not 0 <= self.port < _PORTS:
            raise ContractError(f"port: {self.port} is not in [0, {_PORTS - 1}]")


@dataclass(frozen=True)
class LabelsSection(Labelling):
    """`daemon.labels`: which predictions are kept, and where labels come from beside the table.

    Attributes:
        topic: a Kafka topic; none reads none.
    """

    topic: LabelTopic | None = None


@dataclass(frozen=True, slots=True)
class DaemonSection:
    """`daemon`: what runs beside the store.

    Attributes:
        feed: the way from the agents.
        calibration: what raw scores are ranked against.
        flag_level: a sample with a tail probability of at most this is kept as an exceedance.
        flag_fdr: where above 0, instead those among which so small a share is in-distribution.
        windows: how event time is cut.
        drift: id → drift test.
        rules: id → rule.
        store: the database.
        sinks: id → where events go.
        triggers: id → what an alert may set going.
        http: health and metrics.
        intake: where servers without an agent may post scores and outputs; none listens nowhere.
        labels: which predictions are kept for labels that come late; none keeps none.
    """

    feed: Component
    calibration: CalibrationSection
    flag_level: float
    flag_fdr: float
    windows: Windowing
    drift: Mapping[str, Component]
    rules: Mapping[str, Rule]
    store: StoreSection
    sinks: Mapping[str, SinkSection]
    triggers: Mapping[str, TriggerSection]
    http: HttpSection
    intake: Admission | None = None
    labels: LabelsSection | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """One file, checked.

    Attributes:
        model: what is served.
        agent, daemon: the halves that the file has and that were asked for, else none.
        detectors: ids of the detectors in the agent half, known even where it was not asked for;
            empty where the file has none.
        path: the file.
        digest: sixteen hex digits over the text of the file.
        hints: what is allowed and yet probably not meant, one sentence each.
    """

    model: ModelSection
    agent: AgentSection | None
    daemon: DaemonSection | None
    path: str
    detectors: tuple[str, ...] = ()
    digest: str = ""
    hints: tuple[str, ...] = ()
