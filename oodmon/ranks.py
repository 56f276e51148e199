"""Sequential ranks: scores ranked among the reference and the stream so far, in counts.

Where a fresh sample comes to lie among n + t - 1 others is uniform over the n + t places between
them (Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*). The bins' edges are
calibration scores, so a bin holds whole places: as many as calibration scores lie in it (and one
above them all), plus the samples that fell into it since. Drawing from these places is Pólya's urn,
and it is exact whatever n is, given all counts so far.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.records import BIN_EDGES

__all__ = ["MOST", "ranked", "uniforms"]

I8 = npt.NDArray[np.int64]

_BINS: Final = len(BIN_EDGES) - 1
_AT_ONCE: Final = 128
"""Samples that are ranked against each other in one step."""
MOST: Final = 16_384
"""Samples of a window that are ranked; of a greater window, so many drawn at random."""


def ranked(counts: I8, pool: I8, seed: int) -> I8:
    """The counts of a window over `BIN_EDGES` of the sequential rank p.

    While nothing changes the ranks of all samples are independent and uniform on (0, 1). The
    order of samples in a window is not known and does not matter while nothing changes: one is
    drawn, and so is where within its bin a sample lies.

    Args:
        counts: int64 (64,) the window's, over `BIN_EDGES` of the tail probability.
        pool: int64 (64,) places of each bin before this window, at least one in all.
        seed: of the draws, below 2^63; the same seed gives the same ranks.
    """
    total = int(counts.sum())
    if total > MOST:
        draw = np.random.default_rng(seed)
        counts = draw.multivariate_hypergeometric(counts, MOST, method="marginals")
        total = MOST
    bins = np.repeat(np.arange(_BINS), counts)
    draws = uniforms(seed, 2 * total)
    bins = bins[np.argsort(draws[:total], kind="stable")]
    within = draws[total:]
    found = np.zeros(_BINS, np.int64)
    own, before, places = pool, np.cumsum(pool) - pool, int(pool.sum())
    for at in range(0, total, _AT_ONCE):
        chunk = bins[at : at + _AT_ONCE]
        rows = np.arange(len(chunk))
        # seen[r, b]: samples of the chunk before the r-th that lie in bin b.
        seen = np.zeros((len(chunk) + 1, _BINS), np.int32)
        seen[rows + 1, chunk] = 1
        np.cumsum(seen, axis=0, out=seen)
        lower = np.cumsum(seen, axis=1)
        same = seen[rows, chunk]
        p = before[chunk] + (lower[rows, chunk] - same)
        p = p + within[at : at + _AT_ONCE] * (own[chunk] + same)
        p /= places + rows
        cells = np.searchsorted(BIN_EDGES, p, side="left") - 1
        found += np.bincount(np.clip(cells, 0, _BINS - 1), minlength=_BINS)
        own = own + seen[-1]
        before, places = np.cumsum(own) - own, places + len(chunk)
    return found


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """float64 (count,) in [0, 1), by splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
