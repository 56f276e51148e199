"""Gram deviations: do the channel correlations of each layer fit the predicted class?

The row sums of the Gram matrix of F^p are F^p (F^pᵀ 1), so no C×C matrix is ever formed. The
statistic is homogeneous of degree 2 in the activations: each row is scaled by a power of two of its
own before the powers, and scaled back after the root, which is exact and cannot overflow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.bounds import HeldOut, MinMax, Quantiles, class_counts
from oodmon.detectors.logits import confidence, predicted, two_sided
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Gram"]

_EPSILON: Final = 1e-6
"""Added to the denominator of a deviation, in units of the layer's scale squared (the paper's)."""

_HELD_OUT: Final = 0.1
"""Share of the reference that sets the layers' weights and no bounds (the paper's)."""

_HELD_OUT_BYTES: Final = 64 << 20
"""Statistics of held-out rows are kept up to here; rows beyond help to set the bounds."""

_CHUNK_BYTES: Final = 768 << 10
"""Feature maps are taken in chunks that stay in a core's cache while they are raised to powers."""

_CHUNK_BYTES_ELSEWHERE: Final = 64 << 20

_HEADROOM_BITS: Final = 126
"""The largest sum that a scaled row can reach is 2 to this; float32 ends at 2^128."""

_EXPONENT_LIMIT: Final = 100
"""Rows smaller than 2^-100 count as if they were that large."""

Pieces = Sequence[tuple[int, float]]
"""Per layer the width of its statistics and a factor."""


@detectors.register("gram")
@dataclass(frozen=True)
class Gram(Detector):
    """Deviation of channel correlations from the range seen for the predicted class.

    Reads      layers (B, C, H, W), (B, D) or (B, T, D), logits (B, K)
    Learns     per layer lower, upper (K, P, N): range of each statistic per predicted class (the
               range over all classes where one is never predicted); unit (L,): a power of two, the
               layer's size; weight (L,): 1 / mean held-out deviation, 0 where that mean is 0
    Score      sum_l weight_l sum_{p,i} relative excess over the range (/ largest probability), >= 0
    Reference  Sastry and Oore, ICML 2020

    Options: `layers`, empty for all that are tapped. `powers`. `statistic`: "rowsum" (N = C, as
    released), "triu" (the paper's upper triangle, N = C(C+1)/2) or "diag" (N = C). `bounds`:
    "minmax", or "quantile", which one corrupt reference sample cannot widen; `quantile` is the
    share cut off at each end. `divide_by_confidence`, as released. `channels`: "first", "last", or
    "auto": last for (B, T, D), else first.

    The powers default to 1..5, half of the paper's 1..10: on small networks they separate as well,
    and cost half.
    """

    layers: tuple[str, ...] = ()
    powers: tuple[int, ...] = (1, 2, 3, 4, 5)
    statistic: Literal["rowsum", "triu", "diag"] = "rowsum"
    bounds: Literal["minmax", "quantile"] = "minmax"
    quantile: float = 0.005
    divide_by_confidence: bool = True
    channels: Literal["auto", "first", "last"] = "auto"

    paper: ClassVar[Paper | None] = Paper(
        "Detecting Out-of-Distribution Examples with Gram Matrices",
        "Sastry and Oore",
        "ICML",
        2020,
        "https://arxiv.org/abs/1912.12510",
    )
    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "powers·D·HW"

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("statistic", self.statistic, ("rowsum", "triu", "diag")),
            ("bounds", self.bounds, ("minmax", "quantile")),
            ("channels", self.channels, ("auto", "first", "last")),
        ):
            if value not in allowed:
                raise ContractError(f"detectors.gram.{option}: {value!r} is none of {allowed}")
        if not self.powers or min(self.powers) < 1 or len(set(self.powers)) < len(self.powers):
            raise ContractError(
                f"detectors.gram.powers: {self.powers} are not distinct and positive"
            )
        if not 0.0 <= self.quantile < 0.5:
            raise ContractError(f"detectors.gram.quantile: {self.quantile} is not in [0, 0.5)")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run, beside the defaults."""
        return (
            {},
            {"statistic": "triu", "powers": (1, 2)},
            {"statistic": "diag", "bounds": "quantile"},
        )

    def pin(self, layers: Sequence[str]) -> Gram:
        """All layers that are tapped, where none was named."""
        return self if self.layers else dataclasses.replace(self, layers=tuple(layers))

    def reads(self) -> Reads:
        """Its layers and the logits."""
        return Reads(layers=self.layers, logits=True)

    def learn(self, reference: Reference) -> State:
        """One pass for min/max bounds; one more before it, to count the classes, for quantiles."""
        if not self.layers:
            raise ContractError("detectors.gram.layers is empty, and no layer was tapped")
        reference.progress(0.0, "gram: statistics")
        draw = reference.generator()
        bounds: MinMax | Quantiles = (
            MinMax()
            if self.bounds == "minmax"
            else Quantiles(self.quantile, class_counts(reference))
        )
        units: list[float] = []
        sizes = [0.0] * len(self.layers)
        widths: list[int] = []
        held = HeldOut(_HELD_OUT_BYTES)
        for acts in reference:
            here = [_size(acts.layer(name)) for name in self.layers]
            sizes = list(map(max, sizes, here))
            units = units or list(map(_unit, here))
            parts = [
                self._statistics(acts.layer(name), unit).flatten(1)
                for name, unit in zip(self.layers, units, strict=True)
            ]
            widths = [part.shape[1] for part in parts]
            values = torch.cat(parts, dim=1)
            label, sure = predicted(acts), confidence(acts)
            usable = values.isfinite().all(dim=1) & sure.isfinite()
            chosen = torch.rand(len(values), generator=draw, dtype=torch.float64) < _HELD_OUT
            aside = usable & chosen.to(usable.device)
            if held.full:
                aside = torch.zeros_like(aside)
            else:
                held.add(values[aside], label[aside], sure[aside])
            taken = usable & ~aside
            bounds.add(values[taken], label[taken], two_sided(acts).shape[1])
        lower, upper = bounds.result()
        # in units of the largest of all, so that the size of the batches does not matter
        final = list(map(_unit, sizes))
        factors = [(before / after) ** 2 for before, after in zip(units, final, strict=True)]
        pieces = list(zip(widths, factors, strict=True))
        lows, highs = self._split(lower, pieces), self._split(upper, pieces)
        state = {
            "unit": torch.tensor(final, dtype=torch.float32, device=lower.device),
            "weight": self._weights(held, pieces, lows, highs),
        }
        for name, low, high in zip(self.layers, lows, highs, strict=True):
            state[f"{name}.lower"], state[f"{name}.upper"] = low, high
        reference.progress(1.0, "gram: done")
        return state

    def check(self, state: State) -> None:
        """Ranges of one shape for each layer, with one row per class and one column per power."""
        expected = {"unit", "weight"}
        for name in self.layers:
            expected |= {f"{name}.lower", f"{name}.upper"}
        if set(state) != expected:
            raise StateError(f"gram: state: expected {sorted(expected)}, found {sorted(state)}")
        for name in ("unit", "weight"):
            _expect(name, state[name], (len(self.layers),))
        classes = state[f"{self.layers[0]}.lower"].shape[0] if self.layers else 0
        for name in self.layers:
            lower = state[f"{name}.lower"]
            width = lower.shape[-1] if lower.ndim == 3 else 0
            for end in ("lower", "upper"):
                shape = (classes, len(self.powers), width)
                _expect(f"{name}.{end}", state[f"{name}.{end}"], shape)

    def score(self, acts: Activations, state: State) -> Tensor:
        """Sum over layers of the weighted deviation from the predicted class's ranges."""
        total: Tensor | None = None
        label = predicted(acts)
        for position, name in enumerate(self.layers):
            lower, upper = state[f"{name}.lower"], state[f"{name}.upper"]
            if two_sided(acts).shape[1] != lower.shape[0]:
                raise ContractError(
                    f"gram: learnt with {lower.shape[0]} classes, "
                    f"found logits {tuple(two_sided(acts).shape)}"
                )
            values = self._statistics(acts.layer(name), state["unit"][position])
            if values.shape[1:] != lower.shape[1:]:
                raise ContractError(
                    f"gram: layer {name!r}: learnt {lower.shape[-1]} statistics per power, "
                    f"found {values.shape[-1]} from shape {tuple(acts.layer(name).shape)}"
                )
            deviation = _deviation(values, lower[label], upper[label])
            weighted = deviation * state["weight"][position]
            # a dropped layer must not make NaN of an infinite deviation times 0
            weighted = torch.where(state["weight"][position] > 0.0, weighted, 0.0)
            total = weighted if total is None else total + weighted
        if total is None:
            raise ContractError("detectors.gram.layers is empty")
        if self.divide_by_confidence:
            total = total / confidence(acts)
        return total.clamp(max=torch.finfo(total.dtype).max)

    def _split(self, values: Tensor, pieces: Pieces) -> list[Tensor]:
        """(R, sum of widths) → per layer (R, P, N), times its factor."""
        parts, powers = torch.split(values, [width for width, _ in pieces], dim=1), len(self.powers)
        return [
            part.reshape(len(part), powers, width // powers) * factor
            for part, (width, factor) in zip(parts, pieces, strict=True)
        ]

    def _weights(
        self,
        held: HeldOut,
        pieces: Pieces,
        lows: Sequence[Tensor],
        highs: Sequence[Tensor],
    ) -> Tensor:
        """1 / mean deviation of the held-out rows; 0 where that is 0, all 1 where all are 0.

        Batch by batch: side by side the held-out statistics would take their memory twice.
        """
        found: list[list[Tensor]] = [[] for _ in pieces]
        for values, label, sure in held.batches():
            parts = self._split(values, pieces)
            for column, part, low, high in zip(found, parts, lows, highs, strict=True):
                deviation = _deviation(part, low[label], high[label])
                column.append(deviation / sure if self.divide_by_confidence else deviation)
        means = []
        for column in found:
            deviations = torch.cat(column).double()
            means.append(deviations.mean() if len(deviations) else deviations.sum())
        mean = torch.stack(means)
        weight = torch.where(mean > 0.0, 1.0 / mean, torch.zeros_like(mean))
        return (weight if bool((weight > 0.0).any()) else torch.ones_like(weight)).float()

    def _statistics(self, layer: Tensor, unit: Tensor | float) -> Tensor:
        """(B, P, N), in units of unit²; a row that is not finite gives no finite row."""
        maps = self._channels_first(layer)
        rows, channels, places = maps.shape
        limit = _CHUNK_BYTES if maps.device.type == "cpu" else _CHUNK_BYTES_ELSEWHERE
        size = max(1, limit // max(1, channels * places * 4))
        bits = _HEADROOM_BITS - math.ceil(math.log2(max(1, channels * channels * places)))
        headroom = bits // (2 * max(self.powers))
        # strides as the maps have them, so that channels-last maps are read in order too
        work = torch.empty_like(maps[:size]), torch.empty_like(maps[:size])
        chunks = [
            self._chunk(maps[start : start + size], headroom, unit, work)
            for start in range(0, max(1, rows), size)
        ]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _channels_first(self, layer: Tensor) -> Tensor:
        """(B, C, M), floating, at least float32."""
        if layer.ndim < 2:
            raise ContractError(f"gram: expected a layer (B, C, ...), found {tuple(layer.shape)}")
        if layer.dtype not in (torch.float32, torch.float64):
            layer = layer.float()
        if layer.ndim == 2:
            return layer.unsqueeze(2)
        if self.channels == "last" or (self.channels == "auto" and layer.ndim == 3):
            return layer.flatten(1, -2).transpose(1, 2)
        return layer.flatten(2)

    def _chunk(
        self, maps: Tensor, headroom: int, unit: Tensor | float, work: tuple[Tensor, Tensor]
    ) -> Tensor:
        flat = maps.flatten(1)
        # two passes: aminmax over rows is some forty times slower on a CPU
        exponent = torch.frexp(torch.maximum(flat.amax(dim=1), -flat.amin(dim=1))).exponent
        shift = (headroom - exponent.clamp(min=-_EXPONENT_LIMIT)).to(maps.dtype)
        base, raised = (buffer[: len(maps)] for buffer in work)
        torch.mul(maps, shift.exp2()[:, None, None], out=base)
        back = shift.neg().exp2()[:, None] / unit
        found = torch.empty(
            (len(maps), len(self.powers), self._width(maps.shape[1])),
            dtype=maps.dtype,
            device=maps.device,
        )
        ones = torch.ones((1, 1, 1), dtype=maps.dtype, device=maps.device)
        ones = ones.expand(len(maps), 1, maps.shape[1])
        current, reached = base, 1
        for position in sorted(range(len(self.powers)), key=self.powers.__getitem__):
            power = self.powers[position]
            while reached < power:
                current = torch.mul(current, base, out=raised)
                reached += 1
            if self.statistic == "rowsum":
                total = torch.bmm(ones, current)
                sums = torch.bmm(current, total.transpose(1, 2))[:, :, 0]
            elif self.statistic == "diag":
                sums = current.square().sum(dim=2)
            else:
                upper = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
                sums = torch.bmm(current, current.transpose(1, 2))[:, upper[0], upper[1]]
            # twice: the square of the factor alone may be infinite where the product is not
            found[:, position] = _root(sums, power).mul_(back).mul_(back)
        return found

    def _width(self, channels: int) -> int:
        return channels * (channels + 1) // 2 if self.statistic == "triu" else channels


def _root(sums: Tensor, power: int) -> Tensor:
    """sign(v)|v|^(1/power) by the cheapest way; sums of even powers are never negative."""
    if power == 1:
        return sums
    if power in (2, 4, 8):
        for _ in range(power.bit_length() - 1):
            sums = sums.sqrt()
        return sums
    if power % 2 == 0:
        return sums.pow(1.0 / power)
    return sums.abs().pow_(1.0 / power).copysign_(sums)


def _deviation(values: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Sum over (P, N) of the relative excess below lower or above upper, (B,)."""
    below = (lower - values).clamp_(min=0.0).div_(lower.abs().add_(_EPSILON))
    above = (values - upper).clamp_(min=0.0).div_(upper.abs().add_(_EPSILON))
    return below.add_(above).flatten(1).sum(dim=1)


def _size(layer: Tensor) -> float:
    """The layer's largest finite magnitude; 0 where there is none."""
    size = layer.detach().abs().float()
    return float(torch.where(size.isfinite(), size, 0.0).max()) if size.numel() else 0.0


def _unit(size: float) -> float:
    """The power of two above a magnitude; 1 above 0."""
    exponent = math.frexp(size)[1] if size > 0.0 else 0
    return float(2.0 ** max(-_EXPONENT_LIMIT, min(_EXPONENT_LIMIT, exponent)))


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise StateError(
            f"gram: state {name!r}: expected float32 {shape}, "
            f"found {tensor.dtype} {tuple(tensor.shape)}"
        )
