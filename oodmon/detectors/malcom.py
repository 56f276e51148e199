"""How well feature maps compress beside the usual ones: structure that averages do not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import Labels, features, labels_of
from oodmon.detectors.mahalanobis import nearest, squared_length
from oodmon.detectors.moments import Shrinkage, covariance, moments, whitener
from oodmon.detectors.options import check_options
from oodmon.detectors.phrases import SYMBOLS, compression_distance, hilbert_order
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Malcom"]

_CELLS: Final = 16
"""Of each map of the reference, so many cells decide the levels: all would be too many to hold."""

_VALUES: Final = 65_536
"""Cells per channel that are kept at most."""

_STEPS: Final = 10
"""Of the quantiser's iteration (Lloyd), as released."""


@detectors.register("malcom")
@dataclass(frozen=True)
class Malcom(Detector):
    """Mahalanobis distance over channel means and how each channel's map compresses beside its own.

    Every channel's map is read along a curve as a string of four levels, and its normalised
    compression distance to the channel's typical map stands beside its mean.

    Reads      layers: maps (B, C, H, W) or tokens (B, T, C); vectors (B, D) enter as they are;
               labels while learning
    Learns     per layer thresholds.i (C, 3) between the levels and typical.i (C, H·W), the levels
               of the mean map; of all F features center (F,), whitener (F, F), means (K, F)
    Score      min_k (x - mean_k)ᵀ Σ⁻¹ (x - mean_k), >= 0
    Reference  Yu, Lee and Yu, IJCAI 2020

    Options: `layers`, empty for all that are tapped. `scan` "hilbert" (neighbours stay neighbours)
    or "rows". `compression` off leaves the channel means alone. `shrinkage` of the covariance and
    `labels` as of `mahalanobis`.

    Learns in three passes. Counting phrases takes 3·H·W steps that nothing can do at once: some
    1,000 samples a second for 64 channels of 7×7, and less for larger maps, so name late layers.
    Features that never varied in the reference count for nothing. All maps of a layer must have
    the size that was learnt. One string says little: the phrases of a short string are a coarse
    measure, and what there is to see is in the mean over many channels. On easy pairs (clothes
    against digits) compression adds nothing to the channel means.
    """

    layers: tuple[str, ...] = ()
    scan: Literal["hilbert", "rows"] = "hilbert"
    compression: bool = True
    shrinkage: Shrinkage = "oas"
    labels: Labels = "true"

    paper: ClassVar[Paper | None] = Paper(
        "Convolutional Neural Networks with Compression Complexity Pooling for Out-of-Distribution "
        "Image Detection",
        "Yu, Lee and Yu",
        "IJCAI",
        2020,
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "3·D·HW + D²"

    def __post_init__(self) -> None:
        check_options(self)
        if len(set(self.layers)) < len(self.layers):
            raise ContractError(f"detectors.malcom.layers: {self.layers} names a layer twice")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"layers": ("stage",), "scan": "rows"}, {"compression": False})

    def pin(self, layers: Sequence[str]) -> Malcom:
        """All layers that are tapped, where none was named."""
        return self if self.layers else dataclasses.replace(self, layers=tuple(layers))

    def reads(self) -> Reads:
        """Its layers; the logits where they give the labels."""
        given = self.labels == "true"
        return Reads(layers=self.layers, logits=not given, labels=given)

    def learn(self, reference: Reference) -> State:
        """Levels from a sample of cells, typical maps from the mean map, then moments."""
        if not self.layers:
            raise ContractError("detectors.malcom.layers is empty, and no layer was tapped")
        state: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            cells, mean = self._sample(reference, layer)
            thresholds = _levels(cells)
            state[f"thresholds.{number}"] = thresholds
            state[f"typical.{number}"] = _typical(mean, _strings(cells, thresholds)).float()

        def read(acts: Activations) -> tuple[Tensor, ...]:
            return self._features(acts, state), labels_of(self, acts, self.labels)

        (found,) = moments(reference, read, note="malcom: moments")
        # both halves in units of their own spread, or the smaller one is lost in the larger
        spread = (found.within.diagonal() / found.rows).sqrt()
        scale = torch.where(spread > 0.0, 1.0 / spread, 0.0)
        scatter = found.within * scale * scale[:, None]
        white = whitener(covariance(scatter, found.rows, self.shrinkage)) * scale[:, None]
        means = (found.means[found.present] - found.mean) @ white
        reference.progress(1.0, "malcom: done")
        learnt = {"center": found.mean, "whitener": white, "means": means}
        return {**state, **{name: tensor.float() for name, tensor in learnt.items()}}

    def check(self, state: State) -> None:
        """Per layer thresholds (C, 3) and typical (C, P); center (F,), whitener and means."""
        per_layer = [
            f"{name}.{number}"
            for number in range(len(self.layers))
            for name in ("thresholds", "typical")
        ]
        wanted = {"center", "whitener", "means", *per_layer}
        if set(state) != wanted:
            raise StateError(f"malcom: state: expected {sorted(wanted)}, found {sorted(state)}")
        width = len(state["center"])
        fits = state["whitener"].shape == (width, width) and state["means"].shape[1:] == (width,)
        for number in range(len(self.layers)):
            thresholds, typical = state[f"thresholds.{number}"], state[f"typical.{number}"]
            fits &= thresholds.shape == (len(typical), SYMBOLS - 1) and typical.ndim == 2
        if not fits or any(tensor.dtype != torch.float32 for tensor in state.values()):
            found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
            raise StateError(
                "malcom: state: expected float32 thresholds (C, 3) and typical (C, P) per layer, "
                f"center (F,), whitener (F, F), means (K, F), found {found}"
            )

    def score(self, acts: Activations, state: State) -> Tensor:
        """Squared distance to the nearest class mean."""
        rows = self._features(acts, state)
        center = state["center"]
        if rows.shape[1] != len(center):
            raise ContractError(
                f"malcom: layers {self.layers}: learnt with {len(center)} features, found "
                f"{rows.shape[1]}"
            )
        white = (rows - center) @ state["whitener"]
        means = state["means"]
        return squared_length(white - means[nearest(white, means)])

    def _features(self, acts: Activations, state: State) -> Tensor:
        """Channel means and compression distances of all layers, (B, F)."""
        columns = []
        for number, layer in enumerate(self.layers):
            columns.append(features(acts, layer))
            typical = state[f"typical.{number}"]
            if not len(typical):
                continue
            maps = self._maps(acts, layer)
            if maps is None or maps.shape[1:] != typical.shape:
                found = tuple(acts.layer(layer).shape[1:])
                raise ContractError(
                    f"malcom: layer {layer!r}: learnt from {typical.shape[0]} channels of "
                    f"{typical.shape[1]} places, found {found}"
                )
            strings = _strings(maps, state[f"thresholds.{number}"])
            columns.append(compression_distance(strings, typical.to(torch.int64)))
        return torch.cat(columns, dim=1)

    def _maps(self, acts: Activations, layer: str) -> Tensor | None:
        """(B, C, P) float32 along the curve, or none for vectors."""
        tensor = acts.layer(layer)
        if not self.compression or tensor.ndim < 3:
            return None
        if tensor.ndim == 3:
            return tensor.float().transpose(1, 2)
        height, width = tensor.shape[2], tensor.shape[3:].numel()
        flat = tensor.float().flatten(2)
        if self.scan == "rows":
            return flat
        order = torch.tensor(hilbert_order(height, width), device=tensor.device)
        return flat.index_select(2, order)

    def _sample(self, reference: Reference, layer: str) -> tuple[Tensor, Tensor]:
        """Seeded cells (1, C, N) and the mean map (C, P) of one layer; empty for vectors."""
        draw = reference.generator()
        reference.progress(0.0, f"malcom: levels of {layer}")
        kept: list[Tensor] = []
        held = rows = 0
        total: Tensor | None = None
        for acts in reference:
            maps = self._maps(acts, layer)
            if maps is None:
                none = torch.zeros((1, 0, 0), device=acts.layer(layer).device)
                return none, none[0]
            maps = maps[maps.flatten(1).isfinite().all(dim=1)]
            summed = maps.double().sum(dim=0)
            total = summed if total is None else total + summed
            rows += len(maps)
            if held < _VALUES and len(maps):
                places = torch.randint(maps.shape[2], (len(maps), _CELLS), generator=draw)
                index = places.to(maps.device)[:, None].expand(-1, maps.shape[1], -1)
                kept.append(maps.gather(2, index).transpose(0, 1).flatten(1))
                held += kept[-1].shape[1]
        if total is None or not rows:
            raise ContractError(f"malcom: layer {layer!r}: the reference holds no finite row")
        return torch.cat(kept, dim=1)[None], (total / rows).float()


def _levels(cells: Tensor) -> Tensor:
    """Thresholds (C, 3) of the quantiser of least squared error on the cells (1, C, N), by Lloyd.

    The levels begin at evenly spaced quantiles. A level that no cell is nearest to stays as it is.
    """
    values = cells[0].double().sort(dim=1).values
    channels, count = values.shape
    if not channels:
        return values.new_zeros((0, SYMBOLS - 1)).float()
    places = ((torch.arange(SYMBOLS, device=values.device) + 0.5) / SYMBOLS * count).long()
    levels = values[:, places.clamp(max=count - 1)]
    sums = torch.cat([values.new_zeros((channels, 1)), values.cumsum(dim=1)], dim=1)
    ends = torch.tensor([[0, count]], device=values.device).expand(channels, -1)
    for _ in range(_STEPS):
        between = (levels[:, 1:] + levels[:, :-1]) / 2
        # a value on a threshold belongs to the lower level, as in `_strings`
        cuts = torch.searchsorted(values, between.contiguous(), right=True)
        edges = torch.cat([ends[:, :1], cuts, ends[:, 1:]], dim=1)
        counts = edges.diff(dim=1)
        means = sums.gather(1, edges).diff(dim=1) / counts.clamp(min=1)
        levels = torch.where(counts > 0, means, levels).sort(dim=1).values
    return ((levels[:, 1:] + levels[:, :-1]) / 2).float()


def _strings(maps: Tensor, thresholds: Tensor) -> Tensor:
    """Level of each cell, int64 (B, C, P) of maps (B, C, P): how many thresholds it exceeds."""
    found = torch.zeros(maps.shape, dtype=torch.int64, device=maps.device)
    for threshold in thresholds.unbind(dim=1):
        found += maps > threshold[:, None]
    return found


def _typical(mean: Tensor, strings: Tensor) -> Tensor:
    """Levels (C, P) of the mean map, each as frequent as it is in the reference's strings."""
    channels, places = mean.shape
    if not channels:
        return mean
    shares = torch.stack([(strings[0] <= level).double().mean(dim=1) for level in range(3)], dim=1)
    ranks = mean.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    # the place of a cell among its channel's, in (0, 1)
    heights = (ranks.double() + 0.5) / places
    return (heights[:, :, None] > shares[:, None, :]).sum(dim=2)
