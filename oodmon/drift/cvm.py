"""The two-sample Cramér–von Mises test of a window against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

import numpy as np
from scipy.special import gammaln, kve

from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict, gaps
from oodmon.drift.wasserstein import along
from oodmon.records import Window
from oodmon.registry import drift

__all__ = ["CramerVonMises"]

_TERMS: Final = np.arange(12)
_LARGE: Final = 1.5
"""Above this the tail is a pure exponential, to a part in a thousand."""


def p_value(statistic: float) -> float:
    """P(ω² >= statistic) in the limit (Anderson and Darling, Ann. Math. Statist. 1952, eq. 4.35).

    Beyond `_LARGE`, where the series loses its digits, the slowest exponential exp(-π² x / 2) goes
    on from there.
    """
    if statistic > _LARGE:
        return p_value(_LARGE) * math.exp(-(math.pi**2) * (statistic - _LARGE) / 2.0)
    if statistic < 0.01:
        return 1.0
    k = _TERMS
    y = (4.0 * k + 1.0) ** 2 / (16.0 * statistic)
    logs = gammaln(k + 0.5) - gammaln(0.5) - gammaln(k + 1.0) - 2.0 * y
    # exp(-y) kv(y) = exp(-2 y) kve(y).
    below = float((np.exp(logs) * np.sqrt(4.0 * k + 1.0) * kve(0.25, y)).sum())
    return 1.0 - below / (math.pi * math.sqrt(statistic))


@lru_cache(maxsize=64)
def critical(alpha: float) -> float:
    """The statistic whose p-value is `alpha`, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(middle) > alpha else (low, middle)
    return high


@drift.register("cvm")
@dataclass(frozen=True)
class CramerVonMises(Judged):
    """Mean squared distance between the distribution functions of window and reference.

    Reads      the counts of tail probabilities of n window and m reference samples
    Statistic  n m / (n + m) ∫ (F_n - F_m)² dp over the tail probabilities; >= 0; also the effect
    Threshold  the upper `alpha` point of its limit law ω²
    Reference  Anderson, Ann. Math. Statist. 1962 (two samples)

    Like `ks` it sees any change of the law of the scores; it weighs what happens over the whole
    range against the largest gap alone, and so finds moderate shifts sooner and a few novel samples
    later. Between the edges of the bins the distance is taken to be linear, which errs towards
    silence. The rate holds for independent samples and over calibration sets and windows together.

    Args:
        alpha: false alarms per window and stream, about, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
    """

    paper: ClassVar[Paper | None] = Paper(
        "On the distribution of the two-sample Cramér-von Mises criterion",
        "T. W. Anderson",
        "Annals of Mathematical Statistics",
        1962,
        "https://doi.org/10.1214/aoms/1177704477",
    )

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The criterion, and what is expected of it under no change."""
        gap, size = gaps(window, reference, detector)
        left, right = gap[:-1], gap[1:]
        squares = (left**2 + left * right + right**2) / 3.0
        statistic = size * float(along(reference, detector) @ squares)
        return Verdict(statistic, critical(self.alpha), p_value(statistic))
