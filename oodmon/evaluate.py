"""How well scores separate OOD from ID samples: AUROC, AUPR, and both FPR95 conventions.

OOD is the positive class and higher scores are more OOD, throughout. Everything is exact with
ties, and costs one sort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oodmon.errors import ContractError

__all__ = [
    "Evaluation",
    "aupr_in",
    "aupr_out",
    "auroc",
    "evaluate",
    "fpr95_ood",
    "means",
    "roc",
    "tnr_at_tpr95",
]

Scores = npt.ArrayLike


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of one detector on one pair of data sets.

    Attributes:
        auroc: chance that an OOD sample scores above an ID one; a tie counts one half.
        aupr_out, aupr_in: average precision with OOD, or ID, as the positive class.
        tnr_at_tpr95: share of OOD rejected at the threshold that keeps 95 % of ID.
        fpr95_ood: share of ID flagged at the threshold that catches 95 % of OOD.
        ties: share of (ID, OOD) pairs that tie.
        ids, oods: how many samples.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    tnr_at_tpr95: float
    fpr95_ood: float
    ties: float
    ids: int
    oods: int

    @property
    def fpr95_id(self) -> float:
        """Share of OOD accepted at the threshold that keeps 95 % of ID; lower is better."""
        return 1.0 - self.tnr_at_tpr95


def evaluate(ids: Scores, oods: Scores) -> Evaluation:
    """Every figure at once; `ContractError` for an empty side or a NaN."""
    steps = _steps(ids, oods)
    return Evaluation(
        auroc=_auroc(steps),
        aupr_out=_average_precision(steps[1][::-1], steps[0][::-1]),
        aupr_in=_average_precision(*steps),
        tnr_at_tpr95=tnr_at_tpr95(ids, oods),
        fpr95_ood=fpr95_ood(ids, oods),
        ties=float(np.dot(*steps) / (steps[0].sum() * steps[1].sum())),
        ids=int(steps[0].sum()),
        oods=int(steps[1].sum()),
    )


def auroc(ids: Scores, oods: Scores) -> float:
    """Area under the ROC curve: P(OOD > ID) + P(OOD = ID) / 2."""
    return _auroc(_steps(ids, oods))


def aupr_out(ids: Scores, oods: Scores) -> float:
    """Average precision with OOD as the positive class: sum of precision × step in recall."""
    negatives, positives = _steps(ids, oods)
    return _average_precision(positives[::-1], negatives[::-1])


def aupr_in(ids: Scores, oods: Scores) -> float:
    """Average precision with ID as the positive class, ranked by the negated score."""
    return _average_precision(*_steps(ids, oods))


def tnr_at_tpr95(ids: Scores, oods: Scores) -> float:
    """Share of OOD above the smallest ID score that keeps at least 95 % of ID at or below it.

    Higher is better. The convention of the ODIN, Mahalanobis and Gram papers; 1 - this is their
    "FPR at 95 % TPR" with ID as the positive class.
    """
    inside, outside = _checked(ids, oods)
    # in hundredths, because 0.95 × n is not exact
    place = -(-95 * len(inside) // 100) - 1
    threshold = np.partition(inside, place)[place]
    return float(np.mean(outside > threshold))


def fpr95_ood(ids: Scores, oods: Scores) -> float:
    """Share of ID at or above the largest threshold that catches at least 95 % of OOD.

    Lower is better. The convention of Outlier Exposure, pytorch-ood and OpenOOD.
    """
    inside, outside = _checked(ids, oods)
    place = len(outside) - -(-95 * len(outside) // 100)
    threshold = np.partition(outside, place)[place]
    return float(np.mean(inside >= threshold))


def roc(ids: Scores, oods: Scores) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shares of ID flagged and of OOD caught, at every threshold from the strictest to none.

    Two arrays (m,), both from 0 to 1 and never falling; ties are one step, drawn as a slope.
    """
    inside, outside = _steps(ids, oods)
    flagged, caught = (
        np.concatenate([[0.0], np.cumsum(side[::-1]) / side.sum()]) for side in (inside, outside)
    )
    return flagged, caught


def means(table: Mapping[str, Mapping[str, Evaluation | None]]) -> dict[str, float | None]:
    """Detector → mean AUROC over the data sets, the best first.

    None, and last, where one of them could not be judged.

    Args:
        table: data set → detector → its figures.
    """
    found: dict[str, float | None] = {}
    for detector in next(iter(table.values()), {}):
        judged = [one.auroc for column in table.values() if (one := column[detector]) is not None]
        found[detector] = sum(judged) / len(judged) if len(judged) == len(table) else None
    order = sorted(found, key=lambda name: (found[name] is None, -(found[name] or 0.0)))
    return {name: found[name] for name in order}


def _checked(ids: Scores, oods: Scores) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    sides = []
    for what, scores in (("ID", ids), ("OOD", oods)):
        array = np.asarray(scores)
        if array.ndim != 1 or not len(array):
            raise ContractError(f"{what} scores: expected (n,) with n > 0, found {array.shape}")
        if np.isnan(array).any():
            raise ContractError(f"{what} scores: {int(np.isnan(array).sum())} are NaN")
        sides.append(array)
    return sides[0], sides[1]


def _steps(ids: Scores, oods: Scores) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of ID and of OOD at each distinct score, ascending."""
    inside, outside = _checked(ids, oods)
    values, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    place = place.reshape(-1)
    return (
        np.bincount(place[: len(inside)], minlength=len(values)).astype(np.int64),
        np.bincount(place[len(inside) :], minlength=len(values)).astype(np.int64),
    )


def _auroc(steps: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> float:
    inside, outside = steps
    below = np.cumsum(inside) - inside
    # twice the count of won pairs, in whole numbers: exact
    won = int(np.dot(outside, 2 * below + inside))
    return won / (2 * int(inside.sum()) * int(outside.sum()))


def _average_precision(positives: npt.NDArray[np.int64], negatives: npt.NDArray[np.int64]) -> float:
    """Counts at each threshold, from the most to the least positive one."""
    hit, missed = np.cumsum(positives), np.cumsum(negatives)
    return float(np.dot(positives, hit / (hit + missed)) / hit[-1])
