"""The two-sample Kolmogorov–Smirnov test of a window against the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from oodmon.contracts import DriftTest, Paper
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window
from oodmon.registry import drift

__all__ = ["KolmogorovSmirnov"]


@drift.register("ks")
@dataclass(frozen=True)
class KolmogorovSmirnov(DriftTest[Window]):
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
    """

    alpha: float = 0.001

    paper: ClassVar[Paper | None] = Paper(
        "Table for estimating the goodness of fit of empirical distributions",
        "N. Smirnov",
        "Annals of Mathematical Statistics",
        1948,
        "https://doi.org/10.1214/aoms/1177730256",
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ContractError(f"drift.ks.alpha: {self.alpha} is not in (0, 1)")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01},)

    def start(self, reference: Window) -> Window:
        """Nothing is remembered but the reference."""
        return reference

    def step(self, state: Window, window: Window, detector: str) -> tuple[Window, DriftResult]:
        """Judge one window by itself."""
        seen, known = window.histogram(detector), state.histogram(detector)
        n, m = seen.scored, known.scored
        distance, threshold, p_value = 0.0, 1.0, 1.0
        if n and m:
            gap = np.cumsum(seen.counts) / n - np.cumsum(known.counts) / m
            distance = float(np.abs(gap).max())
            size = n * m / (n + m)
            threshold = math.sqrt(math.log(2.0 / self.alpha) / (2.0 * size))
            p_value = min(1.0, 2.0 * math.exp(-2.0 * size * distance**2))
        return state, DriftResult(
            model=window.model,
            version=window.version,
            test="",
            detector=detector,
            segment=window.segment,
            start=window.start,
            end=window.end,
            statistic=distance,
            threshold=threshold,
            drifted=bool(n and m and distance >= threshold),
            effect=distance,
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
        return 1.0 / self.alpha

    def promise(self, window_seconds: float) -> str:
        """The rate in words."""
        hours = window_seconds / self.alpha / 3600.0
        return (
            f"at most {self.alpha:.2g} false alarms per window and stream on independent samples, "
            f"that is one per {hours:,.1f} hours of windows"
        )
