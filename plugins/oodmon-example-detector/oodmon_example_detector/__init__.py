"""Cosine distance to the nearest class mean: an example of a detector outside of oodmon."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon import Activations
from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.errors import ContractError, StateError

__all__ = ["CosineMean"]

_SHORTEST: Final = 1e-12
"""A vector counts as at least this long: one of zeros is at distance 1 from everything."""


@dataclass(frozen=True)
class CosineMean(Detector):
    """Cosine distance to the nearest class mean.

    Reads      layers[layer] (B, D), or (B, C, H, W) averaged over its places; labels while learning
    Learns     means (K, D) float32 of length 1, one for each class that has rows
    Score      1 - max_k cos(x, mean_k), in [0, 2]
    Reference  Techapanurak, Suganuma and Okatani, ACCV 2020, with class means (Mensink et al.,
               TPAMI 2013) in place of class vectors that are trained along with the network

    Options: `layer`, the name of the layer; empty takes the last that is tapped.
    """

    layer: str = ""

    paper: ClassVar[Paper | None] = Paper(
        "Hyperparameter-Free Out-of-Distribution Detection Using Cosine Similarity",
        "Techapanurak, Suganuma and Okatani",
        "ACCV",
        2020,
        "https://arxiv.org/abs/1905.10628",
    )
    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "C·D"

    def pin(self, layers: Sequence[str]) -> CosineMean:
        """The last layer that is tapped, where none was named."""
        if self.layer or not layers:
            return self
        return dataclasses.replace(self, layer=layers[-1])

    def reads(self) -> Reads:
        """One layer."""
        return Reads(layers=(self.layer,) if self.layer else (), labels=True)

    def learn(self, reference: Reference) -> State:
        """Mean direction of each class, in one pass; rows that are not finite are left out."""
        if not self.layer:
            raise ContractError("detectors.cosine_mean.layer is empty, and no layer was tapped")
        sums = torch.zeros((0, 0), dtype=torch.float64)
        for acts in reference:
            if acts.labels is None:
                raise ContractError("detectors.cosine_mean: the reference has no labels")
            direction = _direction(acts.layer(self.layer)).double().cpu()
            finite = direction.isfinite().all(dim=1)
            direction, labels = direction[finite], acts.labels.cpu()[finite]
            if not len(labels):
                continue
            classes = max(int(labels.max()) + 1, len(sums))
            width = direction.shape[1]
            if sums.shape[1] not in (0, width):
                raise ContractError(
                    f"layer {self.layer!r}: expected {sums.shape[1]} features, found {width}"
                )
            grown = torch.zeros((classes, width), dtype=torch.float64)
            grown[: len(sums)] = sums if len(sums) else 0.0
            sums = grown + functional.one_hot(labels, classes).double().T @ direction
        means = sums[sums.norm(dim=1) > 0.0] if sums.numel() else sums
        if not len(means):
            raise ContractError("detectors.cosine_mean: the reference has no finite labelled row")
        return {"means": functional.normalize(means, dim=1).float().to(reference.device)}

    def check(self, state: State) -> None:
        """Means (K, D), float32."""
        if set(state) != {"means"}:
            raise StateError(f"cosine_mean: state: expected ['means'], found {sorted(state)}")
        means = state["means"]
        if means.ndim != 2 or not len(means) or means.dtype != torch.float32:
            raise StateError(
                f"cosine_mean: state 'means': expected float32 (K, D), "
                f"found {means.dtype} {tuple(means.shape)}"
            )

    def score(self, acts: Activations, state: State) -> Tensor:
        """One minus the largest cosine."""
        direction, means = _direction(acts.layer(self.layer)), state["means"]
        if direction.shape[1] != means.shape[1]:
            raise ContractError(
                f"layer {self.layer!r}: expected {means.shape[1]} features, "
                f"found {direction.shape[1]}"
            )
        return 1.0 - (direction @ means.T).amax(dim=1)


def _direction(features: Tensor) -> Tensor:
    """(B, D) float32 of length 1."""
    flat = features.float().flatten(2).mean(dim=2) if features.ndim > 2 else features.float()
    # Divided by the largest entry first, so that the squares of huge features do not overflow.
    largest = flat.abs().amax(dim=1, keepdim=True).clamp(min=_SHORTEST)
    return functional.normalize(flat / largest, dim=1, eps=_SHORTEST)
