"""Numbers, moments and spans as a person reads them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

__all__ = ["count", "moment", "number", "percent", "span"]


def count(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def number(value: float | None) -> str:
    """Three significant digits; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in percent; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value * 100.0:.1f}\u202f%"


def moment(ns: int) -> str:
    """A time, UTC, to the second."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def span(ns: int) -> str:
    """A duration in its two largest units."""
    seconds = max(ns, 0) / 1e9
    if seconds < 60.0:
        return f"{seconds:.3g} s"
    parts: list[str] = []
    rest = round(seconds)
    for name, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        whole, rest = divmod(rest, length)
        if whole and len(parts) < 2:
            parts.append(f"{whole} {name}")
        elif parts:
            break
    return " ".join(parts)
