"""The least delay possible at a given run length: that of the CUSUM which knows the change.

S <- max(S + ln f1(x) / f0(x), 0), alarm when S reaches h. It is optimal in Lorden's sense
(Moustakides, Ann. Statist. 1986). Its run length and its delay are the mean absorption times of a
Markov chain on a grid of S (Brook and Evans, Biometrika 1972).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Yardstick"]

F8 = npt.NDArray[np.float64]

_CELLS: Final = 96
_BARS: Final = np.concatenate([np.linspace(0.25, 5.0, 12), np.linspace(6.0, 15.0, 10)])
"""Thresholds h; the run length is about exp(h) or more."""
_LONGEST: Final = 1e13
"""Run lengths beyond which the linear equations are no longer solved to any digit."""


class Yardstick:
    """Mean delay of the optimal CUSUM, started at zero, as a function of its run length."""

    def __init__(self, before: F8, after: F8) -> None:
        """From samples (n,) and (m,) of ln f1/f0 under the law before and after the change."""
        before, after = np.sort(before), np.sort(after)
        lengths: list[float] = []
        delays: list[float] = []
        for bar in _BARS.tolist():
            length = _mean_time(before, bar)
            if lengths and not lengths[-1] < length < _LONGEST:
                break
            lengths.append(length)
            delays.append(_mean_time(after, bar))
        self._lengths, self._delays = np.log(lengths), np.array(delays)

    def delay(self, run_length: float) -> float:
        """Mean values to the alarm, at this many values between false alarms.

        Beyond the last run length that was solved for it goes on along the last stretch: the delay
        grows with the logarithm of the run length, by 1 / KL per unit (Lorden 1971).
        """
        wanted = float(np.log(max(run_length, 1.0)))
        if wanted <= self._lengths[-1] or len(self._lengths) < 2:
            return float(np.interp(wanted, self._lengths, self._delays))
        back = min(3, len(self._lengths) - 1)
        slope = (self._delays[-1] - self._delays[-1 - back]) / (
            self._lengths[-1] - self._lengths[-1 - back]
        )
        return float(self._delays[-1] + slope * (wanted - self._lengths[-1]))


def _mean_time(increments: F8, bar: float) -> float:
    """Expected steps of the CUSUM from 0 to `bar`; the increments are sorted."""
    width = bar / _CELLS

    def share_below(values: npt.NDArray[np.floating]) -> F8:
        # Halfway between both counts, so that a jump of the law on an edge is shared.
        low = np.searchsorted(increments, values, side="left")
        high = np.searchsorted(increments, values, side="right")
        return (low + high) / (2.0 * len(increments))

    # From the middle of cell i below the upper edge of cell j: depends on j - i alone, except that
    # cell 0 is the state 0 itself.
    lags = share_below(width * (np.arange(1 - _CELLS, _CELLS, dtype=np.float64) + 0.5))
    places = np.arange(_CELLS)
    below = lags[places[None, :] - places[:, None] + _CELLS - 1]
    below[0] = share_below(width * (places + 1.0))
    moves = np.diff(below, axis=1, prepend=0.0)
    try:
        return float(np.linalg.solve(np.eye(_CELLS) - moves, np.ones(_CELLS))[0])
    except np.linalg.LinAlgError:
        return float("inf")  # never left, to within the digits of the numbers
