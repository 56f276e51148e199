"""Which geometric transformation was applied? A classifier that cannot tell has met a stranger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Paper, Reference, Stability, State
from oodmon.detectors.networks import Shapes, encode, encoder_shapes
from oodmon.detectors.training import BATCH, Plan, Trained, train, whiten_
from oodmon.registry import detectors

__all__ = ["TURNS", "Geom", "dirichlet", "rotated", "shifted", "shifts", "transformed"]

TURNS: Final = 4
_ALL: Final = 72
"""Turns × mirrored or not × three shifts each way (Golan and El-Yaniv, section 4)."""

_SHIFT: Final = 4
"""A shift is this part of the side."""

_STEPS: Final = 100
"""Of the fixed point that fits a Dirichlet; it is exact to rounding long before."""

_BRANCH: Final = -2.22
_NEWTON: Final = 5
"""The inverse of ψ: where its first guess changes, and Newton's steps (Minka, 2000, appendix C)."""

_MIN_LOG: Final = -20.0
"""Log-probabilities are cut here, so that one sure mistake does not decide a Dirichlet."""


@detectors.register("geom")
@dataclass(frozen=True)
class Geom(Trained):
    """How badly a classifier of geometric transformations recognises the one that was applied.

    Reads      inputs (B, C, H, W) or (B, H, W), averaged down to a square
    Learns     mean, scale of each channel; classifier.*; concentration (J, J) where `statistic` is
               "dirichlet"
    Score      "mean": mean_j -log q_j(T_j(x)), >= 0; "dirichlet": the mean over j of
               -sum_k (α_jk - 1) log q_k(T_j(x)), any sign; q the classifier's probabilities
    Reference  Golan and El-Yaniv, NeurIPS 2018

    Options: `transformations` "rotations" (J = 4 turns) or "all" (J = 72: turned, mirrored and
    shifted by a quarter); `statistic`; `width`, `epochs`, `rows`, `learning_rate`,
    `training_seconds` and `side` as in
    `rnd`. Every sample is passed J times. What looks the same however it is turned (a ball, a
    letter O) scores high even in the reference, and padding or a watermark that gives the turn away
    makes it blind.
    """

    transformations: Literal["rotations", "all"] = "rotations"
    statistic: Literal["mean", "dirichlet"] = "mean"
    epochs: int = 10

    each_element: ClassVar[bool] = False
    paper: ClassVar[Paper | None] = Paper(
        "Deep Anomaly Detection Using Geometric Transformations",
        "Golan and El-Yaniv",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1805.10917",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "J networks"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {"epochs": 5, "width": 4, "learning_rate": 3e-3},
            {"epochs": 5, "width": 4, "learning_rate": 3e-3, "statistic": "dirichlet"},
            {"epochs": 1, "width": 4, "learning_rate": 3e-3, "transformations": "all"},
        )

    def _count(self) -> int:
        return TURNS if self.transformations == "rotations" else _ALL

    def _size(self, height: int, width: int) -> tuple[int, int]:
        # turned by 90°, an image must have the shape that it had
        side = min(height, width, self.side)
        return side, side

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        return encoder_shapes("classifier", row, self.width, [8 * self.width], self._count())

    def _kept(self, row: tuple[int, ...]) -> Shapes:
        count = self._count()
        own = {"concentration": (count, count)} if self.statistic == "dirichlet" else {}
        return {**self._weights(row), **own}

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state)

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            return _surprise(self._logs(white[rows], weights))

        weights = {key: state[key] for key in state if key not in ("mean", "scale")}
        plan = Plan(
            self.epochs,
            self.learning_rate,
            batch=max(1, BATCH // self._count()),
            seconds=self.training_seconds,
        )
        state = {**state, **train(weights, len(white), loss, plan, draw, reference, self.name)}
        if self.statistic == "dirichlet":
            total = torch.zeros((self._count(),) * 2, dtype=torch.float64, device=white.device)
            for part in torch.split(white, BATCH):
                total += self._logs(part, state).double().clamp(min=_MIN_LOG).sum(dim=1)
            state["concentration"] = dirichlet(total / len(white)).float()
        return state

    def _measure(self, white: Tensor, state: State) -> Tensor:
        logs = self._logs(white, state)
        if self.statistic == "mean":
            return _surprise(logs)
        weight = 1.0 - state["concentration"]
        return torch.einsum("jbk,jk->b", logs.clamp(min=_MIN_LOG), weight) / len(weight)

    def _logs(self, white: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities (J, B, J): of transformed images, and of transformations."""
        images = transformed(white) if self.transformations == "all" else rotated(white)
        logits = encode(images.flatten(0, 1), weights, "classifier")
        return logits.log_softmax(dim=1).reshape(len(images), len(white), len(images))


def rotated(images: Tensor) -> Tensor:
    """(B, C, S, S) → (4, B, C, S, S): as they are, and turned by 90°, 180° and 270°."""
    return torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)])


def transformed(images: Tensor) -> Tensor:
    """(B, C, S, S) → (72, B, C, S, S): turned, mirrored and shifted; as they are first."""
    step = images.shape[3] // _SHIFT
    found = []
    for down in (0, step, -step):
        for right in (0, step, -step):
            moved = shifted(images, down, right)
            found += [rotated(moved), rotated(moved.flip(3))]
    return torch.cat(found)


def shifts(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """(down, right) of the moves by a quarter of an image: down, up, right, left."""
    down, right = height // _SHIFT, width // _SHIFT
    return ((down, 0), (-down, 0), (0, right), (0, -right))


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """(B, C, H, W) moved by so many pixels; its mirrored border comes in, so that no edge shows."""
    height, width = images.shape[2:]
    up, left = max(-down, 0), max(-right, 0)
    wide = functional.pad(images, (max(right, 0), left, max(down, 0), up), mode="reflect")
    return wide[:, :, up : up + height, left : left + width]


def dirichlet(mean_logs: Tensor) -> Tensor:
    """Concentrations (J, K) of the likeliest Dirichlets for mean log-probabilities (J, K).

    Minka's fixed point: ψ(α_k) = ψ(sum α) + mean log q_k, with Newton's inverse of ψ.
    """
    alpha = torch.ones_like(mean_logs)
    for _ in range(_STEPS):
        aim = torch.digamma(alpha.sum(dim=1, keepdim=True)) + mean_logs
        small = -1.0 / (aim - torch.digamma(torch.ones_like(aim)))
        guess = torch.where(aim > _BRANCH, aim.exp() + 0.5, small)
        for _ in range(_NEWTON):
            guess = guess - (torch.digamma(guess) - aim) / torch.polygamma(1, guess)
        alpha = guess
    return alpha


def _surprise(logs: Tensor) -> Tensor:
    """mean_j -log q_j(T_j(x)) of (J, B, J) → (B,)."""
    return logs.diagonal(dim1=0, dim2=2).mean(dim=1).neg()
