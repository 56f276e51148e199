"""The budget on many streams side by side, as a daemon judges many segments.

A window may hold one sample, as the public tests take one. One stream at a time that would take
hours; a hundred together take minutes, and the decisions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.drift.contender import F8
from oodmon.calibration import NORMAL_SCORES, Calibration
from oodmon.drift.budget import Budget
from oodmon.drift.wealth import Wealth
from oodmon.records import BIN_EDGES, DriftResult, Histogram, Window

__all__ = ["DETECTOR", "SECOND", "Panes", "Side", "evidence"]

SECOND = 1_000_000_000
DETECTOR = "d"

_BINS = len(BIN_EDGES) - 1
_UNITS = np.round(1000.0 * NORMAL_SCORES).astype(np.int64)
_SQUARES = np.round(1000.0 * NORMAL_SCORES**2).astype(np.int64)
_NO_KEYS = np.empty(0, np.uint64)
_NO_SCORES = np.empty(0, np.float32)
_NO_CLASSES = np.empty(0, np.int32)


class Panes:
    """The windows that `oodmon.windows` makes of streams, less the sample of raw scores.

    Args:
        bins: int64 (S, n) bins of the tail probabilities.
        rows: samples in a window; what does not fill one is left out.
    """

    def __init__(self, bins: npt.NDArray[np.int64], rows: int) -> None:
        self.rows = rows
        self.count = bins.shape[1] // rows
        self._bins = bins[:, : self.count * rows]
        self._jumps = self._squared_steps(_UNITS)
        self._swings = self._squared_steps(_SQUARES)

    def _squared_steps(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(S, windows): over the neighbours whose second one is in the window."""
        steps = np.diff(values.take(self._bins), axis=1, prepend=0)
        steps[:, :1] = 0
        summed: npt.NDArray[np.int64] = (
            np.square(steps).reshape(len(steps), self.count, self.rows).sum(2)
        )
        return summed

    def at(self, place: int, streams: npt.NDArray[np.intp]) -> list[Window]:
        """Window number `place` of some streams."""
        bins = self._bins[streams, place * self.rows : (place + 1) * self.rows]
        offsets = _BINS * np.arange(len(streams))[:, None]
        counts = np.bincount((bins + offsets).ravel(), minlength=_BINS * len(streams))
        pairs = self.rows - (place == 0)
        start = (1 + place) * SECOND
        return [
            Window(
                "m",
                "1",
                f"{stream:04}",
                start,
                start + SECOND,
                self.rows,
                detectors={
                    DETECTOR: Histogram(
                        row,
                        0,
                        _NO_KEYS,
                        _NO_SCORES,
                        pairs,
                        jumps,
                        classes=_NO_CLASSES,
                        swings=swings,
                    )
                },
            )
            for stream, row, jumps, swings in zip(
                streams.tolist(),
                counts.reshape(len(streams), _BINS),
                self._jumps[streams, place].tolist(),
                self._swings[streams, place].tolist(),
                strict=True,
            )
        ]


class Side:
    """One budget on streams with a reference each.

    Args:
        budget: the test.
        rows: samples in a window.
        references, values: of the streams; as many values in each.
    """

    def __init__(
        self, budget: Budget, rows: int, references: Sequence[F8], values: Sequence[F8]
    ) -> None:
        known = [Calibration.from_scores(DETECTOR, "", reference) for reference in references]
        self.budget = budget
        self.fresh = [budget.start(each.reference("m", "1")) for each in known]
        self.states: list[Wealth] = list(self.fresh)
        bins = [k.bins(v.astype(np.float32)) for k, v in zip(known, values, strict=True)]
        self.panes = Panes(np.stack(bins), rows)

    def step(self, place: int, streams: npt.NDArray[np.intp]) -> list[DriftResult]:
        """Window number `place` of some streams, each judged as if there were no others."""
        told = self.budget.step_all(
            [self.states[stream] for stream in streams],
            self.panes.at(place, streams),
            [DETECTOR] * len(streams),
        )
        for stream, (state, _) in zip(streams.tolist(), told, strict=True):
            self.states[stream] = state
        return [result for _, result in told]

    def first_alarms(self, quiet: int = 0) -> list[tuple[int, int]]:
        """Per stream: values up to the first alarm after `quiet` of them, and alarms before.

        0 values say that none came; after an alarm before `quiet` a stream starts anew.
        """
        found = [(0, 0)] * len(self.states)
        waiting = np.arange(len(self.states))
        for place in range(self.panes.count):
            seen = (place + 1) * self.panes.rows
            left = []
            for stream, result in zip(waiting.tolist(), self.step(place, waiting), strict=True):
                _, before = found[stream]
                if not self._drifted(result):
                    left.append(stream)
                elif seen > quiet:
                    found[stream] = (seen, before)
                else:
                    found[stream] = (0, before + 1)
                    self.states[stream] = self.fresh[stream]
                    left.append(stream)
            waiting = np.array(left, np.intp)
            if not left:
                break
        return found

    def _drifted(self, result: DriftResult) -> bool:
        """As the daemon decides; that is asked where it may be."""
        if result.statistic < result.threshold:
            return False
        return any(judged.drifted for judged in self.budget.combine([result]))


def evidence(
    budget: Budget, rows: int, references: Sequence[F8], values: Sequence[F8]
) -> npt.NDArray[np.float64]:
    """(windows, streams) log10 of the evidence after each window of each stream."""
    side = Side(budget, rows, references, values)
    every = np.arange(len(side.states))
    return np.array(
        [
            [result.statistic for result in side.step(place, every)]
            for place in range(side.panes.count)
        ]
    )
