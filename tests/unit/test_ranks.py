"""Sequential ranks in counts: uniform whatever the reference, and each window's by itself."""

from __future__ import annotations

import numpy as np
import pytest

from oodmon.ranks import MOST, ranked
from oodmon.records import BIN_EDGES

BINS = len(BIN_EDGES) - 1


def _window(
    rng: np.random.Generator, total: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return rng.multinomial(total, np.diff(BIN_EDGES)).astype(np.int64)


@pytest.mark.parametrize("total", [1, 16, 17, 64, 65, 256, 1000, MOST, MOST + 500])
def test_a_window_alone_is_ranked_as_it_is_among_others(total: int) -> None:
    rng = np.random.default_rng(total)
    counts = np.stack([_window(rng, total), _window(rng, 40), _window(rng, total)])
    pool = rng.integers(1, 30, (3, BINS))
    seeds = rng.integers(0, 2**63, 3).astype(np.uint64)
    together = ranked(counts, pool, seeds)
    for row in range(3):
        alone = ranked(counts[row : row + 1], pool[row : row + 1], seeds[row : row + 1])
        assert np.array_equal(alone[0], together[row])
    assert together.sum(1).tolist() == [min(total, MOST), 40, min(total, MOST)]


@pytest.mark.parametrize("total", [8, 300])
def test_ranks_are_uniform_however_small_the_pool_is(total: int) -> None:
    """Counts of each of ten bands over many streams with references of 30: a chi-squared test."""
    rng = np.random.default_rng(0)
    found = np.zeros(BINS, np.int64)
    windows = 24_000 // total
    for _ in range(windows):
        reference = rng.random(30)
        edges = np.sort(reference)
        place = np.searchsorted(edges, rng.random(total), side="left")
        # A bin of the urn for every third place, so that several places share one.
        pool = np.bincount(np.arange(31) // 3, minlength=BINS)
        counts = np.bincount(place // 3, minlength=BINS)
        found += ranked(counts[None], pool[None], rng.integers(0, 2**63, 1).astype(np.uint64))[0]
    bands = np.add.reduceat(found, [0, 28, 32, 36, 40, 44, 48, 52, 56, 60])
    expected = np.diff(BIN_EDGES[[0, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64]]) * found.sum()
    # Ranks of one stream are independent over the draw of its reference: 9 degrees of freedom.
    assert ((bands - expected) ** 2 / expected).sum() < 27.9
