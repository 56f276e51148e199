"""Which predictions are kept, so that labels that come later can be held against them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.errors import ContractError
from oodmon.promises import Promise

__all__ = ["LABELS", "Labelling", "set_right"]

LABELS: Final = "labels"
"""What rules call the test on true losses, in the place of a drift test's id."""
_CERTAIN: Final = 1e-7
"""Probabilities beyond this have log odds that would outweigh all others."""
_LEAST_SLOPE: Final = 0.05
"""Where doubt says nothing about errors, the estimate must still not fall as doubt rises."""
_PRIOR: Final = 1.0
"""Weight of the prior (slope 1, offset 0: the estimate taken at its word), in squared log odds."""
_STEPS: Final = 100
_CLOSE: Final = 1e-10


@dataclass(frozen=True)
class Labelling:
    """Keep predictions by sample id.

    Args:
        share: of the samples, chosen by a hash of the id, so that every replica and every replay
            chooses the same, (0, 1].
        over_seconds: the accuracy is told of samples that were observed within this, back from the
            newest closed window.
        least_labels: fewer than these tell nothing.
        false_alarms: how often rules on `labels` may be wrong: "1 per 30 days".
        tolerated_loss: of true accuracy against the reference's, that needs no alarm, [0, 0.5].
        least_accuracy: where above 0, what is compared with in the place of both, below 1.
    """

    share: float = 1.0
    over_seconds: float = 604_800.0
    least_labels: int = 100
    false_alarms: str = "1 per 30 days"
    tolerated_loss: float = 0.02
    least_accuracy: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ContractError(f"share: {self.share} is not in (0, 1]")
        if not (math.isfinite(self.over_seconds) and self.over_seconds > 0.0):
            raise ContractError(f"over_seconds: {self.over_seconds} is not above 0")
        if self.least_labels < 1:
            raise ContractError(f"least_labels: {self.least_labels} is not at least 1")
        Promise.parse(self.false_alarms)
        if not 0.0 <= self.tolerated_loss <= 0.5:
            raise ContractError(f"tolerated_loss: {self.tolerated_loss} is not in [0, 0.5]")
        if not 0.0 <= self.least_accuracy < 1.0:
            raise ContractError(f"least_accuracy: {self.least_accuracy} is not in [0, 1)")

    def keeps(self, sample_id: str) -> bool:
        """Whether the prediction of this sample is kept."""
        if self.share >= 1.0:
            return True
        name = sample_id.encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        return drawn < self.share * 2**64


def set_right(
    expected: npt.NDArray[np.float64], wrong: npt.NDArray[np.bool_]
) -> tuple[float, float]:
    """Slope >= 0.05 and offset of log odds(wrong) = slope · log odds(expected) + offset.

    Logistic calibration (Platt 1999) of the estimate by what labels say, with the prior that it is
    right as it is; by Newton's method on a convex loss, each step halved until it does not rise.

    Args:
        expected: (n,) probability of a wrong answer, as it was estimated.
        wrong: (n,) whether it was.
    """
    shares = np.clip(np.asarray(expected, np.float64), _CERTAIN, 1.0 - _CERTAIN)
    design = np.stack([np.log(shares / (1.0 - shares)), np.ones_like(shares)], axis=1)
    target = np.asarray(wrong, np.float64)
    slope, offset = _newton(design, target, np.array([1.0, 0.0]), np.array([1.0, 1.0]))
    if slope < _LEAST_SLOPE:
        slope, offset = _newton(design, target, np.array([_LEAST_SLOPE, 0.0]), np.array([0.0, 1.0]))
    return slope, offset


def _newton(
    design: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    at: npt.NDArray[np.float64],
    moves: npt.NDArray[np.float64],
) -> tuple[float, float]:
    """From `at`, which is the prior's centre too; what does not move is held."""
    centre = at

    def loss(at: npt.NDArray[np.float64]) -> float:
        z = design @ at
        misfit = np.logaddexp(0.0, z).sum() - target @ z
        return float(misfit + 0.5 * _PRIOR * ((at - centre) ** 2).sum())

    now = loss(at)
    for _ in range(_STEPS):
        p = 0.5 * (1.0 + np.tanh(0.5 * (design @ at)))
        slope = (design.T @ (p - target) + _PRIOR * (at - centre)) * moves
        curve = design.T @ (design * (p * (1.0 - p))[:, None]) + _PRIOR * np.eye(2)
        curve = curve * np.outer(moves, moves) + np.diag(1.0 - moves)
        step, size = np.linalg.solve(curve, slope), 1.0
        while size > _CLOSE and loss(at - size * step) > now:
            size /= 2.0
        if size <= _CLOSE or float(np.abs(size * step).max()) <= _CLOSE:
            break
        at = at - size * step
        now = loss(at)
    return float(at[0]), float(at[1])
