"""What may be flagged, at every threshold, and how much of it may be false."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.drift.neighbours import Neighbours
from oodmon.records import ALL, BIN_EDGES
from oodmon.report.doubtful import at_most

__all__ = ["SHOWN", "Flags", "flags"]

SHOWN: Final = (0.0001, 0.001, 0.01, 0.05, 0.1)
"""Thresholds of the table, which needs no script."""
_HIGHEST: Final = 0.5
"""Of the slider: above it half of what is ordinary would be flagged."""


@dataclass(frozen=True, slots=True)
class Flags:
    """One detector, over all samples since the change (or all that there are).

    Attributes:
        samples: that were scored.
        levels: thresholds of the tail probability, ascending.
        flagged: samples at or below each of them.
        doubtful: of these, in-distribution at most; all hold together (`oodmon.report.doubtful`).
        start: place of the threshold at which the most samples are novel for certain.
    """

    detector: str
    samples: int
    levels: Sequence[float]
    flagged: Sequence[int]
    doubtful: Sequence[int]
    start: int

    @property
    def shown(self) -> list[tuple[float, int, int]]:
        """Threshold, flagged and doubtful of the table's rows."""
        places = sorted({_nearest(self.levels, level) for level in SHOWN})
        return [(self.levels[k], self.flagged[k], self.doubtful[k]) for k in places]


def flags(
    rows: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], since: int
) -> list[Flags]:
    """The detector that tells the most first, from stored windows that count each sample once.

    Args:
        rows: of `windows`.
        results: of `drift_results`, which tell how many scores the reference has.
        since: ns; windows that begin earlier are left out.
    """
    known: dict[tuple[str, str], int] = {}
    for result in results:
        if result["detector"] != ALL and result["reference_samples"]:
            known[result["test"], result["detector"]] = result["reference_samples"]
    sums: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
    for row in rows:
        if row["detector"] and row["window_start_ns"] >= since:
            counts, near = sums.setdefault(
                row["detector"], (np.zeros(len(BIN_EDGES) - 1, np.int64), np.zeros(2, np.int64))
            )
            counts += np.asarray(row["counts"], np.int64)
            near += np.array([row["pairs"], row["jumps"]], np.int64)
    found = []
    for detector in sorted(sums):
        counts, near = sums[detector]
        # Where tests do not agree on it the smallest: too careful rather than too sure.
        sizes = [size for (_, name), size in known.items() if name == detector]
        if not sizes or not counts.sum():
            continue
        correlation = float(Neighbours().met(int(near[0]), int(near[1])).believed(counts, 1.0))
        block = (1.0 + correlation) / (1.0 - correlation)
        doubtful = at_most(counts, min(sizes), block)
        kept = np.flatnonzero(
            (BIN_EDGES[1:] * (min(sizes) + 1) >= 1.0) & (BIN_EDGES[1:] <= _HIGHEST)
        )
        levels = [float(f"{level:.3g}") for level in BIN_EDGES[1:][kept]]
        certain = (np.cumsum(counts) - doubtful)[kept]
        found.append(
            Flags(
                detector,
                int(counts.sum()),
                levels,
                np.cumsum(counts)[kept].tolist(),
                doubtful[kept].tolist(),
                int(np.argmax(certain)),
            )
        )
    return sorted(found, key=lambda one: one.doubtful[one.start] - one.flagged[one.start])


def _nearest(levels: Sequence[float], level: float) -> int:
    """Place of the threshold that is nearest on a logarithmic scale."""
    return int(np.argmin(np.abs(np.log(np.asarray(levels) / level))))
