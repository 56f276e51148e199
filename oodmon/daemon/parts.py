"""What a daemon is made of: what the configuration makes, and how the loop is paced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from oodmon.daemon.backoff import Receiver
from oodmon.daemon.intake import Fold
from oodmon.daemon.routes import Routes
from oodmon.daemon.truth import Truth
from oodmon.errors import ContractError
from oodmon.feeds.labels import LabelTopic
from oodmon.labelling import Labelling

__all__ = ["Pace", "Parts"]


@dataclass(frozen=True)
class Pace:
    """How the loop is paced.

    Args:
        group_batches: commit at least every so many batches.
        group_seconds: commit at least so often while batches come; after a commit that took longer,
            as long as that one took, up to a second more.
        poll_seconds: how long one poll of the feed waits; the longest time to notice a signal.
        advance_seconds: while the feed is drained, look for windows to close so often.
        sample_seconds: read the depths of the outbox so often.
        upkeep_seconds: prune and measure the store so often.
        retry_seconds: the first wait after a failed transaction or poll; it doubles.
        max_retry_seconds: the longest such wait.
        grace_seconds: how long shutdown waits for deliveries.
    """

    group_batches: int = 512
    group_seconds: float = 0.5
    poll_seconds: float = 0.2
    advance_seconds: float = 1.0
    sample_seconds: float = 5.0
    upkeep_seconds: float = 60.0
    retry_seconds: float = 0.5
    max_retry_seconds: float = 30.0
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.group_batches < 1:
            raise ContractError("group_batches must be at least 1")
        if not 0 < self.retry_seconds <= self.max_retry_seconds:
            raise ContractError("retry_seconds must be positive and at most max_retry_seconds")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a configuration makes and a reload may change.

    Attributes:
        pipeline: the fold; nobody has stepped it yet.
        routes: facts → receivers.
        receivers: name in the outbox (``sinks.<id>``, ``triggers.<id>``) → what is called.
        flag_level: the tail probability at which samples are flagged, for the metrics.
        calibrated: detector → when its calibration was made, seconds since the epoch.
        labelling: which predictions are kept for labels that come late; none: no prediction.
        truth: what judges them; none: no rule reads it.
        label_topic: where they come from beside the table; none: from nowhere else.
    """

    pipeline: Fold
    routes: Routes
    receivers: Mapping[str, Receiver]
    flag_level: float = 0.001
    calibrated: Mapping[str, float] = field(default_factory=dict)
    labelling: Labelling | None = None
    truth: Truth | None = None
    label_topic: LabelTopic | None = None
