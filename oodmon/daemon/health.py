"""What is wrong at present: which parts fail, since how many tries, and how long to wait."""

from __future__ import annotations

import logging
from typing import Final, Literal

from oodmon.daemon.metrics import Metrics

__all__ = ["Health"]

_log = logging.getLogger(__name__)

Stage = Literal["starting", "ok", "stopping"]

_MUST_WORK: Final = ("lease", "store", "feed", "partitions")


class Health:
    """Troubles of the parts without which the daemon cannot do its work.

    Args:
        metrics: `oodmon_ready` is kept there.
        retry_seconds: the first wait after a failure; it doubles.
        max_retry_seconds: the longest wait.
    """

    def __init__(self, metrics: Metrics, retry_seconds: float, max_retry_seconds: float) -> None:
        self._metrics = metrics
        self._first = retry_seconds
        self._longest = max_retry_seconds
        self._trouble: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._stage: Stage = "starting"

    @property
    def stage(self) -> Stage:
        """Where the daemon is in its life."""
        return self._stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self._stage = stage
        self._tell()

    @property
    def ready(self) -> bool:
        """It does its work."""
        return self._stage == "ok" and not self._trouble

    def parts(self) -> dict[str, str]:
        """Part → "ok" or what is wrong."""
        trouble = dict(self._trouble)
        return {"daemon": self._stage} | {name: trouble.get(name, "ok") for name in _MUST_WORK}

    def fails(self, part: str) -> bool:
        """This part failed last time."""
        return part in self._trouble

    def fail(self, part: str, error: Exception) -> float:
        """Note a failure: the seconds to wait before the next try."""
        why = str(error) or type(error).__name__
        if self._trouble.get(part) != why:
            _log.error("%s: %s", part, why)
        self._trouble[part] = why
        failures = self._failures[part] = self._failures.get(part, 0) + 1
        self._tell()
        # The power is capped before it can overflow.
        return float(min(self._longest, self._first * 2 ** min(failures - 1, 30)))

    def mend(self, part: str) -> None:
        """It works."""
        if self._trouble.pop(part, None) is not None:
            del self._failures[part]
            _log.warning("%s works again", part)
            self._tell()

    def _tell(self) -> None:
        self._metrics.put("oodmon_ready", float(self.ready))
