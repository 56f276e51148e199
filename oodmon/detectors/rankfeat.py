"""Energy of a feature map without its strongest component."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.head import HEAD, energy, head_of, places, pooled
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["RankFeat", "leading"]

_SQUARINGS: Final = 12
"""The Gram matrix to the power 2^12: a second singular value of 0.999 of the first leaves
0.999^8192 < 0.1 % of itself, and of 0.99 nothing."""

_DECOMPOSED: Final = 64
"""Up to so many rows the Gram matrix is decomposed on a CPU, which is a few calls less."""

_LEAST: Final = 1e-30
"""What is divided by is at least this: nothing is left of zeros but zeros."""


@detectors.register("rankfeat")
@dataclass(frozen=True)
class RankFeat(Detector):
    """Energy after the largest singular component of the map is taken away.

    Reads      layers[layer]: the map that feeds the head, (B, C, H, W) or (B, T, D); layer "": the
               last layer
    Learns     weight (C, D) and bias (C,) of the head
    Score      -log sum exp of the head's logits of X - s1 u1 v1', unbounded
    Reference  Song, Sebe and Wang, NeurIPS 2022, section 3.1

    The component of a strange sample is too large; without it the model is unsure of it. The
    singular vector is the smaller Gram matrix's, in float32 (by repeated squaring on a GPU and of
    large ones), and agrees with an SVD unless the two largest singular values are equal within a
    thousandth; then it is not defined either. What is left of the map changes with the head's input
    only: the paper's second position, one block earlier, would need part of the model again.
    Trap: a vector has one component, and nothing is left of it.
    """

    layer: str = ""

    paper: ClassVar[Paper | None] = Paper(
        "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection",
        "Song, Sebe and Wang",
        "NeurIPS",
        2022,
        "https://arxiv.org/abs/2209.08590",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "D·HW²"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"layer": "stage"},)

    def pin(self, layers: Sequence[str]) -> RankFeat:
        """The last layer, where none was named."""
        if self.layer or not layers:
            return self
        return dataclasses.replace(self, layer=layers[-1])

    def reads(self) -> Reads:
        """The map that feeds the head."""
        return Reads(layers=(self.layer,) if self.layer else ())

    def learn(self, reference: Reference) -> State:
        """The head; `ContractError` where the layer is no map that feeds it."""
        head = head_of(self, reference)
        for acts in reference:
            self._maps(acts, head)
            break
        return head

    def check(self, state: State) -> None:
        """Weight (C, D) and bias (C,)."""
        expect(self.name, state, HEAD)

    def score(self, acts: Activations, state: State) -> Tensor:
        """The pooled map less the pooled component, which needs u alone: p - u (u'p)."""
        maps = self._maps(acts, state)
        mean = pooled(maps)
        left = leading(maps)
        return energy(mean - left * (left * mean).sum(dim=1, keepdim=True), state)

    def _maps(self, acts: Activations, state: State) -> Tensor:
        maps = places(acts.layer(self.layer), state["weight"].shape[1], self.name)
        if maps.shape[2] < 2:
            raise ContractError(
                f"rankfeat: layer {self.layer!r}: expected a map of several places, found "
                f"{tuple(acts.layer(self.layer).shape)}; nothing would be left of a vector"
            )
        return maps


def leading(matrices: Tensor) -> Tensor:
    """First left singular vector (B, D) of each matrix (B, D, P), of length 1; zeros of zeros."""
    wide = matrices.shape[1] <= matrices.shape[2]
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    if _decomposes(gram):
        vector = torch.linalg.eigh(gram).eigenvectors[:, :, -1:]
    else:
        vector = _by_squaring(gram)
    vector = functional.normalize(gram @ vector, dim=1, eps=_LEAST)
    if not wide:
        vector = functional.normalize(matrices @ vector, dim=1, eps=_LEAST)
    return vector.squeeze(2)


def _decomposes(gram: Tensor) -> bool:
    """Whether LAPACK is the faster way; it stumbles over what is not finite."""
    if not gram.is_cpu or gram.shape[1] > _DECOMPOSED:
        return False
    return math.isfinite(gram.sum().item())


def _by_squaring(gram: Tensor) -> Tensor:
    """First eigenvector (B, n, 1), without waiting for the device."""
    power = gram
    for _ in range(_SQUARINGS // 2):
        # the largest entry of a positive semidefinite matrix is on its diagonal, and positive
        power = power / power.amax(dim=(1, 2), keepdim=True).clamp_(min=_LEAST)
        power = power @ power
        power = power @ power
    # every column is the vector times its own entry; the largest entry's is the most exact
    place = power.diagonal(dim1=1, dim2=2).argmax(dim=1)[:, None, None]
    return functional.normalize(power.gather(2, place.expand(-1, power.shape[1], 1)), dim=1)
