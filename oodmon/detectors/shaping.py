"""Energy after the features were shaped: clipped (react, vra) or pruned and scaled (ash, scale).

All of them change what feeds the classifier's head and apply the head again. They are made for
features after a ReLU. On a feature map the shaping comes before the mean over its places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import choose
from oodmon.detectors.head import HEAD, energy, head_of, places, pooled, rowwise
from oodmon.detectors.order import Cut, Quantiles, largest
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["ASH", "SCALE", "VRA", "ReAct"]

_SMALLEST: Final = 1e-20
"""`vra` divides by its lower threshold, which is 0 where most activations are."""

_STEEPEST: Final = 60.0
"""A factor is at most exp of this, so that the logits stay in range."""


def _share(detector: str, option: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ContractError(f"detectors.{detector}.{option}: {value} is not in [0, 1)")


def _quantiles(
    detector: Detector, reference: Reference, layer: str, width: int, shares: Sequence[float]
) -> Tensor:
    """Quantiles of all activations that feed the head, in one pass and bounded memory."""
    found = Quantiles(reference.device)
    for acts in reference:
        rows = places(acts.layer(layer), width, detector.name).flatten(1)
        found.add(rows[rows.isfinite().all(dim=1)])
    return torch.tensor([found.at(share) for share in shares], device=reference.device)


@dataclass(frozen=True)
class _Shaping(Detector):
    """What the four have in common: a layer that feeds a head."""

    layer: str = ""

    stability: ClassVar[Stability] = "beta"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"layer": "stage"})

    def pin(self, layers: Sequence[str]) -> Detector:
        """The penultimate features, where no layer was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """The layer that feeds the head."""
        return Reads(layers=(self.layer,) if self.layer else ())

    def learn(self, reference: Reference) -> State:
        """The head."""
        return head_of(self, reference)

    def check(self, state: State) -> None:
        """The head's shapes."""
        expect(self.name, state, HEAD)

    def _rows(self, acts: Activations, state: State) -> Tensor:
        """(B, D, P)."""
        return places(acts.layer(self.layer), state["weight"].shape[1], self.name)


@detectors.register("react")
@dataclass(frozen=True)
class ReAct(_Shaping):
    """Energy of clipped features: what is too large on strange samples counts no more.

    Reads      layers[layer]: what feeds the head, (B, D), (B, T, D) or (B, D, H, W); layer "": the
               penultimate features, else the last layer
    Options    quantile: of all reference activations, the most that one may be
    Learns     weight (C, D) and bias (C,) of the head, threshold ()
    Score      -log sum exp of the logits of min(features, threshold), unbounded
    Reference  Sun, Guo and Li, NeurIPS 2021, equations 2 and 3

    The quantile comes from one pass and a histogram, within 2^-11 of itself.
    """

    quantile: float = 0.9

    paper: ClassVar[Paper | None] = Paper(
        "ReAct: Out-of-distribution Detection With Rectified Activations",
        "Sun, Guo and Li",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2111.12797",
    )
    cost: ClassVar[str] = "C·D"

    def __post_init__(self) -> None:
        _share("react", "quantile", self.quantile)

    def learn(self, reference: Reference) -> State:
        """The head and the quantile; rows that are not finite are left out."""
        head = head_of(self, reference)
        width = head["weight"].shape[1]
        (threshold,) = _quantiles(self, reference, self.layer, width, (self.quantile,))
        return {**head, "threshold": threshold}

    def check(self, state: State) -> None:
        """The head's shapes and a scalar."""
        expect(self.name, state, {**HEAD, "threshold": ""})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Clip, mean over places, head, energy."""
        threshold = state["threshold"]
        rows = self._rows(acts, state)
        return energy(rowwise(rows, lambda part: pooled(part.clamp(max=threshold))), state)


@detectors.register("vra")
@dataclass(frozen=True)
class VRA(_Shaping):
    """Energy of features of which the small are suppressed and the large clipped.

    Reads      layers[layer]: what feeds the head, (B, D), (B, T, D) or (B, D, H, W); layer "": the
               penultimate features, else the last layer
    Options    lower and upper: quantiles of all reference activations
    Learns     weight (C, D) and bias (C,) of the head, lower () and upper ()
    Score      -log sum exp of the logits of f, with f = 0 up to lower, at most upper; unbounded
    Reference  Xu, Lian, Liu and Tao, NeurIPS 2023, equation 7

    The defaults are those that its authors run CIFAR-100 with; CIFAR-10 with 0.6 and 0.9, ImageNet
    with fixed values. pytorch-ood (defaults 0.01 and 0.99) raises what is below to the lower
    quantile and takes quantiles per position instead; that is another score, and the paper's point,
    a zero for weak evidence, is lost in it.
    """

    lower: float = 0.6
    upper: float = 0.95

    paper: ClassVar[Paper | None] = Paper(
        "VRA: Variational Rectified Activation for Out-of-distribution Detection",
        "Xu, Lian, Liu and Tao",
        "NeurIPS",
        2023,
        "https://arxiv.org/abs/2302.11716",
    )
    cost: ClassVar[str] = "C·D"

    def __post_init__(self) -> None:
        _share("vra", "lower", self.lower)
        _share("vra", "upper", self.upper)
        if self.lower > self.upper:
            raise ContractError(
                f"detectors.vra: lower {self.lower} is greater than upper {self.upper}"
            )

    def learn(self, reference: Reference) -> State:
        """The head and both quantiles in one pass; rows that are not finite are left out."""
        head = head_of(self, reference)
        width = head["weight"].shape[1]
        lower, upper = _quantiles(self, reference, self.layer, width, (self.lower, self.upper))
        lower = lower.clamp(min=_SMALLEST)
        return {**head, "lower": lower, "upper": torch.maximum(lower, upper)}

    def check(self, state: State) -> None:
        """The head's shapes and two scalars."""
        expect(self.name, state, {**HEAD, "lower": "", "upper": ""})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Suppress, clip, mean over places, head, energy."""
        lower, upper = state["lower"], state["upper"]
        rows = self._rows(acts, state)
        if rows.is_cpu:
            least = lower.item()

            def cut(part: Tensor) -> Tensor:
                return pooled(torch.threshold_(part.clamp(max=upper), least, 0.0))

            return energy(rowwise(rows, cut), state)
        per_lower, most = 1.0 / lower, upper / lower

        def shaped(part: Tensor) -> Tensor:
            # in units of `lower` its comparison is with a constant, which is one fast kernel
            part = torch.threshold_(part * per_lower, 1.0, 0.0)
            return pooled(torch.minimum(part, most, out=part)).mul_(lower)

        return energy(rowwise(rows, shaped), state)


@dataclass(frozen=True)
class _Pruning(_Shaping):
    """Shaping by the largest activations of each sample."""

    pruned: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.pruned < 1.0:
            raise ContractError(f"detectors.{self.name}.pruned: {self.pruned} is not in [0, 1)")

    def _kept(self, rows: Tensor) -> tuple[Tensor, int, Cut]:
        """The activations as (B, N), how many are kept, and where those begin.

        Only what is above zero is ever kept: a ReLU's zeros are no activations.
        """
        flat, count = rows.flatten(1), self._count(rows)
        cut = largest(flat, count)
        if cut.weight is None:
            return flat, count, cut
        return flat, count, Cut(cut.low.clamp_(min=0.0), cut.high.clamp_(min=0.0), cut.weight)

    def _count(self, rows: Tensor) -> int:
        """Activations of a sample that are kept, at least one."""
        width = rows.shape[1:].numel()
        return max(1, width - round(width * self.pruned))

    def _factor(self, before: Tensor, after: Tensor, rows: Tensor) -> Tensor | float:
        """exp(sum before / sum after), (B, 1), which is at most exp(N / k) after a ReLU."""
        most = min(rows.shape[1:].numel() / self._count(rows), _STEEPEST)
        if len(rows) == 1 and rows.is_cpu:  # four calls on a number cost as much as a head
            share = before.item() / max(after.item(), _SMALLEST)
            return math.exp(min(max(share, 0.0), most))
        # where nothing is above zero before is not either
        return before.div(after.clamp(min=_SMALLEST)).clamp_(min=0.0, max=most).exp_()


@detectors.register("scale")
@dataclass(frozen=True)
class SCALE(_Pruning):
    """Energy of features scaled up by how much of them lies in the largest.

    Reads      layers[layer]: what feeds the head, (B, D), (B, T, D) or (B, D, H, W); layer "": the
               penultimate features, else the last layer
    Options    pruned: share of a sample's activations that does not count as large
    Learns     weight (C, D) and bias (C,) of the head
    Score      -log sum exp of the logits of features · exp(sum / sum of the largest), unbounded
    Reference  Xu, Chen, Franchi and Yao, ICLR 2024, equations 5 and 6

    Nothing is pruned: the largest only decide the factor, which is applied after the mean over
    places. The factor of a sample of nothing but zeros is one.
    Trap: the paper's large activations are those of a map. Where the head takes a map's mean, name
    the layer of that map (such as `layer: stage3`): on a ResNet-20 CIFAR-100 is told by 0.86 of
    AUROC from the map, and by 0.74 from its mean.
    """

    pruned: float = 0.85

    paper: ClassVar[Paper | None] = Paper(
        "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement",
        "Xu, Chen, Franchi and Yao",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2310.00227",
    )
    cost: ClassVar[str] = "D·HW"

    def score(self, acts: Activations, state: State) -> Tensor:
        """The k largest sum to k t + sum max(x - t, 0) for t the k-th largest."""
        rows = self._rows(acts, state)

        flat, count, cut = self._kept(rows)
        above = (flat - cut.high).clamp_(min=0.0).sum(dim=1, keepdim=True)
        after = above.add_(cut.high, alpha=count)
        features = pooled(rows)
        before = features.sum(dim=1, keepdim=True) * rows.shape[2]
        return energy(features, state, self._factor(before, after, rows))


@detectors.register("ash")
@dataclass(frozen=True)
class ASH(_Pruning):
    """Energy of features of which only each sample's largest are kept.

    Reads      layers[layer]: what feeds the head, (B, D), (B, T, D) or (B, D, H, W); layer "": the
               penultimate features, else the last layer
    Options    pruned: share of a sample's activations that is set to zero; kind: what becomes of
               the others: "s" scaled by exp(sum before / sum after), "p" nothing, "b" all equal,
               with the sum that there was
    Learns     weight (C, D) and bias (C,) of the head
    Score      -log sum exp of the logits of the shaped features, unbounded
    Reference  Djurisic, Bozanic, Ashok and Liu, ICLR 2023, algorithms 1 to 3

    Values that share the last place share it evenly, and zeros are never kept, so the score does
    not depend on the order of the units; libraries keep whichever of them comes first.
    Trap: far worse than chance on models without a ReLU before the head (transformers), and where
    novel samples have larger features than known ones, as on small networks that were trained
    briefly (AUROC 0.37 on FashionMNIST against MNIST). And as for `scale`, where the head takes a
    map's mean name the layer of the map: 0.85 from the map, 0.43 from its mean.
    """

    kind: Literal["s", "p", "b"] = "s"

    paper: ClassVar[Paper | None] = Paper(
        "Extremely Simple Activation Shaping for Out-of-Distribution Detection",
        "Djurisic, Bozanic, Ashok and Liu",
        "ICLR",
        2023,
        "https://arxiv.org/abs/2209.09858",
    )
    cost: ClassVar[str] = "D·HW"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("s", "p", "b"):
            raise ContractError(f"detectors.ash.kind: {self.kind!r} is none of 's', 'p' and 'b'")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"pruned": 0.6}, {"kind": "p", "layer": "stage"}, {"kind": "b", "pruned": 0.6})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Prune, mean over places, head, energy; a factor is applied after the mean."""
        rows = self._rows(acts, state)
        flat, count, cut = self._kept(rows)
        binary = self.kind == "b"
        kept = pooled((cut.share(flat) if binary else cut.kept(flat)).view_as(rows))
        if self.kind == "p":
            return energy(kept, state)
        before = flat.sum(dim=1, keepdim=True)
        if binary:
            return energy(kept, state, before / count)
        after = kept.sum(dim=1, keepdim=True).mul_(rows.shape[2])
        return energy(kept, state, self._factor(before, after, rows))
