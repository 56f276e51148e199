"""The Page–Hinkley test on one value per window (river)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import numpy as np
from river.drift import PageHinkley as RiverPageHinkley

from oodmon.contracts import Paper
from oodmon.drift.series import Followed, SeriesTest, standing
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window
from oodmon.registry import drift

__all__ = ["PageHinkley"]

TOLERANCE: Final = 0.25
"""river's `delta`, in standard deviations of the value: half of the smallest shift looked for."""

MIN_WINDOWS: Final = 10
"""river's `min_instances`: windows after a start before the first decision."""

# Threshold → expected run length in windows, on independent N(0, 1) values, both sides:
#   python benchmarks/run_lengths.py page_hinkley
_TABLE: Final = (
    (4.0, 47),
    (6.0, 136),
    (8.0, 363),
    (10.0, 1014),
    (12.0, 2879),
    (14.0, 7526),
    (16.0, 20973),
    (18.0, 56387),
)


def _threshold(run_length: float) -> float:
    """The threshold of this expected run length, linear in its logarithm, as theory has it."""
    thresholds, lengths = np.asarray(_TABLE).T
    logs = np.log(lengths)
    wanted = math.log(run_length)
    if wanted <= logs[-1]:
        return float(np.interp(wanted, logs, thresholds))
    # Siegmund: for high thresholds h, ln(run length) grows by 2 TOLERANCE per unit of h.
    return float(thresholds[-1] + (wanted - logs[-1]) / (2.0 * TOLERANCE))


@drift.register("page_hinkley")
@dataclass(frozen=True)
class PageHinkley(SeriesTest[RiverPageHinkley]):
    """Cumulative deviation of the windows' mean normal score from its own mean, in both directions.

    Reads      one value per window: the mean normal score of its tail probabilities, standardised
               against the reference (`oodmon.drift.series`)
    Statistic  the larger of the two cumulative sums of deviations from the running mean beyond 0.25
               standard deviations, measured from its extreme; river.drift.PageHinkley
    Threshold  from `run_length_windows`, by a table simulated on N(0, 1) values
    Reference  Page, Biometrika 1954; Hinkley, Biometrika 1971

    It compares the stream with its own past, not with the reference: what was already so at the
    start is not a change to it, and after an alarm it starts over and takes what follows as the new
    normal, so `drifted` holds for one window per change. The run length holds for windows of
    independent samples; correlated traffic shortens it. The effect is the shift of the window's
    mean normal score, in standard deviations of the reference. There is no p-value.

    Args:
        run_length_windows: expected windows of one stream between false alarms, at least 50.
        false_alarms: instead of `run_length_windows`: "1 per 30 days" has `oodmon fit` find it.
    """

    run_length_windows: float = 10_000.0
    false_alarms: str = ""

    paper: ClassVar[Paper | None] = Paper(
        "Continuous inspection schemes",
        "E. S. Page",
        "Biometrika",
        1954,
        "https://doi.org/10.1093/biomet/41.1-2.100",
    )

    def __post_init__(self) -> None:
        if not 50.0 <= self.run_length_windows < math.inf:
            raise ContractError(
                f"drift.page_hinkley.run_length_windows: {self.run_length_windows} is below 50"
            )
        self.check_promise()

    def build(self) -> RiverPageHinkley:
        """river's detector at this run length."""
        return RiverPageHinkley(
            min_instances=MIN_WINDOWS,
            delta=TOLERANCE,
            threshold=_threshold(self.run_length_windows),
            alpha=1.0,  # no forgetting: the mean is that of all windows since the last alarm
            mode="both",
        )

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"run_length_windows": 200.0},)

    def nominal(self, windows: float) -> Self:
        """`run_length_windows` is so many, at least 50."""
        return replace(self, run_length_windows=max(windows, 50.0), false_alarms="")

    def step(
        self, state: Followed[RiverPageHinkley], window: Window, detector: str
    ) -> tuple[Followed[RiverPageHinkley], DriftResult]:
        """Feed one window; an empty one is left out."""
        seen, known = window.histogram(detector), state.reference.histogram(detector)
        stands = standing(seen, known)
        statistic, drifted, series = 0.0, False, state.series
        if stands is not None:
            series, river = state.series.feed(stands.value)
            drifted = river.drift_detected
            # Before MIN_WINDOWS the sums may be past the threshold, and nothing is decided yet.
            if drifted or len(series.values) >= MIN_WINDOWS:
                statistic = max(
                    river._sum_increase - river._min_increase,
                    river._max_decrease - river._sum_decrease,
                )
        return Followed(state.reference, series), self.result(
            window,
            state.reference,
            detector,
            statistic=float(statistic),
            threshold=_threshold(self.run_length_windows),
            drifted=drifted,
            effect=0.0 if stands is None else stands.effect,
        )
