"""The agent's intake: decides which passes are read and queues them, in the serving threads.

Nothing here waits: counters are per thread, the queue pushes its oldest out, and what raises is
caught and counted. A process that forked from the serving one gets a queue and a scoring thread of
its own at its first pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable
from threading import get_ident
from time import perf_counter
from typing import Final

import torch

from oodmon.agent.breaker import Breaker
from oodmon.agent.lanes import mark
from oodmon.agent.passes import Pass, Passes
from oodmon.agent.request import Ask, Request, current
from oodmon.agent.sampling import Sampler
from oodmon.agent.scoring import Scoring
from oodmon.contracts import Reads, Visit
from oodmon.records import Activations

__all__ = ["Gate", "Room"]

log = logging.getLogger(__name__)

_REMARKS_TOLD: Final = 32
"""Different complaints about what could not be read that are told in all."""


class Room:
    """What one process needs of its own: queue and scoring thread; the shadow's, if there is one.

    Args:
        source: id of the agent in this process; begins the names of passes that have none.
    """

    def __init__(
        self,
        source: str,
        queue: Passes,
        scoring: Scoring,
        shadow: tuple[Passes, Scoring] | None = None,
    ) -> None:
        self.queue = queue
        self.scoring = scoring
        self.shadow = shadow
        self._source = source
        self._numbers = itertools.count()

    def start(self) -> None:
        """Start the threads; once."""
        self.scoring.start()
        if self.shadow is not None:
            self.shadow[1].start()

    def name(self) -> str:
        """A new name for a pass."""
        return f"{self._source}/pass-{next(self._numbers)}"


class Gate:
    """Intake of one tapped model.

    Args:
        sampler: says which passes are read.
        clock: wall clock, ns UTC.
        device: where the model is; its events are recorded there.
        furnish: makes the queue and the (unstarted) scoring thread of a process id.
        ask: names the samples of a pass; else the context's request does.
        shadow: says which of the passes that are read the shadow worker gets as well.
        reads, shadow_reads: what the scorers beside the tap and the shadow's read; neither queue
            holds what only the other one needs.
    """

    def __init__(
        self,
        sampler: Sampler,
        clock: Callable[[], int],
        device: torch.device,
        furnish: Callable[[int], Room],
        ask: Ask | None,
        breaker: Breaker,
        shadow: Sampler | None = None,
        reads: Reads | None = None,
        shadow_reads: Reads | None = None,
    ) -> None:
        self._sampler = sampler
        self._shadow = shadow
        self._reads = reads or Reads()
        self._shadow_reads = shadow_reads or Reads()
        self._clock = clock
        self._device = device
        self._furnish = furnish
        self._ask = ask
        self._breaker = breaker
        self._rooms: dict[int, Room] = {}
        self._seen: dict[int, int] = {}
        self._passes: dict[int, int] = {}
        self._remarks: set[str] = set()
        self.failures = 0

    @property
    def seen(self) -> int:
        """Rows of all passes, as far as the tap knew them at their start."""
        return sum(list(self._seen.values()))

    @property
    def passes(self) -> int:
        """Passes that started."""
        return sum(list(self._passes.values()))

    def rooms(self) -> Room | None:
        """This process's room, if it has one yet."""
        return self._rooms.get(os.getpid())

    def open(self) -> Room:
        """This process's room, made at the first call."""
        pid = os.getpid()
        room = self._rooms.get(pid)
        if room is None:
            fresh = self._furnish(pid)
            # Of several threads one wins; the others' rooms were never started.
            room = self._rooms.setdefault(pid, fresh)
            if room is fresh:
                room.start()
        return room

    def admit(self, rows: int) -> Visit | None:
        """A pass starts."""
        thread = get_ident()
        # Each thread writes its own entry, so nothing is lost and nothing locked.
        self._seen[thread] = self._seen.get(thread, 0) + rows
        self._passes[thread] = self._passes.get(thread, 0) + 1
        shadowed = False
        if self._shadow is None:
            admitted = self._sampler.admit()
        else:
            # One place for both, so that what the shadow gets is always read for the others too.
            place = self._sampler.draw()
            admitted = place < self._sampler.fraction
            shadowed = place < self._shadow.fraction
        if not admitted or not self._breaker.allows():
            return None
        device = self._device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A hook that runs while a graph is captured would be replayed with it, forever.
            return None
        visit = Pass(
            observed_at=self._clock(),
            begun=0.0,
            fraction=self._sampler.fraction,
            request=self._request(),
            shadowed=shadowed,
        )
        visit.started = mark(device)
        visit.begun = perf_counter()
        return visit

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        """A pass has ended."""
        ended = perf_counter()
        try:
            assert isinstance(visit, Pass)  # noqa: S101 - made by `admit`
            room = self.open()
            visit.acts = acts
            visit.rows = acts.rows
            if visit.rows == 0:
                return
            visit.size = _size(visit)
            visit.serving_seconds = max(ended - visit.begun - tap_seconds, 0.0)
            # The model may have moved since it was attached.
            self._device = next(visit.tensors()).device
            visit.ended = mark(self._device)
            visit.tap_seconds = tap_seconds + perf_counter() - ended
            if remark:
                self._remark(room, remark)
            if self._shadow is not None:
                self._part(room, visit)
            room.queue.put(visit)
            if self._breaker.succeeded():
                room.queue.tell("the tap reads again")
        except Exception as error:
            self.fail(visit, acts.rows, f"{type(error).__name__}: {error}")

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        """A pass could not be read; the model's own exceptions are none of ours."""
        del visit
        if not why:
            return
        try:
            self.failures += 1
            room = self.open()
            room.queue.shed(rows)
            if self._breaker.failed():
                room.queue.tell(
                    f"breaker of the tap opened for {self._breaker.wait_seconds:g} s: {why}"
                )
            self._remark(room, f"a forward pass could not be read: {why}")
        except Exception:
            log.exception("the tap failed")

    def room(self) -> bool:
        """Whether another pass can be queued without shedding."""
        return self.open().queue.room()

    def _part(self, room: Room, visit: Pass) -> None:
        """Hand the shadow worker its own pass, and leave to the others what they read."""
        acts = visit.acts
        if visit.shadowed and room.shadow is not None and self._shadow is not None:
            visit.name = room.name()
            own = dataclasses.replace(
                visit,
                acts=_needed(acts, self._shadow_reads),
                fraction=min(visit.fraction, self._shadow.fraction),
                tap_seconds=0.0,
            )
            own.size = _size(own)
            room.shadow[0].put(own)
        visit.acts = _needed(acts, self._reads)
        visit.size = _size(visit)

    def _request(self) -> Request | None:
        if self._ask is None:
            return current()
        try:
            return self._ask()
        except Exception as error:
            self._remark(self.open(), f"the request callable failed: {error!r}")
            return None

    def _remark(self, room: Room, text: str) -> None:
        if text not in self._remarks and len(self._remarks) < _REMARKS_TOLD:
            self._remarks.add(text)
            log.warning("%s", text)
            room.queue.tell(text)


def _size(visit: Pass) -> int:
    return sum(t.numel() * t.element_size() for t in visit.tensors())


def _needed(acts: Activations, reads: Reads) -> Activations:
    return Activations(
        layers={name: tensor for name, tensor in acts.layers.items() if name in reads.layers},
        logits=acts.logits,
        inputs=acts.inputs if reads.inputs else None,
        observed_at=acts.observed_at,
    )
