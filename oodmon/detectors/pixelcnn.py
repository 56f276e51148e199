"""Likelihood of small images, pixel after pixel, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Paper, Reads, Reference, Stability, State
from oodmon.detectors.networks import Shapes
from oodmon.detectors.outliers import gather_outliers, is_outlier
from oodmon.detectors.training import Plan, Trained, train, whiten_
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["PixelCNN", "levels_of", "masked", "mixture_logs", "predict"]

_FIRST: Final = 7
_LATER: Final = 3
"""Sides of the first kernel and of those in the blocks."""

_OUTSIDE: Final = 2
"""Levels of their own for what is darker or brighter than anything in the reference."""

_PER_LOGISTIC: Final = 3
"""Outputs of the network for each logistic: log-odds of its share, mean, log of its scale."""

_SMALLEST_SCALE: Final = -7.0
"""The log of a logistic's scale is at least this, in halves of the range (Salimans et al.)."""

_MARGIN: Final = 1.0
"""Nats a dimension by which an outlier is to be less likely (Hendrycks et al., section 4.4)."""

_SLOWER: Final = 0.25
"""The epochs and the rate of Adam while outliers are shown, as a share of those before."""

_CLIP: Final = 1.0
_FAR: Final = 1e6
_BATCH: Final = 64


@detectors.register("pixelcnn")
@dataclass(frozen=True)
class PixelCNN(Trained):
    """Bits per dimension of an image under an autoregressive model of grey levels.

    Reads      inputs (B, C, H, W) or (B, H, W); labels while learning where `outliers` is set
    Learns     mean (the darkest value), scale (a level's width) of each channel; first.*, block*.*,
               last*.*: weights, with zeros where a pixel would see what is not before it
    Score      -log2 p(x) / (C·H·W), p(x) the product over the pixels in raster order, >= 0
    Reference  van den Oord et al., NeurIPS 2016; with `logistics` Salimans et al., ICLR 2017,
               equation 2; outliers as in Hendrycks et al., ICLR 2019

    Options: `levels` that the range of each channel is cut into (what lies outside the reference's
    range counts as a level that never came); `logistics`: 0 gives every level a probability of its
    own, M makes them a mixture of M discretised logistics (10 in PixelCNN++), which many levels
    need: with `levels: 256` the score of byte images is in exact bits per dimension; `blocks` of
    the network, `width` channels wide; `side`: larger images are averaged down to it; `outliers`:
    reference rows with the label -1 are known outliers, which after training are made less likely
    by a margin of 1 nat a dimension in a quarter as many epochs again; `epochs`, `rows`,
    `learning_rate` and `training_seconds` as in `rnd`. The channels of a pixel are independent
    given the pixels before.

    Without outliers the score is inverted on what is smoother or darker than the reference: such
    images are likelier than its own. Use it with outliers, or beside `svd_rnd`.
    """

    width: int = 48
    epochs: int = 8
    learning_rate: float = 2e-3
    side: int = 14
    levels: int = 8
    logistics: int = 0
    blocks: int = 4
    outliers: bool = False

    may_be_zero: ClassVar[tuple[str, ...]] = ("logistics",)
    each_element: ClassVar[bool] = False
    cut: ClassVar[float] = _FAR
    paper: ClassVar[Paper | None] = Paper(
        "Conditional Image Generation with PixelCNN Decoders",
        "van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves and Kavukcuoglu",
        "NeurIPS",
        2016,
        "https://arxiv.org/abs/1606.05328",
    )
    stability: ClassVar[Stability] = "experimental"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        small = {"epochs": 2, "width": 8, "blocks": 1, "side": 6}
        mixture = {**small, "epochs": 4, "learning_rate": 1e-2, "levels": 256, "logistics": 3}
        return (small, {**small, "outliers": True}, mixture)

    def reads(self) -> Reads:
        """The inputs, and labels where they mark outliers."""
        return Reads(inputs=True, labels=self.outliers)

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        width, inner, depth = self.width, max(1, self.width // 2), row[0]
        sizes = {"first": (width, depth, _FIRST)}
        for i in range(self.blocks):
            sizes[f"block{i}.narrow"] = (inner, width, 1)
            sizes[f"block{i}.look"] = (inner, inner, _LATER)
            sizes[f"block{i}.widen"] = (width, inner, 1)
        sizes["last0"] = (width, width, 1)
        each = self.logistics * _PER_LOGISTIC or self.levels + _OUTSIDE
        sizes["last1"] = (depth * each, width, 1)
        shapes: Shapes = {}
        for name, (after, before, side) in sizes.items():
            shapes[f"{name}.weight"] = (after, before, side, side)
            shapes[f"{name}.bias"] = (after,)
        return shapes

    def _learnt_from(self, acts: Activations) -> Tensor:
        values = self._values(acts)
        return values[~is_outlier(acts, self.name)] if self.outliers else values

    def _scaling(self, values: Tensor) -> tuple[Tensor, Tensor]:
        row = values.shape[1:]
        least = values.amin(dim=(0, 2, 3))[:, None, None]
        span = values.amax(dim=(0, 2, 3))[:, None, None] - least
        width = torch.where(span > 0.0, span, 1.0) / self.levels
        return least.expand(row).contiguous(), width.expand(row).contiguous()

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        levels = levels_of(whiten_(values, state, self.cut), self.levels).to(torch.int16)
        found = None
        if self.outliers:
            found = gather_outliers(reference, self._values, self.rows, self.name)
        weights = {key: state[key] for key in state if key not in ("mean", "scale")}

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            return self._nats(levels[rows].long(), masked(weights))

        plan = Plan(
            self.epochs,
            self.learning_rate,
            batch=_BATCH,
            clip=_CLIP,
            end=1.0 if found is None else 0.5,
            seconds=self.training_seconds,
        )
        learnt = train(weights, len(levels), loss, plan, draw, reference, self.name)
        if found is not None:
            strange = levels_of(whiten_(found, state, self.cut), self.levels)

            def margin(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
                seen = masked(weights)
                inside = self._nats(levels[rows].long(), seen)
                chosen = torch.randint(len(strange), (len(rows),), generator=draw)
                outside = self._nats(strange[chosen.to(rows.device)], seen)
                return inside + functional.relu(_MARGIN + inside - outside)

            slower = Plan(
                math.ceil(_SLOWER * self.epochs),
                _SLOWER * self.learning_rate,
                batch=_BATCH,
                clip=_CLIP,
                start=0.5,
                seconds=self.training_seconds,
            )
            learnt = train(learnt, len(levels), margin, slower, draw, reference, self.name)
        return {**state, **masked(learnt)}

    def _measure(self, white: Tensor, state: State) -> Tensor:
        bits = self._nats(levels_of(white, self.levels), state) / math.log(2.0)
        return bits.masked_fill(white.isnan().flatten(1).any(dim=1), math.nan)

    def _nats(self, levels: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """-log p a dimension, (B,), of levels (B, C, H, W)."""
        found = predict(levels, weights, self.levels)
        if self.logistics:
            nats = mixture_logs(levels, found, self.levels).neg()
        else:
            nats = functional.cross_entropy(found, levels, reduction="none")
        return nats.flatten(1).mean(dim=1)


def levels_of(white: Tensor, levels: int) -> Tensor:
    """Grey levels, int64: 1 to `levels` within [0, levels], 0 below, levels + 1 above.

    Half a level beyond the reference's range still counts as its end. NaN becomes a level too.
    """
    inside = white.nan_to_num(nan=0.0).floor().clamp(0.0, levels - 1.0) + 1.0
    inside = torch.where(white < -0.5, 0.0, inside)
    return torch.where(white > levels + 0.5, levels + 1.0, inside).long()


def masked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with zeros where a kernel would look at what does not come before.

    The first kernel does not see its own pixel either, those of the blocks do.
    """
    found = dict(weights)
    for name, weight in weights.items():
        side = weight.shape[-1]
        if weight.ndim == 4 and side > 1:
            place = torch.arange(side * side, device=weight.device).reshape(side, side)
            centre = side * side // 2
            before = place < centre if name == "first.weight" else place <= centre
            found[name] = weight * before
    return found


def predict(levels: Tensor, weights: Mapping[str, Tensor], count: int) -> Tensor:
    """What the network says of each pixel's level from the levels before it, (B, J, C, H, W).

    J logits, one for each of count + 2 levels, or the numbers that `mixture_logs` takes.
    """
    depth = levels.shape[1]
    shade = 2.0 * levels.to(weights["first.weight"].dtype) / (count + 1) - 1.0
    found = _convolve(shade, weights, "first")
    i = 0
    while f"block{i}.look.weight" in weights:
        inner = functional.relu(_convolve(functional.relu(found), weights, f"block{i}.narrow"))
        inner = functional.relu(_convolve(inner, weights, f"block{i}.look"))
        found = found + _convolve(inner, weights, f"block{i}.widen")
        i += 1
    found = functional.relu(_convolve(functional.relu(found), weights, "last0"))
    found = _convolve(found, weights, "last1")
    each = found.shape[1] // depth  # no -1: a batch may have no rows
    return found.reshape(len(levels), each, depth, *levels.shape[2:])


def mixture_logs(levels: Tensor, outputs: Tensor, count: int) -> Tensor:
    """log p of levels (B, C, H, W) under a mixture of discretised logistics, in the same shape.

    Args:
        levels: 0 to count + 1; the first takes all that lies below it, the last all above.
        outputs: (B, 3·M, C, H, W): M log-odds of the shares, M means, M logs of the scales, both
            in a unit in which the levels reach from -1 to 1.
        count: of the levels within the reference's range.
    """
    odds, mean, log_scale = outputs.chunk(_PER_LOGISTIC, dim=1)
    log_scale = log_scale.clamp(min=_SMALLEST_SCALE)
    per_scale = torch.exp(-log_scale)
    half = 1.0 / (count + 1)
    away = (2.0 * half * levels.to(outputs.dtype) - 1.0).unsqueeze(1) - mean
    above, below = per_scale * (away + half), per_scale * (away - half)
    # σ(a) - σ(b) = σ(a) · σ(-b) · (1 - exp(b - a)), in which nothing cancels
    first, last = (levels == 0).unsqueeze(1), (levels == count + 1).unsqueeze(1)
    log_up = functional.logsigmoid(above).masked_fill(last, 0.0)
    log_down = functional.logsigmoid(-below).masked_fill(first, 0.0)
    between = torch.log(-torch.expm1(-2.0 * half * per_scale)).masked_fill(first | last, 0.0)
    return torch.logsumexp(odds.log_softmax(dim=1) + log_up + log_down + between, dim=1)


def _convolve(values: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    weight = weights[f"{name}.weight"]
    return functional.conv2d(values, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)
