"""The population stability index of a window against the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, chdtri

from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES, Window
from oodmon.registry import drift

__all__ = ["FLOOR_COUNTS", "PopulationStability", "coarse_bins", "coarse_shares"]

FLOOR_COUNTS: Final = 0.5
"""Added to the count of every bin on both sides, so that no logarithm meets a zero. Put into empty
bins only, as is often done, it lets the false-alarm rate grow to four times the stated one."""


@lru_cache(maxsize=32)
def coarse_bins(bins: int) -> npt.NDArray[np.intp]:
    """First of the 64 bins in each of the coarse bins, whose edges are nearest to equal shares."""
    wanted = np.linspace(0.0, 1.0, bins + 1)[:-1]
    return np.unique(np.abs(BIN_EDGES[:-1, None] - wanted).argmin(axis=0))


def coarse_shares(
    window: Window, reference: Window, detector: str, bins: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The shares of window and reference samples in the coarse bins, none of them 0."""
    starts = coarse_bins(bins)
    a = np.add.reduceat(window.histogram(detector).counts, starts) + FLOOR_COUNTS
    b = np.add.reduceat(reference.histogram(detector).counts, starts) + FLOOR_COUNTS
    return a / a.sum(), b / b.sum()


@drift.register("psi")
@dataclass(frozen=True)
class PopulationStability(Judged):
    """Symmetrised Kullback–Leibler divergence between coarse histograms of window and reference.

    Reads      the counts of tail probabilities, merged into `bins` bins of about equal share, of n
               window and m reference samples
    Statistic  sum over bins of (a - b) ln(a / b), a and b the shares with half a count added to
               every bin; >= 0; also the effect. Folklore reads 0.1 as some and 0.25 as much change
    Threshold  `threshold`, or where that is 0: (1/n + 1/m) (1 + bins/n + bins/m) times the upper
               `alpha` point of chi-squared(bins - 1), the law of the index under no change; the
               second factor keeps the rate for windows of a few dozen samples
    Reference  Yurdakul and Naranjo, J. Risk Model Validation 2020 (the law)

    A fixed threshold says nothing about false alarms, because the index shrinks with n; the p-value
    is given either way. The rate holds for independent samples and over calibration sets and
    windows together, as that of `ks` does.

    Args:
        alpha: false alarms per window and stream, at most, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
        bins: coarse bins, 2 to 36.
        threshold: a fixed threshold instead of `alpha`; 0 derives it.
    """

    bins: int = 10
    threshold: float = 0.0

    paper: ClassVar[Paper | None] = Paper(
        "Statistical properties of the population stability index",
        "B. Yurdakul, J. Naranjo",
        "Journal of Risk Model Validation",
        2020,
        "https://doi.org/10.21314/JRMV.2020.227",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bins <= 36:
            raise ContractError(f"drift.psi.bins: {self.bins} is not in 2 to 36")
        if self.threshold < 0.0:
            raise ContractError(f"drift.psi.threshold: {self.threshold} is negative")
        if self.threshold and self.false_alarms:
            raise ContractError("drift.psi.threshold: a fixed one and false_alarms exclude another")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01}, {"bins": 20, "threshold": 0.1})

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The index, and what is expected of it under no change."""
        n, m = window.histogram(detector).scored, reference.histogram(detector).scored
        a, b = coarse_shares(window, reference, detector, self.bins)
        bins = len(a)
        index = float(((a - b) * np.log(a / b)).sum())
        scale = (1.0 / n + 1.0 / m) * (1.0 + bins / n + bins / m)
        threshold = self.threshold or float(chdtri(bins - 1, self.alpha)) * scale
        return Verdict(index, threshold, float(chdtrc(bins - 1, index / scale)))

    def run_length(self, window_seconds: float) -> float:
        """Windows of one stream between false alarms."""
        return 0.0 if self.threshold else super().run_length(window_seconds)

    def promise(self, window_seconds: float) -> str:
        """The rate in words; a fixed threshold has none."""
        if self.threshold:
            return f"none: the index is compared with the fixed threshold {self.threshold:g}"
        return super().promise(window_seconds)
