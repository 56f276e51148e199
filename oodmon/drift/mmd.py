"""The maximum mean discrepancy of a window to the reference, by random Fourier features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from oodmon.calibration import NORMAL_SCORES
from oodmon.contracts import Paper
from oodmon.drift.judged import Judged, Verdict
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES, Window
from oodmon.registry import drift

__all__ = ["MaximumMeanDiscrepancy", "p_value"]

_HALVINGS: Final = 60
_STEPS: Final = 60
_CLOSE: Final = 1e-10
_NEAR_MEAN: Final = 1e-4
"""Within so many standard deviations of the mean the saddlepoint formula is 0 / 0."""
_SMALLEST: Final = 1e-300

F8 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Embedding:
    """A reference in the space of the features.

    Attributes:
        features: (64, 2 R) of a sample in each bin.
        weights: (2 R,) eigenvalues of their covariance under the reference, without those of 0.
    """

    features: F8
    weights: F8


@lru_cache(maxsize=512)
def _embedding(counts: bytes, frequencies: int, seed: int) -> _Embedding:
    """Features with a kernel as wide as the median distance of two reference samples."""
    known = np.frombuffer(counts, np.int64)
    # One sample more, of the law that tail probabilities have: no bin is impossible.
    shares = (known + np.diff(BIN_EDGES)) / (known.sum() + 1.0)
    distances = np.abs(NORMAL_SCORES[:, None] - NORMAL_SCORES).ravel()
    order = np.argsort(distances, kind="stable")
    below = np.cumsum(np.outer(shares, shares).ravel()[order])
    median = float(distances[order][np.searchsorted(below, 0.5)])
    drawn = np.random.default_rng(seed).standard_normal(frequencies) / (median or 1.0)
    angles = NORMAL_SCORES[:, None] * drawn
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / math.sqrt(frequencies)
    centred = features - shares @ features
    weights = np.linalg.eigvalsh((centred * shares[:, None]).T @ centred)
    return _Embedding(features, weights[weights > 1e-12 * weights[-1]])


def p_value(weights: F8, value: float) -> float:
    """P(Σ λ_i Z_i² >= value) for independent standard normal Z_i and the `weights` λ (k,) > 0.

    Lugannani and Rice's saddlepoint approximation (Kuonen, Biometrika 1999), which keeps its
    relative error in the far tail.
    """
    if value <= 0.0:
        return 1.0
    largest = float(weights.max())
    return _tail(weights / largest, value / largest)


def _tail(weights: F8, value: float) -> float:
    """As `p_value`, the largest weight being 1: the saddlepoint then lies below 1/2."""
    mean, spread = float(weights.sum()), math.sqrt(2.0 * float(weights @ weights))
    if abs(value - mean) < _NEAR_MEAN * spread:
        skew = 8.0 * float((weights**3).sum()) / spread**3
        return float(ndtr(-skew / 6.0))
    # K'(ζ) = Σ λ / (1 - 2 ζ λ) rises from 0 to infinity on (-infinity, 1/2), and is convex: from
    # where its first term alone is the value, Newton's steps come down to the root.
    saddle = (1.0 - 1.0 / value) / 2.0
    for _ in range(_STEPS):
        terms = weights / (1.0 - 2.0 * saddle * weights)
        step = (float(terms.sum()) - value) / (2.0 * float(terms @ terms))
        saddle -= step
        if abs(step) <= _CLOSE * abs(saddle):
            break
    scale = 1.0 - 2.0 * saddle * weights
    exponent = saddle * value + 0.5 * float(np.log(scale).sum())
    w = math.copysign(math.sqrt(2.0 * max(exponent, _SMALLEST)), saddle)
    v = saddle * math.sqrt(2.0 * float(((weights / scale) ** 2).sum()))
    return min(max(float(ndtr(-(w + math.log(v / w) / w))), 0.0), 1.0)


@lru_cache(maxsize=512)
def _critical(counts: bytes, frequencies: int, seed: int, alpha: float) -> float:
    """The value whose p-value is `alpha`, by bisection."""
    weights = _embedding(counts, frequencies, seed).weights
    low, high = 0.0, float(weights.sum())
    while p_value(weights, high) > alpha:
        high *= 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if p_value(weights, middle) > alpha else (low, middle)
    return high


@drift.register("mmd")
@dataclass(frozen=True)
class MaximumMeanDiscrepancy(Judged):
    """Distance between the mean random Fourier features of window and reference.

    Reads      the counts of tail probabilities of n window and m reference samples, each as the
               normal score of its bin
    Statistic  |mean φ(window) - mean φ(reference)|, the biased (V-statistic) estimate; in
               [0, sqrt 2]; also the effect. φ(z) = (cos ω_r z, sin ω_r z) / sqrt(frequencies), ω_r
               drawn from N(0, 1/h²) once (`seed`): the features of a Gaussian kernel whose width h
               is the median distance of two reference samples
    Threshold  n m / (n + m) times the square is Σ λ_i Z_i² under no change, λ the eigenvalues of
               the features' covariance in the reference and Z_i standard normal: the upper `alpha`
               point of that law, by a saddlepoint approximation
    Reference  Gretton et al., JMLR 2012; features: Rahimi and Recht, NeurIPS 2007

    It sees any change of the law of the scores; it weighs shifts of the bulk most, and a few
    novel samples less than `ks` does. It looks at one detector's scores at a time. Features and
    inputs do not leave the agent, and of several detectors' scores only each one's law is known: a
    calibration keeps them apart and sorted, so that there is no joint law to compare with. The rate
    holds for independent samples and over calibration sets and windows together.

    Args:
        alpha: false alarms per window and stream, about, in (0, 1).
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
        frequencies: R, 1 to 1,024.
        seed: of their draw.
    """

    frequencies: int = 32
    seed: int = 0

    paper: ClassVar[Paper | None] = Paper(
        "A kernel two-sample test",
        "A. Gretton, K. M. Borgwardt, M. J. Rasch, B. Schölkopf, A. Smola",
        "Journal of Machine Learning Research",
        2012,
        "https://jmlr.org/papers/v13/gretton12a.html",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.frequencies <= 1024:
            raise ContractError(f"drift.mmd.frequencies: {self.frequencies} is not in 1 to 1024")
        if self.seed < 0:
            raise ContractError(f"drift.mmd.seed: {self.seed} is negative")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01}, {"alpha": 0.01, "frequencies": 8, "seed": 1})

    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """The distance, and what is expected of it under no change."""
        seen, known = window.histogram(detector), reference.histogram(detector)
        n, m = seen.scored, known.scored
        key = (known.counts.tobytes(), self.frequencies, self.seed)
        made = _embedding(*key)
        gap = (seen.counts / n - known.counts / m) @ made.features
        squared, size = float(gap @ gap), n * m / (n + m)
        threshold = math.sqrt(_critical(*key, self.alpha) / size)
        return Verdict(math.sqrt(squared), threshold, p_value(made.weights, size * squared))
