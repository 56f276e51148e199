"""Scores of several detectors in one unit: evidence, -log of a tail probability, and its sum."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

__all__ = ["RULES", "evidence", "joined", "ranked"]

RULES: Final = ("fisher", "max", "mean")
"""How evidence is joined."""

_TAIL_SHARE: Final = 0.1
"""Of the reference scores that say how far its tail reaches."""

_LEAST_SCALE: Final = 1e-6
"""Of a tail, relative to the largest reference score: below that it is rounding."""

_MOST: Final = 3e38
"""Just below the largest float32."""


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Reference scores (M, n) as `evidence` wants them: ranks (M, n) and scale (M, 1).

    The scale is the mean excess of the largest tenth over the score below them.
    """
    ranks = scores.sort(dim=1).values.contiguous()
    tail = max(1, round(_TAIL_SHARE * ranks.shape[1]))
    start = ranks[:, -min(tail + 1, ranks.shape[1])].unsqueeze(1)
    reach = ranks[:, -tail:].mean(dim=1, keepdim=True) - start
    least = (ranks[:, -1:].abs() * _LEAST_SCALE).clamp(min=torch.finfo(ranks.dtype).tiny)
    return ranks, torch.maximum(reach, least)


def evidence(scores: Tensor, ranks: Tensor, scale: Tensor) -> Tensor:
    """-log p of each score against its member's reference scores, (M, B), >= 0; NaN stays NaN.

    p goes through the points (r, (1 + #{r' >= r}) / (n + 1)) of the reference scores r and is
    linear between them: nowhere below the conformal p-value, and a rounding error of a score is
    never a step of p. Beyond the largest score, where a conformal p-value would be the same for
    all, p falls as 1 / (1 + excess / scale): a Pareto tail of index 1, so heavy that no one
    member outvotes all others by far, and still in the order of the scores.

    Args:
        scores: (M, B) float32.
        ranks: (M, n) float32, ascending.
        scale: (M, 1) float32, > 0: how far a tail reaches.
    """
    count = ranks.shape[1]
    place = torch.searchsorted(ranks, scores.contiguous())  # reference scores below
    upper = ranks.gather(1, place.clamp(max=count - 1))
    lower = ranks.gather(1, (place - 1).clamp_(min=0))
    gap = upper - lower
    passed = ((scores - lower) / gap.masked_fill(gap == 0.0, 1.0)).clamp_(0.0, 1.0)
    # p · (n + 1): at the reference score below it is one more than at the one above
    inside = (count + 1 - place).to(scores.dtype) + (1.0 - passed)
    inside = torch.where(place == 0, float(count + 1), inside)
    excess = ((scores - upper) / scale).clamp_(0.0, _MOST)
    beyond = torch.log1p(excess)
    inside = torch.where(place == count, 2.0, inside)
    found = (float(count + 1) / inside).log_() + beyond
    return torch.where(scores.isnan(), scores, found)


def joined(found: Tensor, by: str) -> Tensor:
    """One score (B,) of the evidence (M, B); NaN where a member has none."""
    if by == "fisher":
        return 2.0 * found.sum(dim=0)
    if by == "max":
        return found.amax(dim=0)
    return math.log(len(found)) - torch.logsumexp(-found, dim=0)
