"""Distance from the subspace in which the reference's features lie: residual, vim, pca."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Self

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import choose, features, given_head, reads_of, width_of
from oodmon.detectors.logits import log_partition, two_sided
from oodmon.detectors.moments import Moments, moments, rows_in_blocks
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["PCA", "Residual", "ViM"]

_WIDE: Final = ((2048, 1000), (768, 512))
"""Dimensions of the principal space from this width on, and half the width below (ViM's)."""

_SMALLEST: Final = 1e-6
"""A reference's mean residual counts as at least this share of its features' size."""


def _length(rows: Tensor) -> Tensor:
    """(B,) of (B, D), without overflow at the largest activations a float holds."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return found.clamp_(max=torch.finfo(found.dtype).max)


@dataclass(frozen=True)
class _Subspace(Detector):
    """What all three share: a layer, its moments whatever the class, and their eigenvectors."""

    layer: str = ""

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """One layer."""
        return reads_of(self.layer)

    def _path(self, option: str) -> str:
        return f"detectors.{self.name}.{option}"

    def _moments(self, reference: Reference, logits: bool = False) -> Moments:
        """Of the features; with the logits beside them, (D + C), where a head has to be found."""
        if not self.layer:
            raise ContractError(f"{self._path('layer')} is empty, and no layer was tapped")

        def read(acts: Activations) -> tuple[Tensor, Tensor]:
            rows = features(acts, self.layer)
            if logits:
                rows = torch.cat([rows, two_sided(acts).float()], dim=1)
            return rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device)

        return moments(reference, read, note=f"{self.name}: moments")[0]

    def _centred(self, acts: Activations, state: State) -> Tensor:
        center = state["center"]
        rows = width_of(self, self.layer, features(acts, self.layer), len(center))
        away: Tensor = rows - center
        return away


def _complement(scatter: Tensor, dimensions: int) -> Tensor:
    """Eigenvectors (D, D - dimensions) of the smallest eigenvalues: all that is not principal."""
    vectors: Tensor = torch.linalg.eigh(scatter)[1]
    return vectors[:, : len(scatter) - dimensions].contiguous()


def _about(found: Moments, width: int, center: Tensor) -> Tensor:
    """Mean outer product of the features less a point that need not be their mean, (D, D)."""
    away = found.mean[:width] - center
    return found.total()[:width, :width] / found.rows + torch.outer(away, away)


def _fitted_head(found: Moments, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias from features and logits side by side: exact if the layer feeds the head."""
    total, mean = found.total(), found.mean
    inverse = torch.linalg.pinv(total[:width, :width], rtol=1e-9, hermitian=True)
    weight = (inverse @ total[:width, width:]).T
    return weight, mean[width:] - weight @ mean[:width]


@dataclass(frozen=True)
class _Residual(_Subspace):
    """What residual and vim share: how many dimensions are principal, and where they start."""

    dimensions: int = 0

    def __post_init__(self) -> None:
        if self.dimensions < 0:
            raise ContractError(f"{self._path('dimensions')}: {self.dimensions} is negative")

    def _principal(self, width: int) -> int:
        if self.dimensions >= width:
            raise ContractError(
                f"{self._path('dimensions')}: {self.dimensions} of {width} features leave no "
                "residual"
            )
        rule = next((many for wide, many in _WIDE if width >= wide), width // 2)
        return self.dimensions or rule


@detectors.register("residual")
@dataclass(frozen=True)
class Residual(_Residual):
    """Length of the part of the features that lies outside of their principal space.

    Reads      layers[layer] (B, D), maps averaged over their places
    Learns     center (D,); complement (D, D - d): directions in which the reference varies least
    Score      |(x - center) complement|, >= 0
    Reference  Wang et al., CVPR 2022

    Options: `layer`, empty for the penultimate features. `dimensions` d of the principal space, 0
    for the paper's rule: 1000 from 2048 features on, 512 from 768 on, below that half of them.
    `origin`: "head" for the paper's, the point that the head maps to logits of zero, or "mean" for
    the features' mean. "head" needs a reference that knows the head.
    """

    origin: Literal["mean", "head"] = "mean"

    paper: ClassVar[Paper | None] = Paper(
        "ViM: Out-Of-Distribution with Virtual-logit Matching",
        "Wang, Li, Feng and Zhang",
        "CVPR",
        2022,
        "https://arxiv.org/abs/2203.10807",
    )
    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "D²"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.origin not in ("mean", "head"):
            raise ContractError(
                f"{self._path('origin')}: {self.origin!r} is neither 'mean' nor 'head'"
            )

    def learn(self, reference: Reference) -> State:
        """One pass."""
        found = self._moments(reference)
        width = len(found.mean)
        center = found.mean
        if self.origin == "head":
            head = given_head(self, reference, width)
            if head is None:
                raise ContractError(
                    f"{self._path('origin')}: the reference does not know the model's head; give "
                    "it, or take `origin: mean`"
                )
            center = _origin(*head)
        complement = _complement(_about(found, width, center), self._principal(width))
        reference.progress(1.0, "residual: done")
        return {"center": center.float(), "complement": complement.float()}

    def check(self, state: State) -> None:
        """Center (D,), complement (D, M)."""
        expect("residual", state, {"center": "D", "complement": "D M"})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Length of the residual."""
        return _length(self._centred(acts, state) @ state["complement"])


def _origin(weight: Tensor, bias: Tensor) -> Tensor:
    """-W⁺ b: where the logits are zero, as nearly as can be.

    The rows of a trained head sum to nearly zero, for the softmax does not see their sum: what is
    left in that direction is rounding of float32, and its inverse would throw the origin far off.
    """
    least = max(weight.shape) * torch.finfo(torch.float32).eps
    origin: Tensor = -(torch.linalg.pinv(weight, rtol=least) @ bias)
    return origin


@detectors.register("vim")
@dataclass(frozen=True)
class ViM(_Residual):
    """The residual as one more logit, against the energy of the real ones.

    Reads      layers[layer] (B, D), maps averaged over their places; logits (B, K)
    Learns     center (D,): where the head's logits are zero; complement (D, D - d): directions in
               which the reference varies least; alpha (): mean largest logit / mean residual
    Score      alpha |(x - center) complement| - lse(z); any sign
    Reference  Wang et al., CVPR 2022

    Options: `layer`, empty for the penultimate features. `dimensions` d of the principal space, 0
    for the paper's rule: 1000 from 2048 features on, 512 from 768 on, below that half of them.

    Trap: the rule is for many classes. Where they are few beside the features, `dimensions` a
    little above their number leave more to see: on a ResNet-20 (64 features, 10 classes) 12 told
    house numbers by 0.97 of AUROC, and the rule's 32 by 0.91.

    Where the reference does not know the head, it is found by least squares from features and
    logits, which is exact if the layer feeds it. Learns in two passes, the second for alpha.
    """

    paper: ClassVar[Paper | None] = Residual.paper
    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "D² + C"

    def reads(self) -> Reads:
        """One layer and the logits."""
        return reads_of(self.layer, logits=True)

    def learn(self, reference: Reference) -> State:
        """Moments, then the sizes of residual and logits."""
        unknown = reference.head is None
        found = self._moments(reference, logits=unknown)
        with torch.inference_mode(mode=False), torch.no_grad():
            width = len(found.mean)
            if unknown:
                width -= _classes(reference)
            head = given_head(self, reference, width) or _fitted_head(found, width)
            center = _origin(*head)
            spread = _about(found, width, center)
            complement = _complement(spread, self._principal(width))
            state = {"center": center.float(), "complement": complement.float()}
            reference.progress(0.5, "vim: sizes of residual and logits")
            largest = residual = torch.zeros((), dtype=torch.float64, device=center.device)
            for top, length in rows_in_blocks(reference, lambda acts: self._sizes(acts, state)):
                largest = largest + top.double().sum()
                residual = residual + length.double().sum()
        # a reference without any residual would make alpha infinite
        least = _SMALLEST * found.rows * spread.trace().sqrt()
        alpha = largest.abs() / torch.maximum(residual, least).clamp(min=_SMALLEST)
        reference.progress(1.0, "vim: done")
        return {**state, "alpha": alpha.float()}

    def check(self, state: State) -> None:
        """Center (D,), complement (D, M), alpha ()."""
        expect("vim", state, {"center": "D", "complement": "D M", "alpha": ""})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Virtual logit less log-sum-exp."""
        residual = _length(self._centred(acts, state) @ state["complement"])
        return residual * state["alpha"] - log_partition(acts).float()

    def _sizes(self, acts: Activations, state: State) -> tuple[Tensor, Tensor]:
        residual = _length(self._centred(acts, state) @ state["complement"])
        return two_sided(acts).amax(dim=1).float(), residual


def _classes(reference: Reference) -> int:
    for acts in reference:
        return two_sided(acts).shape[1]
    raise ContractError("the reference is empty; nothing to learn from")


@detectors.register("pca")
@dataclass(frozen=True)
class PCA(_Subspace):
    """Share of the features that their principal components cannot reconstruct.

    Reads      layers[layer] (B, D), maps averaged over their places
    Learns     center (D,): the mean; complement (D, D - d): what is left beside the components that
               hold `share` of the variance; usual (): length of the reference's features
    Score      |x - its reconstruction| / |x|, >= 0
    Reference  Guan et al., ICCV 2023

    Options: `layer`, empty for the penultimate features. `share` of the variance that the principal
    components hold.

    The division keeps samples with large features from looking novel for their size alone. A
    length counts as at least a thousandth of the usual one.
    """

    share: float = 0.9

    paper: ClassVar[Paper | None] = Paper(
        "Revisit PCA-based Technique for Out-of-Distribution Detection",
        "Guan, Liu, Zheng, Zhou and Wang",
        "ICCV",
        2023,
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "D²"

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ContractError(f"{self._path('share')}: {self.share} is not in (0, 1)")

    def learn(self, reference: Reference) -> State:
        """One pass."""
        found = self._moments(reference)
        values, vectors = torch.linalg.eigh(found.total() / found.rows)
        held = values.clamp(min=0.0).flip(0).cumsum(0)
        # at least one direction is left, or there is nothing to see
        count = min(int((held < self.share * held[-1]).sum()) + 1, len(values) - 1)
        usual = (held[-1] + found.mean.square().sum()).sqrt()
        reference.progress(1.0, "pca: done")
        return {
            "center": found.mean.float(),
            "complement": vectors[:, : len(values) - count].contiguous().float(),
            "usual": usual.float(),
        }

    def check(self, state: State) -> None:
        """Center (D,), complement (D, M), usual ()."""
        expect("pca", state, {"center": "D", "complement": "D M", "usual": ""})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Length of what is not reconstructed, relative to the features'."""
        residual = _length(self._centred(acts, state) @ state["complement"])
        length = _length(features(acts, self.layer))
        least = (state["usual"] / 1000.0).clamp(min=torch.finfo(torch.float32).tiny)
        return residual / torch.maximum(length, least)
