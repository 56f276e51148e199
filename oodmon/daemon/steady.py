"""A wall clock that a jump does not carry away.

A clock that is set wrong for a moment (a bad NTP answer, a host that wakes up) would close windows
whose samples are still to come, give up on events that wait, and put others off for hours. So the
daemon's time is the wall clock at its start plus what a monotonic clock has counted since; it
follows the wall clock only when the difference has lasted, or is too small to do harm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from oodmon.contracts import Clock

__all__ = ["SteadyClock"]

_log = logging.getLogger(__name__)

_SECOND: Final = 1_000_000_000


class SteadyClock:
    """Wall time, ns UTC; safe to call from any thread.

    Args:
        clock: the wall clock that may jump, ns UTC.
        monotonic: seconds.
        tolerance_seconds: a difference up to here is followed at once.
        doubt_seconds: a greater one is followed once it has lasted so long.
    """

    def __init__(
        self,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
        tolerance_seconds: float = 0.5,
        doubt_seconds: float = 30.0,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._tolerance = round(tolerance_seconds * _SECOND)
        self._doubt = doubt_seconds
        self._lock = threading.Lock()
        self._doubted_at: float | None = None
        self._wall, self._at = clock(), monotonic()

    def __call__(self) -> int:
        """The time."""
        with self._lock:
            wall, at = self._clock(), self._monotonic()
            expected = self._wall + round((at - self._at) * _SECOND)
            jump = wall - expected
            if abs(jump) > self._tolerance:
                if self._doubted_at is None:
                    self._doubted_at = at
                    _log.warning("the wall clock jumped by %.3f s", jump / _SECOND)
                if at - self._doubted_at < self._doubt:
                    return expected
                _log.warning("the wall clock stays %.3f s off: it is followed", jump / _SECOND)
            self._doubted_at = None
            self._wall, self._at = wall, at
            return wall
