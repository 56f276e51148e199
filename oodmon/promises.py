"""How often a drift test may be wrong, as people write it: "1 per 30 days", "1 per 9 windows"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from oodmon.errors import ContractError

__all__ = ["Promise"]

_UNITS: Final = {
    "second": 1.0,
    "minute": 60.0,
    "hour": 3600.0,
    "day": 86400.0,
    "week": 604800.0,
    "year": 31557600.0,
}
_WINDOW: Final = "window"
_TEXT: Final = re.compile(
    r"\s*1\s+per\s+(?P<number>\d+(?:\.\d+)?)\s+(?P<unit>[a-z]+?)s?\s*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Promise:
    """One false alarm per so much.

    Attributes:
        amount: windows, or seconds.
        in_windows: which of the two.
    """

    amount: float
    in_windows: bool

    @staticmethod
    def parse(text: str) -> Promise:
        """Read ``1 per <number> <unit>``; `ContractError` names the units."""
        match = _TEXT.fullmatch(text)
        unit = match["unit"].lower() if match else ""
        if match and float(match["number"]) > 0.0:
            if unit == _WINDOW:
                return Promise(float(match["number"]), in_windows=True)
            if unit in _UNITS:
                return Promise(float(match["number"]) * _UNITS[unit], in_windows=False)
        units = ", ".join(f"{unit}s" for unit in (*_UNITS, _WINDOW))
        raise ContractError(
            f"false_alarms: expected `1 per <number> <unit>` with a unit of {units}; found {text!r}"
        )

    def windows(self, window_seconds: float) -> float:
        """The same as a number of windows of this length, at least 1."""
        return max(self.amount if self.in_windows else self.amount / window_seconds, 1.0)
