"""Energy of a head of which only the weights that contribute most are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import choose
from oodmon.detectors.head import HEAD, energy, head_of, places, pooled
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["DICE"]


@detectors.register("dice")
@dataclass(frozen=True)
class DICE(Detector):
    """Energy by the weights that matter on the reference; the others only carry noise.

    Reads      layers[layer]: what feeds the head, (B, D), (B, T, D) or (B, D, H, W); layer "": the
               penultimate features, else the last layer
    Options    sparsity: share of the weights that is left out
    Learns     weight (C, D) with the others 0, bias (C,)
    Score      -log sum exp of the sparse head's logits, unbounded
    Reference  Sun and Li, ECCV 2022, equation 3

    A weight's contribution is itself times the mean feature of the reference. The head comes from
    the reference; without one this detector cannot be learnt.
    Trap: where novel samples have larger features than known ones, as on small networks that were
    trained briefly, it is worse than chance (AUROC 0.38 on FashionMNIST against MNIST).
    """

    layer: str = ""
    sparsity: float = 0.7

    paper: ClassVar[Paper | None] = Paper(
        "DICE: Leveraging Sparsification for Out-of-Distribution Detection",
        "Sun and Li",
        "ECCV",
        2022,
        "https://arxiv.org/abs/2111.09805",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C·D"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ContractError(f"detectors.dice.sparsity: {self.sparsity} is not in [0, 1)")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"layer": "stage"})

    def pin(self, layers: Sequence[str]) -> DICE:
        """The penultimate features, where no layer was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """The layer that feeds the head."""
        return Reads(layers=(self.layer,) if self.layer else ())

    def learn(self, reference: Reference) -> State:
        """One pass for the mean feature, in float64; rows that are not finite are left out."""
        head = head_of(self, reference)
        weight = head["weight"]
        total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        count = 0
        for acts in reference:
            rows = pooled(places(acts.layer(self.layer), weight.shape[1], self.name)).double()
            rows = rows[rows.isfinite().all(dim=1)]
            total += rows.sum(dim=0)
            count += len(rows)
        if not count:
            raise ContractError("dice: the reference holds no row that is finite")
        contribution = (weight.double() * (total / count)).flatten()
        left_out = int(self.sparsity * contribution.numel())
        if left_out:
            threshold = contribution.kthvalue(left_out).values
            keep = (contribution > threshold).reshape(weight.shape)
            weight = torch.where(keep, weight, 0.0)
        return {"weight": weight, "bias": head["bias"]}

    def check(self, state: State) -> None:
        """Weight (C, D) and bias (C,)."""
        expect(self.name, state, HEAD)

    def score(self, acts: Activations, state: State) -> Tensor:
        """One product with the sparse weights, which is faster dense."""
        rows = places(acts.layer(self.layer), state["weight"].shape[1], self.name)
        return energy(pooled(rows), state)
