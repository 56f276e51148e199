"""The most novel samples of each pane: which samples, not only how many."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from oodmon.calibration import Calibration
from oodmon.records import Exceedance, ScoreBatch

__all__ = ["Flagged"]

_PER_PANE: Final = 100
"""Samples kept per pane and detector; a flood of novelty needs no longer list than this."""

_Row = tuple[float, str, str, int, float]  # score, sample id, segment, observed at, p


class Flagged:
    """A fold: batches in, exceedances out when their pane closes.

    Args:
        level: a sample is flagged when its tail probability is at most this. Where the calibration
            is too small to reach the level, it is flagged when it outranks all of it.
    """

    def __init__(self, level: float) -> None:
        self.level = level
        self._open: dict[int, dict[str, list[_Row]]] = {}

    def add(self, batch: ScoreBatch, calibrations: Mapping[str, Calibration], pane: int) -> None:
        """Keep the most novel rows of one batch; ties are broken by name, not by arrival."""
        for detector, calibration in calibrations.items():
            column = batch.scores[detector]
            bar = calibration.score_at(self.level)
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

    def close(self, model: str, version: str, until: int) -> list[Exceedance]:
        """The flagged samples of all panes that begin before `until`, most novel first."""
        found = []
        for pane in sorted(start for start in self._open if start < until):
            for detector, heap in sorted(self._open.pop(pane).items()):
                found += [
                    Exceedance(model, version, name, detector, segment, seen, score, p)
                    for score, name, segment, seen, p in sorted(heap, reverse=True)
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
