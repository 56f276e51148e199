"""The scoring thread: passes in, score batches out; what goes wrong here goes no further."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from oodmon.agent.breaker import Breaker
from oodmon.agent.lanes import CpuLane, Lane, Measured, lane_for, quiet_thread
from oodmon.agent.outlet import Outlet, Tally
from oodmon.agent.passes import Pass, Passes, joined
from oodmon.agent.sampling import Sampler
from oodmon.contracts import Reads, Writer
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.taps.identity import WORDS, Difference, compare

__all__ = ["Limits", "ScorerLike", "Scoring"]

log = logging.getLogger(__name__)

_SPAN_NS: Final = 500_000_000
"""Passes joined into one batch started within half a second: the batch carries one time."""

_IDLE_SECONDS: Final = 1.0
_MOST_NICE: Final = 19

_LOOK_SECONDS: Final = 300.0
"""How often it is looked which weights are served: some hundredth of a second each time."""


class ScorerLike(Protocol):
    """What the agent needs of a `detectors.Scorer`."""

    @property
    def digest(self) -> str:
        """Names options and state."""

    def reads(self) -> Reads:
        """What has to be tapped."""

    def score(self, acts: Activations) -> Tensor:
        """Float32 (B,) on the activations' device."""

    def to(self, device: str | torch.device) -> ScorerLike:
        """The same scorer elsewhere."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an agent.

    Attributes:
        queue_passes: forward passes that wait for scoring at most.
        queue_bytes: bytes of activations that wait at most.
        batch_rows: rows scored at once; smaller passes are joined up to it.
        linger_seconds: how long the first of several small passes waits for others.
        failures: failures of a scorer in a row after which it is left alone.
        retry_seconds: for how long, doubled as long as it goes on failing.
        nice: how far the scoring thread steps back, 0 (not at all) to 19; the shadow worker by
            19, unless this is 0.
        shadow_passes: passes that wait for the shadow worker at most.
        shadow_rows: rows that it works on at once; bounds its memory.
        shadow_age_seconds: passes older than this are shed by it: their window closes.
        shadow_duty: share of the time that its thread is at work at most, (0, 1].
    """

    queue_passes: int = 64
    queue_bytes: int = 256 * 1024 * 1024
    batch_rows: int = 256
    linger_seconds: float = 0.25
    failures: int = 5
    retry_seconds: float = 60.0
    nice: int = 10
    shadow_passes: int = 16
    shadow_rows: int = 32
    shadow_age_seconds: float = 5.0
    shadow_duty: float = 0.5

    def __post_init__(self) -> None:
        for name in (
            "queue_passes", "queue_bytes", "batch_rows", "failures", "shadow_passes", "shadow_rows",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ContractError(f"limits.{name}: {getattr(self, name)} is not positive")
        if self.linger_seconds < 0 or self.retry_seconds < 0 or not 0 <= self.nice <= _MOST_NICE:
            raise ContractError(
                "limits: linger_seconds and retry_seconds must not be negative, nice is 0 to 19"
            )
        if not (self.shadow_age_seconds > 0.0 and 0.0 < self.shadow_duty <= 1.0):
            raise ContractError(
                "limits: shadow_age_seconds must be positive, shadow_duty in (0, 1]"
            )


class Scoring:
    """Scores what waits in the queue and writes it to the feed, in a thread of its own.

    Args:
        open_writer: called in the thread; where it fails, batches are shed and it is tried again
            at the next one.
        stamp: model, version, source of the batches.
        repeats: the samples are counted by another source's batches.
        weights: tells which weights are served now, as `taps.identity.identify` does.
    """

    thread_name = "oodmon-scoring"

    def __init__(
        self,
        queue: Passes,
        scorers: Mapping[str, ScorerLike],
        open_writer: Callable[[], Writer],
        stamp: tuple[str, str, str],
        sampler: Sampler,
        limits: Limits,
        clock: Callable[[], int],
        *,
        repeats: bool = False,
        weights: Callable[[], str] = lambda: "",
    ) -> None:
        self.tally = Tally()
        self._queue = queue
        self._scorers = dict(scorers)
        self._outlet = Outlet(
            open_writer,
            stamp,
            {name: scorer.digest for name, scorer in scorers.items()},
            queue,
            self.tally,
            repeats=repeats,
        )
        self._breakers = {n: Breaker(limits.failures, limits.retry_seconds) for n in scorers}
        self._sampler = sampler
        self._limits = limits
        self._clock = clock
        self._device = torch.device("cpu")
        self._lane: Lane = CpuLane()
        self._weights = weights
        self._look_at = 0.0
        self._strange: dict[str, Difference] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.thread_name, daemon=True)

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Samples shed so far, told to the daemon or not yet."""
        return self._outlet.dropped

    def stop(self, timeout_seconds: float) -> bool:
        """Score what waits, flush, close the writer; whether that was done in time."""
        self._stopping.set()
        self._queue.hasten()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        quiet_thread(self._limits.nice)
        while True:
            stopping = self._stopping.is_set()
            try:
                if not stopping and self._queue.wait(_IDLE_SECONDS):
                    if not self._stopping.is_set():
                        self._queue.linger(self._limits.linger_seconds)
                    self._work()
                elif stopping:
                    while len(self._queue):
                        self._work()
                    break
            except Exception:
                # Not a scorer's failure (those are caught one by one), and yet no reason to die.
                log.exception("the scoring thread failed; it goes on")
                self.tally.failures += 1
        self._outlet.close(self._clock(), self._sampler.fraction)

    def _work(self) -> None:
        while group := self._next():
            rows = sum(item.rows for item in group)
            try:
                self._settle(next(iter(group[0].tensors())).device)
                self._recognise(group, time.monotonic())
                begun = time.thread_time()
                measured = self._score(group, rows)
            except Exception as error:
                log.exception("a batch could not be scored")
                self.tally.failures += 1
                self._outlet.lose(rows, f"a batch could not be scored: {error!r}")
                continue
            self._outlet.send(group, measured)
            tap = sum(item.tap_seconds for item in group)
            scoring = time.thread_time() - begun + measured.device_seconds
            serving = measured.serving_seconds or sum(item.serving_seconds for item in group)
            self._sampler.measured(len(group), serving, tap + scoring)
            tally = self.tally
            tally.sampled += rows
            tally.tap_seconds += tap
            tally.scoring_seconds += scoring
            tally.serving_seconds += serving
            self._rest(scoring)

    def _next(self) -> list[Pass]:
        """What is scored as one batch; empty where nothing waits."""
        return self._queue.group(self._limits.batch_rows, _SPAN_NS)

    def _ready(self, acts: Activations) -> Activations:
        """What the scorers are given of a part of a batch."""
        return acts

    def _rest(self, worked_seconds: float) -> None:
        """Called after each batch."""

    def _settle(self, device: torch.device) -> None:
        """Where the passes are: the model has moved, or this is the first one."""
        if device != self._device:
            self._scorers = {name: s.to(device) for name, s in self._scorers.items()}
            self._lane = lane_for(device)
            self._device = device

    def _recognise(self, group: Sequence[Pass], now: float) -> None:
        """Is what is served what the scorers were fitted on? What has changed is told.

        Looked at here and not when attached, because weights may be loaded after that.
        """
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        fitted = {name: _fitted_on(scorer) for name, scorer in self._scorers.items()}
        if not any(fitted.values()):
            return
        with self._lane.aside(group):
            served = self._weights()
        found = {n: compare(weights, served) for n, weights in fitted.items()}
        if not served or found == self._strange:
            return
        self._outlet.rename({n: _estranged(s.digest, found[n]) for n, s in self._scorers.items()})
        for difference, words in WORDS.items():
            names = [name for name, each in found.items() if each == difference]
            if names:
                refused = "; their scores are not counted" if difference == "values" else ""
                text = f"{', '.join(names)}: fitted on {words}{refused}"
                log.warning("%s", text)
                if difference != "rounding":
                    self._outlet.tell(text)
        if "values" in self._strange.values() and "values" not in found.values():
            text = "the weights that are served are again those that the detectors were fitted on"
            log.warning("%s", text)
            self._outlet.tell(text)
        self._strange = found

    def _score(self, group: Sequence[Pass], rows: int) -> Measured:
        def compute() -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                acts = self._together(joined(list(group)))
                parts = [
                    self._ready(_cut(acts, begin, begin + self._limits.batch_rows))
                    for begin in range(0, max(rows, 1), self._limits.batch_rows)
                ]
                columns = [self._column(name, parts, rows) for name in self._scorers]
                scores = torch.stack(columns) if columns else torch.empty(0, rows)
                return scores, _predicted(acts.logits)

        return self._lane.run(group, compute)

    def _together(self, acts: Activations) -> Activations:
        """All on one device, where a model is spread over several."""
        if all(tensor.device == self._device for tensor in acts.layers.values()):
            return acts
        layers = {n: t.to(self._device, non_blocking=True) for n, t in acts.layers.items()}
        return Activations(
            layers=layers, logits=acts.logits, inputs=acts.inputs, observed_at=acts.observed_at
        )

    def _column(self, name: str, parts: Sequence[Activations], rows: int) -> Tensor:
        """Float32 (B,), NaN where the scorer fails or is left alone."""
        breaker = self._breakers[name]
        if breaker.allows():
            try:
                scored = [self._scorers[name].score(part) for part in parts]
                column = (scored[0] if len(scored) == 1 else torch.cat(scored)).float()
                if column.shape != (rows,):
                    raise ValueError(f"expected scores ({rows},), found {tuple(column.shape)}")  # noqa: TRY301
            except Exception as error:
                self.tally.failures += 1
                if breaker.failed():
                    # What breaks a contract is told whole in its message.
                    told = not isinstance(error, ContractError)
                    log.warning(
                        "scorer %s is left alone: it goes on failing: %s",
                        name,
                        error,
                        exc_info=told,
                    )
                    self._outlet.tell(
                        f"breaker of `{name}` opened for {breaker.wait_seconds:g} s after "
                        f"{self._limits.failures} failures: {type(error).__name__}: {error}"
                    )
            else:
                if breaker.succeeded():
                    self._outlet.tell(f"breaker of `{name}` closed: it scores again")
                return column
        return torch.full((rows,), float("nan"), device=self._device)


def _fitted_on(scorer: ScorerLike) -> str:
    """What `taps.identity.identify` said when it was fitted; "" where a scorer does not tell."""
    weights = getattr(scorer, "weights", "")
    return weights if isinstance(weights, str) else ""


def _estranged(digest: str, difference: Difference) -> str:
    """What made a column: on other weights it is none that a calibration was made for."""
    if difference != "values":
        return digest
    return hashlib.sha256(f"{digest} on other weights".encode()).hexdigest()[: len(digest)]


def _cut(acts: Activations, begin: int, end: int) -> Activations:
    if begin == 0 and acts.rows <= end:
        return acts
    return Activations(
        layers={name: tensor[begin:end] for name, tensor in acts.layers.items()},
        logits=None if acts.logits is None else acts.logits[begin:end],
        inputs=None if acts.inputs is None else acts.inputs[begin:end],
        observed_at=acts.observed_at,
    )


def _predicted(logits: Tensor | None) -> Tensor | None:
    """Int32 (B,): the largest logit; of a single one, whether it is positive."""
    if logits is None or logits.ndim != 2 or logits.shape[1] == 0:
        return None
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.int32)
    return logits.argmax(dim=1).to(torch.int32)
