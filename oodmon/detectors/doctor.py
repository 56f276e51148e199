"""Odds that the classifier's answer is wrong, from its softmax probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Stability, State
from oodmon.detectors.logits import log_odds, two_sided
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Doctor"]

_LEAST: Final = 1e-300
"""A probability is at least this before it is divided by; its logarithm is kept apart."""


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
        """With s = 1 - p and q the others' sum of squares: 1 - g = s (2 - s - q / s)."""
        del state
        odds = log_odds(acts, self.temperature)
        if self.kind == "beta":
            return odds
        log_s = functional.logsigmoid(odds.double())
        s = log_s.exp()
        shares = (two_sided(acts).double() / self.temperature).softmax(dim=1)
        # the difference is lost where s is small; then q <= s * s does not count either
        others = (shares.square().sum(dim=1) - (1.0 - s).square()).clamp(min=0.0)
        others = torch.minimum(others, s.square())
        wrong = log_s + torch.log(2.0 - s - others / s.clamp(min=_LEAST))
        return wrong - torch.log((1.0 - s).square() + others)
