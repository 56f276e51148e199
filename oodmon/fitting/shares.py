"""The two disjoint shares of the reference: in memory, and beyond a limit in temporary files.

Known outliers are in neither: they are kept for the detectors that learn from such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oodmon.detectors.outliers import OUTLIER
from oodmon.fitting.placed import Places, joined
from oodmon.records import Activations

__all__ = ["Kept", "Shares", "moved"]

_MEMORY_BYTES: Final = 1 << 30
"""Of activations that each share keeps in memory."""


@dataclass(slots=True)
class Kept:
    """Activations in memory, and beyond a limit in files of a folder; read as often as wanted."""

    folder: Path
    rows: int = 0
    _held: list[Activations | Path] = field(default_factory=list)
    _bytes: int = 0

    def add(self, acts: Activations) -> None:
        """Keep one batch."""
        if not acts.rows:
            return
        self.rows += acts.rows
        tensors = _tensors(acts)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes + size <= _MEMORY_BYTES:
            self._bytes += size
            self._held.append(acts)
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{len(self._held)}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        self._held.append(path)

    def batches(self) -> Iterator[Activations]:
        """What was kept, in order."""
        for held in self._held:
            yield held if isinstance(held, Activations) else _restored(load_file(held))


@dataclass(slots=True)
class Shares:
    """The two shares of the reference; each sample goes to one of them by a seeded draw.

    With a `run` above 1, whole runs of so many neighbours go to one of them, evenly spread: what
    stands beside each other in the data then does so in its share.
    """

    folder: Path
    learn_share: float
    seed: int
    run: int = 1
    learn: Kept = field(init=False)
    calibrate: Kept = field(init=False)
    outliers: Kept = field(init=False)
    _draw: np.random.Generator = field(init=False)
    _right: int = 0
    _labelled: int = 0
    _held_right: int = 0
    _held_labelled: int = 0
    _seen: int = 0
    _labels: Counter[int] = field(default_factory=Counter)
    _places: list[tuple[Places, npt.NDArray[np.bool_]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = np.random.default_rng([self.seed, 1])
        self.learn = Kept(self.folder / "learn")
        self.calibrate = Kept(self.folder / "calibrate")
        self.outliers = Kept(self.folder / "outliers")

    def add(self, acts: Activations, places: Places = MappingProxyType({})) -> None:
        """Take one labelled batch, and when and where its samples were seen."""
        acts = moved(acts, torch.device("cpu"))
        held = np.ones(acts.rows, np.bool_)
        if acts.labels is not None and bool((acts.labels == OUTLIER).any()):
            known = acts.labels == OUTLIER
            self.outliers.add(_rows(acts, known))
            acts = _rows(acts, ~known)
            held = ~known.numpy()
        chosen = torch.from_numpy(self.choose(acts.rows))
        self.learn.add(_rows(acts, chosen))
        self.calibrate.add(_rows(acts, ~chosen))
        held[held] = ~chosen.numpy()
        self._places.append((places, held))
        # A single logit has no class that would be the largest.
        if acts.labels is not None and acts.logits is not None and acts.logits.shape[1] > 1:
            self._labels.update(acts.labels.tolist())
            right = acts.logits.argmax(1) == acts.labels
            self._right += int(right.sum())
            self._labelled += acts.rows
            self._held_right += int(right[~chosen].sum())
            self._held_labelled += int((~chosen).sum())

    def choose(self, rows: int) -> npt.NDArray[np.bool_]:
        """Which of the next rows are to learn from; each call goes on where the last one ended."""
        if self.run == 1:
            return self._draw.random(rows) < self.learn_share
        runs = (self._seen + np.arange(rows)) // self.run
        self._seen += rows
        before, after = np.floor(runs * self.learn_share), np.floor((runs + 1) * self.learn_share)
        chosen: npt.NDArray[np.bool_] = after > before
        return chosen

    @property
    def places(self) -> Places:
        """When and where the samples that calibrate were seen, in their order."""
        return joined(self._places)

    @property
    def held(self) -> tuple[int, int]:
        """Labelled samples among those that calibrate, and how many were answered wrongly."""
        return self._held_labelled, self._held_labelled - self._held_right

    @property
    def accuracy(self) -> float:
        """The model's on the labelled samples, NaN where there are none."""
        return self._right / self._labelled if self._labelled else float("nan")

    @property
    def commonest(self) -> float:
        """Share of the commonest label: what a model that has learnt nothing can reach."""
        return max(self._labels.values(), default=0) / max(self._labelled, 1)


def _tensors(acts: Activations) -> dict[str, Tensor]:
    named = {f"layers/{name}": tensor for name, tensor in acts.layers.items()}
    for name in ("logits", "inputs", "labels"):
        tensor = getattr(acts, name)
        if tensor is not None:
            named[name] = tensor
    return named


def _restored(tensors: Mapping[str, Tensor]) -> Activations:
    return Activations(
        layers={
            name.removeprefix("layers/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("layers/")
        },
        logits=tensors.get("logits"),
        inputs=tensors.get("inputs"),
        labels=tensors.get("labels"),
    )


def _rows(acts: Activations, chosen: Tensor) -> Activations:
    return _restored({name: tensor[chosen] for name, tensor in _tensors(acts).items()})


def moved(acts: Activations, device: torch.device) -> Activations:
    """The same activations on another device."""
    return _restored({name: tensor.to(device) for name, tensor in _tensors(acts).items()})
