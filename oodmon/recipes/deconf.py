"""DeConf, the head of Generalized ODIN: logits h(x) / g(x), of which h alone tells what is known.

Training divides the similarity h to each class by a confidence g that the head learns as well, so
g takes up how sure the network is in general, and h is left with how near the sample is to a class.
The detector ``{type: generalized_odin, layer: head.similarity}`` reads h as it is.

    recipe = DeConf()
    model = recipe.build(backbone, features=128, classes=10)
    recipe.train(model, batches, epochs=4)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from oodmon.errors import ContractError
from oodmon.recipes.descent import SizedBatches, descend

__all__ = ["DeConf", "DeConfHead", "DeConfModel"]

Kind = Literal["cosine", "inner", "euclidean"]

_KINDS: Final = ("cosine", "inner", "euclidean")
_SMALLEST_SCALE: Final = 1e-3
"""g is at least this: logits h / g stay finite."""
_SMALLEST_NORM: Final = 1e-8
_DECAY: Final = 0.1
_DECAY_AT: Final = (0.5, 0.75)


class Similarity(nn.Module):
    """h: features (B, D) → similarity to each class (B, C).

    "cosine" w·φ / |w||φ|, "inner" w·φ + b, "euclidean" -|φ - w|², the sum over D.
    """

    def __init__(self, features: int, classes: int, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes)) if kind == "inner" else None
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """h."""
        if self.kind == "euclidean":
            return -torch.cdist(features, self.weight).square()
        weight: Tensor = self.weight
        if self.kind == "cosine":
            features = functional.normalize(features, dim=1, eps=_SMALLEST_NORM)
            weight = functional.normalize(weight, dim=1, eps=_SMALLEST_NORM)
        return functional.linear(features, weight, self.bias)


class Scale(nn.Module):
    """g: features (B, D) → (B, 1) in (0.001, 1), a batch norm's sigmoid."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, features: Tensor) -> Tensor:
        """g."""
        return torch.sigmoid(self.norm(self.linear(features))).clamp(min=_SMALLEST_SCALE)


class DeConfHead(nn.Module):
    """Features (B, D) → logits h / g (B, C), in float32 whatever the rest runs in.

    Its children `similarity` and `scale` give h and g, where a tap can read them.

    Args:
        features: D.
        classes: C.
        kind: of the similarity.
    """

    def __init__(self, features: int, classes: int, kind: Kind = "cosine") -> None:
        super().__init__()
        if min(features, classes) < 1 or kind not in _KINDS:
            raise ContractError(
                f"DeConfHead: sizes must be positive and kind one of {_KINDS}, found {features}, "
                f"{classes}, {kind!r}"
            )
        self.similarity = Similarity(features, classes, kind)
        self.scale = Scale(features)

    def forward(self, features: Tensor) -> Tensor:
        """h / g."""
        with torch.autocast(features.device.type, enabled=False):
            wide = features.float()
            found: Tensor = self.similarity(wide) / self.scale(wide)
        return found


class DeConfModel(nn.Module):
    """A backbone (inputs → features (B, D)) and its head; gives logits (B, C)."""

    def __init__(self, backbone: nn.Module, head: DeConfHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """h / g."""
        found: Tensor = self.head(self.backbone(inputs))
        return found


@dataclass(frozen=True)
class DeConf:
    """The training recipe of Hsu, Shen, Jin and Kira, CVPR 2020.

    Attributes:
        kind: of the similarity; "cosine" is the paper's recommendation.
        learning_rate, weight_decay: of SGD with momentum 0.9; the rate falls to a tenth after half
            and after three quarters of the steps. The similarity's weights do not decay.
    """

    kind: Kind = "cosine"
    learning_rate: float = 0.05
    weight_decay: float = 1e-4

    def build(self, backbone: nn.Module, features: int, classes: int) -> DeConfModel:
        """A model with a fresh head on this backbone."""
        return DeConfModel(backbone, DeConfHead(features, classes, self.kind))

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, a scalar."""
        return functional.cross_entropy(model(inputs), labels)

    def train(
        self,
        model: DeConfModel,
        batches: SizedBatches,
        epochs: int,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        """Train in place; leaves the model in eval mode.

        A last pass without steps settles the running statistics of the scale's batch norm, whose
        one channel moves fast while training.
        """
        plain = list(model.head.similarity.parameters())
        known = {id(parameter) for parameter in plain}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if id(p) not in known]},
            {"params": plain, "weight_decay": 0.0},
        ]
        descend(
            model,
            groups,
            batches,
            epochs,
            name="DeConf",
            rate=self.learning_rate,
            weight_decay=self.weight_decay,
            decay=_DECAY,
            decay_at=_DECAY_AT,
            loss=lambda inputs, labels: self.loss(model, inputs, labels),
            progress=progress,
        )
        self._settle(model, batches)

    @torch.no_grad()
    def _settle(self, model: DeConfModel, batches: SizedBatches) -> None:
        norm = model.head.scale.norm
        momentum, norm.momentum = norm.momentum, None  # a plain average over the pass
        norm.reset_running_stats()
        norm.train()
        for inputs, _ in batches:
            model(inputs)
        norm.eval()
        norm.momentum = momentum

    def native_score(self, similarity: Tensor) -> Tensor:
        """-max h (B,), of what ``head.similarity`` gives; higher is more OOD."""
        return similarity.amax(dim=1).neg()

    def predict(self, output: Tensor) -> Tensor:
        """Softmax of h / g (B, C)."""
        return output.softmax(dim=1)
