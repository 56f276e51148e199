"""How a detector's own network is trained inside `learn`: sampled, whitened, bounded, seeded."""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Final, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Reads, Reference, State
from oodmon.detectors.features import choose, features, reads_of
from oodmon.detectors.networks import Shapes, initial
from oodmon.detectors.options import check_options
from oodmon.detectors.reference import gather
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations

__all__ = [
    "BATCH",
    "Plan",
    "Trained",
    "TrainedAnywhere",
    "train",
    "whiten",
    "whiten_",
]

log = logging.getLogger(__name__)

BATCH: Final = 128

_CLIP: Final = 5.0
"""Whitened values are cut at this many standard deviations (Burda et al., ICLR 2019)."""

_FLOOR: Final = 1e-2
"""A standard deviation is at least this share of the reference's range of values."""

_HELD_OUT: Final = 0.1
"""Share of the rows that says when to stop."""

_PATIENCE: Final = 2
"""Epochs without a better held-out loss before training stops."""

_BETTER: Final = 0.01
"""A loss counts as better when it is lower than the best one by this share of its size."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        epochs: at most.
        rate: of Adam.
        batch: rows a step.
        clip: the gradient's norm is cut at it; 0 leaves it alone.
        decay: of the weights.
        patience: epochs without a better held-out loss before training stops.
        start, end: the part of the whole work that this training is, for the progress shown.
        seconds: that the whole work may take at most; this part has its share of them.
    """

    epochs: int
    rate: float
    batch: int = BATCH
    clip: float = 0.0
    decay: float = 0.0
    patience: int = _PATIENCE
    start: float = 0.0
    end: float = 1.0
    seconds: float = math.inf


def train(
    weights: Mapping[str, Tensor],
    count: int,
    loss: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    plan: Plan,
    draw: torch.Generator,
    reference: Reference,
    name: str,
) -> dict[str, Tensor]:
    """Adam on the mean of `loss`; the weights of the epoch with the lowest held-out loss.

    When the plan's seconds are over it ends after the batch, in the middle of an epoch.

    Args:
        weights: where to start; they are left as they are.
        count: rows to learn from.
        loss: weights and row numbers (b,) → (b,), or (0,) to leave the step out.
        plan: how long and how fast.
        draw: which rows are held out, and the order of the others.
        reference: told of the progress; its device is where the row numbers lie.
        name: of the detector, for the note.
    """
    device = reference.device
    order = torch.randperm(count, generator=draw).to(device)
    held = max(1, int(_HELD_OUT * count)) if count > 1 else 0
    aside, taken = order[:held] if held else order, order[held:]
    moving = {key: value.detach().clone() for key, value in weights.items()}
    for tensor in moving.values():
        tensor.requires_grad_()
    best = {key: value.detach().clone() for key, value in moving.items()}
    lowest, waited = math.inf, 0
    until, late = monotonic() + plan.seconds * (plan.end - plan.start), False
    # on CUDA the fastest convolution may add in any order
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        adam = torch.optim.Adam(moving.values(), lr=plan.rate, weight_decay=plan.decay)
        for epoch in range(plan.epochs):
            shuffled = taken[torch.randperm(len(taken), generator=draw).to(device)]
            for rows in torch.split(shuffled, plan.batch):
                with torch.enable_grad():
                    losses = loss(moving, rows)
                    mean = losses.mean()
                if not len(losses):
                    continue
                adam.zero_grad()
                mean.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                if plan.clip > 0.0:
                    torch.nn.utils.clip_grad_norm_(moving.values(), plan.clip)
                adam.step()
                if late := monotonic() >= until:
                    break
            now = _mean(loss, moving, aside, plan.batch)
            done = plan.start + (plan.end - plan.start) * (epoch + 1) / plan.epochs
            reference.progress(done, f"{name}: held-out loss {now:.3g}")
            better = now < lowest - _BETTER * abs(lowest) if lowest < math.inf else True
            waited = 0 if better else waited + 1
            if now < lowest:
                lowest = now
                best = {key: value.detach().clone() for key, value in moving.items()}
            if late:
                what = "%s: its training_seconds were over in epoch %d of %d"
                log.warning(what, name, epoch + 1, plan.epochs)
            if late or waited >= plan.patience:
                break
    reference.progress(plan.end, f"{name}: trained")
    return best


def _mean(
    loss: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    rows: Tensor,
    batch: int,
) -> float:
    total, seen = 0.0, 0
    with torch.no_grad():
        for part in torch.split(rows, batch):
            losses = loss(weights, part)
            total += float(losses.sum(dtype=torch.float64))
            seen += len(losses)
    return total / seen if seen else math.inf


def whiten(values: Tensor, state: Mapping[str, Tensor], cut: float = _CLIP) -> Tensor:
    """(values - mean) / scale, cut at ±`cut`: whatever comes in, the network sees what is finite.

    Not in place; NaN stays.
    """
    return ((values - state["mean"]) / state["scale"]).clamp_(-cut, cut)


def whiten_(values: Tensor, state: Mapping[str, Tensor], cut: float = _CLIP) -> Tensor:
    """The same in place: the sample that is learnt from is the largest thing in memory."""
    return values.sub_(state["mean"]).div_(state["scale"]).clamp_(-cut, cut)


@dataclass(frozen=True)
class Trained(Detector):
    """A detector of images with a network of its own: what all such detectors have in common.

    Options: `width` of the first convolution, hidden layers are eight times as wide; `epochs` at
    most, over at most `rows` reference rows; `learning_rate` of Adam; `side`: larger images are
    averaged down to it; `training_seconds` at most, after which what was learnt so far counts.
    """

    width: int = 16
    epochs: int = 20
    rows: int = 20_000
    learning_rate: float = 1e-3
    side: int = 32
    training_seconds: float = 600.0

    cost: ClassVar[str] = "network"
    may_be_zero: ClassVar[tuple[str, ...]] = ()
    """Numeric options for which 0 has a meaning."""
    each_element: ClassVar[bool] = True
    """Whether every element is whitened for itself, or every channel as a whole."""
    cut: ClassVar[float] = _CLIP
    """Whitened values are cut at plus and minus this."""

    def __post_init__(self) -> None:
        check_options(self, self.may_be_zero)

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"epochs": 2, "width": 4},)

    def reads(self) -> Reads:
        """The inputs."""
        return Reads(inputs=True)

    def learn(self, reference: Reference) -> State:
        """Sample the reference, whiten it, draw the first weights, train."""
        # training makes gradients, whatever mode the caller is in
        with torch.inference_mode(mode=False), torch.no_grad():
            (values,) = gather(reference, lambda acts: (self._learnt_from(acts),), self.rows)
            mean, scale = self._scaling(values)
            draw = reference.generator()
            weights = initial(self._weights(tuple(values.shape[1:])), draw)
            state = {"mean": mean, "scale": scale, **weights}
            state = {name: tensor.to(reference.device) for name, tensor in state.items()}
            return self._fit(values, state, draw, reference)

    def check(self, state: State) -> None:
        """Every tensor is there, and their shapes fit each other."""
        mean = state.get("mean")
        if mean is None:
            raise StateError(f"{self.name}: state: expected 'mean' among {sorted(state)}")
        row = tuple(mean.shape)
        if len(row) not in self._ranks() or 0 in row:
            raise StateError(f"{self.name}: state 'mean': {row} is no row that it could score")
        expected = {"mean": row, "scale": row, **self._kept(row)}
        if set(state) != set(expected):
            raise StateError(
                f"{self.name}: state: expected {sorted(expected)}, found {sorted(state)}"
            )
        for name, shape in expected.items():
            tensor = state[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise StateError(
                    f"{self.name}: state {name!r}: expected float32 {shape}, "
                    f"found {tensor.dtype} {tuple(tensor.shape)}"
                )

    def score(self, acts: Activations, state: State) -> Tensor:
        """What the network makes of each row."""
        values = self._values(acts)
        if values.shape[1:] != state["mean"].shape:
            raise ContractError(
                f"{self.name}: learnt with rows of shape {tuple(state['mean'].shape)}, "
                f"found {tuple(values.shape[1:])}"
            )
        return self._measure(whiten(values, state, self.cut), state)

    @abstractmethod
    def _weights(self, row: tuple[int, ...]) -> Shapes:
        """What is drawn before training, for rows of this shape."""

    @abstractmethod
    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        """Train: raw rows that may be written to, and the state so far → the whole state."""

    @abstractmethod
    def _measure(self, white: Tensor, state: State) -> Tensor:
        """Score (B,) of whitened rows, which may be written to."""

    def _kept(self, row: tuple[int, ...]) -> Shapes:
        """What the state holds beside mean and scale."""
        return self._weights(row)

    def _ranks(self) -> tuple[int, ...]:
        """Dimensions that a row may have: images only."""
        return (3,)

    def _learnt_from(self, acts: Activations) -> Tensor:
        """The rows of a batch that count as in-distribution."""
        return self._values(acts)

    def _values(self, acts: Activations) -> Tensor:
        """Float32 (B, C, H, W) of at most `side` pixels each way, or (B, D)."""
        values = acts.require_inputs().float()
        if values.ndim == 2 and 1 in self._ranks():
            return values
        if values.ndim == 3:
            values = values.unsqueeze(1)
        if values.ndim != 4:
            raise ContractError(
                f"{self.name}: expected images (B, C, H, W), found {tuple(values.shape)}"
            )
        size = self._size(values.shape[2], values.shape[3])
        if size != tuple(values.shape[2:]):
            values = functional.adaptive_avg_pool2d(values, size)
        return values

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this size is averaged down to."""
        return min(height, self.side), min(width, self.side)

    def _scaling(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in the shape of a row."""
        row = values.shape[1:]
        over = (0,) if self.each_element or len(row) == 1 else (0, 2, 3)
        mean = values.mean(dim=over, keepdim=True)[0].expand(row).contiguous()
        scale = values.std(dim=over, correction=0, keepdim=True)[0].expand(row)
        span = float(values.max() - values.min())
        return mean, scale.clamp(min=_FLOOR * span if span > 0.0 else 1.0).contiguous()


@dataclass(frozen=True)
class TrainedAnywhere(Trained):
    """The same on features (the default), or on inputs: images or vectors.

    Options beside those of `Trained`: `on` "features" or "inputs"; `layer` of the features, ""
    for the penultimate features, else the last layer; "logits" and "softmax" are features too.
    Feature maps are averaged over their places.
    """

    on: Literal["features", "inputs"] = "features"
    layer: str = ""

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"epochs": 3}, {"on": "inputs", "epochs": 2, "width": 4})

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named and one is needed."""
        if self.on == "inputs" or self.layer:
            return self
        return dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """One layer, or the inputs."""
        if self.on == "inputs":
            return Reads(inputs=True)
        return reads_of(self.layer)

    def learn(self, reference: Reference) -> State:
        """Sample the reference, whiten it, draw the first weights, train."""
        if self.on == "features" and not self.layer:
            raise ContractError(f"detectors.{self.name}.layer is empty, and no layer was tapped")
        return super().learn(reference)

    def _ranks(self) -> tuple[int, ...]:
        return (1,) if self.on == "features" else (1, 3)

    def _values(self, acts: Activations) -> Tensor:
        if self.on == "inputs":
            return super()._values(acts)
        return features(acts, self.layer)
