"""The most novel samples of each pane: which samples, not only how many.

Either all samples whose tail probability is at most a level, or as many as the traffic allows while
the expected share of false ones among them (the false-discovery rate) stays below a bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import Calibration
from oodmon.records import BIN_EDGES, Exceedance, ScoreBatch

__all__ = ["Flagged", "cut_at", "most_novel"]

_PER_PANE: Final = 100
"""Samples kept per pane and detector; a flood of novelty needs no longer list than this."""
_MOST_NOVEL: Final = 40
"""Samples that an alert chooses from, each perhaps flagged by several detectors."""


def cut_at(counts: npt.NDArray[np.int64], false_share: float) -> float:
    """The tail probability up to which samples are flagged at this false-discovery rate q; 0: none.

    Benjamini and Hochberg's step-up on conformal p-values rounded up to `BIN_EDGES`: the greatest
    edge e with e <= q k / m, where k of m samples have p <= e. Conformal p-values depend positively
    on each other, and stay so when rounded, so the expected share of in-distribution samples among
    the flagged ones is at most q (Bates, Candès, Lei, Romano and Sesia, Annals of Statistics 2023).

    Args:
        counts: int64 (64,) of one pane.
        false_share: q.
    """
    found = np.cumsum(counts)
    reached = np.flatnonzero(BIN_EDGES[1:] * found[-1] <= false_share * found)
    return float(BIN_EDGES[reached[-1] + 1]) if len(reached) and found[-1] else 0.0


def most_novel(flagged: Sequence[Exceedance], since: int) -> list[Exceedance]:
    """Those of them that were observed at `since`, ns, or later, the most novel first; not all."""
    late = [sample for sample in flagged if sample.observed_at >= since]
    return sorted(late, key=lambda sample: (sample.p, sample.sample_id))[:_MOST_NOVEL]


_Row = tuple[float, str, str, int, float]  # score, sample id, segment, observed at, p


class Flagged:
    """A fold: batches in, exceedances out when their pane closes.

    Args:
        level: a sample is flagged when its tail probability is at most this. Where the calibration
            is too small to reach the level, it is flagged when it outranks all of it.
        false_share: where above 0, it takes the level's place: the flagged samples of a pane and
            detector are those up to `cut_at`. A calibration of n scores can flag a single sample
            among m only if n > m / q.
    """

    def __init__(self, level: float, false_share: float = 0.0) -> None:
        self.level = level
        self.false_share = false_share
        self._open: dict[int, dict[str, list[_Row]]] = {}

    def add(self, batch: ScoreBatch, calibrations: Mapping[str, Calibration], pane: int) -> None:
        """Keep the most novel rows of one batch; ties are broken by name, not by arrival."""
        for detector, calibration in calibrations.items():
            column = batch.scores[detector]
            bar = calibration.score_at(self.false_share or self.level)
            heap = self._open.get(pane, {}).get(detector)
            if heap is not None and len(heap) >= _PER_PANE:
                bar = max(bar, heap[0][0])
            rows = np.flatnonzero(column >= bar)
            if not len(rows):
                continue
            if len(rows) > _PER_PANE:
                least = np.partition(column[rows], -_PER_PANE)[-_PER_PANE]
                rows = rows[column[rows] >= least]
            if heap is None:
                heap = self._open.setdefault(pane, {}).setdefault(detector, [])
            p = calibration.tail_probabilities(column[rows])
            for row, probability in zip(rows.tolist(), p.tolist(), strict=True):
                segment = batch.segments[batch.segment[row]] if len(batch.segment) else ""
                name = batch.sample_id(row)
                entry = (float(column[row]), name, segment, batch.observed_at, probability)
                if len(heap) < _PER_PANE:
                    heapq.heappush(heap, entry)
                else:
                    heapq.heappushpop(heap, entry)

    def close(
        self,
        model: str,
        version: str,
        until: int,
        counts: Mapping[str, npt.NDArray[np.int64]],
    ) -> list[Exceedance]:
        """The flagged samples of all panes that begin before `until`, most novel first.

        Args:
            model, version: what is served.
            until: ns.
            counts: detector → counts of the pane that ends at `until`, over all segments.
        """
        found = []
        for pane in sorted(start for start in self._open if start < until):
            for detector, heap in sorted(self._open.pop(pane).items()):
                cut = 1.0
                if self.false_share:
                    cut = cut_at(counts[detector], self.false_share) if detector in counts else 0.0
                found += [
                    Exceedance(model, version, name, detector, segment, seen, score, p)
                    for score, name, segment, seen, p in sorted(heap, reverse=True)
                    if p <= cut
                ]
        return found

    def freeze(self) -> list[Any]:
        """Plain JSON values."""
        return [
            [pane, detector, sorted(heap)]
            for pane, row in sorted(self._open.items())
            for detector, heap in sorted(row.items())
        ]

    def thaw(self, rows: Sequence[Any]) -> None:
        """Back from `freeze`."""
        self._open = {}
        for pane, detector, entries in rows:
            heap = [(float(e[0]), str(e[1]), str(e[2]), int(e[3]), float(e[4])) for e in entries]
            heapq.heapify(heap)
            self._open.setdefault(int(pane), {})[str(detector)] = heap
