"""The best possible delay on each stream: the CUSUM that knows both laws (`drift.yardstick`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from benchmarks.drift.streams import Change, Pools, Stream
from oodmon.drift.yardstick import Yardstick

__all__ = ["best"]

F8 = npt.NDArray[np.float64]

POINTS = 40_000
"""Quantiles that stand for a law."""


def best(stream: Stream, change: Change, pools: Pools) -> Yardstick | None:
    """The yardstick; none where the change in correlated values has no closed form."""
    if stream.pool:
        return _empirical(pools[stream.pool], pools[change.novel], change.share)
    z: F8 = ndtri((np.arange(POINTS) + 0.5) / POINTS)
    if change.share:
        if stream.phi:
            return None
        novel = round(POINTS * change.share)
        far: F8 = 3.0 + ndtri((np.arange(novel) + 0.5) / novel)
        near: F8 = ndtri((np.arange(POINTS - novel) + 0.5) / (POINTS - novel))
        mixed = np.concatenate([near, far])
        return Yardstick(_contaminated(z, change.share), _contaminated(mixed, change.share))
    # Innovations of AR(1) are independent; a shift of the mean by mu shifts them by mu (1 - φ),
    # their standard deviation being sqrt(1 - φ²). A change of scale scales them alike.
    mean = change.mean * np.sqrt((1.0 - stream.phi) / (1.0 + stream.phi))

    def ratio(values: F8) -> F8:
        moved = (values - mean) / change.scale
        out: F8 = 0.5 * values**2 - 0.5 * moved**2 - np.log(change.scale)
        return out

    return Yardstick(ratio(z), ratio(mean + change.scale * z))


def _contaminated(z: F8, share: float) -> F8:
    out: F8 = np.log1p(share * np.expm1(3.0 * z - 4.5))
    return out


def _empirical(known: F8, novel: F8, share: float, cells: int = 60) -> Yardstick:
    """ln f1/f0 from histograms of both pools, on cells cut at quantiles of either."""
    levels = np.linspace(0.0, 1.0, cells)[1:-1]
    edges = np.unique(np.concatenate([np.quantile(known, levels), np.quantile(novel, levels)]))
    f0 = np.bincount(np.searchsorted(edges, known), minlength=len(edges) + 1) + 0.5
    fn = np.bincount(np.searchsorted(edges, novel), minlength=len(edges) + 1) + 0.5
    f0 /= f0.sum()
    f1 = (1.0 - share) * f0 + share * fn / fn.sum()
    ratio = np.log(f1 / f0)
    rng = np.random.default_rng(0)
    return Yardstick(rng.choice(ratio, POINTS, p=f0), rng.choice(ratio, POINTS, p=f1))
