"""Features of a layer as vectors: the one pooling, the layer that is chosen, the head they feed.

Every detector of features reads a layer through `features`, so the pooling is done once per batch
however many detectors read it, and all of them mean the same vector by the same layer's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Reads, Reference
from oodmon.detectors.logits import predicted, two_sided
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = [
    "LOGITS",
    "PENULTIMATE",
    "SOFTMAX",
    "Labels",
    "choose",
    "features",
    "given_head",
    "joined",
    "labels_of",
    "reads_of",
    "unit",
    "width_of",
]

PENULTIMATE: Final = "penultimate"
"""The input of the model's head, as the tap names it."""

LOGITS: Final = "logits"
SOFTMAX: Final = "softmax"
"""In the place of a layer's name: the logits, or their softmax, are the features."""

Labels = Literal["true", "predicted"]
"""Which class a reference row counts for: its label, or the model's answer."""


def choose(layers: Sequence[str]) -> str:
    """The layer to read where none was named: the penultimate one, else the last; "" of none."""
    if PENULTIMATE in layers:
        return PENULTIMATE
    return layers[-1] if layers else ""


def reads_of(*layers: str, logits: bool = False, labels: bool = False) -> Reads:
    """`Reads` for these layers, of which `LOGITS` and `SOFTMAX` are none."""
    tapped = tuple(layer for layer in layers if layer and layer not in (LOGITS, SOFTMAX))
    of_logits = any(layer in (LOGITS, SOFTMAX) for layer in layers)
    return Reads(layers=tapped, logits=logits or of_logits, labels=labels)


def features(acts: Activations, layer: str) -> Tensor:
    """The layer's features, (B, D) float32: what is more than a vector per row is averaged.

    Maps (B, C, H, W) and other tensors of four or more dimensions are averaged over their places,
    token sequences (B, T, D) over T. `LOGITS` and `SOFTMAX` stand for the logits and their softmax,
    where no layer has that name. Shared between the detectors of a batch.
    """
    if layer in (LOGITS, SOFTMAX) and layer not in acts.layers:
        return acts.shared(f"features.{layer}", lambda: _of_logits(acts, layer))
    return acts.shared(f"features.{layer}", lambda: _pooled(acts.layer(layer), layer))


def unit(acts: Activations, layer: str) -> Tensor:
    """The features at length 1, (B, D) float32; features of nothing but zeros stay zeros."""

    def compute() -> Tensor:
        rows = features(acts, layer)
        # the largest value first: the squares of a half-precision model's features stay in range
        largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows
        rows = rows / largest.masked_fill(largest == 0.0, 1.0)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        found: Tensor = rows / length.masked_fill(length == 0.0, 1.0)
        return found

    return acts.shared(f"features.unit.{layer}", compute)


def joined(acts: Activations, layers: Sequence[str]) -> Tensor:
    """The features of several layers side by side, (B, sum of D)."""
    if len(layers) == 1:
        return features(acts, layers[0])
    return acts.shared(
        f"features.joined.{layers}",
        lambda: torch.cat([features(acts, layer) for layer in layers], dim=1),
    )


def width_of(detector: Detector, layer: str, rows: Tensor, width: int) -> Tensor:
    """The rows themselves; `ContractError` unless they have the width that was learnt."""
    if rows.shape[1] != width:
        raise ContractError(
            f"{detector.name}: layer {layer!r}: learnt with {width} features, found {rows.shape[1]}"
        )
    return rows


def labels_of(detector: Detector, acts: Activations, which: Labels) -> Tensor:
    """Class of each reference row, (B,) int64; `ContractError` where it is not known."""
    if which == "predicted":
        return predicted(acts)
    if acts.labels is None:
        raise ContractError(
            f"{detector.name}: the reference has no labels; give them, or set `labels: predicted`"
        )
    return acts.labels


def given_head(
    detector: Detector, reference: Reference, width: int
) -> tuple[Tensor, Tensor] | None:
    """Weight (C, D) and bias (C,) in float64, C >= 2, or none where the reference knows no head.

    One logit of a binary model becomes two, as in `logits.two_sided`. `ContractError` where the
    head does not fit features of this width.
    """
    if reference.head is None:
        return None
    weight, bias = (tensor.double() for tensor in reference.head)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ContractError(
            f"{detector.name}: the head's weight is {tuple(weight.shape)}, and the layer has "
            f"{width} features; name the layer that feeds the head"
        )
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias


def _of_logits(acts: Activations, layer: str) -> Tensor:
    logits = two_sided(acts).float()
    return logits if layer == LOGITS else logits.softmax(dim=1)


def _pooled(layer: Tensor, name: str) -> Tensor:
    if layer.ndim < 2:
        raise ContractError(f"layer {name!r}: expected (B, D) or more, found {tuple(layer.shape)}")
    if layer.ndim == 2:
        return layer.float()
    places = 1 if layer.ndim == 3 else tuple(range(2, layer.ndim))
    return layer.mean(dim=places, dtype=torch.float32)
