"""GradNorm: how large the gradient towards a uniform answer is, in closed form for the head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Stability, State
from oodmon.detectors.features import choose, features
from oodmon.detectors.logits import two_sided
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["GradNorm"]


@detectors.register("gradnorm")
@dataclass(frozen=True)
class GradNorm(Detector):
    """Gradient of the divergence from a uniform answer, with respect to the head's weights.

    Reads      layers[layer] (B, D), the input of the head, and logits (B, C)
    Options    layer; temperature T divides the logits first
    Learns     nothing
    Score      -|p - 1/C|_1 |φ|_1 / T with p = softmax(z/T): minus the L1 norm of the gradient of
               KL(uniform || p) with respect to the head's weight, which is the outer product of
               p - 1/C and φ; <= 0, no backward pass
    Reference  Huang, Geng and Li, NeurIPS 2021

    Larger features count as more in-distribution. Where novel inputs make larger features than
    known ones, as in many transformers, the score is inverted: look at its AUROC before using it.
    """

    layer: str = ""
    temperature: float = 1.0

    paper: ClassVar[Paper | None] = Paper(
        "On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
        "Huang, Geng and Li",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2110.00218",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C + D"

    def __post_init__(self) -> None:
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ContractError(
                f"detectors.gradnorm.temperature: {self.temperature} is not positive"
            )

    def pin(self, layers: Sequence[str]) -> GradNorm:
        """The penultimate features, where no layer was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """Features and logits."""
        return Reads(layers=(self.layer,) if self.layer else (), logits=True)

    def score(self, acts: Activations, state: State) -> Tensor:
        """Product of two L1 norms."""
        del state
        found = features(acts, self.layer)
        logits = two_sided(acts)
        classes = logits.shape[1]
        p = (logits if self.temperature == 1.0 else logits / self.temperature).softmax(dim=1)
        away = p.sub_(1.0 / classes).abs_().sum(dim=1)
        size: Tensor = torch.linalg.vector_norm(found, ord=1, dim=1)
        return (away * size).neg_().div_(self.temperature)

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"layer": "faint"}, {"layer": "faint", "temperature": 2.0})
