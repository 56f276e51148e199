"""The Wasserstein distance of a window to the reference, in tail probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict, gaps
from oodmon.records import Window
from oodmon.registry import drift

__all__ = ["Wasserstein", "along"]

# Upper quantiles of ∫ |B| over a Brownian bridge B: -ln p → value, simulated with 800,000 bridges
# of 512 steps (seed 0), to about half a percent.
_LOGS: Final = -np.log(
    [
        0.999,
        0.99,
        0.95,
        0.9,
        0.8,
        0.7,
        0.6,
        0.5,
        0.35,
        0.2,
        0.1,
        0.05,
        0.02,
        0.01,
        0.005,
        0.002,
        0.001,
        0.0005,
        0.0002,
    ]
)
_VALUES: Final = np.array(
    [
        0.1036,
        0.1258,
        0.1533,
        0.1724,
        0.2009,
        0.2267,
        0.2528,
        0.2814,
        0.3337,
        0.4098,
        0.4988,
        0.5818,
        0.6817,
        0.7512,
        0.8141,
        0.8985,
        0.9563,
        1.0065,
        1.0769,
    ]
)
_RATE: Final = 6.0
"""P(∫ |B| > x) = exp(-6 x² (1 + o(1))): ∫ B is normal with variance 1/12."""


def along(reference: Window, detector: str) -> npt.NDArray[np.float64]:
    """(64,) the reference's share in each bin: what dp becomes when p is measured by its ranks."""
    known = reference.histogram(detector)
    shares: npt.NDArray[np.float64] = known.counts / known.scored
    return shares


def _logarithm(value: float) -> float:
    """-ln P(∫ |B| >= value)."""
    if value <= _VALUES[-1]:
        squares = np.concatenate([[0.0], _VALUES**2])
        return float(np.interp(value**2, squares, np.concatenate([[0.0], _LOGS])))
    return float(_LOGS[-1] + _RATE * (value**2 - _VALUES[-1] ** 2))


def _critical(alpha: float) -> float:
    """The inverse."""
    wanted = -math.log(alpha)
    if wanted <= _LOGS[-1]:
        squares = np.concatenate([[0.0], _VALUES**2])
        return math.sqrt(np.interp(wanted, np.concatenate([[0.0], _LOGS]), squares))
    return math.sqrt(_VALUES[-1] ** 2 + (wanted - _LOGS[-1]) / _RATE)


@drift.register("wasserstein")
@dataclass(frozen=True)
class Wasserstein(Judged):
    """Area between the distribution functions of window and reference, over tail probabilities.

    Reads      the counts of tail probabilities of n window and m reference samples
    Statistic  W = ∫ |F_n - F_m| dp, the mean change of the tail probability when the samples are
               moved as little as possible; in [0, 0.5]; also the effect
    Threshold  the upper `alpha` point of ∫ |B| over a Brownian bridge B, times sqrt((n + m) / n m)
    Reference  Ramdas, García Trillos and Cuturi, Entropy 2017 (the law of the distance on ranks)

    The distance of the raw scores depends on their law, and a threshold such as 0.1 standard
    deviations flags nine of ten windows of 50 samples on which nothing changed. Measured in tail
    probabilities it does not depend on it. Between the edges of the bins the difference is taken to
    be linear. The rate holds for independent samples and over calibration sets and windows
    together.

    Args:
        alpha: false alarms per window and stream, about, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
    """

    paper: ClassVar[Paper | None] = Paper(
        "On Wasserstein two-sample testing and related families of nonparametric tests",
        "A. Ramdas, N. García Trillos, M. Cuturi",
        "Entropy",
        2017,
        "https://doi.org/10.3390/e19020047",
    )

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The area, and what is expected of it under no change."""
        gap, size = gaps(window, reference, detector)
        left, right = np.abs(gap[:-1]), np.abs(gap[1:])
        # Where the sign changes inside a bin, two triangles; else a trapezium.
        crossing = gap[:-1] * gap[1:] < 0.0
        sums = np.where(
            crossing, (left**2 + right**2) / np.maximum(left + right, 1e-300), left + right
        )
        area = float(along(reference, detector) @ sums) / 2.0
        root = math.sqrt(size)
        return Verdict(area, _critical(self.alpha) / root, math.exp(-_logarithm(root * area)))
