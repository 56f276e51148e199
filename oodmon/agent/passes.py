"""Forward passes on their way from the serving threads to the scoring thread.

Writers never wait: a deque whose ends are atomic, and a token to wake the reader. What does not
fit pushes the oldest out, and is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final

import torch
from torch import Tensor

from oodmon.agent.request import Request
from oodmon.records import Activations

__all__ = ["Pass", "Passes", "joined"]

_NOTICES_HELD: Final = 64


@dataclass(slots=True, eq=False)
class Pass:
    """One forward pass that is read. Made at its start, filled in at its end."""

    observed_at: int
    begun: float
    fraction: float
    request: Request | None
    started: Any = None
    """CUDA event at the start, where the model runs on such a device."""
    ended: Any = None
    acts: Activations = field(default_factory=Activations)
    rows: int = 0
    size: int = 0
    """Bytes of the activations."""
    serving_seconds: float = 0.0
    tap_seconds: float = 0.0
    shadowed: bool = False
    """Whether the shadow worker gets it as well."""
    name: str = ""
    """Names the rows where the request does not and two batches must agree on their names."""

    def sample_ids(self) -> tuple[str, ...]:
        """One string per row; empty where the batch may name them."""
        asked = self.request.sample_ids(self.rows) if self.request is not None else ()
        if asked or not self.name:
            return asked
        return tuple(f"{self.name}/{row}" for row in range(self.rows))

    def tensors(self) -> Iterator[Tensor]:
        """Everything that was read."""
        for tensor in (self.acts.logits, self.acts.inputs, *self.acts.layers.values()):
            if tensor is not None:
                yield tensor

    def shape(self) -> tuple[Any, ...]:
        """Passes of the same shape can be joined into one batch."""
        parts = {"": self.acts.logits, "\0": self.acts.inputs, **self.acts.layers}
        return tuple(
            (name, t.shape[1:], t.dtype, t.device) for name, t in parts.items() if t is not None
        )


def joined(passes: list[Pass]) -> Activations:
    """The activations of several passes of one shape as one batch, rows in order."""
    first = passes[0].acts
    if len(passes) == 1:
        return first

    def cat(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.cat(there) if there else None

    layers = {name: torch.cat([p.acts.layers[name] for p in passes]) for name in first.layers}
    return Activations(
        layers=layers,
        logits=cat([p.acts.logits for p in passes]),
        inputs=cat([p.acts.inputs for p in passes]),
        observed_at=first.observed_at,
    )


class Passes:
    """The bounded queue. Any thread puts, one thread gets.

    Args:
        limit: passes held at most.
        limit_bytes: bytes of activations held at most.
        hurry_rows: rows waiting from which a lingering reader is called at once.
    """

    def __init__(self, limit: int, limit_bytes: int, hurry_rows: int) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._hurry_rows = hurry_rows
        self._waiting: deque[Pass] = deque()
        self._shed: deque[int] = deque()
        self._notices: deque[str] = deque(maxlen=_NOTICES_HELD)
        # C code that never waits in put(), unlike a Condition, whose lock a preempted reader holds.
        self._token: SimpleQueue[None] = SimpleQueue()
        self._hurry: SimpleQueue[None] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: Pass) -> None:
        """Queue one pass; the oldest ones make room."""
        waiting = self._waiting
        waiting.append(item)
        held = list(waiting)  # one C call, so no other thread changes it half-way
        size = sum(p.size for p in held)
        rows = sum(p.rows for p in held)
        while len(waiting) > self._limit or size > self._limit_bytes:
            try:
                oldest = waiting.popleft()
            except IndexError:
                break
            size -= oldest.size
            self.shed(oldest.rows)
            if oldest is item:
                self.tell(
                    f"one forward pass holds {item.size} bytes of activations, more than the "
                    f"queue may ({self._limit_bytes}); it cannot be scored"
                )
        self._token.put(None)
        if rows >= self._hurry_rows or not self._half_free(len(held), size):
            self._hurry.put(None)

    def room(self) -> bool:
        """Whether half of the queue is free."""
        held = list(self._waiting)
        return self._half_free(len(held), sum(p.size for p in held))

    def _half_free(self, passes: int, size: int) -> bool:
        return 2 * passes < self._limit and 2 * size < self._limit_bytes

    def shed(self, rows: int) -> None:
        """Count samples that will not be scored."""
        self._shed.append(rows)

    def expire(self, before_ns: int) -> None:
        """Shed what was observed before then."""
        while self._waiting:
            try:
                oldest = self._waiting.popleft()
            except IndexError:
                break
            if oldest.observed_at >= before_ns:
                self._waiting.appendleft(oldest)
                break
            self.shed(oldest.rows)

    @property
    def shed_untold(self) -> int:
        """Samples shed since the last `take_shed`."""
        return sum(list(self._shed))

    def take_shed(self) -> int:
        """Samples shed since the last call."""
        total = 0
        while self._shed:
            total += self._shed.popleft()
        return total

    def tell(self, text: str) -> None:
        """Something for the next batch's notices, unless it waits there already."""
        if text not in self._notices:
            self._notices.append(text)

    def take_notices(self) -> list[str]:
        """What is to be told since the last call."""
        told = []
        while self._notices:
            told.append(self._notices.popleft())
        return told

    def wait(self, timeout_seconds: float) -> bool:
        """Sleep until something is queued."""
        try:
            self._token.get(timeout=timeout_seconds)
        except Empty:
            return bool(self._waiting)
        return True

    def linger(self, seconds: float) -> None:
        """Let more passes gather, unless enough have or the end is near."""
        if seconds > 0:
            try:
                self._hurry.get(timeout=seconds)
            except Empty:
                return

    def hasten(self) -> None:
        """Wake the reader, wherever it sleeps."""
        self._token.put(None)
        self._hurry.put(None)

    def group(self, rows: int, span_ns: int) -> list[Pass]:
        """The oldest passes that can be scored as one batch: of one shape, within the span."""
        chosen: list[Pass] = []
        total = 0
        while self._waiting:
            head = self._waiting[0]
            if chosen and (
                total + head.rows > rows
                or head.observed_at - chosen[0].observed_at > span_ns
                or head.shape() != chosen[0].shape()
            ):
                break
            try:
                taken = self._waiting.popleft()
            except IndexError:
                break
            if taken is not head and chosen and taken.shape() != chosen[0].shape():
                # A writer shed the one that was looked at; this one starts the next group.
                self._waiting.appendleft(taken)
                break
            chosen.append(taken)
            total += taken.rows
        if not self._waiting:
            self._forget_tokens()
        return chosen

    def _forget_tokens(self) -> None:
        for tokens in (self._token, self._hurry):
            while not tokens.empty():
                try:
                    tokens.get_nowait()
                except Empty:
                    break
        if self._waiting:  # one came in between, and its token may have gone with the others
            self._token.put(None)
