"""Odds that the classifier's answer is wrong, from its softmax probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Stability, State
from oodmon.detectors.odds import answer
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Doctor"]


@detectors.register("doctor")
@dataclass(frozen=True)
class Doctor(Detector):
    """How likely the answer is to be wrong: by the whole softmax, or by its largest value.

    Reads      logits (B, C); a binary logit z counts as (-z/2, z/2)
    Options    kind "alpha" or "beta"; temperature divides the logits first
    Learns     nothing
    Score      "alpha": log((1 - g) / g) with g = sum of p squared;
               "beta": log((1 - p) / p) with p the largest probability; both unbounded
    Reference  Granese, Romanelli, Gorla, Palamidessi and Piantanida, NeurIPS 2021, equations 10, 11

    The logarithm of the paper's ratio, which orders the same way and does not saturate. "beta"
    orders as `msp` does.
    """

    kind: Literal["alpha", "beta"] = "alpha"
    temperature: float = 1.0

    paper: ClassVar[Paper | None] = Paper(
        "DOCTOR: A Simple Method for Detecting Misclassification Errors",
        "Granese, Romanelli, Gorla, Palamidessi and Piantanida",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2106.02395",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C"

    def __post_init__(self) -> None:
        if self.kind not in ("alpha", "beta"):
            raise ContractError(f"detectors.doctor.kind: {self.kind!r} is neither alpha nor beta")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ContractError(f"detectors.doctor.temperature: {self.temperature} is not positive")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"kind": "beta"})

    def reads(self) -> Reads:
        """Logits."""
        return Reads(logits=True)

    def score(self, acts: Activations, state: State) -> Tensor:
        """With s = 1 - p and r the mean p of the others: 1 - g = s (2 - s - r)."""
        del state
        found = answer(acts, self.temperature)
        if self.kind == "beta":
            return found.log_odds()
        s, r = found.log_wrong().exp_(), found.mean_other()
        right = torch.addcmul((1.0 - s).square_(), s, r)
        return found.log_wrong().add_(torch.log(2.0 - s - r)).sub_(right.log_())
