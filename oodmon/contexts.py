"""What ranks may be taken within: the predicted class, the segment, the hour of the day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Final
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from oodmon.errors import ContractError

__all__ = ["CONTEXTS", "HOURS", "Context", "local_hours"]

CONTEXTS: Final = ("predicted", "segment", "hour")
HOURS: Final = 24
_SECOND: Final = 1_000_000_000
_QUARTER: Final = 900 * _SECOND
"""Clocks are put forward and back on whole quarters of an hour, UTC."""
_HOUR: Final = 3600 * _SECOND


@dataclass(frozen=True)
class Context:
    """What a score is ranked within; samples that differ in any of it have different cells.

    Args:
        of: some of "predicted", "segment" and "hour"; none: among all reference scores.
        time_zone: whose hours, such as "Europe/Berlin".
    """

    of: tuple[str, ...] = ()
    time_zone: str = "UTC"

    def __post_init__(self) -> None:
        for name in self.of:
            if name not in CONTEXTS:
                raise ContractError(
                    f"context: expected {', '.join(CONTEXTS[:-1])} or {CONTEXTS[-1]}; "
                    f"found {name!r}"
                )
        if len(set(self.of)) < len(self.of):
            raise ContractError(f"context: names one twice: {', '.join(self.of)}")
        try:
            _zone(self.time_zone)
        except (KeyError, ValueError, OSError):
            raise ContractError(
                f"time_zone: there is no time zone {self.time_zone!r} here; a name is such as "
                "Europe/Berlin, and where no name is known: pip install tzdata"
            ) from None

    def __bool__(self) -> bool:
        return bool(self.of)

    def __str__(self) -> str:
        return " and ".join(self.of)

    def hours(self, times: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) hour of the day, 0 to 23, of times in ns UTC."""
        return local_hours(np.asarray(times, np.int64), self.time_zone)


def local_hours(times: npt.NDArray[np.int64], time_zone: str) -> npt.NDArray[np.int64]:
    """(n,) hour of the day in a time zone, of times in ns UTC."""
    quarters, place = np.unique(times // _QUARTER, return_inverse=True)
    offsets = np.array([_offset(time_zone, quarter) for quarter in quarters.tolist()], np.int64)
    local = times + (offsets[place] if len(times) else 0)
    hours: npt.NDArray[np.int64] = local // _HOUR % HOURS
    return hours


@cache
def _zone(name: str) -> ZoneInfo | None:
    return None if name == "UTC" else ZoneInfo(name)


@lru_cache(maxsize=4096)
def _offset(time_zone: str, quarter: int) -> int:
    """ns east of UTC, in the quarter of an hour that begins so many of them after the epoch."""
    zone = _zone(time_zone)
    if zone is None:
        return 0
    moment = datetime.fromtimestamp(quarter * _QUARTER // _SECOND, UTC)
    offset = zone.utcoffset(moment.astimezone(zone))
    return 0 if offset is None else round(offset.total_seconds()) * _SECOND
