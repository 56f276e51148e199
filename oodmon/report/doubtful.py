"""How many of the samples below a tail probability may be in-distribution, at every one at once.

Whoever looks for a threshold by eye has looked at all of them. A bound for one threshold that was
fixed before does not hold for the one that was chosen; these hold for all together.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.records import BIN_EDGES

__all__ = ["RISK", "at_most"]

RISK: Final = 0.05
"""That a bound is too low at any threshold."""
_DRAWS: Final = 2_000
_HALVINGS: Final = 50

F8 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def at_most(
    counts: Counts, reference: int, block: float = 1.0, risk: float = RISK, seed: int = 0
) -> Counts:
    """(64,) of the samples with p <= `BIN_EDGES[k + 1]`, how many are in-distribution at most.

    With probability 1 - `risk` all 64 hold together, whatever the other samples are: of any
    threshold among the edges, chosen after seeing everything, it may be said that no more of the
    samples below it are false.

    The places that m in-distribution samples take among n reference scores are draws from Pólya's
    urn (Gazin, Blanchard and Roquain, *Transductive conformal inference with adaptive scores*,
    AISTATS 2024), so how far their counts rise above what is expected, at the worst edge, can be
    drawn: with the signed root of the Kullback-Leibler divergence as the distance, so that no edge
    is worst by its place alone, the bound is that of rank (1 - risk)(draws + 1) among the drawn
    ones, and by exchangeability holds exactly. Fewer than m of the samples may be in-distribution,
    which only lowers their counts. Between two edges no more false ones can come than samples come,
    and further down there are not more than further up.

    Args:
        counts: int64 (64,) of samples over `BIN_EDGES`.
        reference: n, scores that they were ranked among.
        block: neighbouring samples that count as one, where traffic is correlated (approximate).
        risk: in (0, 1).
        seed: of the draws.
    """
    found = np.cumsum(counts)
    total = int(found[-1])
    if not total or reference < 1:
        return np.zeros(len(found), np.int64)
    null = _null(total, reference, max(round(total / max(block, 1.0)), 1), risk, seed)
    # Each edge below lends its bound, and so does the empty threshold, where nothing is false.
    lent = found + np.minimum.accumulate(np.minimum(null - found, 0))
    least: Counts = np.minimum.accumulate(np.minimum(null, lent)[::-1])[::-1]
    return np.maximum(least, 0)


@lru_cache(maxsize=64)
def _null(total: int, reference: int, worth: int, risk: float, seed: int) -> Counts:
    """(64,) what the counts of so many in-distribution samples, worth fewer, stay below."""
    # Rounded first: an edge that is a whole place in theory must not miss it by a bit.
    places = np.floor(np.round(BIN_EDGES[1:] * (reference + 1), 9)).astype(np.int64)
    expected = places / (reference + 1)
    # Variance of a share: of `worth` samples, and of the reference's own.
    size = worth * (reference + 2) / (reference + 1 + worth)
    rng = np.random.default_rng(seed)
    weights = rng.standard_gamma(np.diff(places, prepend=0), (_DRAWS, len(places)))
    weights /= weights.sum(axis=1, keepdims=True)
    shares = np.cumsum(rng.multinomial(worth, weights), axis=1) / worth
    worst = np.max(size * _divergence(np.maximum(shares, expected), expected), axis=1)
    rank = min(math.ceil((1.0 - risk) * (_DRAWS + 1)), _DRAWS)
    highest = _highest(expected, float(np.sort(worst)[rank - 1] / size))
    null: Counts = np.floor(np.round(highest * total, 9)).astype(np.int64)
    null.setflags(write=False)
    return null


def _highest(expected: F8, allowed: float) -> F8:
    """The greatest share whose divergence from what is expected is at most so much."""
    low, high = expected.copy(), np.ones_like(expected)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        inside = _divergence(middle, expected) <= allowed
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    # Where no place is below an edge there is no sample either; at p <= 1 there are all.
    return np.where(expected <= 0.0, 0.0, np.where(expected >= 1.0, 1.0, high))


def _divergence(share: F8, expected: F8) -> F8:
    """Kullback-Leibler, of two coins, nats; 0 where the coin falls on one side alone."""
    inside = (expected > 0.0) & (expected < 1.0)
    q = np.where(inside, expected, 0.5)
    p = np.clip(np.where(inside, share, 0.5), 1e-300, 1.0)
    rest = np.maximum(1.0 - p, 1e-300)
    found: F8 = p * np.log(p / q) + np.where(p < 1.0, rest * np.log(rest / (1.0 - q)), 0.0)
    return np.maximum(found, 0.0)
