"""The two-sample Kolmogorov–Smirnov test of a window against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict, gaps
from oodmon.records import Window
from oodmon.registry import drift

__all__ = ["KolmogorovSmirnov"]


@drift.register("ks")
@dataclass(frozen=True)
class KolmogorovSmirnov(Judged):
    """Largest distance between the distribution functions of window and reference.

    Reads      the counts of tail probabilities of n window and m reference samples
    Statistic  D = max over bin edges of |F_n - F_m|, in [0, 1]; also the effect
    Threshold  sqrt(ln(2 / alpha) (n + m) / (2 n m)), at which the p-value
               2 exp(-2 D² n m / (n + m)) is `alpha`
    Reference  Smirnov 1948; the bound: Massart, Ann. Probab. 1990 (m without limit, any n) and Wei
               and Dudley, Statist. Probab. Lett. 2012 (two samples)

    On binned values the distance can only be smaller than on the values themselves, so the test
    errs towards silence. The rate is the one over calibration sets and windows together: one
    calibration set that is off by chance leans on all its windows alike. It is also one for
    independent samples; on correlated traffic, and for a promise about many streams, take `budget`.

    Args:
        alpha: false alarms per window and stream, at most, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
    """

    paper: ClassVar[Paper | None] = Paper(
        "Table for estimating the goodness of fit of empirical distributions",
        "N. Smirnov",
        "Annals of Mathematical Statistics",
        1948,
        "https://doi.org/10.1214/aoms/1177730256",
    )

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The distance, and what is expected of it under no change."""
        gap, size = gaps(window, reference, detector)
        distance = float(np.abs(gap).max())
        threshold = math.sqrt(math.log(2.0 / self.alpha) / (2.0 * size))
        return Verdict(distance, threshold, 2.0 * math.exp(-2.0 * size * distance**2))
