"""Random network distillation: how badly does a trained network imitate a random one here?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oodmon.contracts import Paper, Reference, Stability, State
from oodmon.detectors.networks import Shapes, encode, encoder_shapes
from oodmon.detectors.training import BATCH, Plan, TrainedAnywhere, train, whiten_
from oodmon.registry import detectors

__all__ = ["RND", "error", "network_shapes"]


def network_shapes(prefix: str, row: tuple[int, ...], width: int, outputs: int) -> Shapes:
    """Shapes of a target network, or of the predictor, which is deeper."""
    # an image's target is convolutions and one linear map; a vector's has one hidden layer
    between = 0 if len(row) == 3 else 1
    if prefix == "predictor":
        between = 2
    return encoder_shapes(prefix, row, width, [8 * width] * between, outputs)


def error(white: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Mean squared difference (B,) of the predictor's outputs and the target's."""
    found = encode(white, state, "predictor") - encode(white, state, "target")
    return found.square_().mean(dim=1)


@detectors.register("rnd")
@dataclass(frozen=True)
class RND(TrainedAnywhere):
    """Error of a trained predictor of a fixed random network's output.

    Reads      on "features": layers[layer] (B, D), maps (B, C, H, W) averaged over their places;
               on "inputs": inputs (B, C, H, W) or (B, H, W), or vectors (B, D)
    Learns     mean, scale of each element; target.*, predictor.*: weights and biases
    Score      mean over the outputs of (predictor(x) - target(x))², >= 0
    Reference  Burda et al., ICLR 2019

    Options: `outputs` of both networks; `width`: of their first convolution, hidden layers are
    eight times as wide; `epochs` at most (training stops when the error on held-out rows stops
    falling) over at most `rows` reference rows; `learning_rate` of Adam; `side`: larger images are
    averaged down to it; `training_seconds` at most, after which the best so far counts (and depends
    on how fast the machine is). The predictor never learns from the monitored stream. On inputs,
    blurred and flat images score low: see `svd_rnd`.
    """

    outputs: int = 64

    paper: ClassVar[Paper | None] = Paper(
        "Exploration by Random Network Distillation",
        "Burda, Edwards, Storkey and Klimov",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1810.12894",
    )
    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "2 networks"

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        return {
            **network_shapes("target", row, self.width, self.outputs),
            **network_shapes("predictor", row, self.width, self.outputs),
        }

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state)
        aim = torch.cat([encode(part, state, "target") for part in torch.split(white, BATCH)])

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            return (encode(white[rows], weights, "predictor") - aim[rows]).square().mean(dim=1)

        predictor = {key: state[key] for key in state if key.startswith("predictor.")}
        plan = Plan(self.epochs, self.learning_rate, seconds=self.training_seconds)
        return {
            **state,
            **train(predictor, len(white), loss, plan, draw, reference, self.name),
        }

    def _measure(self, white: Tensor, state: State) -> Tensor:
        return error(white, state)
