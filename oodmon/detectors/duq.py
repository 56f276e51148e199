"""Distance to class centroids in a learnt embedding: a model's own DUQ head, or one fitted to it.

The arithmetic (`embed`, `log_kernel`, `move_centroids`) is also what `recipes.duq` trains with.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import choose, features
from oodmon.detectors.logits import predicted
from oodmon.detectors.reference import gather
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["DUQ", "embed", "log_kernel", "move_centroids"]

log = logging.getLogger(__name__)

_BATCH: Final = 128
_LEARNING_RATE: Final = 0.05
_MOMENTUM: Final = 0.9
_WEIGHT_DECAY: Final = 1e-4
_DECAY: Final = 0.2
_DECAY_AT: Final = (0.5, 0.8)
"""SGD as the authors train the head; the rate falls by `_DECAY` at these shares of the steps."""

_NEAREST: Final = 1e-7
"""A distance counts as at least this much: log(1 - K) is finite and so is its gradient."""

_FEWEST: Final = 1e-6
"""A running class count is at least this: a class that stopped coming keeps a centroid."""

_FLOOR: Final = 1e-2
"""A unit's standard deviation is at least this share of the mean one, so dead units stay small."""


def embed(features: Tensor, weight: Tensor) -> Tensor:
    """W_c φ for each class: (B, D) and (M, K, D) → (B, M, K)."""
    size, classes, width = weight.shape
    flat = features @ weight.reshape(size * classes, width).T
    return flat.reshape(len(features), size, classes)


def log_kernel(embedding: Tensor, centroid: Tensor, length_scale: float) -> Tensor:
    """log K_c = -mean_m (W_c φ - e_c)² / (2σ²), (B, K); the kernel itself underflows."""
    return (embedding - centroid).square().mean(dim=1) / (-2.0 * length_scale**2)


def move_centroids(
    embedding: Tensor, one_hot: Tensor, count: Tensor, total: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the running class means: new count (K,), total (M, K) and centroid (M, K).

    Args:
        embedding: (B, M, K), without gradient.
        one_hot: (B, K) labels.
        count, total: the running sums so far.
        keep: γ; 0 forgets all but this batch.
    """
    count = keep * count + (1.0 - keep) * one_hot.sum(dim=0)
    total = keep * total + (1.0 - keep) * (embedding * one_hot[:, None, :]).sum(dim=0)
    return count, total, total / count.clamp(min=_FEWEST)


@detectors.register("duq")
@dataclass(frozen=True)
class DUQ(Detector):
    """Distance to the nearest class centroid under a kernel per class.

    Reads      mode "head": the output of a DUQ head, (B, K), from `layer`, or the logits where none
               is named; mode "posthoc": layers[layer] (B, D) or (B, C, H, W), labels while learning
    Learns     mode "head": nothing; mode "posthoc": mean, scale (D,), weight (M, K, D),
               centroid (M, K)
    Score      -log max_c K_c = min_c mean_m (W_c φ - e_c)² / (2σ²), >= 0
    Reference  van Amersfoort et al., ICML 2020

    Options: `head_output`: what the head gives, "log_kernel" (as `recipes.duq.DUQHead` does) or
    "kernel" (as the authors' code does; distant samples then tie where K is 0 in float32).
    The others are for mode "posthoc": `embedding` M, `length_scale` σ, `keep` γ of the running
    centroids, `epochs` over at most `rows` reference rows, `training_seconds` at most (as in
    `rnd`), `labels`: "true", or "predicted" where the reference has none. Feature maps are averaged
    over their places.
    """

    mode: Literal["head", "posthoc"] = "posthoc"
    layer: str = ""
    head_output: Literal["log_kernel", "kernel"] = "log_kernel"
    embedding: int = 64
    length_scale: float = 0.3
    keep: float = 0.99
    epochs: int = 10
    rows: int = 20_000
    training_seconds: float = 600.0
    labels: Literal["true", "predicted"] = "true"

    paper: ClassVar[Paper | None] = Paper(
        "Uncertainty Estimation Using a Single Deep Deterministic Neural Network",
        "van Amersfoort, Smith, Teh and Gal",
        "ICML",
        2020,
        "https://arxiv.org/abs/2003.02037",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "M·C·D"

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("mode", self.mode, ("head", "posthoc")),
            ("head_output", self.head_output, ("log_kernel", "kernel")),
            ("labels", self.labels, ("true", "predicted")),
        ):
            if value not in allowed:
                raise ContractError(f"detectors.duq.{option}: {value!r} is none of {allowed}")
        if (
            min(self.embedding, self.epochs, self.rows) < 1
            or not min(self.length_scale, self.training_seconds) > 0.0
        ):
            raise ContractError(
                "detectors.duq: embedding, epochs, rows, length_scale and training_seconds must be "
                "positive"
            )
        if not 0.0 <= self.keep < 1.0:
            raise ContractError(f"detectors.duq.keep: {self.keep} is not in [0, 1)")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"epochs": 3}, {"mode": "head"}, {"epochs": 3, "labels": "predicted"})

    def pin(self, layers: Sequence[str]) -> DUQ:
        """The penultimate features, else the last layer, where none was named and one is needed."""
        if self.mode == "head" or self.layer:
            return self
        return dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """The features; or the head's output."""
        if self.mode == "head" and not self.layer:
            return Reads(logits=True)
        layers = (self.layer,) if self.layer else ()
        if self.mode == "head":
            return Reads(layers=layers)
        given = self.labels == "true"
        return Reads(layers=layers, logits=not given, labels=given)

    def learn(self, reference: Reference) -> State:
        """Mode "posthoc": train W on frozen features by SGD; centroids follow as running means."""
        if self.mode == "head":
            return {}
        if not self.layer:
            raise ContractError("detectors.duq.layer is empty, and no layer was tapped")
        with torch.inference_mode(mode=False), torch.no_grad():
            rows, labels = gather(reference, self._labelled, self.rows)
            return self._train(rows, labels, reference)

    def check(self, state: State) -> None:
        """Weight (M, K, D), centroid (M, K), mean and scale (D,); nothing in mode "head"."""
        names = set() if self.mode == "head" else {"mean", "scale", "weight", "centroid"}
        if set(state) != names:
            raise StateError(f"duq: state: expected {sorted(names)}, found {sorted(state)}")
        if self.mode == "head":
            return
        weight = state["weight"]
        if weight.ndim != 3 or weight.shape[0] != self.embedding:
            raise StateError(
                f"duq: state 'weight': expected ({self.embedding}, K, D), "
                f"found {tuple(weight.shape)}"
            )
        width = (weight.shape[2],)
        shapes = {"mean": width, "scale": width, "centroid": tuple(weight.shape[:2])}
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape:
                raise StateError(
                    f"duq: state {name!r}: expected {shape}, found {tuple(state[name].shape)}"
                )
        for name, tensor in state.items():
            if tensor.dtype != torch.float32:
                raise StateError(f"duq: state {name!r}: expected float32, found {tensor.dtype}")

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the log of the largest kernel value."""
        if self.mode == "head":
            return self._of_head(acts)
        rows = features(acts, self.layer)
        mean = state["mean"]
        if rows.shape[1] != len(mean):
            raise ContractError(
                f"duq: layer {self.layer!r}: learnt with {len(mean)} units, "
                f"found {tuple(acts.layer(self.layer).shape)}"
            )
        embedding = embed((rows - mean) / state["scale"], state["weight"])
        return log_kernel(embedding, state["centroid"], self.length_scale).amax(dim=1).neg()

    def _of_head(self, acts: Activations) -> Tensor:
        output = acts.layer(self.layer) if self.layer else acts.require_logits()
        if output.ndim != 2:
            raise ContractError(f"duq: expected a head's (B, K), found {tuple(output.shape)}")
        largest = output.amax(dim=1)
        if largest.dtype not in (torch.float32, torch.float64):
            largest = largest.float()
        if self.head_output == "log_kernel":
            return largest.neg()
        return largest.clamp(min=torch.finfo(largest.dtype).tiny).log().neg()

    def _labelled(self, acts: Activations) -> tuple[Tensor, Tensor]:
        rows = features(acts, self.layer)
        if self.labels == "predicted":
            return rows, predicted(acts)
        if acts.labels is None:
            raise ContractError(
                "duq: the reference has no labels; give them, or set `labels: predicted`"
            )
        return rows, acts.labels

    def _train(self, rows: Tensor, labels: Tensor, reference: Reference) -> State:
        device = rows.device
        draw = reference.generator()
        classes = int(labels.max()) + 1
        width = rows.shape[1]
        mean, scale = rows.mean(dim=0), rows.std(dim=0, correction=0)
        average = float(scale.mean())
        scale = scale.clamp(min=_FLOOR * average if average > 0.0 else 1.0)
        rows = (rows - mean) / scale
        # He's initialisation, as the authors'; the fan-in is D
        weight = torch.randn((self.embedding, classes, width), generator=draw)
        weight = (weight * (2.0 / width) ** 0.5).to(device)
        count = torch.full((classes,), _BATCH / classes, device=device)
        total = torch.randn((self.embedding, classes), generator=draw).to(device) * count
        centroid = total / count
        speed = torch.zeros_like(weight)
        order = [torch.randperm(len(rows), generator=draw) for _ in range(self.epochs)]
        batches = [part.to(device) for epoch in order for part in torch.split(epoch, _BATCH)]
        rate = _LEARNING_RATE
        until = monotonic() + self.training_seconds
        for step, chosen in enumerate(batches):
            if step in {int(share * len(batches)) for share in _DECAY_AT}:
                rate *= _DECAY
            batch = rows[chosen]
            one_hot = torch.nn.functional.one_hot(labels[chosen], classes).to(batch.dtype)
            slope = self._slope(batch, one_hot, weight, centroid).add_(weight, alpha=_WEIGHT_DECAY)
            speed.mul_(_MOMENTUM).add_(slope)
            weight.sub_(speed, alpha=rate)
            count, total, centroid = move_centroids(
                embed(batch, weight), one_hot, count, total, self.keep
            )
            reference.progress((step + 1) / len(batches), "duq: training the head")
            if monotonic() >= until:
                what = "duq: its training_seconds were over after %d of %d batches"
                log.warning(what, step + 1, len(batches))
                break
        return {"mean": mean, "scale": scale, "weight": weight, "centroid": centroid}

    def _slope(self, batch: Tensor, one_hot: Tensor, weight: Tensor, centroid: Tensor) -> Tensor:
        """Gradient in W of the mean binary cross entropy -y log K - (1 - y) log(1 - K).

        With D = -log K it is y - (1 - y)/(e^D - 1) in D, so nothing under- or overflows.
        """
        offset = embed(batch, weight) - centroid
        distance = offset.square().mean(dim=1) / (2.0 * self.length_scale**2)
        in_distance = one_hot - (1.0 - one_hot) / distance.clamp(min=_NEAREST).expm1()
        in_distance /= one_hot.numel() * self.embedding * self.length_scale**2
        flat = (offset * in_distance[:, None, :]).reshape(len(batch), -1)
        return (flat.T @ batch).reshape(weight.shape)
