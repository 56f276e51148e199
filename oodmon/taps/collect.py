"""A tap run to the end over given batches, for scripts that read a reference through a model.

What a serving tap only counts is an error here, since nothing is served: a layer without a row per
sample, an output without logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oodmon.contracts import Reads, Tap, Visit
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["LastPass", "collect"]


@dataclass(frozen=True, slots=True)
class _Pass:
    observed_at: int = 0


@dataclass(slots=True)
class LastPass:
    """An intake that wants every pass and keeps the last.

    Attributes:
        acts: what was read of it; none where nothing was.
        complaint: what could not be read, and why; "" where all was.
    """

    acts: Activations | None = None
    complaint: str = ""

    def admit(self, rows: int) -> Visit | None:
        """Every pass is wanted."""
        del rows
        self.acts, self.complaint = None, ""
        return _Pass()

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        """Keep it."""
        del visit, tap_seconds
        self.acts, self.complaint = acts, remark

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        """Remember why, for the message."""
        del visit, rows
        self.complaint = why or "the model returned nothing"

    def room(self) -> bool:
        """There is always room."""
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
    last = LastPass()
    attached = tap.attach(model, reads, last)
    try:
        for inputs, labels in batches:
            last.acts, last.complaint = None, ""
            args, kwargs = _arguments(inputs, device)
            with torch.no_grad():
                model(*args, **kwargs)
            acts = last.acts
            if last.complaint or acts is None:
                raise ContractError(last.complaint or "the tap read nothing in a forward pass")
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
