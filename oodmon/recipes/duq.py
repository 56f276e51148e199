"""DUQ, trained end to end: a head of class centroids, its loss, and the centroids' own update.

The head gives log K_c, so its output takes the place of logits: argmax predicts, and the detector
``{type: duq, mode: head}`` reads it as it is.

    recipe = DUQ(length_scale=0.3)
    model = recipe.build(backbone, features=128, classes=10)
    recipe.train(model, batches, epochs=5)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from oodmon.detectors.duq import embed, log_kernel, move_centroids
from oodmon.errors import ContractError
from oodmon.recipes.descent import SizedBatches, descend

__all__ = ["DUQ", "DUQHead", "DUQModel", "cross_entropy"]

_NEAREST: Final = 1e-7
"""-log K counts as at least this much in log(1 - K), which then is finite, and so its slope."""

_DECAY: Final = 0.2
_DECAY_AT: Final = (0.5, 0.8)


class DUQHead(nn.Module):
    """Features (B, D) → log K (B, C), each ≤ 0, in float32 whatever the rest runs in.

    Args:
        features: D.
        classes: C.
        embedding: M, the width of each class's embedding.
        length_scale: σ of the kernel.
        keep: γ of the running centroids; 0.999 as the authors', 0.99 for short training.
        batch_size: the running counts start as if one such batch had been seen.
    """

    count: Tensor
    total: Tensor

    def __init__(
        self,
        features: int,
        classes: int,
        embedding: int = 64,
        length_scale: float = 0.3,
        keep: float = 0.999,
        batch_size: int = 128,
    ) -> None:
        super().__init__()
        if min(features, classes, embedding, batch_size) < 1 or not length_scale > 0.0:
            raise ContractError("DUQHead: sizes and length_scale must be positive")
        self.length_scale = length_scale
        self.keep = keep
        self.weight = nn.Parameter(torch.empty(embedding, classes, features))
        # the authors' He initialisation of this (M, C, D) tensor takes C·D as the fan-in
        nn.init.normal_(self.weight, std=(2.0 / (classes * features)) ** 0.5)
        count = torch.full((classes,), batch_size / classes)
        self.register_buffer("count", count)
        self.register_buffer("total", torch.randn(embedding, classes) * count)

    @property
    def centroid(self) -> Tensor:
        """(M, C)."""
        return self.total / self.count.clamp(min=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """log K."""
        with torch.autocast(features.device.type, enabled=False):
            embedding = embed(features.float(), self.weight)
            return log_kernel(embedding, self.centroid, self.length_scale)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Move the centroids towards the class means of this batch."""
        one_hot = functional.one_hot(labels, self.weight.shape[1]).to(self.weight.dtype)
        embedding = embed(features.float(), self.weight)
        count, total, _ = move_centroids(embedding, one_hot, self.count, self.total, self.keep)
        self.count.copy_(count)
        self.total.copy_(total)


class DUQModel(nn.Module):
    """A backbone (inputs → features (B, D)) and its head; gives log K (B, C)."""

    def __init__(self, backbone: nn.Module, head: DUQHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """log K."""
        found: Tensor = self.head(self.backbone(inputs))
        return found


@dataclass(frozen=True)
class DUQ:
    """The training recipe of van Amersfoort et al., ICML 2020, as their code does it.

    Attributes:
        embedding, length_scale, keep: of the head. 0.3 suits small networks; the authors take 0.1.
        penalty: λ of the two-sided gradient penalty; 0 leaves it out and trains three times as
            fast. 0.05 is the authors' for full training.
        learning_rate, weight_decay: of SGD with momentum 0.9; the rate falls to a fifth after
            half and after four fifths of the steps.
    """

    embedding: int = 64
    length_scale: float = 0.3
    keep: float = 0.999
    penalty: float = 0.0
    learning_rate: float = 0.05
    weight_decay: float = 1e-4

    def build(self, backbone: nn.Module, features: int, classes: int) -> DUQModel:
        """A model with a fresh head on this backbone."""
        return DUQModel(
            backbone, DUQHead(features, classes, self.embedding, self.length_scale, self.keep)
        )

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross entropy over batch and classes, plus the penalty; a scalar.

        The penalty is λ E(|∇_x Σ_c K_c| - 1)²; it needs a second backward pass.
        """
        if self.penalty > 0.0:
            inputs = inputs.detach().requires_grad_()
        found: Tensor = model(inputs)
        loss = cross_entropy(found, labels)
        if self.penalty > 0.0:
            (slope,) = torch.autograd.grad(found.exp().sum(), inputs, create_graph=True)
            norm = torch.linalg.vector_norm(slope.flatten(1), dim=1)
            loss = loss + self.penalty * (norm - 1.0).square().mean()
        return loss

    @torch.no_grad()
    def after_step(self, model: DUQModel, inputs: Tensor, labels: Tensor) -> None:
        """Move the centroids with features made in eval mode; the mode is as before afterwards."""
        training = model.training
        model.eval()
        try:
            model.head.update(model.backbone(inputs), labels)
        finally:
            model.train(training)

    def train(
        self,
        model: DUQModel,
        batches: SizedBatches,
        epochs: int,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        """Train in place; leaves the model in eval mode."""
        descend(
            model,
            [{"params": list(model.parameters())}],
            batches,
            epochs,
            name="DUQ",
            rate=self.learning_rate,
            weight_decay=self.weight_decay,
            decay=_DECAY,
            decay_at=_DECAY_AT,
            loss=lambda inputs, labels: self.loss(model, inputs, labels),
            after_step=lambda inputs, labels: self.after_step(model, inputs, labels),
            progress=progress,
        )

    def native_score(self, output: Tensor) -> Tensor:
        """-log max K (B,), ≥ 0, higher is more OOD."""
        return output.amax(dim=1).neg()

    def predict(self, output: Tensor) -> Tensor:
        """Kernel values as shares (B, C) that sum to 1; argmax is the class."""
        return output.softmax(dim=1)


def cross_entropy(found: Tensor, labels: Tensor) -> Tensor:
    """Mean of -y log K - (1 - y) log(1 - K), from log K (B, C) and labels (B,)."""
    one_hot = functional.one_hot(labels, found.shape[1]).to(found.dtype)
    others = torch.log(-torch.expm1(found.clamp(max=-_NEAREST)))
    return -(one_hot * found + (1.0 - one_hot) * others).mean()
