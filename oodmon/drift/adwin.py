"""Adaptive windowing on one value per window (river)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import numpy as np
from river.drift import ADWIN

from oodmon.contracts import Paper
from oodmon.drift.series import Followed, SeriesTest, standing
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window
from oodmon.registry import drift

__all__ = ["Adwin"]

# river's `delta` → expected run length in windows, on independent N(0, 1) values, clock 1:
#   python benchmarks/run_lengths.py adwin
_TABLE: Final = (
    (1.0, 371),
    (0.5, 991),
    (0.2, 3360),
    (0.1, 7872),
    (0.05, 19709),
    (0.02, 69189),
    (0.01, 163667),
)


def _delta(run_length: float) -> float:
    """river's `delta` of this expected run length: the logarithms are about linear in each other.

    Beyond the table the run length is taken to grow as 1 / delta; it grows faster, so the false
    alarms are fewer than stated.
    """
    deltas, lengths = np.asarray(_TABLE).T
    wanted = math.log(run_length)
    if wanted <= math.log(lengths[-1]):
        return float(np.exp(np.interp(wanted, np.log(lengths), np.log(deltas))))
    return float(deltas[-1] * lengths[-1] / run_length)


@drift.register("adwin")
@dataclass(frozen=True)
class Adwin(SeriesTest[ADWIN]):
    """Drops old windows as soon as two halves of what is kept differ in their means.

    Reads      one value per window: the mean normal score of its tail probabilities, standardised
               against the reference (`oodmon.drift.series`)
    Statistic  windows that the newest one made it drop as outdated; river.drift.ADWIN, which looks
               for a change at every window
    Threshold  1; river's `delta` comes from `run_length_windows`, by a table simulated on N(0, 1)
               values, because the bound that `delta` stands for is far from sharp
    Reference  Bifet and Gavaldà, SDM 2007

    It compares the stream with its own past, not with the reference: what was already so at the
    start is not a change to it, and after an alarm it starts over and takes what follows as the new
    normal, so `drifted` holds for one window per change. It sees changes of the mean only. The run
    length holds for windows of independent samples; correlated traffic shortens it. The effect is
    the shift of the window's mean normal score, in standard deviations of the reference. There is
    no p-value.

    Args:
        run_length_windows: expected windows of one stream between false alarms, at least 400.
        false_alarms: instead of `run_length_windows`: "1 per 30 days" has `oodmon fit` find it.
    """

    run_length_windows: float = 10_000.0
    false_alarms: str = ""

    paper: ClassVar[Paper | None] = Paper(
        "Learning from time-changing data with adaptive windowing",
        "A. Bifet, R. Gavaldà",
        "SIAM International Conference on Data Mining",
        2007,
        "https://doi.org/10.1137/1.9781611972771.42",
    )

    def __post_init__(self) -> None:
        if not 400.0 <= self.run_length_windows < math.inf:
            raise ContractError(
                f"drift.adwin.run_length_windows: {self.run_length_windows} is below 400"
            )
        self.check_promise()

    def build(self) -> ADWIN:
        """river's detector at this run length."""
        return ADWIN(delta=_delta(self.run_length_windows), clock=1)  # type: ignore[no-untyped-call]

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"run_length_windows": 400.0},)

    def nominal(self, windows: float) -> Self:
        """`run_length_windows` is so many, at least 400."""
        return replace(self, run_length_windows=max(windows, 400.0), false_alarms="")

    def step(
        self, state: Followed[ADWIN], window: Window, detector: str
    ) -> tuple[Followed[ADWIN], DriftResult]:
        """Feed one window; an empty one is left out."""
        seen, known = window.histogram(detector), state.reference.histogram(detector)
        stands = standing(seen, known)
        statistic, drifted, series = 0.0, False, state.series
        if stands is not None:
            width = state.series.detector().width
            series, river = state.series.feed(stands.value)
            drifted = river.drift_detected
            statistic = float(max(width + 1 - river.width, 1)) if drifted else 0.0
        return Followed(state.reference, series), self.result(
            window,
            state.reference,
            detector,
            statistic=statistic,
            threshold=1.0,
            drifted=drifted,
            effect=0.0 if stands is None else stands.effect,
        )
