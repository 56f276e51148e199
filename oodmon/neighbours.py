"""How alike neighbouring samples are, measured on the traffic itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES

__all__ = ["Neighbours"]

F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]

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
_POWERS: Final = np.stack([np.ones_like(NORMAL_SCORES), NORMAL_SCORES, NORMAL_SCORES**2], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """Pairs of neighbouring samples, and the sum of the squared jumps between them.

    Of the normal scores; both as `records.Histogram` counts them, older ones with less weight.
    Numbers for one stream, or arrays of one shape for many; so is all that is given and returned.
    """

    pairs: F8 | float = 0.0
    jumps: F8 | float = 0.0

    def met(self, pairs: I8 | int, jumps: I8 | int) -> Neighbours:
        """With those of one more window."""
        weight = np.where(np.asarray(self.pairs) > _MEMORY, 0.5, 1.0)
        return Neighbours(
            weight * self.pairs + pairs, weight * self.jumps + np.asarray(jumps) / _MILLIONTHS
        )

    def autocorrelation(self, seen: I8, variance: float) -> F8:
        """Lag-one autocorrelation φ of the normal scores, [0, 1].

        By von Neumann's ratio of squared jumps: unlike products of neighbours, they do not rise
        when the mean does, so a shift does not pass for correlation.

        Args:
            seen: (…, 64) counts of the traffic, which tell the scores' variance.
            variance: of the reference's, in its place while little has been seen.
        """
        sums = seen @ _POWERS
        total = sums[..., 0]
        some = np.maximum(total, 1.0)
        mean = sums[..., 1] / some
        # Of values up to 5, so that the difference of the squares is exact enough.
        own = np.maximum(sums[..., 2] / some - mean**2, _LEAST_VARIANCE)
        spread = (_REFERENCE * variance + total * own) / (_REFERENCE + total)
        found = 1.0 - self.jumps / np.maximum(self.pairs, 1e-9) / (2.0 * spread)
        return np.where(np.asarray(self.pairs) > 0.0, np.minimum(np.maximum(found, 0.0), 1.0), 0.0)

    def believed(self, seen: I8, variance: float) -> F8:
        """φ as it is reckoned with: one standard error higher, or 0 where it is not significant."""
        pairs = np.asarray(self.pairs, np.float64)
        trusted = pairs + _PRIOR_PAIRS
        found = self.autocorrelation(seen, variance) * pairs + _PRIOR * _PRIOR_PAIRS
        found /= trusted
        error = 1.0 / np.sqrt(trusted)
        significant = (found > _SIGNIFICANT * error) & (pairs > 0.0)
        return np.minimum(found + error, _MOST) * significant
