"""Generalised entropy of the most likely classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Stability, State
from oodmon.detectors.logits import gaps, log_odds
from oodmon.detectors.order import top_values
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["GEN"]


@detectors.register("gen")
@dataclass(frozen=True)
class GEN(Detector):
    """Generalised entropy: a power of p (1 - p), summed over the most likely classes.

    Reads      logits (B, C); a binary logit z counts as (-z/2, z/2)
    Options    gamma: the power, small ones weigh the tail; top: classes summed over, at most C;
               temperature divides the logits first
    Learns     nothing
    Score      sum over the top classes of (p (1 - p))^gamma, >= 0
    Reference  Liu, Lochman and Zach, CVPR 2023, equations 3 and 4

    No probability is clamped, and 1 - p of the predicted class comes from the others' odds, so
    that confident samples keep their order. Libraries that clamp p at 1e-7 rank them differently
    where most of many classes lie below that.
    """

    gamma: float = 0.1
    top: int = 100
    temperature: float = 1.0

    paper: ClassVar[Paper | None] = Paper(
        "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
        "Liu, Lochman and Zach",
        "CVPR",
        2023,
        "https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_"
        "Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C"

    def __post_init__(self) -> None:
        for option, value in (("gamma", self.gamma), ("temperature", self.temperature)):
            if not (value > 0.0 and math.isfinite(value)):
                raise ContractError(f"detectors.gen.{option}: {value} is not positive")
        if self.top < 1:
            raise ContractError(f"detectors.gen.top: {self.top} is not positive")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"gamma": 0.5, "top": 2})

    def reads(self) -> Reads:
        """Logits."""
        return Reads(logits=True)

    def score(self, acts: Activations, state: State) -> Tensor:
        """With o the odds of the others: at the top p = 1 / (1 + o) and 1 - p = o / (1 + o).

        All in the log domain: p^gamma is far from 0 where p itself underflows.
        """
        del state
        odds = log_odds(acts, self.temperature)
        log_total = functional.softplus(odds)  # -log p at the top
        gap = gaps(acts, self.temperature)
        if self.top < gap.shape[1]:
            gap = top_values(gap, self.top - 1)
        log_p = gap.sub_(log_total.unsqueeze(1))
        # the predicted class is not among the others: its gap is marked, and its term here is 0
        terms = log_p.exp().neg_().log1p_().add_(log_p).mul_(self.gamma).exp_().sum(dim=1)
        top = odds.sub(log_total, alpha=2.0)
        return terms.add_(top.mul_(self.gamma).exp_())
