"""Contrasting shifted instances: an embedding that keeps an image apart from its turned copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Paper, Reference, Stability, State
from oodmon.detectors.networks import Shapes, dense_shapes, encode, encoder_shapes
from oodmon.detectors.training import Plan, Trained, train, whiten_
from oodmon.detectors.transformations import TURNS, rotated
from oodmon.errors import StateError
from oodmon.registry import detectors

__all__ = ["CSI", "contrast", "draw_views", "look"]

_TEMPERATURE: Final = 0.5
_EMBEDDING: Final = 128
_BATCH: Final = 32
"""Images a step; each comes in four turns and two views."""

_ZOOM: Final = (0.6, 1.0)
"""Part of the side that a random view shows."""

_LIGHT: Final = (0.3, 0.3)
"""How much a random view's contrast and brightness may differ, in standard deviations."""

_PATIENCE: Final = 3
_FULL: Final = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
"""The view that shows all."""


@detectors.register("csi")
@dataclass(frozen=True)
class CSI(Trained):
    """Unlikeness to the reference in a contrastive embedding, and doubt about an image's turn.

    Reads      inputs (B, C, H, W) or (B, H, W), averaged down to a square
    Learns     mean, scale of each channel; encoder.*, projection.*, shift.*; views (T, 2, 3);
               bank (4, M, 128) of unit length; contrast_weight, shift_weight (4,)
    Score      -mean_k [ λcon_k max_m <z_k, bank_km> + λcls_k l_k ] over the four turns k; z the
               embedding, not normalised, l the margin of the right turn's logit over the mean one;
               about -2 on the reference
    Reference  Tack et al., NeurIPS 2020, equations 5 to 9

    Options: `bank` images that are kept, M at most; `views`: how many views of each turn are
    averaged while scoring, the first of them shows all; the same for every sample; `width`,
    `epochs`, `rows`, `learning_rate`, `training_seconds` and `side` as in `rnd`. A sample is passed
    4 · `views` times, and learning takes eight passes an image and epoch. The paper's logit of a
    turn is replaced by its margin, whose mean on the reference is positive for any classifier that
    is better than chance; where it is not, the term is left out.
    """

    epochs: int = 10
    rows: int = 5_000
    bank: int = 500
    views: int = 4

    each_element: ClassVar[bool] = False
    paper: ClassVar[Paper | None] = Paper(
        "CSI: Novelty Detection via Contrastive Learning on Distributionally Shifted Instances",
        "Tack, Mo, Jeong and Shin",
        "NeurIPS",
        2020,
        "https://arxiv.org/abs/2007.08176",
    )
    stability: ClassVar[Stability] = "experimental"
    cost: ClassVar[str] = "4·views networks"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {"epochs": 6, "width": 4, "rows": 300, "learning_rate": 3e-3, "bank": 50, "views": 2},
        )

    def _size(self, height: int, width: int) -> tuple[int, int]:
        # turned by 90°, an image must have the shape that it had
        side = min(height, width, self.side)
        return side, side

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        hidden = 8 * self.width
        return {
            **encoder_shapes("encoder", row, self.width, [], hidden),
            **dense_shapes("projection", (hidden, hidden, _EMBEDDING)),
            **dense_shapes("shift", (hidden, TURNS)),
        }

    def _kept(self, row: tuple[int, ...]) -> Shapes:
        return {
            **self._weights(row),
            "views": (self.views, 2, 3),
            "contrast_weight": (TURNS,),
            "shift_weight": (TURNS,),
        }

    def check(self, state: State) -> None:
        """As for all; and the bank holds up to `bank` embeddings of each turn."""
        bank = state.get("bank")
        if bank is None:
            raise StateError(f"csi: state: expected 'bank' among {sorted(state)}")
        fits = bank.ndim == 3 and bank.shape[::2] == (TURNS, _EMBEDDING)
        if not fits or not 0 < bank.shape[1] <= self.bank or bank.dtype != torch.float32:
            raise StateError(
                f"csi: state 'bank': expected float32 (4, 1 to {self.bank}, {_EMBEDDING}), "
                f"found {bank.dtype} {tuple(bank.shape)}"
            )
        super().check({name: tensor for name, tensor in state.items() if name != "bank"})

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state)

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            turned = rotated(white[rows]).flatten(0, 1)
            seen = torch.cat([self._altered(turned, draw) for _ in range(2)])
            embedding, logits = _embed(seen, weights)
            applied = torch.arange(TURNS, device=white.device).repeat_interleave(len(rows))
            wrong = functional.cross_entropy(logits, applied.repeat(2), reduction="none")
            return (contrast(embedding) + wrong).reshape(2 * TURNS, len(rows)).mean(dim=0)

        weights = {key: state[key] for key in state if key not in ("mean", "scale")}
        plan = Plan(
            self.epochs,
            self.learning_rate,
            batch=_BATCH,
            patience=_PATIENCE,
            seconds=self.training_seconds,
        )
        state = {**state, **train(weights, len(white), loss, plan, draw, reference, self.name)}
        views = draw_views(self.views, draw)
        views[0] = torch.tensor(_FULL)
        state["views"] = views.to(white.device)
        chosen = torch.randperm(len(white), generator=draw)[: self.bank].to(white.device)
        parts = [self._seen(part, state) for part in torch.split(white[chosen], _BATCH)]
        embedding = torch.cat([part[0] for part in parts], dim=1)
        margin = torch.cat([part[1] for part in parts], dim=1).mean(dim=1)
        length = embedding.norm(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        state["bank"] = embedding / length
        state["contrast_weight"] = length.mean(dim=(1, 2)).reciprocal()
        state["shift_weight"] = torch.where(margin > 0.0, margin.reciprocal(), 0.0)
        return state

    def _altered(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """A random view of each image, in another light."""
        count = len(images)
        seen = look(images, draw_views(count, draw).to(images.device))
        light = 2.0 * torch.rand((2, count, 1, 1, 1), generator=draw).to(images.device) - 1.0
        return seen * (1.0 + _LIGHT[0] * light[0]) + _LIGHT[1] * light[1]

    def _measure(self, white: Tensor, state: State) -> Tensor:
        embedding, margin = self._seen(white, state)
        # (4, B, M): likeness to every kept image, turn by turn
        likeness = torch.bmm(embedding, state["bank"].mT).amax(dim=2)
        weights = state["contrast_weight"], state["shift_weight"]
        return -(weights[0][:, None] * likeness + weights[1][:, None] * margin).mean(dim=0)

    def _seen(self, white: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Embedding (4, B, 128) and margin (4, B) of the right turn, averaged over the views."""
        turned = rotated(white)
        views = state["views"]
        count = white.shape[0]
        seen = torch.cat(
            [look(turned.flatten(0, 1), view.expand(TURNS * count, 2, 3)) for view in views]
        )
        embedding, logits = _embed(seen, state)
        embedding = embedding.reshape(len(views), TURNS, count, _EMBEDDING).mean(dim=0)
        logits = logits.reshape(len(views), TURNS, count, TURNS).mean(dim=0)
        right = logits.diagonal(dim1=0, dim2=2).T
        return embedding, right - logits.mean(dim=2)


def contrast(embedding: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """NT-Xent (2n,) of embeddings (2n, D): row i and row n + i are views of one thing.

    Minus log of the softmax over all other rows, of the cosine by the temperature.
    """
    unit = functional.normalize(embedding, dim=1)
    likeness = unit @ unit.T / temperature
    rows = torch.arange(len(unit), device=unit.device)
    itself = rows[:, None] == rows
    other = rows[:, None] == rows.roll(len(unit) // 2)
    total = likeness.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    return total - (likeness * other).sum(dim=1)


def draw_views(count: int, draw: torch.Generator) -> Tensor:
    """Random affine maps (count, 2, 3) from a view's square to a part of the image's."""
    near, far = _ZOOM
    zoom = near + (far - near) * torch.rand(count, generator=draw)
    # the part that is shown lies within the image
    shift = (2.0 * torch.rand((count, 2), generator=draw) - 1.0) * (1.0 - zoom)[:, None]
    views = torch.zeros((count, 2, 3))
    views[:, 0, 0] = views[:, 1, 1] = zoom
    views[:, :, 2] = shift
    return views


def look(images: Tensor, views: Tensor) -> Tensor:
    """What each affine view (n, 2, 3) shows of each image (n, C, S, S), in the same size."""
    if not len(images):
        return images  # torch cannot make a grid for none
    grid = functional.affine_grid(views, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _embed(images: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Projection (n, 128) and logits of the turn (n, 4)."""
    features = functional.leaky_relu(encode(images, weights, "encoder"))
    # the length of an embedding counts as evidence, so that of the input must not reach it
    features = functional.layer_norm(features, features.shape[1:])
    return encode(features, weights, "projection"), encode(features, weights, "shift")
