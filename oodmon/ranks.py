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
U8 = npt.NDArray[np.uint64]

_BINS: Final = len(BIN_EDGES) - 1
_PIECE: Final = 16
"""Samples of a window that are each compared with each in one step."""
_EARLIER: Final = np.tri(_PIECE, k=-1, dtype=np.bool_)
_ALONE: Final = 64
"""Samples up to which a window that comes alone is compared as a whole."""
_AT_A_TIME: Final = 1 << 17
"""Samples that are ranked in one step."""
MOST: Final = 16_384
"""Samples of a window that are ranked; of a greater window, so many drawn at random."""
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_STEPS: Final = np.arange(1, 2 * MOST + 1, dtype=np.uint64) * _GOLDEN
_NUMBERS: Final = np.arange(_BINS)
_OFFSETS: Final = np.arange(MOST) // _PIECE * _BINS
_ONES: Final = np.array([number.bit_count() for number in range(1 << _PIECE)], np.uint8)


def ranked(counts: I8, pool: I8, seeds: U8) -> I8:
    """The counts of windows of S streams over `BIN_EDGES` of the sequential rank p.

    While nothing changes the ranks of all samples are independent and uniform on (0, 1). The
    order of samples in a window is not known and does not matter while nothing changes: one is
    drawn, and so is where within its bin a sample lies.

    Args:
        counts: int64 (S, 64) the windows', over `BIN_EDGES` of the tail probability.
        pool: int64 (S, 64) places of each bin before these windows, at least one in each row.
        seeds: uint64 (S,) of the draws, below 2^63; the same seed gives the same ranks.

    Returns:
        int64 (S, 64); each row is what it would be by itself.
    """
    totals = counts.sum(1)
    most = int(totals.max(initial=0))
    if most > MOST:
        counts = counts.copy()
        for row in np.flatnonzero(totals > MOST).tolist():
            draw = np.random.default_rng(int(seeds[row]))
            counts[row] = draw.multivariate_hypergeometric(counts[row], MOST, method="marginals")
        totals = np.minimum(totals, MOST)
        most = MOST
    if len(counts) == 1 and most <= _ALONE:
        return _alone(counts[0], pool[0], seeds[0], most)[None]
    if len(counts) == 1:
        return _single(counts[0], pool[0], seeds[0], most)[None]
    rows = max(_AT_A_TIME // max(most, 1), 1)
    if len(counts) <= rows:
        return _ranked(counts, pool, seeds, totals)
    blocks = [slice(at, at + rows) for at in range(0, len(counts), rows)]
    return np.concatenate([_ranked(counts[b], pool[b], seeds[b], totals[b]) for b in blocks])


def _alone(counts: I8, pool: I8, seed: np.uint64, total: int) -> I8:
    """One small window, of which `_ranked`'s many calls would cost more than the samples."""
    draws = _finished(seed + _STEPS[: 2 * total])
    bins = _NUMBERS.repeat(counts)[draws[:total].argsort(kind="stable")]
    earlier = np.tri(total, k=-1, dtype=np.bool_)
    lower = ((bins < bins[:, None]) & earlier).sum(1)
    same = ((bins == bins[:, None]) & earlier).sum(1)
    places = pool.cumsum()
    p = (places - pool)[bins] + lower
    p = p + draws[total:] * (pool[bins] + same)
    p /= places[-1] + np.arange(total)
    cells = BIN_EDGES.searchsorted(p, side="left") - 1
    return np.bincount(np.minimum(np.maximum(cells, 0), _BINS - 1), minlength=_BINS)


def _single(counts: I8, pool: I8, seed: np.uint64, total: int) -> I8:
    """One window of some hundred samples or more: `_ranked` without what many streams need."""
    draws = _finished(seed + _STEPS[: 2 * total])
    bins = _NUMBERS.repeat(counts)[draws[:total].argsort(kind="stable")]
    pieces = -(-total // _PIECE)
    at = bins + _OFFSETS[:total]
    own = np.bincount(at, minlength=pieces * _BINS).reshape(pieces, _BINS)
    before = own.cumsum(0)
    before -= own
    before += pool
    below = before.cumsum(1)
    below -= before
    flat = np.full(pieces * _PIECE, _BINS, np.int8)
    flat[:total] = bins
    table = flat.reshape(pieces, _PIECE)
    others, mine = table[:, None, :], table[:, :, None]
    lower = _counted((others < mine) & _EARLIER)[:total]
    same = _counted((others == mine) & _EARLIER)[:total]
    p = draws[total:] * (before.ravel()[at] + same)
    p += below.ravel()[at] + lower
    p /= int(pool.sum()) + np.arange(total)
    cells = BIN_EDGES.searchsorted(p, side="left") - 1
    return np.bincount(np.minimum(np.maximum(cells, 0), _BINS - 1), minlength=_BINS)


def _counted(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """How many of each 16 are set, flat: by a table, as a sum over so few is slow."""
    return _ONES[np.packbits(flags, axis=-1).view(np.uint16)].ravel()


def _ranked(counts: I8, pool: I8, seeds: U8, totals: I8) -> I8:
    """In pieces of some samples, as what the pool is before a piece is known beforehand."""
    streams, total = len(counts), int(totals.sum())
    owner = np.repeat(np.arange(streams), totals)
    number = np.arange(total) - (totals.cumsum() - totals)[owner]
    seed = seeds[owner]
    draws, within = _mixed(seed, number + 1), _mixed(seed, totals[owner] + number + 1)
    bins = np.repeat(np.arange(streams * _BINS), counts.ravel()) % _BINS
    bins = bins[np.lexsort((draws, owner))]
    pieces = -(-totals // _PIECE)
    first = pieces.cumsum() - pieces
    piece, place = first[owner] + number // _PIECE, number % _PIECE
    count = int(pieces.sum())
    of = np.repeat(np.arange(streams), pieces)
    own = np.bincount(piece * _BINS + bins, minlength=count * _BINS).reshape(count, _BINS)
    before = np.zeros((count + 1, _BINS), np.int64)
    own.cumsum(0, out=before[1:])
    before = before[:-1] - before[first[of]] + pool[of]
    # A piece's empty places come last: no sample is after them.
    table = np.full((count, _PIECE), _BINS, np.int8)
    table[piece, place] = bins
    others, mine = table[:, None, :], table[:, :, None]
    lower = _counted((others < mine) & _EARLIER)
    same = _counted((others == mine) & _EARLIER)
    at, row = piece * _BINS + bins, piece * _PIECE + place
    places = before.cumsum(1)
    p = within * (before.ravel()[at] + same[row])
    p += (places - before).ravel()[at] + lower[row]
    p /= places[piece, -1] + place
    cells = np.searchsorted(BIN_EDGES, p, side="left") - 1
    cells = np.minimum(np.maximum(cells, 0), _BINS - 1) + owner * _BINS
    return np.bincount(cells, minlength=streams * _BINS).reshape(streams, _BINS)


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """float64 (count,) in [0, 1), by splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    return _mixed(np.uint64(seed), np.arange(1, count + 1))


def _mixed(seed: U8 | np.uint64, number: I8) -> npt.NDArray[np.float64]:
    """The `number`-th draw of a seed, from 1."""
    return _finished(seed + number.astype(np.uint64) * _GOLDEN)


def _finished(z: U8) -> npt.NDArray[np.float64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
