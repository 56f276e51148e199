"""What delivery asks of a receiver and of the outbox, and how long it waits after a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from oodmon.errors import ContractError
from oodmon.records import Event
from oodmon.store.events import OutboxRow

__all__ = ["Backoff", "Outbox", "Receiver"]


class Receiver(Protocol):
    """The shape of a sink; a guard has it too."""

    def open(self) -> None:
        """Connect."""

    def send(self, events: Sequence[Event]) -> None:
        """All or nothing."""

    def close(self) -> None:
        """Flush."""


class Outbox(Protocol):
    """The part of `Store` that delivery uses."""

    def pending(self, receiver: str, now_ns: int, limit: int) -> Sequence[OutboxRow]:
        """Rows that are due, in order."""

    def settle(self, receiver: str, seqs: Sequence[int]) -> None:
        """Delivered."""

    def defer(self, receiver: str, seqs: Sequence[int], not_before_ns: int, error: str) -> None:
        """Not now."""

    def bury(self, receiver: str, seqs: Sequence[int], error: str) -> None:
        """Never."""


@dataclass(frozen=True)
class Backoff:
    """How a receiver is tried again; the words are those of OpenTelemetry's exporters.

    Args:
        initial_seconds: upper bound of the first wait.
        max_seconds: upper bound of a wait, unless the receiver itself wishes for a longer one.
        factor: growth of the bound per failure.
        max_age_seconds: an event that keeps failing for so long becomes a dead letter.
        timeout_seconds: a call that takes longer counts as stalled.
        batch: events per call.
    """

    initial_seconds: float = 5.0
    max_seconds: float = 30.0
    factor: float = 1.5
    max_age_seconds: float = 86_400.0
    timeout_seconds: float = 30.0
    batch: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.initial_seconds <= self.max_seconds:
            raise ContractError("initial_seconds must be positive and at most max_seconds")
        if self.factor < 1 or self.batch < 1:
            raise ContractError("factor and batch must be at least 1")
        if self.max_age_seconds <= 0 or self.timeout_seconds <= 0:
            raise ContractError("max_age_seconds and timeout_seconds must be positive")

    def wait(self, failures: int, uniform: float) -> float:
        """Seconds to wait after so many failures in a row; `uniform` in [0, 1) is the full jitter.

        Full jitter: AWS Architecture Blog, *Exponential Backoff And Jitter*, 2015. A tenth of the
        bound is the least, so that an unlucky draw does not hammer a receiver that is down.
        """
        # The bound is capped before the power can overflow.
        steps = min(failures - 1, 200)
        bound = min(self.max_seconds, self.initial_seconds * self.factor**steps)
        return bound * (0.1 + 0.9 * uniform)
