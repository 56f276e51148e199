"""What a sequential test bets on: alternatives to "nothing changed", each made fair.

The formulas, and why fair bets keep the promise, stand in `drift.budget.Budget`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES

__all__ = ["F8", "Bets", "bets"]

F8 = npt.NDArray[np.float64]

_LEAST_VARIANCE: Final = 0.01

# The alternatives that are bet on. In normal scores z = Phi^-1(1 - p), so higher is more OOD.
_SHIFTS: Final = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_SPREADS: Final = (0.7, 0.85, 1.15, 1.3, 1.6, 2.0)
_SHIFTED_SPREADS: Final = ((0.5, 1.25), (1.0, 1.5), (0.5, 0.8), (-0.5, 0.8), (-0.5, 1.25))
_SHARES: Final = (0.02, 0.05, 0.1, 0.25)
_NOVEL: Final = (2.0, 3.0, 4.0)
_EXCESS: Final = tuple(
    (alpha, share) for alpha in (0.01, 0.05, 0.1, 0.2) for share in (0.05, 0.15, 0.4, 0.8)
)
# The opposite: mass that leaves the tail, as when a model grows too sure of itself.
_DEFICITS: Final = ((0.1, 0.5), (0.1, 0.9), (0.25, 0.5), (0.25, 0.9))
_CLIPS: Final = (2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 144.0, math.inf)
_FLOORS: Final = (0.01, 0.1, 0.2, 0.35, 0.5, 0.7)


def _normal_tail(z: F8) -> F8:
    """Phi(z), each value to full relative precision.

    By the standard library: scipy.special would be a fifth of an idle daemon's memory.
    """
    return np.array([math.erfc(-value / math.sqrt(2.0)) / 2.0 for value in z.tolist()])


_Alternative = tuple[F8, float, float]
"""Density over the bins, and which shift of all samples or which share of novel ones it is."""


def _alternatives() -> list[_Alternative]:
    """The mean of each alternative's density over each of the 64 bins, for uniform p."""
    inner = [-NormalDist().inv_cdf(edge) for edge in BIN_EDGES[1:-1].tolist()]
    z = np.array([math.inf, *inner, -math.inf])
    width = np.diff(BIN_EDGES)

    def normal(mean: float, spread: float) -> F8:
        upper_tail = _normal_tail((mean - z) / spread)
        density: F8 = np.diff(upper_tail) / width
        return density

    def excess(alpha: float, share: float) -> F8:
        inside: F8 = np.diff(np.minimum(BIN_EDGES, alpha)) / width / alpha
        return 1.0 - share + share * inside

    def deficit(alpha: float, share: float) -> F8:
        inside: F8 = np.diff(np.minimum(BIN_EDGES, alpha)) / width
        return (1.0 - share) * inside + (1.0 - alpha * (1.0 - share)) / (1.0 - alpha) * (1 - inside)

    rows = [(normal(mean, 1.0), max(mean, 0.0), 0.0) for mean in _SHIFTS]
    rows += [(normal(0.0, spread), 0.0, 0.0) for spread in _SPREADS]
    rows += [(normal(mean, spread), 0.0, 0.0) for mean, spread in _SHIFTED_SPREADS]
    rows += [
        (1.0 - share + share * normal(mean, 1.0), 0.0, share)
        for mean in _NOVEL
        for share in _SHARES
    ]
    rows += [(excess(alpha, share), 0.0, share) for alpha, share in _EXCESS]
    rows += [(deficit(alpha, share), 0.0, 0.0) for alpha, share in _DEFICITS]
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Bets:
    """What one reference gives.

    Attributes:
        log_bets: (J, 64) log of the fair bets that grow.
        q: (64,) the bins' probabilities.
        n: calibration scores.
        variance: of the normal scores under q.
        least_shift, least_share: the least shift of all samples, in σ of the normal score, and
            the least share of novel samples that a bet is left for; 0 where none is.
    """

    log_bets: F8
    q: F8
    n: int
    variance: float
    least_shift: float
    least_share: float


@lru_cache(maxsize=512)
def bets(counts: tuple[int, ...], tolerated_fraction: float, calibration_risk: float) -> Bets:
    """The bets that pay against this reference; shared by all streams that have it."""
    n = sum(counts)
    if n == 0:
        raise ContractError("budget: the reference holds no calibration scores")
    q = np.array(counts, np.float64)
    # A fresh sample outranks all n with probability 1 / (n + 1).
    q[int(np.searchsorted(BIN_EDGES, 1.0 / (n + 1), side="left")) - 1] += 1.0
    q /= n + 1
    error = math.sqrt(math.log(2.0 / calibration_risk) / (2.0 * n)) + 1.0 / (n + 1)
    kept, shifts, shares = [], [], []
    for alternative, shift, share in _alternatives():
        row = _clipped(alternative, q, tolerated_fraction, error)
        if row is not None:
            kept.append(row)
            shifts += [shift] if shift else []
            shares += [share] if share else []
    centre = q @ NORMAL_SCORES
    variance = float(q @ (NORMAL_SCORES - centre) ** 2)
    # A reference whose scores are all alike says nothing of spread; any jump is then large.
    return Bets(
        np.array(kept).reshape(-1, len(q)),
        q,
        n,
        max(variance, _LEAST_VARIANCE),
        min(shifts, default=0.0),
        min(shares, default=0.0),
    )


def _clipped(bet: F8, q: F8, tolerated_fraction: float, error: float) -> F8 | None:
    """Log of the fair clipping of a bet that grows fastest where its own alternative is true.

    None if no clipping grows: at this δ and n the alternative cannot be told from the null.
    """
    alternative = q * bet
    alternative /= alternative.sum()
    best, best_growth = None, 0.0
    for clip in _CLIPS:
        for floor in _FLOORS:
            table = np.clip(bet, floor, clip)
            most = (
                table @ q
                + tolerated_fraction * (table.max() - table.min())
                + error * np.abs(np.diff(table)).sum()
            )
            fair = np.log(table / most)
            growth = float(alternative @ fair)
            if growth > best_growth:
                best, best_growth = fair, growth
    return best
