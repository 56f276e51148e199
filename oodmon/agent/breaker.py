"""A circuit breaker: what fails again and again is left alone for a while, then tried once."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Breaker"]


class Breaker:
    """Closed → open after so many failures in a row → half open after a while → closed or open.

    Args:
        failures: failures in a row that open it.
        retry_seconds: how long it stays open; doubled each time the try fails.
        longest_seconds: the doubling ends here.
        now: monotonic seconds.
    """

    def __init__(
        self,
        failures: int = 5,
        retry_seconds: float = 60.0,
        longest_seconds: float = 3600.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = failures
        self._first_wait = retry_seconds
        self._longest = longest_seconds
        self._now = now
        self._in_a_row = 0
        self._wait = retry_seconds
        self._retry_at = 0.0
        self._open = False

    @property
    def open(self) -> bool:
        """Whether calls are held back (or the next one is only a try)."""
        return self._open

    @property
    def wait_seconds(self) -> float:
        """How long it stays open this time."""
        return self._wait

    def allows(self) -> bool:
        """Whether to call: closed, or open for long enough that one try is due."""
        return not self._open or self._now() >= self._retry_at

    def succeeded(self) -> bool:
        """Note a success; true where this closed the breaker."""
        closed = self._open
        self._in_a_row = 0
        self._open = False
        self._wait = self._first_wait
        return closed

    def failed(self) -> bool:
        """Note a failure; true where this opened the breaker."""
        self._in_a_row += 1
        if self._open:
            self._wait = min(2.0 * self._wait, self._longest)
            self._retry_at = self._now() + self._wait
            return False
        if self._in_a_row < self._limit:
            return False
        self._open = True
        self._retry_at = self._now() + self._wait
        return True
