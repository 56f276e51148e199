"""How alike neighbouring samples are, measured on the traffic itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES

__all__ = ["Neighbours"]

_PRIOR_PAIRS: Final = 16.0
_PRIOR: Final = 0.3
"""Correlation is assumed until this many pairs have been seen: the first windows must not alarm
because it is not known yet."""
_SIGNIFICANT: Final = 2.0
"""Standard errors from which a correlation is believed. One that is smaller is paid for by the
margin of the promise (docs/adr/0004)."""
_MEMORY: Final = 2.0**20
"""Pairs beyond which the older half counts half: correlation may change over the months."""
_REFERENCE: Final = 64.0
"""Samples that the reference's variance counts for beside that of the traffic."""
_MOST: Final = 0.98
_LEAST_VARIANCE: Final = 0.01
_MILLIONTHS: Final = 1e6


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Pairs of neighbouring samples of one stream, and the sum of the squared jumps between them.

    Of the normal scores; both as `records.Histogram` counts them, older ones with less weight.
    """

    pairs: float = 0.0
    jumps: float = 0.0

    def met(self, pairs: int, jumps: int) -> Neighbours:
        """With those of one more window."""
        weight = 0.5 if self.pairs > _MEMORY else 1.0
        return Neighbours(weight * self.pairs + pairs, weight * self.jumps + jumps / _MILLIONTHS)

    def autocorrelation(self, seen: npt.NDArray[np.int64], variance: float) -> float:
        """Lag-one autocorrelation φ of the normal scores, [0, 1].

        By von Neumann's ratio of squared jumps: unlike products of neighbours, they do not rise
        when the mean does, so a shift does not pass for correlation.

        Args:
            seen: counts of the traffic, which tell the scores' variance.
            variance: of the reference's, in its place while little has been seen.
        """
        if not self.pairs:
            return 0.0
        total = int(seen.sum())
        if total:
            mean = float(seen @ NORMAL_SCORES) / total
            own = max(float(seen @ (NORMAL_SCORES - mean) ** 2) / total, _LEAST_VARIANCE)
            variance = (_REFERENCE * variance + total * own) / (_REFERENCE + total)
        return min(max(1.0 - self.jumps / self.pairs / (2.0 * variance), 0.0), 1.0)

    def believed(self, seen: npt.NDArray[np.int64], variance: float) -> float:
        """φ as it is reckoned with: one standard error higher, or 0 where it is not significant."""
        if not self.pairs:
            return 0.0
        trusted = self.pairs + _PRIOR_PAIRS
        found = self.autocorrelation(seen, variance) * self.pairs + _PRIOR * _PRIOR_PAIRS
        error = 1.0 / math.sqrt(trusted)
        found /= trusted
        return min(found + error, _MOST) if found > _SIGNIFICANT * error else 0.0
