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
from oodmon.drift.neighbours import Alike
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES

__all__ = ["F8", "LEAST_VARIANCE", "Bets", "bets"]

F8 = npt.NDArray[np.float64]

LEAST_VARIANCE: Final = 0.01
"""Of normal scores: a reference whose scores are all alike says nothing of spread."""

_FROZEN: Final = 0.15
"""Share of the wealth that is bet on frozen ranks where sequential ones are bet on as well."""
_ENOUGH: Final = 14.0
"""Nats that raise an alarm at a promise of some 10^4 windows; `least_shift` assumes such a one."""
_DEGREES: Final = 30
"""Hermite polynomials that `worths` is worked out from; what is beyond counts as independent."""
_STEP: Final = 0.01
_CORRELATIONS: Final = _STEP * np.arange(99)

# The alternatives that are bet on. In normal scores z = Phi^-1(1 - p), so higher is more OOD.
# Shifts double: of what lies between two, the lesser bet wins nine tenths, and a shift of 0.1 (a
# fifth of the traffic is a little novel) needs a bet of its own, or none grows.
_SHIFTS: Final = (-2.0, -1.0, -0.5, -0.25, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
_SPREADS: Final = (0.7, 0.85, 1.15, 1.25, 1.4, 1.7)
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

# What each kind of alternative is given of the wealth. Any weights keep the promise; these cost a
# shift or a spread of all samples, or a few percent of novel ones, 1 to 1.5 nats less than equal
# ones would; a spread has the most, as its growth is the least. Changes towards the reference's
# middle are rarer, and wait longer.
_SHIFTS_UP: Final = 0.28
_SHIFTS_DOWN: Final = 0.05
_WIDER: Final = 0.33
_NARROWER: Final = 0.03
_BOTH: Final = 0.02
_SOME_NOVEL: Final = 0.25
_MORE_IN_TAIL: Final = 0.03
_LESS_IN_TAIL: Final = 0.01


_INNER: Final = tuple(-NormalDist().inv_cdf(edge) for edge in BIN_EDGES[1:-1].tolist())
"""Normal scores of the inner edges, descending."""


def _normal_tail(z: F8) -> F8:
    """Phi(z), each value to full relative precision.

    By the standard library: scipy.special would be a fifth of an idle daemon's memory.
    """
    return np.array([math.erfc(-value / math.sqrt(2.0)) / 2.0 for value in z.tolist()])


@dataclass(frozen=True, slots=True, eq=False)
class _Alternative:
    """One thing that may have happened.

    Its density over the bins, which shift of all samples or which share of novel ones it is, and
    its share of the wealth.
    """

    density: F8
    shift: float
    share: float
    weight: float


def _alternatives() -> list[_Alternative]:
    """The mean of each alternative's density over each of the 64 bins, for uniform p."""
    z = np.array([math.inf, *_INNER, -math.inf])
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

    up = [(normal(mean, 1.0), mean, 0.0) for mean in _SHIFTS if mean > 0]
    down = [(normal(mean, 1.0), 0.0, 0.0) for mean in _SHIFTS if mean < 0]
    wider = [(normal(0.0, spread), 0.0, 0.0) for spread in _SPREADS if spread > 1]
    narrower = [(normal(0.0, spread), 0.0, 0.0) for spread in _SPREADS if spread < 1]
    both = [(normal(mean, spread), 0.0, 0.0) for mean, spread in _SHIFTED_SPREADS]
    novel = [
        (1.0 - share + share * normal(mean, 1.0), 0.0, share)
        for mean in _NOVEL
        for share in _SHARES
    ]
    more = [(excess(alpha, share), 0.0, share) for alpha, share in _EXCESS]
    less = [(deficit(alpha, share), 0.0, 0.0) for alpha, share in _DEFICITS]
    return [
        _Alternative(density, shift, share, of_all / len(kind))
        for kind, of_all in (
            (up, _SHIFTS_UP),
            (down, _SHIFTS_DOWN),
            (wider, _WIDER),
            (narrower, _NARROWER),
            (both, _BOTH),
            (novel, _SOME_NOVEL),
            (more, _MORE_IN_TAIL),
            (less, _LESS_IN_TAIL),
        )
        for density, shift, share in kind
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Bets:
    """What one reference gives.

    Attributes:
        log_bets: (J, 64) log of the fair bets that grow.
        log_weights: (J,) log of their shares of the wealth, which sum to one.
        sequential: how many of them, the first, are on sequential ranks; the rest on frozen ones.
        worths: (99, J) how many samples count as one where the lag-one autocorrelation of normal
            scores is 0, 0.01, … 0.98.
        places: int64 (64,) where a fresh sample may come to lie among the calibration scores.
        q: (64,) the bins' probabilities.
        n: calibration scores.
        variance: of the normal scores under q.
        of_squares: variance of their squares under q.
        least_shift, least_share: the least shift of all samples, in σ of the normal score, and
            the least share of novel samples that can be found; 0 where none can.
    """

    log_bets: F8
    log_weights: F8
    sequential: int
    worths: F8
    places: npt.NDArray[np.int64]
    q: F8
    n: int
    variance: float
    of_squares: float
    least_shift: float
    least_share: float

    def worth(self, alike: Alike) -> F8:
        """(…, J) how many samples count as one, for neighbours as much alike (…).

        Where they are alike in everything that a sample is, each bet's logs are correlated by φ^l
        at lag l, and their sum's variance grows by (1 + φ) / (1 - φ) whatever the bet. Of a
        mixture, (1 + φ_h) / (1 - φ_h) being convex, the share of each is at least enough.
        """
        rows = np.rint(alike.correlation / _STEP).astype(np.intp)
        gaussian: F8 = self.worths.take(np.minimum(rows, len(self.worths) - 1), 0)
        sticky = np.asarray(alike.sticky)[..., None]
        if not sticky.any():
            return gaussian
        lasting = np.asarray(alike.lasting)[..., None]
        mixed: F8 = (1.0 - sticky) * gaussian + sticky * (1.0 + lasting) / (1.0 - lasting)
        return mixed


@dataclass(frozen=True, slots=True, eq=False)
class _Fair:
    alternative: _Alternative
    row: F8
    growth: float


@lru_cache(maxsize=64)
def _fair(q: bytes, tolerated_fraction: float, error: float) -> tuple[_Fair, ...]:
    law = np.frombuffer(q, np.float64)
    found = []
    for alternative in _alternatives():
        row, growth = _clipped(alternative.density, law, tolerated_fraction, error)
        if growth > 0.0:
            found.append(_Fair(alternative, row, growth))
    return tuple(found)


@lru_cache(maxsize=512)
def bets(
    counts: tuple[int, ...], tolerated_fraction: float, calibration_risk: float, ranks: str
) -> Bets:
    """The bets that pay against this reference; shared by all streams that have it.

    Args:
        counts: the reference's, in the bins of its own tail probabilities.
        tolerated_fraction, calibration_risk, ranks: options of `Budget`.
    """
    n = sum(counts)
    if n == 0:
        raise ContractError("budget: the reference holds no calibration scores")
    places = np.array(counts, np.int64)
    # A fresh sample outranks all n with probability 1 / (n + 1).
    places[int(np.searchsorted(BIN_EDGES, 1.0 / (n + 1), side="left")) - 1] += 1
    q = places / (n + 1)
    error = math.sqrt(math.log(2.0 / calibration_risk) / (2.0 * n)) + 1.0 / (n + 1)
    uniform = np.diff(BIN_EDGES)
    sequential: tuple[_Fair, ...] = ()
    frozen: tuple[_Fair, ...] = ()
    if ranks != "frozen":
        # The pool may have learnt one tolerated change when its opposite comes.
        sequential = _fair(uniform.tobytes(), 2.0 * tolerated_fraction, 0.0)
    if ranks != "sequential":
        frozen = _fair(q.tobytes(), tolerated_fraction, error)
    found = [*sequential, *frozen]
    log_bets = np.array([fair.row for fair in found]).reshape(-1, len(q))
    weights = _shares(sequential, 1.0 - _FROZEN) + _shares(frozen, _FROZEN)
    shifts, shares = [], []
    for index, fair in enumerate(found):
        # Ranks among reference and stream fade as the stream fills the pool: n samples' worth of
        # growth is what there is.
        if index >= len(sequential) or n * fair.growth >= _ENOUGH:
            shifts += [fair.alternative.shift] if fair.alternative.shift else []
            shares += [fair.alternative.share] if fair.alternative.share else []
    centre = q @ NORMAL_SCORES
    variance = float(q @ (NORMAL_SCORES - centre) ** 2)
    return Bets(
        log_bets,
        np.log(np.array(weights) / sum(weights)) if weights else np.empty(0),
        len(sequential),
        _worths(log_bets),
        places,
        q,
        n,
        max(variance, LEAST_VARIANCE),
        max(float(q @ NORMAL_SCORES**4 - (q @ NORMAL_SCORES**2) ** 2), LEAST_VARIANCE),
        min(shifts, default=0.0),
        min(shares, default=0.0),
    )


def _shares(found: tuple[_Fair, ...], of_all: float) -> list[float]:
    total = sum(fair.alternative.weight for fair in found)
    return [of_all * fair.alternative.weight / total for fair in found]


def _worths(log_bets: F8) -> F8:
    """(99, J): the variance of a sum of the log bet over AR(1) samples, against independent ones.

    With g = Σ_h a_h He_h / sqrt(h!) over normal scores of autocorrelation φ^l at lag l, that of g
    is Σ_h a_h² φ^hl / Σ_h a_h² (Mehler's formula), and summed over all lags the variance grows by
    Σ_h a_h² (1 + φ^h) / (1 - φ^h) / Σ_h a_h². For a shift, where g is linear, that is
    (1 + φ) / (1 - φ); for a spread (1 + φ²) / (1 - φ²); for what happens in the tail still less.
    """
    width = np.diff(BIN_EDGES)
    z = np.array([0.0, *_INNER, 0.0])
    density = np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)
    density[[0, -1]] = 0.0
    hermite = [np.ones_like(z), z]
    for degree in range(2, _DEGREES):
        hermite.append(z * hermite[-1] - (degree - 1) * hermite[-2])
    # The integral of He_h phi over (a, b) is He_h-1(a) phi(a) - He_h-1(b) phi(b).
    basis = np.array(
        [
            np.diff(polynomial * density) / math.sqrt(math.factorial(degree))
            for degree, polynomial in enumerate(hermite, 1)
        ]
    )
    centred = log_bets - (log_bets @ width)[:, None]
    variance = np.maximum(centred**2 @ width, np.finfo(np.float64).tiny)
    squares = (centred @ basis.T) ** 2
    beyond = np.maximum(variance - squares.sum(1), 0.0)
    powers = _CORRELATIONS[:, None] ** np.arange(1, len(basis) + 1)
    grown: F8 = ((1.0 + powers) / (1.0 - powers)) @ squares.T
    worths: F8 = np.maximum((grown + beyond) / variance, 1.0)
    return worths


def _clipped(bet: F8, q: F8, tolerated_fraction: float, error: float) -> tuple[F8, float]:
    """Log of the fair clipping of a bet that grows fastest where its own alternative is true.

    And its growth per sample there, in nats; 0 if no clipping grows: at this δ and n the
    alternative cannot be told from the null.
    """
    alternative = q * bet
    alternative /= alternative.sum()
    best, best_growth = np.zeros_like(bet), 0.0
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
    return best, best_growth
