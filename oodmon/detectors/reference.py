"""In-distribution data that detectors learn from: arrays in memory, or batches made on demand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy.typing as npt
import torch
from torch import Tensor

from oodmon.contracts import Probe
from oodmon.contracts import Reference as ReferenceContract
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["Reference", "gather", "layer_names", "part_of", "rows_of"]

Array = Tensor | npt.NDArray[Any]
Progress = Callable[[float, str], None]

_GATHER_SLACK: Final = 2
"""A full sample is thinned out when it has grown to this many times its limit."""


class Reference:
    """Labelled in-distribution batches, in the same order at each pass.

    Make one with `from_arrays` or `from_batches`.

    Args:
        batches: called once per pass; gives an iterator of `Activations`.
        head: weight (C, D) and bias (C,) of the classifier head, if known.
        seed: of the generator that detectors draw from.
        device: where every tensor is brought.
        progress: called with the share of the work done, in [0, 1], and a note.
        probe: passes through the model that the batches come from, for detectors that need them.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Activations]],
        head: tuple[Array, Array] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        progress: Progress | None = None,
        probe: Probe | None = None,
    ) -> None:
        self._batches = batches
        self._device = torch.device(device)
        self._head = (
            None if head is None else (self._bring(head[0]).detach(), self._bring(head[1]).detach())
        )
        self._seed = seed
        self._progress = progress
        self._probe = probe

    @classmethod
    def from_arrays(
        cls,
        layers: Mapping[str, Array] | None = None,
        logits: Array | None = None,
        inputs: Array | None = None,
        labels: Array | None = None,
        head: tuple[Array, Array] | None = None,
        seed: int = 0,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        progress: Progress | None = None,
        probe: Probe | None = None,
    ) -> Reference:
        """Arrays or tensors with one row per sample; `ContractError` names one that disagrees."""
        tensors: dict[str, Tensor] = {
            f"layers[{name!r}]": torch.as_tensor(array) for name, array in (layers or {}).items()
        }
        for what, array in (("logits", logits), ("inputs", inputs), ("labels", labels)):
            if array is not None:
                tensors[what] = torch.as_tensor(array)
        if not tensors:
            raise ContractError("a reference needs layers, logits or inputs; none were given")
        rows = next(iter(tensors.values())).shape[0]
        for what, tensor in tensors.items():
            if tensor.ndim == 0 or tensor.shape[0] != rows:
                raise ContractError(
                    f"reference: {what} has shape {tuple(tensor.shape)}, others have {rows} rows"
                )
        if batch_size < 1:
            raise ContractError(f"batch_size: {batch_size} is not positive")
        names = tuple(layers or {})

        def batches() -> Iterator[Activations]:
            for start in range(0, rows, batch_size):
                part = {
                    what: tensor[start : start + batch_size] for what, tensor in tensors.items()
                }
                yield Activations(
                    layers={name: part[f"layers[{name!r}]"] for name in names},
                    logits=part.get("logits"),
                    inputs=part.get("inputs"),
                    labels=part.get("labels"),
                )

        return cls(batches, head=head, seed=seed, device=device, progress=progress, probe=probe)

    @classmethod
    def from_batches(
        cls,
        batches: Callable[[], Iterator[Activations]],
        head: tuple[Array, Array] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        progress: Progress | None = None,
        probe: Probe | None = None,
    ) -> Reference:
        """Batches made on demand, such as forward passes over a data set.

        `batches` is called once per pass and must give the same batches each time.
        """
        return cls(batches, head=head, seed=seed, device=device, progress=progress, probe=probe)

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (C, D) and bias (C,) of the classifier head, if known."""
        return self._head

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self._device

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, seeded the same at each call."""
        return torch.Generator().manual_seed(self._seed)

    def progress(self, done: float, note: str = "") -> None:
        """Report the share of the work that is done, in [0, 1]."""
        if self._progress is not None:
            self._progress(min(max(done, 0.0), 1.0), note)

    def __iter__(self) -> Iterator[Activations]:
        for acts in self._batches():
            yield Activations(
                layers={name: self._bring(tensor) for name, tensor in acts.layers.items()},
                logits=None if acts.logits is None else self._bring(acts.logits),
                inputs=None if acts.inputs is None else self._bring(acts.inputs),
                labels=None if acts.labels is None else self._bring(acts.labels).long(),
                sample_ids=acts.sample_ids,
                observed_at=acts.observed_at,
                probe=self._probe or acts.probe,
            )

    def _bring(self, array: Array) -> Tensor:
        return torch.as_tensor(array).detach().to(self._device)


def layer_names(reference: ReferenceContract) -> tuple[str, ...]:
    """Names of the layers of the first batch, in its order; empty when there is no batch."""
    for acts in itertools.islice(iter(reference), 1):
        return tuple(acts.layers)
    return ()


def part_of(acts: Activations, chosen: Tensor) -> Activations:
    """Some rows of a reference's batch, by a mask (B,) or their numbers."""
    return Activations(
        layers={name: tensor[chosen] for name, tensor in acts.layers.items()},
        logits=None if acts.logits is None else acts.logits[chosen],
        inputs=None if acts.inputs is None else acts.inputs[chosen],
        labels=None if acts.labels is None else acts.labels[chosen],
        probe=acts.probe,
    )


def rows_of(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of each tensor where the mask (B,) holds."""
    return tuple(tensor[mask] for tensor in tensors)


def gather(
    reference: ReferenceContract,
    read: Callable[[Activations], tuple[Tensor, ...]],
    limit: int,
) -> tuple[Tensor, ...]:
    """What `read` takes from each batch, for at most `limit` rows, in the reference's order.

    Above the limit it is a uniform sample without replacement (the rows with the smallest of
    random keys from the reference's generator), so that one pass and bounded memory are enough.
    Rows that hold a value that is not finite are left out. The tensors are normal ones even if
    the batches were made in inference mode.
    """
    draw = reference.generator()
    kept: list[tuple[Tensor, ...]] = []
    keys: list[Tensor] = []
    held = 0
    with torch.inference_mode(mode=False), torch.no_grad():
        for acts in reference:
            columns = read(acts)
            key = torch.rand(columns[0].shape[0], generator=draw, dtype=torch.float64)
            finite = torch.ones(columns[0].shape[0], dtype=torch.bool, device=columns[0].device)
            for column in columns:
                if column.is_floating_point():
                    width = math.prod(column.shape[1:])  # no -1: a batch may have no rows
                    finite &= column.isfinite().reshape(len(column), width).all(dim=1)
            kept.append(rows_of(finite, *columns))
            keys.append(key[finite.cpu()])
            held += len(keys[-1])
            if held > _GATHER_SLACK * limit:
                kept, keys = _thin(kept, keys, limit)
                held = limit
        if held > limit:
            kept, keys = _thin(kept, keys, limit)
        if not kept or not sum(len(key) for key in keys):
            raise ContractError("the reference holds no row that is finite; nothing to learn from")
        return tuple(torch.cat([columns[i] for columns in kept]) for i in range(len(kept[0])))


def _thin(
    kept: list[tuple[Tensor, ...]], keys: list[Tensor], limit: int
) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
    key = torch.cat(keys)
    chosen = key.argsort(stable=True)[:limit].sort().values
    columns = tuple(torch.cat([part[i] for part in kept]) for i in range(len(kept[0])))
    return [tuple(column[chosen.to(column.device)] for column in columns)], [key[chosen]]
