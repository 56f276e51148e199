"""Whose samples a forward pass holds: request ids and segments, carried by the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Ask", "Request", "current", "request"]


@dataclass(frozen=True, slots=True)
class Request:
    """Names of the samples of the passes that run under it.

    Attributes:
        ids: one string per row; a single string names a pass of one row, and the rows of a larger
            one as ``id/0``, ``id/1`` …; empty: the agent names them.
        segment: one segment for all rows, or one per row; "" is none.
    """

    ids: str | tuple[str, ...] = ()
    segment: str | tuple[str, ...] = ""

    def sample_ids(self, rows: int) -> tuple[str, ...]:
        """`rows` ids, or none where there are none or their number does not fit."""
        if isinstance(self.ids, str):
            if not self.ids:
                return ()
            return (self.ids,) if rows == 1 else tuple(f"{self.ids}/{i}" for i in range(rows))
        return self.ids if len(self.ids) == rows else ()

    def segments(self, rows: int) -> tuple[str, ...]:
        """`rows` segment names, or none where there are none or their number does not fit."""
        if isinstance(self.segment, str):
            return (self.segment,) * rows if self.segment else ()
        return self.segment if len(self.segment) == rows else ()

    def complaint(self, rows: int) -> str:
        """Why ids or segments cannot be used for a pass of so many rows; "" where they can."""
        for what, value in (("ids", self.ids), ("segment", self.segment)):
            if not isinstance(value, str) and len(value) not in (0, rows):
                return f"request {what}: {len(value)} given, the forward pass had {rows} rows"
        return ""


Ask = Callable[[], Request | None]
"""Given at attach: asked in each sampled forward pass, in the thread that runs it."""

_current: ContextVar[Request | None] = ContextVar("oodmon_request", default=None)


def current() -> Request | None:
    """The request that this thread or task is under."""
    return _current.get()


@contextmanager
def request(ids: str | Sequence[str] = (), segment: str | Sequence[str] = "") -> Iterator[Request]:
    """Name the samples of the forward passes that run inside, in this thread or task.

    A nested request replaces the outer one until it ends. What does not fit the number of rows is
    left out and told once; it never raises into the model.
    """
    made = Request(
        ids if isinstance(ids, str) else tuple(map(str, ids)),
        segment if isinstance(segment, str) else tuple(map(str, segment)),
    )
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)
