"""The nouns: what flows from the tap to the people on call.

Records are frozen. Arrays in them are made read-only on construction, so that whoever wants to
write has to copy. Times are integer nanoseconds since the epoch, UTC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from oodmon.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

    from oodmon.contracts import Probe

__all__ = [
    "ALL",
    "BIN_EDGES",
    "SAMPLE_SIZE",
    "SHADOW",
    "Activations",
    "Alert",
    "DriftResult",
    "Event",
    "Exceedance",
    "Fact",
    "Histogram",
    "Notice",
    "ScoreBatch",
    "Window",
]

_T = TypeVar("_T")

ALL: Final = "*"
"""In the place of a detector or a segment: the result speaks of all of them together."""

SAMPLE_SIZE: Final = 128
"""Raw scores kept per window and detector for tests that need raw values."""

SHADOW: Final = "/shadow"
"""Ends the source of batches that repeat the samples of the source before it."""

_TAIL_EDGES = 10.0 ** np.linspace(-4.0, -1.0, 28)
_BODY_EDGES = np.linspace(0.1, 1.0, 37)[1:]
BIN_EDGES: Final[npt.NDArray[np.float64]] = np.concatenate([[0.0], _TAIL_EDGES, _BODY_EDGES])
"""Edges of the 64 tail-probability bins (lower, upper]: log-spaced up to 0.1, linear above.

A share of a few percent of novel samples shows in the far tail first, hence the fine bins there.
"""
BIN_EDGES.setflags(write=False)


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only view: the caller's own array keeps its flags."""
    if not array.flags.writeable:
        return array
    view = array.view()
    view.setflags(write=False)
    return view


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What a tap saw of one forward pass (or what a test or `fit` hands over instead of one).

    Attributes:
        layers: name → Tensor (B, …), floating, detached, one device for all.
        logits: Tensor (B, C) before softmax, or none.
        inputs: Tensor (B, …), only when a detector reads them.
        labels: Tensor (B,) int64, only while learning.
        sample_ids: B strings, or empty when the samples have no names of their own.
        observed_at: start of the forward pass, ns UTC.
        probe: further passes through the model, only for detectors that read the model.

    B may be 0 and values may be non-finite. The tensors are shared between detectors and must not
    be written to.
    """

    layers: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    inputs: Tensor | None = None
    labels: Tensor | None = None
    sample_ids: tuple[str, ...] = ()
    observed_at: int = 0
    probe: Probe | None = field(default=None, repr=False)
    _shared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def rows(self) -> int:
        """B, the number of samples."""
        if self.logits is not None:
            return int(self.logits.shape[0])
        for tensor in (self.inputs, *self.layers.values()):
            if tensor is not None:
                return int(tensor.shape[0])
        return 0

    def layer(self, name: str) -> Tensor:
        """The activations of one layer; `ContractError` names the layers there are."""
        try:
            return self.layers[name]
        except KeyError:
            have = ", ".join(sorted(self.layers)) or "none"
            raise ContractError(f"layer {name!r} was not tapped; tapped layers: {have}") from None

    def require_logits(self) -> Tensor:
        """The logits, or `ContractError` where none were tapped."""
        if self.logits is None:
            raise ContractError("logits were not tapped, and this detector reads them")
        return self.logits

    def require_inputs(self) -> Tensor:
        """The model's inputs, or `ContractError` where none were tapped."""
        if self.inputs is None:
            raise ContractError("inputs were not tapped, and this detector reads them")
        return self.inputs

    def require_probe(self) -> Probe:
        """Passes through the model, or `ContractError` where none can be made."""
        if self.probe is None:
            raise ContractError(
                "there is no probe of the model here, and this detector needs further passes"
            )
        return self.probe

    def shared(self, key: str, compute: Callable[[], _T]) -> _T:
        """An intermediate that several detectors need (log-sum-exp, norms): computed once a batch.

        Two threads may both compute it; either result is the right one.
        """
        value: _T | None = self._shared.get(key)
        if value is None:
            value = self._shared[key] = compute()
        return value


@dataclass(frozen=True, slots=True, eq=False)
class ScoreBatch:
    """The scores of one batch of samples: the only record that crosses from agent to daemon.

    Attributes:
        model, version: what was served.
        source: id of the agent.
        sequence: counts the batches of one source from 0, gap-free.
        observed_at: start of the forward pass, ns UTC.
        scores: detector id → float32 (B,), higher = more OOD, NaN where a row could not be scored.
        digests: detector id → digest of the scorer that made the column.
        sample_ids: B strings, or empty: then row i is named ``source/sequence/i``.
        segment: int32 (B,) into `segments`, or empty: no segments.
        segments: names that `segment` points into.
        predicted: int32 (B,) predicted class, or empty.
        dropped: samples that the agent shed since the batch before.
        sampled_fraction: the share of served samples that the agent scores at present, (0, 1].
        notices: what the agent has to tell, one sentence each ("breaker of `gram` opened: …").
        repeats: its samples come in batches of another source as well, which count them: only its
            score columns are to be counted (a shadow worker's, whose scores come later).
    """

    model: str
    version: str
    source: str
    sequence: int
    observed_at: int
    scores: Mapping[str, npt.NDArray[np.float32]]
    digests: Mapping[str, str] = field(default_factory=dict)
    sample_ids: tuple[str, ...] = ()
    segment: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    segments: tuple[str, ...] = ()
    predicted: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    dropped: int = 0
    sampled_fraction: float = 1.0
    notices: tuple[str, ...] = ()
    repeats: bool = False

    def __post_init__(self) -> None:
        columns = {}
        rows = -1
        for name, column in self.scores.items():
            if column.ndim != 1 or column.dtype != np.float32:
                raise ContractError(
                    f"scores[{name!r}]: expected float32 (B,), found {column.dtype} {column.shape}"
                )
            if rows not in (-1, len(column)):
                raise ContractError(f"scores[{name!r}]: {len(column)} rows, others have {rows}")
            rows = len(column)
            columns[name] = _frozen(column)
        rows = max(rows, 0)
        object.__setattr__(self, "scores", columns)
        for name, count in (
            ("sample_ids", len(self.sample_ids)),
            ("segment", len(self.segment)),
            ("predicted", len(self.predicted)),
        ):
            if count not in (0, rows):
                raise ContractError(f"{name}: {count} rows, scores have {rows}")
        for name in ("segment", "predicted"):
            array = getattr(self, name)
            if array.dtype != np.int32 or array.ndim != 1:
                raise ContractError(
                    f"{name}: expected int32 (B,), found {array.dtype} {array.shape}"
                )
            object.__setattr__(self, name, _frozen(array))
        if len(self.segment) and not (
            int(self.segment.min()) >= 0 and int(self.segment.max()) < len(self.segments)
        ):
            raise ContractError(
                f"segment: values must index the {len(self.segments)} names in `segments`"
            )
        if self.sequence < 0 or self.dropped < 0:
            raise ContractError("sequence and dropped must not be negative")
        if not 0.0 < self.sampled_fraction <= 1.0:
            raise ContractError(f"sampled_fraction: {self.sampled_fraction} is not in (0, 1]")

    @property
    def rows(self) -> int:
        """B, the number of samples."""
        return next((len(column) for column in self.scores.values()), 0)

    def sample_id(self, row: int) -> str:
        """The name of one sample."""
        return self.sample_ids[row] if self.sample_ids else f"{self.source}/{self.sequence}/{row}"


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """The scores of one detector in one window, as counts that add.

    Attributes:
        counts: int64 (64,) over `BIN_EDGES` of the tail probability.
        invalid: samples whose score was NaN.
        keys: uint64 (k,) ascending, k ≤ `SAMPLE_SIZE`: the smallest hashes of sample places seen.
        sample: float32 (k,) the raw scores that belong to `keys`.
        pairs: neighbouring samples of one source that were both scored.
        jumps: sum over these pairs of the squared difference of their normal scores, in
            millionths; against the spread it tells how correlated the traffic is.
        judged: samples whose score is the probability of a wrong answer; 0 for other detectors.
        errors: sum of these probabilities, in millionths.
        classes: int32 (k,) predicted classes that belong to `keys`, -1 where unknown; or empty.
        swings: as `jumps`, of the squared normal scores: whether neighbours are alike in more than
            their mean.

    The keys make the raw sample a uniform one whatever the order of arrival, and mergeable.
    """

    counts: npt.NDArray[np.int64]
    invalid: int
    keys: npt.NDArray[np.uint64]
    sample: npt.NDArray[np.float32]
    pairs: int = 0
    jumps: int = 0
    judged: int = 0
    errors: int = 0
    classes: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    swings: int = 0

    def __post_init__(self) -> None:
        bins = len(BIN_EDGES) - 1
        if self.counts.shape != (bins,) or self.counts.dtype != np.int64:
            raise ContractError(
                f"counts: expected int64 ({bins},), found {self.counts.dtype} {self.counts.shape}"
            )
        if not len(self.classes) and len(self.keys):
            object.__setattr__(self, "classes", np.full(len(self.keys), -1, np.int32))
        if not len(self.keys) == len(self.sample) == len(self.classes) <= SAMPLE_SIZE:
            raise ContractError("keys, sample and classes must have one length, <= SAMPLE_SIZE")
        for name in ("counts", "keys", "sample", "classes"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @staticmethod
    def empty() -> Histogram:
        """The zero of addition."""
        return Histogram(
            np.zeros(len(BIN_EDGES) - 1, np.int64),
            0,
            np.empty(0, np.uint64),
            np.empty(0, np.float32),
        )

    @property
    def scored(self) -> int:
        """Samples with a score."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Estimated share of right answers; NaN where the scores do not tell it."""
        return 1.0 - self.errors / 1e6 / self.judged if self.judged else float("nan")

    def __add__(self, other: Histogram) -> Histogram:
        keys = np.concatenate([self.keys, other.keys])
        sample = np.concatenate([self.sample, other.sample])
        classes = np.concatenate([self.classes, other.classes])
        order = np.argsort(keys, kind="stable")[:SAMPLE_SIZE]
        return Histogram(
            self.counts + other.counts,
            self.invalid + other.invalid,
            keys[order],
            sample[order],
            self.pairs + other.pairs,
            self.jumps + other.jumps,
            self.judged + other.judged,
            self.errors + other.errors,
            classes[order],
            self.swings + other.swings,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What was seen in one span of event time and one segment, as counts that add.

    Attributes:
        model, version: what was served.
        segment: name of the segment, "" where there are none.
        start, end: half-open span [start, end), ns UTC.
        samples: samples that arrived in time.
        dropped: samples shed by agents, counted in the window of the batch that reports them.
        late: samples whose scores were older than the allowed lateness: counted, not merged.
        detectors: detector id → `Histogram`.
        predicted: predicted class → samples.

    ``a + b`` is associative and commutative; the sum spans both.
    """

    model: str
    version: str
    segment: str
    start: int
    end: int
    samples: int = 0
    dropped: int = 0
    late: int = 0
    detectors: Mapping[str, Histogram] = field(default_factory=dict)
    predicted: Mapping[int, int] = field(default_factory=dict)

    def histogram(self, detector: str) -> Histogram:
        """One detector's counts; the empty histogram if the window has none."""
        found = self.detectors.get(detector)
        return Histogram.empty() if found is None else found

    def __add__(self, other: Window) -> Window:
        if (self.model, self.version, self.segment) != (other.model, other.version, other.segment):
            raise ContractError(
                "only windows of one model, version and segment add: "
                f"{self.model}/{self.version}/{self.segment!r} and "
                f"{other.model}/{other.version}/{other.segment!r}"
            )
        detectors = dict(self.detectors)
        for name, histogram in other.detectors.items():
            detectors[name] = detectors[name] + histogram if name in detectors else histogram
        predicted = dict(self.predicted)
        for label, count in other.predicted.items():
            predicted[label] = predicted.get(label, 0) + count
        return Window(
            self.model,
            self.version,
            self.segment,
            min(self.start, other.start),
            max(self.end, other.end),
            self.samples + other.samples,
            self.dropped + other.dropped,
            self.late + other.late,
            detectors,
            predicted,
        )


@dataclass(frozen=True, slots=True)
class DriftResult:
    """The decision of one drift test on one window of one stream.

    Attributes:
        test: id of the test in the configuration.
        detector, segment: the stream; `ALL` where the result speaks of all streams of the test.
        start, end: span of the window, ns UTC.
        statistic, threshold: what was compared; `drifted` is the outcome.
        effect: a size that a person can read; each test says what it means by it.
        p_value: where the test has one.
        since: estimate of when the change began, ns UTC; 0 where the test has none.
        samples, reference_samples: what the decision rests on.
    """

    model: str
    version: str
    test: str
    detector: str
    segment: str
    start: int
    end: int
    statistic: float
    threshold: float
    drifted: bool
    effect: float
    samples: int
    reference_samples: int
    p_value: float | None = None
    since: int = 0


@dataclass(frozen=True, slots=True)
class Exceedance:
    """A flagged sample: its tail probability was at most the configured level."""

    model: str
    version: str
    sample_id: str
    detector: str
    segment: str
    observed_at: int
    score: float
    p: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that an agent or the pipeline has to tell; `key` makes it the same on replay."""

    model: str
    version: str
    source: str
    observed_at: int
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Alert:
    """The start or the end of an episode, in Alertmanager's words.

    Attributes:
        rule: id of the rule.
        status: firing | resolved.
        severity: info | warning | critical (free text, as Alertmanager's).
        started_at, ended_at: ns UTC; `ended_at` is 0 while it fires.
        labels: what identifies the episode, beside the rule.
        evidence: what a person wants to know; plain JSON values.
    """

    rule: str
    status: Literal["firing", "resolved"]
    severity: str
    started_at: int
    ended_at: int
    labels: Mapping[str, str]
    evidence: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name rule and labels."""
        text = "\x00".join([self.rule, *(f"{k}\x01{self.labels[k]}" for k in sorted(self.labels))])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        """The same on every replay: fingerprint, start and status."""
        return f"{self.fingerprint}-{self.started_at}-{self.status}"


Fact = Window | DriftResult | Exceedance | Notice | Alert
"""What the pipeline concludes."""


@dataclass(frozen=True, slots=True)
class Event:
    """The envelope in which a fact, or something that the daemon did, leaves for the world.

    Outside it is a CloudEvents 1.0 JSON object; `wire.cloud_event` makes it.

    Attributes:
        id: the same on every replay; receivers drop what they have seen.
        type: such as ``oodmon.alert.firing.v1``.
        source: ``/oodmon/<model>/<version>``.
        subject: order is kept per subject (an alert's fingerprint).
        time: ns UTC.
        data: plain JSON values.
    """

    id: str
    type: str
    source: str
    subject: str
    time: int
    data: Mapping[str, Any]
