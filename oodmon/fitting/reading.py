"""The tapped model over a data set, so that what is read here is what serving will read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from oodmon.contracts import Detector, Probe, Reads, Tap
from oodmon.errors import ContractError
from oodmon.fitting.sources import Batch
from oodmon.records import Activations
from oodmon.taps.collect import LastPass
from oodmon.taps.twin import Twin

__all__ = ["Reading", "offered", "place_of", "probe_of", "reads_of"]


def reads_of(detectors: Iterable[Detector]) -> Reads:
    """What all detectors together read, and the logits for the model's accuracy."""
    all_reads = [detector.reads() for detector in detectors]
    layers = dict.fromkeys(layer for reads in all_reads for layer in reads.layers)
    return Reads(
        tuple(layers),
        logits=True,
        inputs=any(reads.inputs for reads in all_reads),
        model=any(reads.model for reads in all_reads),
    )


def place_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters(), torch.empty(0)).device


def offered(tap: Tap, model: nn.Module) -> tuple[str, ...]:
    """The layers that the tap would read in this model; empty of a tap that cannot tell."""
    found: tuple[str, ...] = tap.offers(model) if hasattr(tap, "offers") else ()
    return found


def probe_of(tap: Tap, model: nn.Module, reads: Reads) -> Probe | None:
    """Further passes through the model, called as the tap does; none where nothing needs them."""
    made: Probe | None = getattr(tap, "twin", Twin)(model) if reads.model else None
    return made


class Reading:
    """A model with its tap attached, in evaluation mode; at the end it is left as it was.

    Use it as a context. `found` says what the tap reads, one sentence each.
    """

    def __init__(self, model: nn.Module, tap: Tap, reads: Reads) -> None:
        self._model = model
        self._device = place_of(model)
        self._modes = [(module, module.training) for module in model.modules()]
        self._seen = LastPass()
        self._attached = tap.attach(model, reads, self._seen)
        self.found = self._attached.found

    def __enter__(self) -> Self:
        self._model.eval()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._attached.detach()
        for module, training in self._modes:
            module.training = training

    def read(self, batch: Batch) -> Activations:
        """What the tap saw of this batch, with its labels; one pass without gradients.

        `ContractError` says what the model was called with where it raises.
        """
        try:
            with torch.no_grad():
                self._model(*_on(batch.arguments, self._device), **_on(batch.named, self._device))
        except Exception as error:
            given = ", ".join(
                [
                    *map(_shape, batch.arguments),
                    *(f"{n}={_shape(v)}" for n, v in batch.named.items()),
                ]
            )
            raise ContractError(
                f"the model cannot be called with ({given}), which the data gives: "
                f"{type(error).__name__}: {error}"
            ) from error
        return dataclasses.replace(self._last_pass(batch), labels=batch.labels)

    def _last_pass(self, batch: Batch) -> Activations:
        """What the tap saw of the batch that just went through."""
        acts = self._seen.acts
        if acts is None:
            why = self._seen.complaint or "no pass ended"
            raise ContractError(f"the tap read nothing of a batch: {why}")
        if acts.rows != batch.rows or (batch.labels is not None and len(batch.labels) != acts.rows):
            labels = "no" if batch.labels is None else str(len(batch.labels))
            raise ContractError(
                f"a batch of {batch.rows} inputs and {labels} labels gave {acts.rows} rows"
            )
        return acts


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _on(values: Any, device: torch.device) -> Any:
    if isinstance(values, Mapping):
        return {name: _on(value, device) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_on(value, device) for value in values)
    return values.to(device) if isinstance(values, Tensor) else values
