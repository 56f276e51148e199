"""Random network distillation: how badly does a trained network imitate a random one here?"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.reference import gather
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["RND"]

_CLIP: Final = 5.0
"""Whitened values are cut at this many standard deviations (the authors')."""

_FLOOR: Final = 1e-2
"""A standard deviation is at least this share of the reference's range of values."""

_GAIN: Final = math.sqrt(2.0)
"""Of the orthogonal initialisation (the authors')."""

_HELD_OUT: Final = 0.1
"""Share of the rows that says when to stop."""

_PATIENCE: Final = 2
"""Epochs without a better held-out error before training stops."""

_BETTER: Final = 0.99
"""An error counts as better below this share of the best one."""

_BATCH: Final = 128
_STRIDES: Final = (2, 2, 1)
"""Of the three 3×3 convolutions."""


@detectors.register("rnd")
@dataclass(frozen=True)
class RND(Detector):
    """Error of a trained predictor of a fixed random network's output.

    Reads      on "features": layers[layer] (B, D), maps (B, C, H, W) averaged over their places;
               on "inputs": inputs (B, C, H, W) or (B, H, W), or vectors (B, D)
    Learns     mean, scale of each element; target.*, predictor.*: weights and biases
    Score      mean over the outputs of (predictor(x) - target(x))², >= 0
    Reference  Burda et al., ICLR 2019

    Options: `outputs` of both networks; `width`: of their first convolution, hidden layers are
    eight times as wide; `epochs` at most (training stops when the error on held-out rows stops
    falling) over at most `rows` reference rows; `learning_rate` of Adam; `side`: larger images are
    averaged down to it. The predictor never learns from the monitored stream.
    """

    on: Literal["features", "inputs"] = "features"
    layer: str = ""
    outputs: int = 64
    width: int = 16
    epochs: int = 20
    rows: int = 20_000
    learning_rate: float = 1e-3
    side: int = 32

    paper: ClassVar[Paper | None] = Paper(
        "Exploration by Random Network Distillation",
        "Burda, Edwards, Storkey and Klimov",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1810.12894",
    )
    stability: ClassVar[Stability] = "stable"

    def __post_init__(self) -> None:
        if self.on not in ("features", "inputs"):
            raise ContractError(f"detectors.rnd.on: {self.on!r} is neither 'features' nor 'inputs'")
        for option in ("outputs", "width", "epochs", "rows", "learning_rate", "side"):
            if not getattr(self, option) > 0:
                raise ContractError(
                    f"detectors.rnd.{option}: {getattr(self, option)} is not positive"
                )

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"epochs": 3}, {"on": "inputs", "epochs": 2, "width": 4})

    def pin(self, layers: Sequence[str]) -> RND:
        """The last layer that is tapped, where features are read and none was named."""
        if self.on == "inputs" or self.layer or not layers:
            return self
        return dataclasses.replace(self, layer=layers[-1])

    def reads(self) -> Reads:
        """One layer, or the inputs."""
        if self.on == "inputs":
            return Reads(inputs=True)
        return Reads(layers=(self.layer,) if self.layer else ())

    def learn(self, reference: Reference) -> State:
        """Whiten, draw the target, train the predictor until the held-out error stops falling."""
        if self.on == "features" and not self.layer:
            raise ContractError("detectors.rnd.layer is empty, and no layer was tapped")
        with torch.inference_mode(mode=False), torch.no_grad():
            (values,) = gather(reference, lambda acts: (self._values(acts),), self.rows)
            values = values.float()
            mean, scale = values.mean(dim=0), values.std(dim=0, correction=0)
            span = float(values.max() - values.min())
            scale = scale.clamp(min=_FLOOR * span if span > 0.0 else 1.0)
            draw = reference.generator()
            state = {"mean": mean, "scale": scale, **self._networks(values.shape[1:], draw)}
            state = {name: tensor.to(reference.device) for name, tensor in state.items()}
            return self._train(values, state, draw, reference)

    def check(self, state: State) -> None:
        """The networks fit each other and the whitening."""
        mean = state.get("mean")
        if mean is None:
            raise StateError(f"rnd: state: expected 'mean' among {sorted(state)}")
        expected = {name: tuple(mean.shape) for name in ("mean", "scale")}
        for prefix in ("target", "predictor"):
            for name, shape in self._shapes(prefix, tuple(mean.shape)).items():
                expected[f"{name}.weight"] = shape
                expected[f"{name}.bias"] = shape[:1]
        if set(state) != set(expected):
            raise StateError(f"rnd: state: expected {sorted(expected)}, found {sorted(state)}")
        for name, shape in expected.items():
            tensor = state[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise StateError(
                    f"rnd: state {name!r}: expected float32 {shape}, "
                    f"found {tensor.dtype} {tuple(tensor.shape)}"
                )

    def score(self, acts: Activations, state: State) -> Tensor:
        """Mean squared error of the predictor."""
        values = self._values(acts)
        if values.shape[1:] != state["mean"].shape:
            raise ContractError(
                f"rnd: learnt with rows of shape {tuple(state['mean'].shape)}, "
                f"found {tuple(values.shape[1:])}"
            )
        white = _whiten(values, state)
        error = _run(white, state, "predictor") - _run(white, state, "target")
        return error.square_().mean(dim=1)

    def _values(self, acts: Activations) -> Tensor:
        """(B, D), or images (B, C, H, W) of at most `side` pixels; at least float32."""
        values = acts.require_inputs() if self.on == "inputs" else acts.layer(self.layer)
        if values.ndim < 2:
            raise ContractError(f"rnd: expected (B, D) or more, found {tuple(values.shape)}")
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        if values.ndim == 2:
            return values
        if self.on == "features":
            return values.flatten(2).mean(dim=2)
        if values.ndim == 3:
            values = values.unsqueeze(1)
        if values.ndim != 4:
            raise ContractError(f"rnd: expected images (B, C, H, W), found {tuple(values.shape)}")
        height, width = values.shape[2:]
        if max(height, width) > self.side:
            size = (min(height, self.side), min(width, self.side))
            values = functional.adaptive_avg_pool2d(values, size)
        return values

    def _shapes(self, prefix: str, row: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shape of each weight of one network, in the order in which they are applied."""
        shapes: dict[str, tuple[int, ...]] = {}
        hidden = 8 * self.width
        size = row[0]
        if len(row) == 3:
            channels = (row[0], self.width, 2 * self.width, 2 * self.width)
            side = list(row[1:])
            for i, stride in enumerate(_STRIDES):
                shapes[f"{prefix}.conv{i}"] = (channels[i + 1], channels[i], 3, 3)
                side = [(length - 1) // stride + 1 for length in side]
            size = channels[-1] * side[0] * side[1]
        # an image's target is convolutions and one linear map; a vector's has one hidden layer
        between = 0 if len(row) == 3 else 1
        if prefix == "predictor":
            between = 2
        widths = [size, *[hidden] * between, self.outputs]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            shapes[f"{prefix}.linear{i}"] = (after, before)
        return shapes

    def _networks(self, row: Sequence[int], draw: torch.Generator) -> dict[str, Tensor]:
        state = {}
        for prefix in ("target", "predictor"):
            for name, shape in self._shapes(prefix, tuple(row)).items():
                state[f"{name}.weight"] = _orthogonal(shape, draw)
                state[f"{name}.bias"] = torch.zeros(shape[0])
        return state

    def _train(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        """Adam on the mean squared error; the weights of the best epoch are kept."""
        order = torch.randperm(len(values), generator=draw).to(values.device)
        held = max(1, int(_HELD_OUT * len(order))) if len(order) > 1 else 0
        aside, taken = order[:held], order[held:]
        aim = torch.cat(
            [_run(_whiten(part, state), state, "target") for part in torch.split(values, _BATCH)]
        )
        learnt = [name for name in state if name.startswith("predictor.")]
        for name in learnt:
            state[name].requires_grad_()
        best = {name: state[name].detach().clone() for name in learnt}
        lowest, waited = math.inf, 0
        # on CUDA the fastest convolution may add in any order
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            adam = torch.optim.Adam([state[name] for name in learnt], lr=self.learning_rate)
            for epoch in range(self.epochs):
                shuffled = taken[torch.randperm(len(taken), generator=draw).to(taken.device)]
                for rows in torch.split(shuffled, _BATCH):
                    with torch.enable_grad():
                        found = _run(_whiten(values[rows], state), state, "predictor")
                        loss = functional.mse_loss(found, aim[rows])
                    adam.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    adam.step()
                error = _mean_error(values, aim, aside if held else taken, state)
                reference.progress((epoch + 1) / self.epochs, f"rnd: held-out error {error:.3g}")
                waited = 0 if error < _BETTER * lowest else waited + 1
                if error < lowest:
                    lowest = error
                    best = {name: state[name].detach().clone() for name in learnt}
                if waited >= _PATIENCE:
                    break
        reference.progress(1.0, "rnd: done")
        return {**state, **best}


def _whiten(values: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return ((values - state["mean"]) / state["scale"]).clamp_(-_CLIP, _CLIP)


def _run(white: Tensor, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Forward pass of one network (B, ...) → (B, outputs); no module is ever made."""
    if white.ndim == 4:
        for i, stride in enumerate(_STRIDES):
            name = f"{prefix}.conv{i}"
            white = functional.conv2d(
                white, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=1
            )
            white = functional.leaky_relu(white)
        white = white.flatten(1)
    layer = 0
    while True:
        name = f"{prefix}.linear{layer}"
        white = functional.linear(white, state[f"{name}.weight"], state[f"{name}.bias"])
        layer += 1
        if f"{prefix}.linear{layer}.weight" not in state:
            return white
        white = functional.leaky_relu(white)


def _mean_error(values: Tensor, aim: Tensor, rows: Tensor, state: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        total = 0.0
        for part in torch.split(rows, _BATCH):
            found = _run(_whiten(values[part], state), state, "predictor")
            total += float((found - aim[part]).square().mean(dim=1).sum(dtype=torch.float64))
    return total / max(1, len(rows))


def _orthogonal(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Orthogonal rows or columns times `_GAIN` (Saxe et al., ICLR 2014), from this generator."""
    rows, columns = shape[0], math.prod(shape[1:])
    tall = torch.randn((max(rows, columns), min(rows, columns)), generator=draw)
    basis, triangle = torch.linalg.qr(tall)
    basis = basis * triangle.diagonal().sign()
    turned = basis if rows >= columns else basis.T
    return torch.mul(turned, _GAIN).reshape(shape).contiguous()
