"""Squared Mahalanobis distance to class means under one covariance: plain, relative, many layers.

Features are whitened once, and one product gives the nearest of all classes; the distance to that
one is then a sum of squares, so it cannot be negative however the product was rounded.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import Labels, choose, joined, labels_of, reads_of, width_of
from oodmon.detectors.moments import Moments, Shrinkage, covariance, moments, whitener
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Mahalanobis", "RelativeMahalanobis", "nearest", "squared_length"]


def nearest(white: Tensor, means: Tensor) -> Tensor:
    """Index (B,) of the nearest of means (K, D) to each row of white (B, D): one product."""
    half = means.square().sum(dim=1).div_(2.0)
    return torch.addmm(half, white, means.T, alpha=-1.0).argmin(dim=1)


def squared_length(rows: Tensor) -> Tensor:
    """(B,) of (B, D); what overflows is the largest number there is, and NaN stays NaN."""
    return rows.square().sum(dim=1).clamp_(max=torch.finfo(rows.dtype).max)


@dataclass(frozen=True)
class _Gaussians(Detector):
    """What the plain and the relative distance share: the options, and what is learnt."""

    layer: str = ""
    layers: tuple[str, ...] = ()
    combine: Literal["concat", "sum"] = "concat"
    shrinkage: Shrinkage = "oas"
    labels: Labels = "true"

    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "D² + C·D"

    def __post_init__(self) -> None:
        for option, allowed in (
            ("combine", ("concat", "sum")),
            ("shrinkage", ("oas", "none")),
            ("labels", ("true", "predicted")),
        ):
            if getattr(self, option) not in allowed:
                raise ContractError(
                    f"{self._path(option)}: {getattr(self, option)!r} is none of {allowed}"
                )
        if self.layer and self.layers:
            raise ContractError(f"{self._path('layers')}: give this or `layer`, not both")
        if len(set(self.layers)) < len(self.layers):
            raise ContractError(f"{self._path('layers')}: {self.layers} names a layer twice")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        several = ("stage", "features")
        return (
            {},
            {"layers": several, "shrinkage": "none"},
            {"layers": several, "combine": "sum", "labels": "predicted"},
        )

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named."""
        if self.layer or self.layers:
            return self
        return dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """Its layers; the logits where they are features, or give the labels."""
        given = self.labels == "true"
        return reads_of(self.layer, *self.layers, logits=not given, labels=given)

    def learn(self, reference: Reference) -> State:
        """One pass: moments per class of each group of layers that shares a Gaussian."""
        groups = self._groups()
        if not groups:
            raise ContractError(f"{self._path('layer')} is empty, and no layer was tapped")

        def read(acts: Activations) -> tuple[Tensor, ...]:
            rows = (joined(acts, group) for group in groups)
            return (*rows, labels_of(self, acts, self.labels))

        state: dict[str, Tensor] = {}
        for number, found in enumerate(moments(reference, read, note=f"{self.name}: moments")):
            for key, tensor in self._gaussian(found, weighted=len(groups) > 1).items():
                state[f"{key}.{number}"] = tensor.float()
        reference.progress(1.0, f"{self.name}: done")
        return state

    def check(self, state: State) -> None:
        """Per group: center (D,), whitener (D, D), whitened means (K, D), weight ()."""
        shapes = {}
        for number in range(len(self._groups())):
            for key, text in self._shapes().items():
                # the letters of each group are its own
                letters = " ".join(f"{letter}{number}" for letter in text.split())
                shapes[f"{key}.{number}"] = letters
        expect(self.name, state, shapes)

    def score(self, acts: Activations, state: State) -> Tensor:
        """Distance to the nearest mean; of several groups, the weighted sum."""
        total: Tensor | None = None
        groups = self._groups()
        for number, group in enumerate(groups):
            center = state[f"center.{number}"]
            away = width_of(self, "+".join(group), joined(acts, group), len(center)) - center
            found = self._distance(away, state, number)
            if len(groups) > 1:
                found = found * state[f"weight.{number}"]
            total = found if total is None else total + found
        if total is None:
            raise ContractError(f"{self._path('layer')} is empty, and no layer was tapped")
        return total

    def _groups(self) -> tuple[tuple[str, ...], ...]:
        """Layers that share a Gaussian."""
        named = self.layers or ((self.layer,) if self.layer else ())
        if self.combine == "sum":
            return tuple((layer,) for layer in named)
        return (named,) if named else ()

    def _gaussian(self, found: Moments, weighted: bool) -> dict[str, Tensor]:
        """One group's share of the state, in float64."""
        spread = found.within / found.rows
        white = whitener(covariance(found.within, found.rows, self.shrinkage))
        center = found.mean
        # the mean of a row's distance to its own class needs no second pass: it is a trace
        usual = float((white * (spread @ white)).sum()) if weighted else 1.0
        return {
            "center": center,
            "whitener": white,
            "means": (found.means[found.present] - center) @ white,
            "weight": torch.full_like(center[0], 1.0 / usual if usual > 0.0 else 0.0),
        }

    def _shapes(self) -> dict[str, str]:
        return {"center": "D", "whitener": "D D", "means": "K D", "weight": ""}

    def _path(self, option: str) -> str:
        return f"detectors.{self.name}.{option}"

    @abstractmethod
    def _distance(self, away: Tensor, state: State, number: int) -> Tensor:
        """(B,) of features less the centre of this group."""


def _to_nearest(away: Tensor, state: State, number: int) -> Tensor:
    white = away @ state[f"whitener.{number}"]
    means = state[f"means.{number}"]
    return squared_length(white - means[nearest(white, means)])


@detectors.register("mahalanobis")
@dataclass(frozen=True)
class Mahalanobis(_Gaussians):
    """Squared Mahalanobis distance to the nearest class mean, under one covariance for all classes.

    Reads      layers[layer] (B, D), maps averaged over their places; labels while learning
    Learns     per group of layers: center (D,) the mean of all rows; whitener W (D, D) with W Wᵀ =
               inverse covariance; means (K, D) of the classes seen, whitened; weight ()
    Score      min_k (x - mean_k)ᵀ Σ⁻¹ (x - mean_k), >= 0, chi-squared(D) if features are Gaussian
    Reference  Lee et al., NeurIPS 2018

    Options: `layer`, empty for the penultimate features; "logits" and "softmax" are features too
    (logits separate far better than their softmax, Aigrain and Detyniecki 2019). `layers`: several
    instead of one; `combine` them by "concat" (one Gaussian over all) or "sum" (one each, divided
    by its mean over the reference, which is that of the distance to a row's own class). `shrinkage`
    of the covariance: "oas", or "none". `labels`: "true", or "predicted" where there are none.

    Learns in one pass and in memory for K·D + D² numbers. A class without rows has no mean, so
    samples of it are far from all others. Features that never varied in the reference are kept: one
    that wakes up gives a large distance. The paper's perturbation of inputs needs a gradient, and
    its regression over layers needs outliers: both are left out. One layer close to the input
    separates little; take the penultimate one, or several. A covariance of classes far apart in
    size fits none of them: see `gmm`.
    """

    paper: ClassVar[Paper | None] = Paper(
        "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial "
        "Attacks",
        "Lee, Lee, Lee and Shin",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1807.03888",
    )

    def _distance(self, away: Tensor, state: State, number: int) -> Tensor:
        return _to_nearest(away, state, number)


@detectors.register("relative_mahalanobis")
@dataclass(frozen=True)
class RelativeMahalanobis(_Gaussians):
    """Mahalanobis distance to the nearest class, less that to all of the reference as one Gaussian.

    Reads      layers[layer] (B, D), maps averaged over their places; labels while learning
    Learns     what `mahalanobis` does, and per group background (D, D): the whitener of all rows
               together, whatever their class
    Score      min_k d_k(x) - d_0(x); any sign
    Reference  Ren et al., arXiv 2021

    Options `layer`, `layers`, `combine`, `shrinkage` and `labels` as in `mahalanobis`. What all
    classes have in common counts for nothing here, so samples near the classes' boundaries (near
    OOD) stand out more than by the plain distance. Far from all of the reference both distances are
    large and their difference says little: run it beside `mahalanobis`, not in its place.
    """

    cost: ClassVar[str] = "2·D² + C·D"
    paper: ClassVar[Paper | None] = Paper(
        "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
        "Ren, Fort, Liu, Roy, Padhy and Lakshminarayanan",
        "arXiv",
        2021,
        "https://arxiv.org/abs/2106.09022",
    )

    def _gaussian(self, found: Moments, weighted: bool) -> dict[str, Tensor]:
        state = super()._gaussian(found, weighted)
        state["background"] = whitener(covariance(found.total(), found.rows, self.shrinkage))
        return state

    def _shapes(self) -> dict[str, str]:
        return {**super()._shapes(), "background": "D D"}

    def _distance(self, away: Tensor, state: State, number: int) -> Tensor:
        background = squared_length(away @ state[f"background.{number}"])
        return _to_nearest(away, state, number) - background
