"""Features against one vector per class: she, cosine, nci, and fdbd against the boundaries between.

Each costs no more than the classifier's own head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import (
    Labels,
    choose,
    features,
    given_head,
    labels_of,
    reads_of,
    unit,
    width_of,
)
from oodmon.detectors.logits import predicted, two_sided
from oodmon.detectors.moments import Moments, moments
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["FDBD", "NCI", "SHE", "Cosine"]

_NEAR: Final = 1e-6
"""A distance from the mean counts as at least this share of the usual one."""


@dataclass(frozen=True)
class _OfLayer(Detector):
    """What all of them share: a layer that may be left open."""

    layer: str = ""

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def _path(self, option: str) -> str:
        return f"detectors.{self.name}.{option}"

    def _means(self, reference: Reference, labels: Labels, correct: bool = False) -> Moments:
        """Counts and means of features per class; `correct` leaves out what the model got wrong."""
        if not self.layer:
            raise ContractError(f"{self._path('layer')} is empty, and no layer was tapped")

        def read(acts: Activations) -> tuple[Tensor, Tensor]:
            rows, classes = features(acts, self.layer), labels_of(self, acts, labels)
            if correct:
                right = classes == predicted(acts)
                return rows[right], classes[right]
            return rows, classes

        return moments(reference, read, scatter=False, note=f"{self.name}: means")[0]

    def _rows(self, acts: Activations, width: int) -> Tensor:
        return width_of(self, self.layer, features(acts, self.layer), width)

    def _check_labels(self, labels: str) -> None:
        if labels not in ("true", "predicted"):
            raise ContractError(
                f"{self._path('labels')}: {labels!r} is neither 'true' nor 'predicted'"
            )

    def _head(self, reference: Reference, width: int) -> tuple[Tensor, Tensor]:
        head = given_head(self, reference, width)
        if head is None:
            raise ContractError(
                f"{self.name}: the reference does not know the model's head; give its weight and "
                "bias"
            )
        return head


def _row_of(table: Tensor, acts: Activations) -> Tensor:
    """The row of a table (K, ...) for each sample's predicted class, (B, ...)."""
    return table[predicted(acts)]


@detectors.register("she")
@dataclass(frozen=True)
class SHE(_OfLayer):
    """Likeness of the features to the pattern stored for the predicted class.

    Reads      layers[layer] (B, D), maps averaged over their places; logits (B, K); labels while
               learning
    Learns     patterns (K, D): mean features per class of what the model gets right; the mean of
               all of them where a class has none
    Score      -x · pattern of the predicted class; any sign
    Reference  Zhang et al., ICLR 2023

    Options: `layer`, empty for the penultimate features. `labels`: "true", or "predicted" where
    there are none (then every row counts as right).

    Small features score high, large ones low: a sample with loud features in any direction looks
    like the reference. On FashionMNIST against MNIST that makes it no better than chance, where
    `cosine`, which leaves the size out, reaches 0.95. The model's classes must be the labels'.
    """

    labels: Labels = "true"

    paper: ClassVar[Paper | None] = Paper(
        "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with "
        "Modern Hopfield Energy",
        "Zhang, Fu, Chen, Du, Li, Wang, Liu, Han and Zhang",
        "ICLR",
        2023,
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "D"

    def __post_init__(self) -> None:
        self._check_labels(self.labels)

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run: novel features have to be small ones."""
        return ({"layer": "faint"}, {"layer": "faint", "labels": "predicted"})

    def reads(self) -> Reads:
        """One layer and the logits."""
        return reads_of(self.layer, logits=True, labels=self.labels == "true")

    def learn(self, reference: Reference) -> State:
        """One pass."""
        found = self._means(reference, self.labels, correct=True)
        classes = _classes(reference)
        if len(found.counts) > classes:
            raise ContractError(
                f"she: the reference has label {len(found.counts) - 1}, and the model has "
                f"{classes} classes"
            )
        patterns = found.mean.repeat(classes, 1)
        patterns[found.present] = found.means[found.present]
        reference.progress(1.0, "she: done")
        return {"patterns": patterns.float()}

    def check(self, state: State) -> None:
        """Patterns (K, D)."""
        expect("she", state, {"patterns": "K D"})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the inner product with the predicted class's pattern."""
        patterns = state["patterns"]
        rows = self._rows(acts, patterns.shape[1])
        return (rows * _row_of(patterns, acts)).sum(dim=1).neg()


def _classes(reference: Reference) -> int:
    for acts in reference:
        return two_sided(acts).shape[1]
    raise ContractError("the reference is empty; nothing to learn from")


@detectors.register("cosine")
@dataclass(frozen=True)
class Cosine(_OfLayer):
    """Angle between the features and the mean of the nearest class.

    Reads      layers[layer] (B, D), maps averaged over their places; labels while learning
    Learns     means (K, D) of the classes seen, at length 1
    Score      -max_k x·m_k / (|x| |m_k|), in [-1, 1]; with `projection` -max_k x·m_k / |m_k|
    Reference  Techapanurak et al., ACCV 2020

    Options: `layer`, empty for the penultimate features. `projection`: the features' own length
    counts too, so that small features score high and large ones low. `labels`: "true", or
    "predicted" where there are none.

    Features after a ReLU all lie in one corner: their angles are small, and only the order of the
    scores means something.
    """

    projection: bool = False
    labels: Labels = "true"

    paper: ClassVar[Paper | None] = Paper(
        "Hyperparameter-Free Out-of-Distribution Detection Using Cosine Similarity",
        "Techapanurak, Suganuma and Okatani",
        "ACCV",
        2020,
        "https://arxiv.org/abs/1905.10628",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C·D"

    def __post_init__(self) -> None:
        self._check_labels(self.labels)

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"layer": "faint", "projection": True, "labels": "predicted"})

    def reads(self) -> Reads:
        """One layer; the logits where they give the labels."""
        given = self.labels == "true"
        return reads_of(self.layer, logits=not given, labels=given)

    def learn(self, reference: Reference) -> State:
        """One pass."""
        found = self._means(reference, self.labels)
        means = torch.nn.functional.normalize(found.means[found.present], dim=1)
        reference.progress(1.0, "cosine: done")
        return {"means": means.float()}

    def check(self, state: State) -> None:
        """Means (K, D)."""
        expect("cosine", state, {"means": "K D"})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the largest product with a class's direction."""
        means = state["means"]
        rows = self._rows(acts, means.shape[1])
        if not self.projection:
            rows = unit(acts, self.layer)
        return (rows @ means.T).amax(dim=1).neg()


@detectors.register("nci")
@dataclass(frozen=True)
class NCI(_OfLayer):
    """How far the features, seen from their mean, point towards the head's predicted class.

    Reads      layers[layer] (B, D), maps averaged over their places; logits (B, K)
    Learns     center (D,): mean of the features; weight (K, D): the head's; least (): the smallest
               distance from the mean that counts
    Score      -(x - center)·w / |x - center| - norm_weight |x|_1; any sign
    Reference  Liu and Qin, CVPR 2025

    Options: `layer`, empty for the penultimate features, which must feed the head. `norm_weight`:
    of the features' size; above 0 small features score high (the paper tunes it on OOD data, which
    a monitor does not have, so it is 0).

    The reference has to know the model's head.
    """

    norm_weight: float = 0.0

    paper: ClassVar[Paper | None] = Paper(
        "Detecting Out-of-Distribution Through the Lens of Neural Collapse",
        "Liu and Qin",
        "CVPR",
        2025,
        "https://arxiv.org/abs/2311.01479",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "D"

    def __post_init__(self) -> None:
        if not self.norm_weight >= 0.0:
            raise ContractError(f"{self._path('norm_weight')}: {self.norm_weight} is negative")

    def reads(self) -> Reads:
        """One layer and the logits."""
        return reads_of(self.layer, logits=True)

    def learn(self, reference: Reference) -> State:
        """One pass for the mean."""
        found = self._means(reference, "predicted")
        weight, _ = self._head(reference, len(found.mean))
        reference.progress(1.0, "nci: done")
        return {"center": found.mean.float(), "weight": weight.float(), "least": _least(found)}

    def check(self, state: State) -> None:
        """Center (D,), weight (K, D), least ()."""
        expect("nci", state, {"center": "D", "weight": "K D", "least": ""})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the projection, and minus the weighted size."""
        center = state["center"]
        rows = self._rows(acts, len(center))
        away = rows - center
        length = torch.linalg.vector_norm(away, dim=1)
        along = (away * _row_of(state["weight"], acts)).sum(dim=1)
        found = along / torch.maximum(length, state["least"])
        if self.norm_weight > 0.0:
            found = found + self.norm_weight * rows.abs().sum(dim=1)
        return found.neg()


def _least(found: Moments) -> Tensor:
    """The smallest length that is divided by: features that lie at their mean are no error."""
    size = float(found.mean.square().sum().sqrt())
    return torch.tensor(_NEAR * size if size > 0.0 else _NEAR, device=found.mean.device)


@detectors.register("fdbd")
@dataclass(frozen=True)
class FDBD(_OfLayer):
    """Mean distance to the decision boundaries of the other classes, relative to that to the mean.

    Reads      layers[layer] (B, D), maps averaged over their places; logits (B, K)
    Learns     center (D,): mean of the features; inverse (K, K): 1 / |w_i - w_j| of the head's
               rows, 0 where they are equal; least (): the smallest distance that counts
    Score      -mean over the other classes c of (z_top - z_c) / |w_top - w_c| / |x - center|, <= 0
    Reference  Liu and Qin, ICML 2024

    Options: `layer`, empty for the penultimate features, which must feed the head.

    The reference has to know the model's head. Classes with an infinite logit are left out of the
    mean: a model that masks classes is scored on the others.
    """

    paper: ClassVar[Paper | None] = Paper(
        "Fast Decision Boundary based Out-of-Distribution Detector",
        "Liu and Qin",
        "ICML",
        2024,
        "https://arxiv.org/abs/2312.11536",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "D + C"

    def reads(self) -> Reads:
        """One layer and the logits."""
        return reads_of(self.layer, logits=True)

    def learn(self, reference: Reference) -> State:
        """One pass for the mean; the head gives the rest."""
        found = self._means(reference, "predicted")
        weight, _ = self._head(reference, len(found.mean))
        apart = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
        inverse = torch.where(apart > 0.0, 1.0 / apart.clamp(min=1e-30), 0.0)
        reference.progress(1.0, "fdbd: done")
        return {"center": found.mean.float(), "inverse": inverse.float(), "least": _least(found)}

    def check(self, state: State) -> None:
        """Center (D,), inverse (K, K), least ()."""
        expect("fdbd", state, {"center": "D", "inverse": "K K", "least": ""})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the regularised mean distance."""
        center = state["center"]
        logits = two_sided(acts).float()
        away = torch.linalg.vector_norm(self._rows(acts, len(center)) - center, dim=1)
        gaps = logits.amax(dim=1, keepdim=True) - logits
        masked = gaps.isinf()
        distances = gaps.masked_fill(masked, 0.0) * _row_of(state["inverse"], acts)
        others = (logits.shape[1] - 1 - masked.sum(dim=1)).clamp(min=1)
        return (distances.sum(dim=1) / (others * torch.maximum(away, state["least"]))).neg()
