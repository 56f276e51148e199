"""The population stability index of a window against the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, chdtri

from oodmon.contracts import DriftTest, Paper
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES, DriftResult, Window
from oodmon.registry import drift

__all__ = ["PopulationStability"]

FLOOR_COUNTS: Final = 0.5
"""Added to the count of every bin on both sides, so that no logarithm meets a zero. Put into empty
bins only, as is often done, it lets the false-alarm rate grow to four times the stated one."""


@lru_cache(maxsize=32)
def _starts(bins: int) -> npt.NDArray[np.intp]:
    """First of the 64 bins in each of the coarse bins, whose edges are nearest to equal shares."""
    wanted = np.linspace(0.0, 1.0, bins + 1)[:-1]
    return np.unique(np.abs(BIN_EDGES[:-1, None] - wanted).argmin(axis=0))


@drift.register("psi")
@dataclass(frozen=True)
class PopulationStability(DriftTest[Window]):
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
        bins: coarse bins, 2 to 36.
        threshold: a fixed threshold instead of `alpha`; 0 derives it.
    """

    alpha: float = 0.001
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
        if not 0.0 < self.alpha < 1.0:
            raise ContractError(f"drift.psi.alpha: {self.alpha} is not in (0, 1)")
        if not 2 <= self.bins <= 36:
            raise ContractError(f"drift.psi.bins: {self.bins} is not in 2 to 36")
        if self.threshold < 0.0:
            raise ContractError(f"drift.psi.threshold: {self.threshold} is negative")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01}, {"bins": 20, "threshold": 0.1})

    def start(self, reference: Window) -> Window:
        """Nothing is remembered but the reference."""
        return reference

    def step(self, state: Window, window: Window, detector: str) -> tuple[Window, DriftResult]:
        """Judge one window by itself."""
        seen, known = window.histogram(detector), state.histogram(detector)
        n, m = seen.scored, known.scored
        index, threshold, p_value = 0.0, self.threshold or 1.0, 1.0
        if n and m:
            starts = _starts(self.bins)
            bins = len(starts)
            a = np.add.reduceat(seen.counts, starts) + FLOOR_COUNTS
            b = np.add.reduceat(known.counts, starts) + FLOOR_COUNTS
            a, b = a / a.sum(), b / b.sum()
            index = float(((a - b) * np.log(a / b)).sum())
            scale = (1.0 / n + 1.0 / m) * (1.0 + bins / n + bins / m)
            p_value = float(chdtrc(bins - 1, index / scale))
            threshold = self.threshold or float(chdtri(bins - 1, self.alpha)) * scale
        return state, DriftResult(
            model=window.model,
            version=window.version,
            test="",
            detector=detector,
            segment=window.segment,
            start=window.start,
            end=window.end,
            statistic=index,
            threshold=threshold,
            drifted=bool(n and m and index >= threshold),
            effect=index,
            samples=n,
            reference_samples=m,
            p_value=p_value,
        )

    def freeze(self, state: Window) -> Mapping[str, npt.NDArray[Any]]:
        """Nothing to keep: the reference comes back by itself."""
        del state
        return {}

    def thaw(self, reference: Window, arrays: Mapping[str, npt.NDArray[Any]]) -> Window:
        """The reference."""
        del arrays
        return reference

    def run_length(self, window_seconds: float) -> float:
        """Windows of one stream between false alarms."""
        del window_seconds
        return 0.0 if self.threshold else 1.0 / self.alpha

    def promise(self, window_seconds: float) -> str:
        """The rate in words; a fixed threshold has none."""
        if self.threshold:
            return f"none: the index is compared with the fixed threshold {self.threshold:g}"
        hours = window_seconds / self.alpha / 3600.0
        return (
            f"about {self.alpha:.2g} false alarms per window and stream on independent samples, "
            f"that is one per {hours:,.1f} hours of windows"
        )
