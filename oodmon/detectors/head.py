"""The classifier's own last layer, applied again to features that were changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Reference, State
from oodmon.detectors.features import given_head
from oodmon.detectors.odds import log_partition_of
from oodmon.errors import ContractError

__all__ = ["HEAD", "energy", "head_of", "places", "pooled", "rowwise"]

HEAD: Final[Mapping[str, str]] = {"weight": "C D", "bias": "C"}
"""Shapes of the state that `head_of` makes."""

_AT_ONCE: Final = 1 << 17
"""Values worked on at once: what is read is still in the cache when it is read again."""


def head_of(detector: Detector, reference: Reference) -> State:
    """The head's weight (C, D) and bias (C,), float32; `ContractError` where none is known."""
    if reference.head is None:
        raise ContractError(
            f"{detector.name}: the reference knows no classifier head, and this detector applies "
            "it again; give the reference `head=(weight, bias)`"
        )
    found = given_head(detector, reference, reference.head[0].shape[-1])
    if found is None:
        raise ContractError(f"{detector.name}: the reference knows no classifier head")
    return {"weight": found[0].float(), "bias": found[1].float()}


def places(layer: Tensor, width: int, name: str) -> Tensor:
    """What feeds the head, (B, D, P) float32: D features at P places, of which the mean is taken.

    Vectors (B, D) have one place, maps (B, D, H, W) have H·W, token sequences (B, T, D) have T;
    maps that the head takes flattened, D = C·H·W, have one.
    """
    rows = layer.float()
    if rows.ndim == 2 and rows.shape[1] == width:
        return rows.unsqueeze(2)
    if rows.ndim == 3 and rows.shape[2] == width:
        return rows.transpose(1, 2)
    if rows.ndim > 3 and rows.shape[1] == width:
        return rows.flatten(2)
    if rows.ndim > 2 and rows.shape[1:].numel() == width:
        return rows.flatten(1).unsqueeze(2)
    raise ContractError(
        f"{name}: the head takes {width} features, and the layer has {tuple(layer.shape)}; "
        "name the layer that feeds the head"
    )


def pooled(values: Tensor) -> Tensor:
    """Mean over the places: (B, D, P) → (B, D)."""
    count = values.shape[2]
    if count == 1:
        return values.squeeze(2)
    # a product with a vector reads memory once; a mean over so few values does not
    return values @ _evenly(count, values.dtype, values.device)


@functools.lru_cache(maxsize=16)
def _evenly(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.full((count,), 1.0 / count, dtype=dtype, device=device)


def rowwise(values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` on a cache's worth of rows at a time, (b, …) → (b, …), where there are many."""
    if not values.is_cpu or values.numel() <= _AT_ONCE:
        return change(values)
    size = max(1, _AT_ONCE * len(values) // values.numel())
    parts = [change(values[start : start + size]) for start in range(0, len(values), size)]
    return torch.cat(parts)


def energy(features: Tensor, state: State, factor: Tensor | float | None = None) -> Tensor:
    """-log sum exp of the head's logits, (B,), for features (B, D) times a factor (B, 1)."""
    weight, bias = state["weight"], state["bias"]
    rows = features if factor is None else features * factor
    logits = functional.linear(rows, weight, bias)
    return log_partition_of(logits).neg_()
