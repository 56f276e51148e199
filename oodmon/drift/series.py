"""One number a window: what change detectors that know nothing of histograms are fed with.

The detectors of river take one value at a time. Their value is the window's mean normal score,
standardised against the reference, so that it is about N(0, 1) while nothing changes, whatever the
law of the raw scores. `Series` keeps the values since the last alarm, from which the detector is
built again after a restart.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES, covered
from oodmon.contracts import Arrays
from oodmon.drift.tuned import Tunable
from oodmon.records import BIN_EDGES, Histogram, Window

__all__ = ["HISTORY", "Followed", "Series", "SeriesTest", "Standing", "exceeding", "standing"]

HISTORY: Final = 512
"""Values that survive when the memory of a series, twice as long, is full."""

SPREAD_FLOOR: Final = 0.05
"""Below this standard deviation of the reference's normal scores nearly all of them share a bin
(a detector with few distinct scores); then the spread of a continuous detector, 1, is taken."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How one window stands to the reference.

    Attributes:
        value: about N(0, 1) for independent samples while nothing changes; > 0 is more OOD.
        effect: shift of the mean normal score, in standard deviations of the reference.
    """

    value: float
    effect: float


def standing(window: Histogram, reference: Histogram) -> Standing | None:
    """Compare the mean normal scores of n window samples and m reference samples.

    value = effect · sqrt(n m / (n + m)), the two-sample z statistic: the sampling error of the
    reference is part of it, so a small calibration set does not pass for a change. None where
    either side is empty: there is nothing to feed.
    """
    n, m = window.scored, reference.scored
    if n == 0 or m == 0:
        return None
    shares = reference.counts / m
    mean = float(shares @ NORMAL_SCORES)
    spread = math.sqrt(max(float(shares @ (NORMAL_SCORES - mean) ** 2), 0.0))
    # A fresh sample outranks all m with probability 1 / (m + 1), which none of the m did.
    first = int(np.searchsorted(BIN_EDGES, 1.0 / (m + 1.0), side="left")) - 1
    centre = (m * mean + float(NORMAL_SCORES[first])) / (m + 1.0)
    if spread < SPREAD_FLOOR:
        spread = 1.0
    effect = (float(window.counts @ NORMAL_SCORES) / n - centre) / spread
    return Standing(effect * math.sqrt(n * m / (n + m)), effect)


class Detects(Protocol):
    """A change detector of river's shape."""

    @property
    def drift_detected(self) -> bool:
        """Whether the value fed last was taken for a change."""

    def update(self, x: float) -> object:
        """Feed one value."""


D = TypeVar("D", bound=Detects)


@dataclass(slots=True, eq=False)
class Series(Generic[D]):
    """The values fed since the last alarm, and the detector that stands behind them.

    Treated as immutable: `feed` returns the next series. The detector itself cannot be copied, so
    it moves on to the next series, and a series that is fed a second time builds its own by replay.
    When `values` reaches twice `HISTORY`, the older half is dropped and the detector is built from
    what is left: at the same window live and after a restart, so both go on alike.
    """

    build: Callable[[], D]
    values: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    _detector: D | None = None

    def detector(self) -> D:
        """The detector as it stands after `values`; feed it only through `feed`."""
        if self._detector is None:
            self._detector = self.build()
            for value in self.values.tolist():
                self._detector.update(value)
        return self._detector

    def feed(self, value: float) -> tuple[Series[D], D]:
        """The series with one more value, and the detector right after it.

        After an alarm the next series is empty: river's detectors forget everything then, and go
        on with what comes next as the new normal.
        """
        detector = self.detector()
        self._detector = None
        detector.update(value)
        if detector.drift_detected:
            return Series(self.build), detector
        values = np.append(self.values, value)
        if len(values) == 2 * HISTORY:
            return Series(self.build, values[-HISTORY:].copy()), detector
        return Series(self.build, values, detector), detector


@dataclass(frozen=True, slots=True, eq=False)
class Followed(Generic[D]):
    """One stream as a `SeriesTest` remembers it."""

    reference: Window
    series: Series[D]


class SeriesTest(Tunable[Followed[D]]):
    """A drift test that asks a detector of river about one value a window.

    Attributes:
        run_length_windows: expected windows of one stream between false alarms.
    """

    run_length_windows: float

    disjoint: ClassVar[bool] = True  # overlapping windows are not independent

    @abstractmethod
    def build(self) -> D:
        """A detector that has seen nothing, at the threshold of the run length."""

    def start(self, reference: Window) -> Followed[D]:
        """No window seen."""
        self.refuse_untuned()
        return Followed(reference, Series(self.build))

    def freeze(self, state: Followed[D]) -> Arrays:
        """The values since the last alarm: at most 8 kB."""
        return {"values": state.series.values}

    def thaw(self, reference: Window, arrays: Arrays) -> Followed[D]:
        """Build river's object again by feeding it the values."""
        return Followed(reference, Series(self.build, np.asarray(arrays["values"], np.float64)))

    def run_length(self, window_seconds: float) -> float:
        """Windows of one stream between false alarms."""
        del window_seconds
        return self.run_length_windows

    def promise(self, window_seconds: float) -> str:
        """The run length in words."""
        hours = self.run_length_windows * window_seconds / 3600.0
        return (
            f"one false alarm per {self.run_length_windows:,.0f} windows and stream on average "
            f"({hours:,.1f} hours), on independent samples"
        )


def exceeding(window: Histogram, level: float) -> float:
    """Samples with a tail probability of at most `level`; a bin that it cuts counts in part."""
    return float(window.counts @ covered(level))
