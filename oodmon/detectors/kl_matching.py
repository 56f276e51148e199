"""Divergence of the softmax from the typical softmax of each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.odds import answer, shares, two_sided
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["KLMatching"]

_LEAST: Final = -80.0
"""A typical probability counts as at least exp of this: a divergence is never infinite."""


@detectors.register("kl_matching")
@dataclass(frozen=True)
class KLMatching(Detector):
    """Kullback-Leibler divergence from the nearest class's typical softmax.

    Reads      logits (B, C)
    Learns     log_typical (K, C): log of the mean softmax of the reference rows that the model
               gives to each of the K classes that it gives at all
    Score      min_k KL(p || typical_k), >= 0 up to rounding, at most 80
    Reference  Hendrycks et al., ICML 2022, section 4.2

    A class that no reference row is given to has no typical softmax and matches nothing. No labels
    are needed. A typical probability of 0 counts as exp(-80), so that one logit of -inf in the
    reference does not make later scores infinite.
    """

    paper: ClassVar[Paper | None] = Paper(
        "Scaling Out-of-Distribution Detection for Real-World Settings",
        "Hendrycks, Basart, Mazeika, Zou, Kwon, Mostajabi, Steinhardt and Song",
        "ICML",
        2022,
        "https://arxiv.org/abs/1911.11132",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C²"

    def reads(self) -> Reads:
        """Logits."""
        return Reads(logits=True)

    def learn(self, reference: Reference) -> State:
        """One pass; sums in float64. Rows that are not finite are left out."""
        total = count = torch.zeros(0)
        for acts in reference:
            shares = two_sided(acts).double().softmax(dim=1)
            shares = shares[shares.isfinite().all(dim=1)]
            if not len(total):
                width = shares.shape[1]
                total, count = shares.new_zeros(width, width), shares.new_zeros(width)
            label = shares.argmax(dim=1)
            total.index_add_(0, label, shares)
            count += torch.bincount(label, minlength=len(count)).double()
        given = count > 0
        if not bool(given.any()):
            raise ContractError("kl_matching: the reference holds no row that is finite")
        typical = total[given] / count[given].unsqueeze(1)
        return {"log_typical": typical.log().clamp_(min=_LEAST).float()}

    def check(self, state: State) -> None:
        """log_typical (K, C)."""
        if set(state) != {"log_typical"}:
            raise StateError(f"kl_matching: state: expected log_typical, found {sorted(state)}")
        shape = tuple(state["log_typical"].shape)
        if len(shape) != 2 or not 1 <= shape[0] <= shape[1]:
            raise StateError(f"kl_matching: state 'log_typical': expected (K, C), found {shape}")

    def score(self, acts: Activations, state: State) -> Tensor:
        """sum p log p - max_k sum p log typical_k: one product for all classes."""
        logits, typical = two_sided(acts).float(), state["log_typical"]
        if logits.shape[1] != typical.shape[1]:
            raise ContractError(
                f"kl_matching: learnt with {typical.shape[1]} classes, found {logits.shape[1]}"
            )
        p = shares(logits)
        return (p @ typical.T).amax(dim=1).add_(answer(acts).entropy()).neg_()
