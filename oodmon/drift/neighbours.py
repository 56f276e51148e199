"""How alike neighbouring samples are, measured on the traffic itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES
from oodmon.records import Histogram

__all__ = ["Alike", "Neighbours"]

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
_PRIOR_COUPLES: Final = 4.0
"""Couples of windows as far apart as their samples tell, before any was seen."""
_COUPLES: Final = 2.0**13
"""Couples of windows beyond which the older half counts half."""
_SURELY: Final = 3.0
"""Standard errors from which windows are believed to lie further apart than neighbours tell."""
_JUMP: Final = 6.0
"""Times what is expected: two windows further apart than that, as at a change, count as so far."""
_POWERS: Final = np.stack([NORMAL_SCORES**power for power in (0, 1, 2, 4)], axis=1)


_SUMS: Final = np.ascontiguousarray(_POWERS[:, :3])


class Alike(NamedTuple):
    """How alike neighbouring samples are taken to be; numbers, or arrays of one shape.

    Attributes:
        correlation: lag-one autocorrelation φ of the normal scores.
        sticky: share of the likeness that does not lie in the mean alone, [0, 1]: 0 where the
            scores are as of a Gaussian AR(1), 1 where a sample repeats the one before it.
        lasting: correlation of what is sticky.
    """

    correlation: F8 | float
    sticky: F8 | float
    lasting: F8 | float


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """Pairs of neighbouring samples, and the sums of the squared jumps between them.

    Of the normal scores, and of their squares (`swings`); all as `records.Histogram` counts them,
    older ones with less weight. Numbers for one stream, or arrays of one shape for many; so is all
    that is given and returned.

    Neighbours are those of one source. Where traffic that is alike is dealt out to several, or is
    alike at long range, they tell too little, and the means of windows lie further apart than they
    should. So couples of successive windows are counted too: by how much their means differ
    (`apart`), and how much the samples of both vary about their common mean (`within`), both
    in units of one sample.

    Attributes:
        pairs, jumps, swings: of neighbours.
        couples, apart, within: of windows.
        samples, first, second: of the latest window: samples, and the sums of their normal scores
            and of the squares.
    """

    pairs: F8 | float = 0.0
    jumps: F8 | float = 0.0
    swings: F8 | float = 0.0
    couples: F8 | float = 0.0
    apart: F8 | float = 0.0
    within: F8 | float = 0.0
    samples: F8 | float = 0.0
    first: F8 | float = 0.0
    second: F8 | float = 0.0

    def numbers(self) -> F8:
        """(…, 9) all of it; `of` brings it back."""
        return np.array(self.row()).T

    def row(self) -> tuple[Any, ...]:
        """All of it, one after the other."""
        return _values(self)

    @staticmethod
    def of(numbers: F8) -> Neighbours:
        """From (…, 9); of one stream as numbers."""
        if numbers.size == numbers.shape[-1]:
            return Neighbours(*numbers.ravel().tolist())
        return Neighbours(*numbers.T)

    def met(self, pairs: I8 | int, jumps: I8 | int, swings: I8 | int = 0) -> Neighbours:
        """With those of one more window."""
        weight: Any = 1.0 - 0.5 * (self.pairs > _MEMORY)
        return Neighbours(
            weight * self.pairs + pairs,
            weight * self.jumps + jumps / _MILLIONTHS,
            weight * self.swings + swings / _MILLIONTHS,
            *_values(self)[3:],
        )

    def after(self, histograms: Sequence[Histogram], counts: I8) -> Neighbours:
        """With one more window of each stream; one stream may be held as numbers.

        Args:
            histograms: of the windows, none empty.
            counts: int64 (S, 64) theirs.
        """
        sums = counts @ _SUMS
        if len(histograms) == 1:
            one = histograms[0]
            samples, first, second = sums[0].tolist()
            return self.met(one.pairs, one.jumps, one.swings)._coupled(
                samples, first, second, _PLAIN
            )
        near = self.met(
            np.array([each.pairs for each in histograms]),
            np.array([each.jumps for each in histograms]),
            np.array([each.swings for each in histograms]),
        )
        return near._coupled(sums[:, 0], sums[:, 1], sums[:, 2], _ARRAYS)

    def _coupled(self, samples: Any, first: Any, second: Any, by: _Calls) -> Neighbours:
        """With the couple of the latest window and one more."""
        known: Any = self.samples > 0.0
        before = by.most(self.samples, 1.0)
        both = before + samples
        apart = first / samples - self.first / before
        apart = apart * apart * before * samples / both
        middle = (first + self.first) / both
        within = (second + self.second - both * middle * middle) / (both - 1.0)
        within = by.most(within, _LEAST_VARIANCE)
        usual = by.most(self.apart / by.most(self.within, _LEAST_VARIANCE), 1.0)
        weight: Any = 1.0 - 0.5 * (self.couples > _COUPLES)
        return Neighbours(
            self.pairs,
            self.jumps,
            self.swings,
            weight * self.couples + known,
            weight * self.apart + known * by.least(apart, _JUMP * usual * within),
            weight * self.within + known * within,
            samples,
            first,
            second,
        )

    def autocorrelation(self, seen: I8, variance: float) -> F8:
        """Lag-one autocorrelation φ of the normal scores, [0, 1].

        By von Neumann's ratio of squared jumps: unlike products of neighbours, they do not rise
        when the mean does, so a shift does not pass for correlation.

        Args:
            seen: (…, 64) counts of the traffic, which tell the scores' variance.
            variance: of the reference's, in its place while little has been seen.
        """
        return self._ratio(self.jumps, _spread(seen @ _POWERS, variance))

    def believed(self, seen: I8, variance: float) -> F8:
        """φ as it is reckoned with: one standard error higher, or 0 where it is not significant."""
        found, error = self._trusted(self.autocorrelation(seen, variance), _PRIOR)
        near = _significant(found, error, found + error)
        told: F8 = _further(near, (self.couples, self.apart, self.within), _ARRAYS)
        return told

    def alike(self, seen: I8, variance: float, of_squares: float) -> Alike:
        """`believed`, and what the squares of the normal scores say beside it.

        In Gaussian AR(1) traffic squares are correlated by φ². Where they are more alike, as where
        requests are repeated, or where quiet and restless hours take turns, every statistic of a
        sample lasts as long, and not its mean alone.

        Args:
            seen, variance: as for `autocorrelation`.
            of_squares: variance of the squared normal scores of the reference.
        """
        sums = seen @ _POWERS
        mine = (self.pairs, self.jumps, self.swings, self.couples, self.apart, self.within)
        if sums.size == len(_POWERS.T):
            # One stream: numbers, of which numpy would make forty calls.
            numbers = [float(np.asarray(value).item()) for value in mine]
            return _alike(sums.ravel().tolist(), numbers, (variance, of_squares), _PLAIN)
        return _alike(list(np.moveaxis(sums, -1, 0)), mine, (variance, of_squares), _ARRAYS)

    def _ratio(self, jumps: F8 | float, spread: F8) -> F8:
        found = 1.0 - jumps / np.maximum(self.pairs, 1e-9) / (2.0 * spread)
        return np.where(np.asarray(self.pairs) > 0.0, np.minimum(np.maximum(found, 0.0), 1.0), 0.0)

    def _trusted(self, found: F8, prior: float) -> tuple[F8, F8]:
        """With what is assumed before anything was seen; and the standard error."""
        pairs = np.asarray(self.pairs, np.float64)
        trusted = pairs + _PRIOR_PAIRS
        mixed = (found * pairs + prior * _PRIOR_PAIRS) / trusted
        return mixed * (pairs > 0.0), 1.0 / np.sqrt(trusted)


_values: Final = attrgetter(*(each.name for each in fields(Neighbours)))


def _significant(found: F8, error: F8, value: F8) -> F8:
    return np.minimum(value, _MOST) * (found > _SIGNIFICANT * error)


def _further(near: Any, windows: Sequence[Any], by: _Calls) -> Any:
    """φ by neighbours, or by how far windows lie apart where that is surely more.

    Means of windows of independent samples lie as far apart as the samples within vary; where a
    sample is worth 1/b, b times as far: as in AR(1) traffic of φ = (b - 1) / (b + 1). Successive
    couples share a window, so the ratio's standard error is sqrt(3 / couples) of it.
    """
    couples, apart, within = windows
    trusted = couples + _PRIOR_COUPLES
    error = by.root(3.0 / trusted)
    ratio = apart / by.most(within, _LEAST_VARIANCE)
    ratio = by.most((ratio * couples + _PRIOR_COUPLES) / trusted, 1.0)
    surely = ratio * (1.0 - near) > (1.0 + near) * (1.0 + _SURELY * error)
    likely = ratio * (1.0 + error)
    far = by.least((likely - 1.0) / (likely + 1.0), _MOST)
    return by.most(near, far * surely)


def _spread(sums: F8, variance: float) -> F8:
    """Of the normal scores, by the sums of their powers."""
    some = np.maximum(sums[..., 0], 1.0)
    # Of values up to 5, so that the difference of the squares is exact enough.
    own = np.maximum(sums[..., 2] / some - (sums[..., 1] / some) ** 2, _LEAST_VARIANCE)
    found: F8 = (_REFERENCE * variance + sums[..., 0] * own) / (_REFERENCE + sums[..., 0])
    return found


class _Calls(NamedTuple):
    """What differs between a number and an array."""

    least: Callable[[Any, Any], Any]
    most: Callable[[Any, Any], Any]
    root: Callable[[Any], Any]


_PLAIN: Final = _Calls(min, max, math.sqrt)
_ARRAYS: Final = _Calls(np.minimum, np.maximum, np.sqrt)


def _alike(
    sums: Sequence[Any], neighbours: Sequence[Any], reference: tuple[float, float], by: _Calls
) -> Alike:
    """`Neighbours.alike`, of numbers or of arrays.

    Args:
        sums: of the powers 0, 1, 2 and 4 of the normal scores.
        neighbours: pairs, jumps and swings; couples, apart and within.
        reference: variance of its normal scores, and of their squares.
        by: min, max and root.
    """
    total, first, second, fourth = sums
    pairs, jumps, swings, *windows = neighbours
    some, trusted = by.most(total, 1.0), pairs + _PRIOR_PAIRS
    error = 1.0 / by.root(trusted)

    def correlation(own: Any, expected: float, jumps: Any, prior: float) -> Any:
        spread = _REFERENCE * expected + total * by.most(own, _LEAST_VARIANCE)
        twice = 2.0 * spread / (_REFERENCE + total)
        found = by.least(by.most(1.0 - jumps / by.most(pairs, 1e-9) / twice, 0.0), 1.0)
        return (found * pairs + prior * _PRIOR_PAIRS) / trusted * (pairs > 0.0)

    mean, square = first / some, second / some
    plain = correlation(square - mean * mean, reference[0], jumps, _PRIOR)
    squares = correlation(fourth / some - square * square, reference[1], swings, _PRIOR**2)
    bar = _SIGNIFICANT * error
    likely = _further(by.least(plain + error, _MOST) * (plain > bar), windows, by)
    gaussian = likely * likely
    more = (squares > bar) & (squares > gaussian) & (swings > 0.0)
    lasting = by.most(likely, by.least(squares + error, _MOST) * more)
    sticky = (squares - gaussian) / by.most(lasting - gaussian, _LEAST_VARIANCE)
    return Alike(likely, by.least(sticky, 1.0) * more, lasting)
