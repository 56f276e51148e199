"""Score batches → a group of facts that is ready to be committed; nothing counted twice.

The pipeline is a fold that changes its own memory. What it concluded is only true once it is
committed, and a batch that it refuses must leave no trace. So the intake remembers a *mark* (the
frozen state) and the steps since it: a refused batch is undone by going back to the mark and
taking these steps again, each at most once more, however many batches are bad.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from oodmon.calibration import EXPECTED_ERROR, Calibration
from oodmon.contracts import Delivery, DriftTest
from oodmon.daemon.labels import predictions
from oodmon.daemon.metrics import Metrics
from oodmon.errors import ContractError
from oodmon.labelling import Labelling
from oodmon.records import Fact, Notice, ScoreBatch
from oodmon.store.events import AgentSeen
from oodmon.store.labels import Prediction

__all__ = ["Fold", "Group", "Intake", "reason_on"]

_log = logging.getLogger(__name__)

MAX_AGENTS: Final = 10_000
"""Agents whose numbering is followed; beyond them the one unheard of for longest is forgotten."""

_DAY: Final = 86_400_000_000_000
_NUMBER: Final = re.compile(r"\d+")


class Fold(Protocol):
    """The part of `Pipeline` that the daemon uses."""

    model: str
    version: str
    calibrations: dict[str, Calibration]
    tests: dict[str, DriftTest[Any]]

    @property
    def watermark(self) -> int:
        """How far event time has been seen, ns UTC."""

    def step(self, batch: ScoreBatch) -> list[Fact]:
        """Take one batch; `ContractError` refuses it."""

    def advance(self, now_ns: int) -> list[Fact]:
        """Close what ends before now."""

    def freeze(self) -> bytes:
        """The whole memory."""

    def thaw(self, data: bytes) -> None:
        """The memory back; `StateError` if it belongs to another configuration."""

    def run_lengths(self) -> Mapping[str, float]:
        """Drift test → expected windows between false alarms, at least; 0 without a promise."""

    def promises(self) -> Mapping[str, str]:
        """Drift test → its false-alarm promise in words."""

    def measurements(self) -> Mapping[tuple[str, str, str], Mapping[str, float]]:
        """(test, detector, segment) → what the test measured about the traffic."""


@dataclass(slots=True)
class Group:
    """What one transaction will hold.

    Attributes:
        facts: in the order in which they were concluded.
        positions: partition → where it stands after the group.
        agents: source → what is known of it after the group.
        batches: taken, refused and repeated ones together.
        accepted: times of the batches that the pipeline took, ns UTC.
        predictions: what was answered, where it is kept for labels that come late.
    """

    facts: list[Fact] = field(default_factory=list)
    positions: dict[str, str] = field(default_factory=dict)
    agents: dict[str, AgentSeen] = field(default_factory=dict)
    batches: int = 0
    accepted: list[int] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.batches or self.facts)


class Intake:
    """Feeds the pipeline and collects one group after the other.

    Args:
        pipeline: the fold; from here on nobody else steps it.
        agents: what was last heard of the agents.
        metrics: where batches are counted.
        labelling: which predictions are kept; none: no prediction.
    """

    def __init__(
        self,
        pipeline: Fold,
        agents: Sequence[AgentSeen],
        metrics: Metrics,
        labelling: Labelling | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._labelling = labelling
        self.agents = {agent.source: agent for agent in agents}
        self.group = Group()
        self._metrics = metrics
        self._told: set[str] = set()
        self.mark()

    def mark(self, state: bytes | None = None) -> None:
        """Go back no further than here; `state` spares a freeze where it is at hand."""
        self._mark = self.pipeline.freeze() if state is None else state
        self._since: list[ScoreBatch | int] = []

    def committed(self, state: bytes) -> None:
        """The group is in the store: begin the next one."""
        self.group = Group()
        self.mark(state)

    def swap(self, pipeline: Fold, labelling: Labelling | None = None) -> None:
        """Go on with another pipeline; only between groups."""
        if self.group:
            raise ContractError("a pipeline is only swapped between groups")
        self.pipeline, self._labelling = pipeline, labelling
        self.mark()

    def take(self, delivery: Delivery) -> None:
        """Take one batch; refused and repeated ones are counted and do no harm."""
        batch, group = delivery.batch, self.group
        group.batches += 1
        group.positions[delivery.partition] = delivery.position
        before = self.agents.get(batch.source)
        if before is not None and _repeated(before, batch):
            self._count(batch, "duplicate")
            return
        error: Exception | None = None
        try:
            facts = self.pipeline.step(batch)
        except MemoryError:
            raise  # not the batch's fault: the position stays, and a restart takes it again
        except Exception as caught:
            error = caught
            self._undo()
        if error is None:
            group.facts += facts
            group.accepted.append(batch.observed_at)
            if self._labelling is not None:
                group.predictions += predictions(self._labelling, batch, self._error_of(batch))
            self._since.append(batch)
            self._metrics.add("oodmon_batches_total", result="accepted")
            counted = 0 if batch.repeats else batch.rows
            self._metrics.add(
                "oodmon_samples_total", counted, model=batch.model, model_version=batch.version
            )
        else:
            self._refuse(batch, error)
        self._see(before, batch, accepted=error is None)

    def _error_of(self, batch: ScoreBatch) -> str:
        """The first detector whose column is the probability of a wrong answer."""
        for name, known in self.pipeline.calibrations.items():
            if known.measures == EXPECTED_ERROR and batch.digests.get(name) == known.digest:
                return name
        return ""

    def advance(self, now_ns: int) -> None:
        """Time has passed and the feed is drained."""
        try:
            facts = self.pipeline.advance(now_ns)
        except MemoryError:
            raise
        except Exception:
            _log.exception("the pipeline failed while closing windows; its state was restored")
            self._undo()
            return
        self.group.facts += facts
        if self._since and isinstance(self._since[-1], int):
            self._since[-1] = now_ns  # closing up to now closes all that came before
        else:
            self._since.append(now_ns)

    def _undo(self) -> None:
        self.pipeline.thaw(self._mark)
        for step in self._since:
            # The same facts again: they are already in the group.
            if isinstance(step, int):
                self.pipeline.advance(step)
            else:
                self.pipeline.step(step)
        self.mark()

    def _refuse(self, batch: ScoreBatch, error: Exception) -> None:
        self._count(batch, "rejected")
        expected = isinstance(error, ContractError)
        why = str(error) if expected else f"{type(error).__name__}: {error}"
        if self._tell(batch, "rejected", f"a batch was rejected: {why}"):
            # Once per source, reason and day, like the notice; the metrics count the others.
            _log.error(
                "batch %s/%d rejected: %s",
                batch.source,
                batch.sequence,
                why,
                exc_info=None if expected else error,
            )

    def _count(self, batch: ScoreBatch, result: str) -> None:
        self._metrics.add("oodmon_batches_total", result=result)
        self._metrics.add(
            "oodmon_samples_dropped_total",
            batch.rows,
            model=batch.model,
            model_version=batch.version,
            reason=result,
        )

    def _tell(self, batch: ScoreBatch, what: str, text: str) -> bool:
        """One notice per source, reason and day, one key on every replay: whether it is new."""
        key = f"{what}:{batch.source}:{reason_on(text, batch.observed_at)}"
        if key in self._told:
            return False
        if len(self._told) >= MAX_AGENTS:
            self._told.clear()
        self._told.add(key)
        self.group.facts.append(
            Notice(batch.model, batch.version, batch.source, batch.observed_at, key, text)
        )
        return True

    def _see(self, before: AgentSeen | None, batch: ScoreBatch, *, accepted: bool) -> None:
        missing = 0
        if before is not None and batch.sequence > before.sequence + 1:
            missing = batch.sequence - before.sequence - 1
            self._metrics.add(
                "oodmon_batches_lost_total",
                missing,
                model=batch.model,
                model_version=batch.version,
            )
            self._tell(batch, "lost", "batches of this agent are missing: its numbering has a gap")
        if before is None and len(self.agents) >= MAX_AGENTS:
            oldest = min(self.agents.values(), key=lambda agent: agent.observed_at)
            del self.agents[oldest.source]
        seen = AgentSeen(
            source=batch.source,
            model=batch.model,
            version=batch.version,
            sequence=batch.sequence,
            observed_at=max(batch.observed_at, before.observed_at if before else 0),
            samples=(batch.rows if accepted else 0) + (before.samples if before else 0),
            dropped=batch.dropped + (before.dropped if before else 0),
            sampled_fraction=batch.sampled_fraction,
            lost=missing + (before.lost if before else 0),
        )
        self.agents[batch.source] = self.group.agents[batch.source] = seen
        # What a shadow worker sheds was scored by the others: no sample of the service is lost.
        if batch.dropped and not batch.repeats:
            self._metrics.add(
                "oodmon_samples_dropped_total",
                batch.dropped,
                model=batch.model,
                model_version=batch.version,
                reason="agent",
            )


def reason_on(text: str, at_ns: int) -> str:
    """What is the same for one reason on one day, for the key of a notice.

    Numbers do not make a reason: a text that names the batch would be new for each.
    """
    reason = hashlib.sha256(_NUMBER.sub("#", text).encode()).hexdigest()[:12]
    return f"{reason}:{at_ns // _DAY}"


def _repeated(before: AgentSeen, batch: ScoreBatch) -> bool:
    """Seen already? A lower number with a newer time is an agent that began anew."""
    return batch.sequence <= before.sequence and batch.observed_at <= before.observed_at
