"""The accuracy before and after the change: as estimated without labels, and as labels tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oodmon.store.events import Store
from oodmon.store.labels import Measured

__all__ = ["Estimate", "estimates", "labelled"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One detector.

    Attributes:
        before, after: estimated share of right answers before and after the change; None where
            nothing was seen.
        lowest: of a window, all segments together.
        lowest_at: where that window begins, ns UTC.
        samples: that the estimates rest on.
    """

    detector: str
    before: float | None
    after: float | None
    lowest: float
    lowest_at: int
    samples: int


def estimates(rows: Sequence[Mapping[str, Any]], changed_at: int) -> list[Estimate]:
    """From stored windows that count each sample once; by detector."""
    sides: dict[str, list[list[float]]] = {}
    spans: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["estimated_accuracy"] is None:
            continue
        start, right = row["window_start_ns"], row["estimated_accuracy"] * row["scored"]
        after = bool(changed_at) and start >= changed_at
        side = sides.setdefault(row["detector"], [[0.0, 0.0], [0.0, 0.0]])[after]
        span = spans.setdefault(row["detector"], {}).setdefault(start, [0.0, 0.0])
        for sums in (side, span):
            sums[0] += right
            sums[1] += row["scored"]
    found = []
    for detector in sorted(sides):
        lowest, lowest_at = min(
            (right / scored, start) for start, (right, scored) in spans[detector].items()
        )
        before, after_it = (right / n if n else None for right, n in sides[detector])
        samples = int(sum(n for _, n in sides[detector]))
        found.append(Estimate(detector, before, after_it, lowest, lowest_at, samples))
    return found


def labelled(store: Store, model: str, version: str, changed_at: int) -> list[tuple[str, Measured]]:
    """What labels say "before" and "after" the change, or of "all"; nothing without labels.

    Of the predictions that the daemon still keeps.
    """
    spans = [("all", 0, 2**63 - 1)]
    if changed_at:
        spans = [("before", 0, changed_at), ("after", changed_at, 2**63 - 1)]
    return [
        (name, one)
        for name, since, until in spans
        for one in store.measured(since, until)
        if (one.model, one.version) == (model, version) and one.labelled
    ]
