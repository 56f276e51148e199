"""The chi-squared test of the predicted classes of a window against those of the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from scipy.special import chdtrc, chdtri

from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict
from oodmon.records import Window
from oodmon.registry import drift

__all__ = ["ChiSquared"]

_LEAST: Final = 5.0
"""Samples that a class is expected to have in the window; rarer ones are counted together
(Cochran, Biometrics 1954)."""


@drift.register("chi_squared")
@dataclass(frozen=True)
class ChiSquared(Judged):
    """Homogeneity of the predicted classes in window and reference: prior drift.

    Reads      predicted classes of n window samples and of the m calibration samples; classes that
               are expected fewer than 5 times in the window are counted together
    Statistic  sum over classes of (observed - expected)² / expected, in both samples; >= 0
    Threshold  the upper `alpha` point of chi-squared(classes - 1)
    Reference  Pearson, Phil. Mag. 1900

    It looks at what the model answers, not at how unusual the inputs are: a change of the traffic's
    mix shows here and may be no fault. It is the same for every detector, whose stream it is
    counted with. Where the calibration holds no predicted classes (a model without logits) it finds
    nothing, and `oodmon fit` says so. The rate holds for independent samples.

    Args:
        alpha: false alarms per window and stream, about, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
    """

    paper: ClassVar[Paper | None] = Paper(
        "On the criterion that a given system of deviations from the probable in the case of a "
        "correlated system of variables is such that it can be reasonably supposed to have arisen "
        "from random sampling",
        "K. Pearson",
        "Philosophical Magazine",
        1900,
        "https://doi.org/10.1080/14786440009463897",
    )

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The statistic, and what is expected of it under no change."""
        del detector
        labels = sorted(window.predicted.keys() | reference.predicted.keys())
        a = np.array([window.predicted.get(label, 0) for label in labels], np.float64)
        b = np.array([reference.predicted.get(label, 0) for label in labels], np.float64)
        n, m = a.sum(), b.sum()
        if not (n and m):
            return Verdict(0.0, float(chdtri(1, self.alpha)), 1.0)
        share = (a + b) / (n + m)
        rare = min(n, m) * share < _LEAST
        if rare.any():
            a, b, share = (np.append(x[~rare], x[rare].sum()) for x in (a, b, share))
        freedom = len(share) - 1
        if freedom < 1:
            return Verdict(0.0, float(chdtri(1, self.alpha)), 1.0)
        pulls = (a - n * share) ** 2 / (n * share) + (b - m * share) ** 2 / (m * share)
        statistic = float(pulls.sum())
        return Verdict(
            statistic, float(chdtri(freedom, self.alpha)), float(chdtrc(freedom, statistic))
        )

    def outlook(self, reference: Window) -> str:
        """Whether there is something to compare with."""
        if not reference.predicted:
            return "the calibration holds no predicted classes: it will find nothing"
        return f"{len(reference.predicted)} predicted classes in the calibration"
