"""Beside the model: tap → scorers → feed; bounded, and nothing of it ever raises into the model.

A package rather than one file, because each of its parts is a subject of its own: `gate` (in the
serving threads), `passes` (between the threads), `scoring` and `outlet` (in the scoring thread),
`lanes` (CPU and CUDA), `sampling` (the overhead budget), `breaker`, `request`.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import torch
from torch import nn

from oodmon.agent.breaker import Breaker
from oodmon.agent.gate import Gate, Room
from oodmon.agent.passes import Passes
from oodmon.agent.request import Ask, Request, request
from oodmon.agent.sampling import Sampler
from oodmon.agent.scoring import Limits, ScorerLike, Scoring
from oodmon.contracts import Attached, Feed, Reads, Tap, Writer
from oodmon.errors import ContractError

__all__ = ["Agent", "Limits", "Request", "Stats", "request"]

log = logging.getLogger(__name__)

_EXIT_SECONDS: Final = 5.0
"""How long a process that ends may wait for scores that are still to be written."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of one agent in this process; samples are rows.

    Attributes:
        passes: forward passes that started.
        seen: samples in them, as far as their inputs told.
        sampled: samples that were read and scored.
        scored: samples that the feed accepted.
        dropped: samples shed: queue full, feed full, tap or feed failing.
        batches: score batches that the feed accepted.
        failures: of tap, scorers and feed together.
        fraction: share of the passes that is read at present.
        tap_seconds: serving-thread time of reading.
        scoring_seconds: scoring-thread CPU time, plus device time on CUDA.
        serving_seconds: forward time of the sampled passes.
        overhead: (tap + scoring) / serving time of all passes, estimated from the sampled ones.
    """

    passes: int
    seen: int
    sampled: int
    scored: int
    dropped: int
    batches: int
    failures: int
    fraction: float
    tap_seconds: float
    scoring_seconds: float
    serving_seconds: float
    overhead: float


class Agent:
    """Watches one model. Made by `Agent.attach`; a context manager that detaches.

    All threads of the process may call the model. A forked process watches on by itself, with a
    source, a queue and a writer of its own.
    """

    def __init__(
        self,
        *,
        scorers: Mapping[str, ScorerLike],
        feed: Feed,
        model_name: str,
        version: str,
        device: torch.device,
        budget: float,
        request: Ask | None,
        source: str,
        clock: Callable[[], int],
        limits: Limits,
        seed: int,
    ) -> None:
        self._scorers = {name: scorer.to(device) for name, scorer in scorers.items()}
        self._feed = feed
        self._model = (model_name, version)
        self._clock = clock
        self._limits = limits
        self._source = source
        self._pid = self._born_in = os.getpid()
        self._first_writer: list[Writer] = []
        self._sampler = Sampler(budget, seed)
        self._gate = Gate(
            self._sampler,
            clock,
            device,
            self._furnish,
            request,
            Breaker(limits.failures, limits.retry_seconds),
        )
        self._attached: Attached | None = None
        self.found: tuple[str, ...] = ()

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        tap: Tap,
        scorers: Mapping[str, ScorerLike],
        feed: Feed,
        model_name: str,
        version: str,
        overhead_budget: float = 0.0,
        request: Ask | None = None,
        source: str = "",
        clock: Callable[[], int] = time.time_ns,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Agent:
        """Start watching.

        Args:
            scorers: detector id → scorer; moved to the model's device.
            overhead_budget: share of serving time, (0, 1]; 1 reads every pass; 0 leaves it to the
                tap's own option.
            request: asked in each sampled pass who it is for; else `request()`'s context says.
            source: id of this agent; made from host, process and chance where it is "".
            clock: ns UTC.

        Raises:
            ContractError: a layer that does not exist, with near names; an impossible option.
            FeedError: the feed cannot be opened.
        """
        if not scorers:
            raise ContractError("an agent needs at least one scorer")
        budget = overhead_budget or float(getattr(tap, "overhead_budget", 1.0))
        if not 0.0 < budget <= 1.0:
            raise ContractError(f"overhead_budget: {budget} is not in (0, 1]")
        agent = cls(
            scorers=scorers,
            feed=feed,
            model_name=model_name,
            version=version,
            device=_device_of(model),
            budget=budget,
            request=request,
            source=source,
            clock=clock,
            limits=limits or Limits(),
            seed=seed,
        )
        agent._start(model, tap, _union(scorers))
        return agent

    @property
    def source(self) -> str:
        """Id of this agent in this process."""
        pid = os.getpid()
        if not self._source or pid != self._pid:
            name = self._source if self._source and pid == self._pid else ""
            self._source = name or f"{socket.gethostname()}-{pid}-{secrets.token_hex(3)}"
            self._pid = pid
        return self._source

    @staticmethod
    def request(
        ids: str | tuple[str, ...] = (), segment: str | tuple[str, ...] = ""
    ) -> AbstractContextManager[Request]:
        """`oodmon.agent.request`: names the samples of the passes that run inside."""
        return request(ids, segment)

    def stats(self) -> Stats:
        """Counters so far."""
        room = self._gate.rooms()
        if room is None:
            return Stats(
                self._gate.passes, self._gate.seen, 0, 0, 0, 0, self._gate.failures,
                self._sampler.fraction, 0.0, 0.0, 0.0, 0.0,
            )  # fmt: skip
        tally = room.scoring.tally
        spent = tally.tap_seconds + tally.scoring_seconds
        served = tally.serving_seconds
        share = tally.sampled / max(self._gate.seen, 1)
        return Stats(
            passes=self._gate.passes,
            seen=self._gate.seen,
            sampled=tally.sampled,
            scored=tally.scored,
            dropped=room.scoring.dropped,
            batches=tally.batches,
            failures=tally.failures + self._gate.failures,
            fraction=self._sampler.fraction,
            tap_seconds=tally.tap_seconds,
            scoring_seconds=tally.scoring_seconds,
            serving_seconds=served,
            overhead=spent * share / served if served else 0.0,
        )

    def detach(self, timeout_seconds: float = 10.0) -> bool:
        """Take the hooks off, score and write what waits, close the writer.

        Safe twice. Returns whether all was written in time; what was not is lost with the process.
        """
        atexit.unregister(self._at_exit)
        if self._attached is not None:
            self._attached.detach()
        room = self._gate.rooms()
        written = room is None or room.scoring.stop(timeout_seconds)
        if written and os.getpid() == self._born_in:
            while self._first_writer:  # nothing was ever written
                self._first_writer.pop().close()
        return written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _start(self, model: nn.Module, tap: Tap, reads: Reads) -> None:
        writer = self._feed.writer(self.source)
        self._first_writer.append(writer)
        try:
            self._attached = tap.attach(model, reads, self._gate)
        except BaseException:
            writer.close()
            raise
        self.found = self._attached.found
        self._gate.open()
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        if not self.detach(_EXIT_SECONDS):
            log.warning("the process ends before all scores were written")

    def _furnish(self, pid: int) -> Room:
        limits = self._limits
        queue = Passes(limits.queue_passes, limits.queue_bytes, limits.batch_rows)
        forked = pid != self._born_in
        source = self.source

        def open_writer() -> Writer:
            # A forked process must not write to, nor close, what its parent opened.
            if self._first_writer and not forked:
                return self._first_writer.pop()
            return self._feed.writer(source)

        scoring = Scoring(
            queue,
            self._scorers,
            open_writer,
            (*self._model, source),
            self._sampler,
            limits,
            self._clock,
        )
        return Room(pid, queue, scoring)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _union(scorers: Mapping[str, ScorerLike]) -> Reads:
    """What all scorers read together, and the logits, which also give the predicted class."""
    reads = [scorer.reads() for scorer in scorers.values()]
    layers = dict.fromkeys(name for each in reads for name in each.layers)
    return Reads(layers=tuple(layers), logits=True, inputs=any(each.inputs for each in reads))
