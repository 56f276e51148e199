"""The verbs: what a component of each kind has to do, and nothing else.

A component is a frozen dataclass whose fields are its options (the YAML schema); `name` is set by
the registry. `oodmon.checks` holds every implementation, plugins included, to what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy.typing as npt

from oodmon.records import Activations, DriftResult, Event, ScoreBatch, Window

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Arrays",
    "Attached",
    "Delivery",
    "Detector",
    "DriftTest",
    "Feed",
    "Intake",
    "Paper",
    "Probe",
    "Reader",
    "Reads",
    "Reference",
    "Sink",
    "Stability",
    "State",
    "Tap",
    "Trigger",
    "TriggerRequest",
    "Visit",
    "Writer",
]

Stability = Literal["stable", "beta", "experimental"]

State = Mapping[str, "Tensor"]
"""What a detector learnt: a flat mapping of tensors."""

Arrays = Mapping[str, npt.NDArray[Any]]
"""What a drift test remembers, as plain arrays that can be stored."""

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    venue: str
    year: int
    url: str = ""


@dataclass(frozen=True, slots=True)
class Reads:
    """What a detector needs to see at score time; labels are only ever read while learning.

    `model` says that it needs further passes through the model (`Activations.probe`) on the
    inputs. Such a detector is run by the agent's shadow worker, not beside the tap.
    """

    layers: tuple[str, ...] = ()
    logits: bool = False
    inputs: bool = False
    labels: bool = False
    model: bool = False


class Visit(Protocol):
    """One forward pass that is being read: made by the intake, handed back to it by the tap."""

    @property
    def observed_at(self) -> int:
        """Start of the pass, ns UTC."""


class Intake(Protocol):
    """Where a tap hands its activations, in the serving thread: never waits, never raises."""

    def admit(self, rows: int) -> Visit | None:
        """A pass of so many rows (0 = not known yet) starts; None: pass it by."""

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        """An admitted pass has ended; reading it took the serving thread `tap_seconds`.

        The remark says what could not be read: layer, expected and found.
        """

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        """An admitted pass could not be read, or the model raised in it (`why` is then "")."""

    def room(self) -> bool:
        """Whether another pass can be queued without shedding. Asked by taps that can wait."""


class Attached(Protocol):
    """A tap at work."""

    @property
    def found(self) -> tuple[str, ...]:
        """What is read and from where, one sentence each."""

    def detach(self) -> None:
        """Stop; the model is as it was before, bit for bit. Safe twice."""


class Tap(ABC):
    """Where activations are read. A frozen dataclass of options; what is attached lives outside."""

    name: ClassVar[str]
    stability: ClassVar[Stability] = "beta"

    @abstractmethod
    def attach(self, model: torch.nn.Module, reads: Reads, intake: Intake) -> Attached:
        """Start reading. `ContractError` here names what is missing; nothing raises in a pass."""


class Probe(Protocol):
    """Further passes through the model, of which the model itself keeps no trace.

    They run on a private copy of its modules that shares the weights, always in evaluation mode
    and one at a time: the served model's parameters, gradients, buffers, modes and hooks cannot be
    reached from here. (Calling the served model, or `torch.func.functional_call` on it, could not
    promise that: hooks would fire, modes would flip, weights would be swapped under other threads.)

    `ContractError` where the model cannot be called with the inputs alone.
    """

    def run(
        self,
        inputs: Tensor,
        layers: Sequence[str] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> Activations:
        """One pass, without gradient: logits and layers, named as a tap names them.

        `weights` take the place of the model's own, by their names in its state dict.
        """

    def slope(
        self,
        inputs: Tensor,
        objective: Callable[[Activations], Tensor],
        layers: Sequence[str] = (),
    ) -> Tensor:
        """Gradient of the objective (B,) with respect to the inputs, of their shape.

        Row i holds that of row i: the rows' objectives are summed, never averaged.
        """

    def thinned(
        self, inputs: Tensor, seeds: Sequence[int], rate: float = 0.0
    ) -> Iterator[Activations]:
        """Passes with dropout on: each seed's masks make one thinned network for all rows.

        A `rate` above 0 replaces the model's own dropout rates. `ContractError` where the model
        runs no dropout.
        """


class Reference(Protocol):
    """In-distribution data to learn from: `detectors.reference.Reference` is the real one."""

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (C, D) and bias (C,) of the classifier head, if known."""

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, seeded the same at each call."""

    def progress(self, done: float, note: str = "") -> None:
        """Report the share of the work that is done, in [0, 1]."""

    def __iter__(self) -> Iterator[Activations]:
        """Labelled batches, in the same order at each pass."""


class Detector(ABC):
    """Frozen dataclass of options and two pure functions; nothing is kept on self.

    Higher is more OOD. Row i of a score depends on row i alone; NaN means "cannot score this row"
    and stays in its row. No gradient, no host synchronisation, no input changed, the same answer
    twice.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = ""
    """Per sample, beside the forward pass: "C", "C·D", "D²", "N·D", "network" (C classes, D
    features, N stored samples)."""
    measures: ClassVar[str] = ""
    """What a score is beside a rank: "expected_error" is the probability of a wrong answer."""

    @abstractmethod
    def reads(self) -> Reads:
        """Which layers, logits or inputs it needs."""

    def learn(self, reference: Reference) -> State:
        """What the detector takes from the reference: same reference, same state, bit for bit."""
        return {}

    @abstractmethod
    def score(self, acts: Activations, state: State) -> Tensor:
        """(B,), floating, on the activations' device."""

    def pin(self, layers: Sequence[str]) -> Detector:
        """The same detector with the layers that were left open chosen from those there are.

        `Scorer.learn` calls it, so a scorer always names what it reads. `layers` is in the order
        of the forward pass.
        """
        return self

    def check(self, state: State) -> None:
        """`StateError` says what, where and expected if this is no state of this detector."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One batch as a feed hands it over.

    Attributes:
        batch: what the agent measured.
        partition: the part of the feed that it came from (a writer's folder, a topic partition).
        position: where that partition stands after this batch. Opaque to all but the feed; it is
            committed in the transaction that holds what was concluded from the batch.
    """

    batch: ScoreBatch
    partition: str
    position: str


class Writer(ABC):
    """The agent's end of a feed: one per serving process."""

    @abstractmethod
    def put(self, batch: ScoreBatch) -> bool:
        """Accept one batch; False says that it was shed because the feed is full. Never waits."""

    @abstractmethod
    def close(self) -> None:
        """Flush. Safe twice."""


class Reader(ABC):
    """The daemon's end of a feed."""

    folder: str = ""
    """The folder of this machine that the feed fills; "" where there is none."""

    @abstractmethod
    def seek(self, positions: Mapping[str, str]) -> None:
        """Go on after these committed positions; an unnamed partition starts at its beginning."""

    @abstractmethod
    def poll(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        """Up to `limit` batches; empty when nothing came within the time.

        What is already there is delivered in one order whatever the calls: by event time, then
        partition. So a restart over the same content replays the same way.
        """

    @abstractmethod
    def settle(self, positions: Mapping[str, str]) -> None:
        """These positions are committed; what lies before them may be forgotten."""

    @abstractmethod
    def backlog_bytes(self) -> int:
        """Accepted and not yet settled."""

    @property
    def damaged_frames(self) -> int:
        """Places that were found damaged and passed over, since the reader was opened."""
        return 0

    def problems(self) -> Sequence[str]:
        """Parts of the feed that cannot be read at present, and why: one sentence each."""
        return ()

    @property
    def capacity_bytes(self) -> int:
        """The backlog at which writers begin to shed; 0 where it cannot be told."""
        return 0

    def partitions(self) -> Collection[str] | None:
        """What there is now; the positions of others are forgotten. None: it cannot be told.

        Any thread may ask. Names of partitions that are gone must never come back.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Safe twice."""


class Feed(ABC):
    """The way from agent to daemon, both ends."""

    name: ClassVar[str]
    stability: ClassVar[Stability] = "beta"

    @abstractmethod
    def writer(self, source: str) -> Writer:
        """The agent's end, for the agent of this id; `FeedError` where it cannot work."""

    @abstractmethod
    def reader(self) -> Reader:
        """The daemon's end; `FeedError` where it cannot work."""


class DriftTest(ABC, Generic[S]):
    """Frozen dataclass of options and pure functions over a state S of the stream's own.

    One state per (detector, segment). Deterministic. The pipeline stores states through `freeze`
    and brings them back through `thaw`; no foreign object is ever pickled.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    stability: ClassVar[Stability] = "beta"
    disjoint: ClassVar[bool] = False
    """True: every sample must be counted once, so that under sliding windows the test is given
    the panes that they are made of."""

    @abstractmethod
    def start(self, reference: Window) -> S:
        """The state before the first window.

        The reference holds the calibration scores, binned by their own tail probabilities.
        """

    @abstractmethod
    def step(self, state: S, window: Window, detector: str) -> tuple[S, DriftResult]:
        """Take one closed window of the stream. An empty window is never drifted.

        The result's `test` is left "" and is filled in by the pipeline.
        """

    def step_all(
        self,
        states: Sequence[S],
        windows: Sequence[Window],
        detectors: Sequence[str],
        *,
        sharing: int = 1,
        alarming: bool = False,
    ) -> list[tuple[S, DriftResult]]:
        """`step` for many streams of one span: the same results, sooner where a test can.

        Args:
            states, windows, detectors: of the streams that have a window.
            sharing: streams that `combine` decides on together, the silent ones too. At 1, as in
                `step`, each is decided on by itself.
            alarming: what it decided on the span before.
        """
        return [self.step(*each) for each in zip(states, windows, detectors, strict=True)]

    @abstractmethod
    def freeze(self, state: S) -> Arrays:
        """The state as plain arrays: ``thaw(reference, freeze(s))`` goes on exactly as ``s``."""

    def freeze_all(self, states: Sequence[S]) -> list[tuple[list[int], Arrays]]:
        """Which of many states, and their `freeze` stacked; empty where they come one by one."""
        return []

    @abstractmethod
    def thaw(self, reference: Window, arrays: Arrays) -> S:
        """The state back from arrays."""

    def rearm(self, state: S, reference: Window) -> S:
        """The state when an episode is over: no evidence, as after `start`.

        What was learnt from traffic that had not changed may be kept.
        """
        return self.start(reference)

    def moved(self, state: S) -> Mapping[str, Any]:
        """What an alert says of one stream beside the result: plain JSON values; may be empty."""
        return {}

    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        """Judge the streams of one span together: the results, changed or added to.

        Tests that share one promise over all their streams decide here. `others` are the latest
        results of the test's streams that had no window in this span.
        """
        return results

    def run_length(self, window_seconds: float) -> float:
        """The promise as a number: expected windows between false alarms, at least.

        Per stream, or over all streams where `combine` adds a result for `ALL` of them. 0 says that
        nothing is promised.
        """
        return 0.0

    def outlook(self, reference: Window) -> str:
        """What a reference of this size lets it find, in words for those who fit; may be ""."""
        return ""

    def measurements(self, state: S) -> Mapping[str, float]:
        """What the test learnt about the traffic itself, for metrics (autocorrelation, …)."""
        return {}

    def promise(self, window_seconds: float) -> str:
        """How often a false alarm may come, in words for the alert and the report."""
        return ""


class Sink(ABC):
    """Tells the world. Frozen dataclass of options; what is open lives outside the options.

    Fails with `RetryLater` or `Rejected` only. Batching, backoff, timeout, dead letters and order
    per subject live once, in `daemon.delivery`.
    """

    name: ClassVar[str]
    stability: ClassVar[Stability] = "beta"

    @abstractmethod
    def open(self) -> None:
        """Connect, or `RetryLater` / `Rejected`."""

    @abstractmethod
    def send(self, events: Sequence[Event]) -> None:
        """All or nothing; idempotent by event id."""

    @abstractmethod
    def close(self) -> None:
        """Flush; safe twice, safe without `open`."""


@dataclass(frozen=True, slots=True)
class TriggerRequest:
    """Ask for a retraining.

    Attributes:
        id: idempotency key; the same for the same episode on every replay.
        alert: the firing alert's event.
        requested_at: ns UTC.
    """

    id: str
    alert: Event
    requested_at: int
    labels: Mapping[str, str] = field(default_factory=dict)


class Trigger(ABC):
    """Acts. Only ever called through `triggers.guard`; fails as a sink does."""

    name: ClassVar[str]
    stability: ClassVar[Stability] = "beta"

    @abstractmethod
    def open(self) -> None:
        """Connect, or `RetryLater` / `Rejected`."""

    @abstractmethod
    def fire(self, request: TriggerRequest) -> None:
        """Ask for one retraining; idempotent by request id."""

    @abstractmethod
    def close(self) -> None:
        """Safe twice, safe without `open`."""


Clock = Callable[[], int]
"""Wall clock in ns UTC; only the agent and the daemon own one."""
