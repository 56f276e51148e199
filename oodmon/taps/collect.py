"""A tap run to the end over given batches: how `oodmon fit` reads a reference through a model.

What a serving tap only counts is an error here, since nothing is served: a layer without a row per
sample, an output without logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oodmon.contracts import Reads, Tap, Visit
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["collect"]


@dataclass(frozen=True, slots=True)
class _Pass:
    observed_at: int = 0


@dataclass
class _Gather:
    """An intake that keeps the last pass and its complaint."""

    taken: list[Activations] = field(default_factory=list)
    complaint: str = ""

    def admit(self, rows: int) -> Visit | None:
        del rows
        return _Pass()

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        del visit, tap_seconds
        self.taken.append(acts)
        self.complaint = remark

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        del visit, rows
        self.complaint = why or "the model returned nothing"

    def room(self) -> bool:
        return True


def collect(
    model: nn.Module,
    tap: Tap,
    reads: Reads,
    batches: Iterable[tuple[Any, Tensor | None]],
) -> Iterator[Activations]:
    """Run the model over the batches and yield what the tap reads, one `Activations` per batch.

    Args:
        model: called as it is, without gradients; put it in eval mode first.
        batches: (input, labels) pairs; an input that is a tuple or a dict is spread over the
            model's arguments. Tensors are moved to the model's device.

    Raises:
        ContractError: naming layer, expected and found, where a batch could not be read.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    gather = _Gather()
    attached = tap.attach(model, reads, gather)
    try:
        for inputs, labels in batches:
            gather.taken.clear()
            gather.complaint = ""
            args, kwargs = _arguments(inputs, device)
            with torch.no_grad():
                model(*args, **kwargs)
            if gather.complaint or not gather.taken:
                raise ContractError(gather.complaint or "the tap read nothing in a forward pass")
            acts = gather.taken[-1]
            missing = [name for name in reads.layers if name not in acts.layers]
            if missing:
                raise ContractError(
                    f"layer {missing[0]!r}: expected to run in every forward pass, found no call; "
                    "a compiled model must be tapped before its first pass"
                )
            if labels is not None:
                acts = dataclasses.replace(acts, labels=labels.to(device))
            yield acts
    finally:
        attached.detach()


def _arguments(inputs: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, dict):
        return (), {name: moved(value) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(moved(value) for value in inputs), {}
    return (moved(inputs),), {}
