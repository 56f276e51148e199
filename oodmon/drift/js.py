"""The Jensen–Shannon distance of a window to the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.special import chdtrc, chdtri

from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict
from oodmon.drift.psi import coarse_shares
from oodmon.errors import ContractError
from oodmon.records import Window
from oodmon.registry import drift

__all__ = ["JensenShannon"]


@drift.register("js")
@dataclass(frozen=True)
class JensenShannon(Judged):
    """Root of the Jensen–Shannon divergence between coarse histograms of window and reference.

    Reads      the counts of tail probabilities, merged into `bins` bins of about equal share, of n
               window and m reference samples
    Statistic  sqrt(JSD) in base 2, JSD the mean divergence of both shares from their middle, half a
               count added to every bin; in [0, 1]; also the effect
    Threshold  8 ln 2 JSD is about (1/n + 1/m) chi-squared(bins - 1) under no change; its upper
               `alpha` point, with the factor 1 + bins/n + bins/m that keeps the rate for windows of
               a few dozen samples
    Reference  Lin, IEEE Trans. Inf. Theory 1991; the law: Menéndez et al., J. Franklin Inst. 1997

    A threshold on the distance itself, 0.1 as is common, says nothing about false alarms, because
    the distance shrinks with n. The rate holds for independent samples and over calibration sets
    and windows together.

    Args:
        alpha: false alarms per window and stream, about, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
        bins: coarse bins, 2 to 36.
    """

    bins: int = 10

    paper: ClassVar[Paper | None] = Paper(
        "Divergence measures based on the Shannon entropy",
        "J. Lin",
        "IEEE Transactions on Information Theory",
        1991,
        "https://doi.org/10.1109/18.61115",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bins <= 36:
            raise ContractError(f"drift.js.bins: {self.bins} is not in 2 to 36")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01}, {"alpha": 0.01, "bins": 20})

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The distance, and what is expected of it under no change."""
        n, m = window.histogram(detector).scored, reference.histogram(detector).scored
        a, b = coarse_shares(window, reference, detector, self.bins)
        bins = len(a)
        middle = (a + b) / 2.0
        bits = float((a * np.log2(a / middle) + b * np.log2(b / middle)).sum()) / 2.0
        scale = (1.0 / n + 1.0 / m) * (1.0 + bins / n + bins / m) / (8.0 * math.log(2.0))
        threshold = math.sqrt(min(float(chdtri(bins - 1, self.alpha)) * scale, 1.0))
        return Verdict(
            math.sqrt(max(bits, 0.0)), threshold, float(chdtrc(bins - 1, max(bits, 0.0) / scale))
        )
