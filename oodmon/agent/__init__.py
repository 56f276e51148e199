"""Beside the model: tap → scorers → feed; bounded, and nothing of it ever raises into the model.

Its parts: `gate` (in the serving threads), `passes` (between the threads), `scoring` and `outlet`
(in the scoring thread), `shadow` (detectors that need further passes), `lanes` (CPU and CUDA),
`sampling` (the overhead budget), `breaker`, `request`.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
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
from oodmon.agent.shadow import FIRST, Shadow
from oodmon.agent.stats import Stats, count
from oodmon.contracts import Attached, Feed, Reads, Tap, Writer
from oodmon.errors import ContractError
from oodmon.records import SHADOW
from oodmon.taps.identity import identify
from oodmon.taps.twin import Twin

__all__ = ["Agent", "Limits", "Request", "Stats", "request"]

log = logging.getLogger(__name__)

_EXIT_SECONDS: Final = 5.0
"""How long a process that ends may wait for scores that are still to be written."""


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
        shadow_budget: float,
        twin: Callable[[], Twin],
        weights: Callable[[], str],
        request: Ask | None,
        source: str,
        clock: Callable[[], int],
        limits: Limits,
        seed: int,
    ) -> None:
        moved = {name: scorer.to(device) for name, scorer in scorers.items()}
        self._beside = {name: s for name, s in moved.items() if not s.reads().model}
        self._shadowed = {name: s for name, s in moved.items() if s.reads().model}
        self._feed = feed
        self._model = (model_name, version)
        self._clock = clock
        self._limits = limits
        self._source = source
        self._pid = self._born_in = os.getpid()
        self._first_writer: list[Writer] = []
        both = self._beside and self._shadowed
        shadow = Sampler(shadow_budget, seed, FIRST)
        self._sampler = Sampler(budget, seed) if self._beside else shadow
        self._shadow_sampler = shadow if both else None
        self._new_twin = twin
        self._weights = weights
        self._first_twin: list[Twin] = []
        self._gate = Gate(
            self._sampler,
            clock,
            device,
            self._furnish,
            request,
            Breaker(limits.failures, limits.retry_seconds),
            self._shadow_sampler,
            _union(self._beside),
            _union(self._shadowed),
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
        shadow_budget: float = 0.01,
        request: Ask | None = None,
        source: str = "",
        clock: Callable[[], int] = time.time_ns,
        limits: Limits | None = None,
        seed: int = 0,
        check_weights: bool = True,
    ) -> Agent:
        """Start watching.

        Args:
            scorers: detector id → scorer; moved to the model's device.
            overhead_budget: share of serving time, (0, 1]; 1 reads every pass; 0 leaves it to the
                tap's own option.
            shadow_budget: the same for the shadow worker, beside it: for detectors that need
                further passes through the model.
            request: asked in each sampled pass who it is for; else `request()`'s context says.
            source: id of this agent; made from host, process and chance where it is "".
            clock: ns UTC.
            check_weights: scores count only on the weights that their scorer was fitted on, where
                it says which.

        Raises:
            ContractError: a layer that does not exist, with near names; an impossible option; a
                model that cannot be copied, where a detector needs further passes.
            FeedError: the feed cannot be opened.
        """
        if not scorers:
            raise ContractError("an agent needs at least one scorer")
        budget = overhead_budget or float(getattr(tap, "overhead_budget", 1.0))
        for option, share in (("overhead_budget", budget), ("shadow_budget", shadow_budget)):
            if not 0.0 < share <= 1.0:
                raise ContractError(f"{option}: {share} is not in (0, 1]")
        known = weakref.ref(model)
        agent = cls(
            scorers=scorers,
            feed=feed,
            model_name=model_name,
            version=version,
            device=_device_of(model),
            budget=budget,
            shadow_budget=shadow_budget,
            twin=lambda: _twin(tap, known()),
            weights=lambda: identify(known()) if check_weights else "",
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
        return count(self._gate, self._sampler, None if room is None else room.scoring)

    def shadow_stats(self) -> Stats | None:
        """The shadow worker's counters; none where no detector needs further passes.

        Nor where all do: then the shadow worker's are the agent's.
        """
        if self._shadow_sampler is None:
            return None
        room = self._gate.rooms()
        shadow = None if room is None or room.shadow is None else room.shadow[1]
        return count(self._gate, self._shadow_sampler, shadow)

    def detach(self, timeout_seconds: float = 10.0) -> bool:
        """Take the hooks off, score and write what waits, close the writer.

        Safe twice. Returns whether all was written in time; what was not is lost with the process.
        """
        atexit.unregister(self._at_exit)
        if self._attached is not None:
            self._attached.detach()
        room = self._gate.rooms()
        begun = time.monotonic()
        written = room is None or room.scoring.stop(timeout_seconds)
        if room is not None and room.shadow is not None:
            left = timeout_seconds - (time.monotonic() - begun)
            written = room.shadow[1].stop(max(left, 0.0)) and written
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
        if self._shadowed:
            twin = self._new_twin()
            twin.build()  # what cannot be copied is an error here and now
            self._first_twin.append(twin)
        writer = self._feed.writer(self.source)
        self._first_writer.append(writer)
        try:
            self._attached = tap.attach(model, reads, self._gate)
        except BaseException:
            writer.close()
            raise
        self.found = self._attached.found
        if self._shadowed:
            self.found += (_told(self._shadowed),)
        self._gate.open()
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        if not self.detach(_EXIT_SECONDS):
            log.warning("the process ends before all scores were written")

    def _furnish(self, pid: int) -> Room:
        limits = self._limits
        forked = pid != self._born_in
        source = self.source

        def open_writer() -> Writer:
            # A forked process must not write to, nor close, what its parent opened.
            if self._first_writer and not forked:
                return self._first_writer.pop()
            return self._feed.writer(source)

        shadow = self._furnish_shadow(source, open_writer, forked=forked)
        if shadow is not None and not self._beside:
            return Room(source, *shadow)
        queue = Passes(limits.queue_passes, limits.queue_bytes, limits.batch_rows)
        stamp = (*self._model, source)
        scoring = Scoring(
            queue,
            self._beside,
            open_writer,
            stamp,
            self._sampler,
            limits,
            self._clock,
            weights=self._weights,
        )
        return Room(source, queue, scoring, shadow)

    def _furnish_shadow(
        self, source: str, open_writer: Callable[[], Writer], *, forked: bool
    ) -> tuple[Passes, Shadow] | None:
        if not self._shadowed:
            return None
        # A twin's lock may have been held when the process forked.
        twin = self._first_twin.pop() if self._first_twin and not forked else self._new_twin()
        repeats = self._shadow_sampler is not None
        if repeats:
            source += SHADOW
        queue = Shadow.queue(self._limits)
        return queue, Shadow(
            queue,
            self._shadowed,
            (lambda: self._feed.writer(source)) if repeats else open_writer,
            (*self._model, source),
            self._shadow_sampler or self._sampler,
            self._limits,
            self._clock,
            twin,
            repeats=repeats,
            weights=self._weights,
        )


def _twin(tap: Tap, model: nn.Module | None) -> Twin:
    if model is None:
        raise ContractError("the model is gone")
    make = getattr(tap, "twin", Twin)
    made: Twin = make(model, keep=False)
    return made


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _union(scorers: Mapping[str, ScorerLike]) -> Reads:
    """What all scorers read together, and the logits, which also give the predicted class."""
    reads = [scorer.reads() for scorer in scorers.values()]
    layers = dict.fromkeys(name for each in reads for name in each.layers)
    return Reads(layers=tuple(layers), logits=True, inputs=any(each.inputs for each in reads))


def _told(scorers: Mapping[str, ScorerLike]) -> str:
    names = ", ".join(scorers)
    return f"shadow worker: {names} make further passes over a fraction of the inputs"
