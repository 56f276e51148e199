"""Density of features under a normalising flow: a chain of invertible maps to a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Paper, Reference, Stability, State
from oodmon.detectors.networks import Shapes, dense_shapes
from oodmon.detectors.training import Plan, TrainedAnywhere, train, whiten_
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Flow", "transform"]

_BOUND: Final = 2.0
"""The log-scale of one coupling stays within it, or the flow explodes away from its reference."""

_CUT: Final = 100.0
"""Far enough out to rank outliers, near enough for squares to stay finite."""

_WEIGHT_DECAY: Final = 1e-5
_CLIP: Final = 10.0
_PATIENCE: Final = 3


@detectors.register("flow")
@dataclass(frozen=True)
class Flow(TrainedAnywhere):
    """Negative log-density under a RealNVP flow, of features or of tabular inputs.

    Reads      on "features": layers[layer] (B, D), maps (B, C, H, W) averaged over their places;
               on "inputs": inputs (B, D)
    Learns     mean, scale (D,); coupling<i>.*: weights and biases
    Score      -log p of the whitened row in nats: |z|²/2 + D log(2π)/2 - log |det dz/dx|; any sign
    Reference  Dinh et al., ICLR 2017; on features, as Izmailov et al., ICML 2020, advise

    Options: `couplings`, each a network of two hidden layers of 8 · `width`; `noise`: standard
    deviation of what is added to whitened rows while learning, because a density has no value on
    units that are often exactly 0, as after a ReLU; `epochs`, `rows`, `learning_rate`,
    `training_seconds`, `side`, `on` and `layer` as in `rnd`. D is at least 2. Images are refused:
    flows of pixels find smooth images likely, whatever they show.
    """

    couplings: int = 6
    noise: float = 0.1

    may_be_zero: ClassVar[tuple[str, ...]] = ("noise",)
    cut: ClassVar[float] = _CUT
    paper: ClassVar[Paper | None] = Paper(
        "Density Estimation Using Real NVP",
        "Dinh, Sohl-Dickstein and Bengio",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1605.08803",
    )
    stability: ClassVar[Stability] = "beta"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"epochs": 4, "width": 4},)

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        size, hidden = row[0], 8 * self.width
        shapes: Shapes = {}
        for i in range(self.couplings):
            shapes |= dense_shapes(f"coupling{i}", (size, hidden, hidden, 2 * size))
        return shapes

    def _ranks(self) -> tuple[int, ...]:
        return (1,)

    def _values(self, acts: Activations) -> Tensor:
        if self.on == "inputs" and acts.require_inputs().ndim != 2:
            raise ContractError(
                f"flow: expected inputs (B, D), found {tuple(acts.require_inputs().shape)}; "
                "for images use their features"
            )
        values = super()._values(acts)
        if values.shape[1] < 2:
            raise ContractError("flow: expected rows of at least 2 values, found 1")
        return values

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state, self.cut)
        weights = {key: state[key] for key in state if key.startswith("coupling")}
        for i in range(self.couplings):
            # the flow starts as the identity
            weights[f"coupling{i}.linear2.weight"] = torch.zeros_like(
                weights[f"coupling{i}.linear2.weight"]
            )

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            batch = white[rows]
            if self.noise:
                shake = torch.randn(batch.shape, generator=draw).to(batch.device)
                batch = batch + self.noise * shake
            return _surprise(batch, weights)

        plan = Plan(
            self.epochs,
            self.learning_rate,
            clip=_CLIP,
            decay=_WEIGHT_DECAY,
            patience=_PATIENCE,
            seconds=self.training_seconds,
        )
        return {**state, **train(weights, len(white), loss, plan, draw, reference, self.name)}

    def _measure(self, white: Tensor, state: State) -> Tensor:
        found = _surprise(white, state)
        return found.nan_to_num(nan=math.nan, posinf=torch.finfo(found.dtype).max)


def transform(white: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """z (B, D) and log |det dz/dx| (B,) of rows x (B, D).

    Coupling i leaves the units alone whose number has a certain bit at i % 2, and scales and shifts
    the others by what a network makes of those; the bit changes with every second coupling, so
    that every two units are told apart.
    """
    size = white.shape[1]
    number = torch.arange(size, device=white.device)
    bits = (size - 1).bit_length()
    volume = white.new_zeros(len(white))
    i = 0
    while f"coupling{i}.linear0.weight" in weights:
        moved = ((number >> (i // 2 % bits)) & 1 == i % 2).to(white.dtype)
        log_scale, shift = _coupling(white * (1.0 - moved), weights, f"coupling{i}")
        log_scale = log_scale * moved
        white = white * log_scale.exp() + shift * moved
        volume = volume + log_scale.sum(dim=1)
        i += 1
    return white, volume


def _coupling(kept: Tensor, weights: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    for layer in range(2):
        name = f"{prefix}.linear{layer}"
        kept = functional.linear(kept, weights[f"{name}.weight"], weights[f"{name}.bias"])
        kept = functional.leaky_relu(kept)
    name = f"{prefix}.linear2"
    both = functional.linear(kept, weights[f"{name}.weight"], weights[f"{name}.bias"])
    log_scale, shift = both.chunk(2, dim=1)
    return _BOUND * (log_scale / _BOUND).tanh(), shift


def _surprise(white: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    found, volume = transform(white, weights)
    constant = 0.5 * white.shape[1] * math.log(2.0 * math.pi)
    return 0.5 * found.square().sum(dim=1) + constant - volume
