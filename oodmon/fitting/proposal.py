"""Which detectors to run together for a cost: a greedy choice by what each adds to the others."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["coverage", "propose", "rank_correlation"]

F8 = npt.NDArray[np.float64]

_CHANCE: Final = 0.5
"""AUROC of a detector that sees nothing."""


def coverage(auroc: F8) -> float:
    """Mean over the columns of the best AUROC of any detector (D, K); chance where there is none.

    An AUROC that is NaN, or below chance, counts as chance.
    """
    if not auroc.shape[1]:
        return _CHANCE
    known = np.nan_to_num(auroc, nan=_CHANCE).clip(min=_CHANCE)
    return float(known.max(axis=0, initial=_CHANCE).mean())


def propose(
    auroc: F8,
    cost: F8,
    correlation: F8,
    budget: float,
    redundant: float = 0.95,
    least_gain: float = 0.002,
) -> list[int]:
    """Rows of the detectors to run, the most valuable first; empty where none fits the budget.

    Coverage has diminishing returns, so the greedy choice by gain per cost, or the best single
    detector where that covers more, is at least (1 - 1/e) / 2 of the best set (Leskovec et al.,
    KDD 2007). What the others made redundant is taken out again.

    Args:
        auroc: (D, K) of each detector on each corruption.
        cost: (D,) > 0, in the unit of the budget.
        correlation: (D, D) of their ranks; who is above `redundant` with one chosen is passed by.
        budget: the chosen ones' costs add up to this at most.
        least_gain: of coverage, below which a detector is not worth running.
    """
    chosen: list[int] = []
    open_ = set(range(len(auroc)))
    while True:
        spent = float(cost[chosen].sum())
        covered = coverage(auroc[chosen])
        gains = {
            row: coverage(auroc[[*chosen, row]]) - covered
            for row in sorted(open_)
            if spent + cost[row] <= budget
            and not any(correlation[row, other] > redundant for other in chosen)
        }
        worth = {row: gain for row, gain in gains.items() if gain >= least_gain}
        if not worth:
            break
        best = max(worth, key=lambda row: (worth[row] / cost[row], -row))
        chosen.append(best)
        open_.discard(best)
    affordable = [row for row in range(len(auroc)) if cost[row] <= budget]
    single = max(affordable, key=lambda row: (coverage(auroc[[row]]), -cost[row]), default=None)
    if single is not None and coverage(auroc[[single]]) - coverage(auroc[chosen]) >= least_gain:
        chosen = [single]
    for row in sorted(chosen, key=lambda row: -cost[row]):
        rest = [other for other in chosen if other != row]
        if rest and coverage(auroc[chosen]) - coverage(auroc[rest]) < least_gain:
            chosen = rest
    return sorted(chosen, key=lambda row: -coverage(auroc[[row]]))


def rank_correlation(scores: npt.NDArray[Any]) -> F8:
    """Spearman's, (D, D), of the rows' ranks (D, N); ties share theirs, and a constant row has 0.

    Samples that one of the detectors could not score are left out; without samples all are 0.
    """
    known = scores[:, ~np.isnan(scores).any(axis=0)]
    found: F8 = np.eye(len(scores))
    if known.shape[1] < 2:
        return found
    ranks = np.stack([_ranks(row) for row in known])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    unit = centred / np.where(length == 0.0, 1.0, length)
    found = np.clip(unit @ unit.T, -1.0, 1.0).astype(np.float64)
    np.fill_diagonal(found, 1.0)
    return found


def _ranks(row: npt.NDArray[Any]) -> F8:
    _, place, counts = np.unique(row, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle: F8 = (last - (counts - 1) / 2.0).astype(np.float64)
    found: F8 = middle[place.reshape(-1)]
    return found
