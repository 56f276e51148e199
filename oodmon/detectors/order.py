"""Order statistics without a sort: of the values of each row, and of a stream in bounded memory."""

from __future__ import annotations

import functools
import math
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from oodmon.errors import ContractError

__all__ = ["Cut", "Quantiles", "largest", "top_values"]

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]

_SEARCHED: Final = 1 << 16
"""From so many values on a search beats selection: it reads them in order, 16 times."""

_WIDE: Final = 2048
"""On a CPU rows of so many values are selected from one by one: in its cache, through a sample."""

_SAMPLED: Final = 1024
"""Values sampled of a row at most, and an eighth of it."""

_SLACK: Final = 3.0
"""Standard deviations that its order statistic may be away from the sample's; beyond, which is one
row in hundreds, the row is sorted."""

_STEPS: Final = 16
"""Steps of the search; on 8,192 half-normal values they end at the exact order statistic in all but
a percent of the rows, and what is left over weighs less than 1e-6 of the sum."""

_BITS: Final = 20
"""Leading bits of a float32 that make a bin of `Quantiles`: sign, exponent, 11 of the mantissa."""


class Cut(NamedTuple):
    """Where the k largest values of each row begin; each (B, 1).

    Values above `high` are among them, those in (low, high] with `weight` each: values that share
    the k-th place share it evenly. No weight says that none do: what is above `low` is among them.
    """

    low: Tensor
    high: Tensor
    weight: Tensor | None

    def kept(self, values: Tensor) -> Tensor:
        """The values (B, N) that are among the largest, and zeros for the others."""
        if self.weight is None:  # on a CPU
            if len(values) == 1:
                return functional.threshold(values, self.low.item(), 0.0)
            kept = values.clone()
            for row, low in zip(kept, self.low.flatten().tolist(), strict=True):
                torch.threshold_(row, low, 0.0)
            return kept
        return self.share(values).mul_(values)

    def share(self, values: Tensor) -> Tensor:
        """How far each value (B, N) is among the largest, in [0, 1]."""
        if self.weight is None:
            return (values > self.low).to(values.dtype)
        surely = (values - self.high).sign_().clamp_(min=0.0)
        maybe = (values - self.low).sign_().clamp_(min=0.0)
        return surely.lerp_(maybe, self.weight)


def top_values(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row (B, N), in no order: (B, count)."""
    if values.device.type != "cpu":
        return values.topk(count, dim=1, sorted=False).values
    start = values.shape[1] - count
    if not count:
        return values[:, start:]
    # NumPy's sort is vectorised, takes a NaN for the largest as here, and is as fast as its
    # selection, which many equal values slow a hundredfold
    return torch.from_numpy(np.sort(values.numpy(), axis=1)[:, start:])


def largest(values: Tensor, count: int) -> Cut:
    """The `count` largest of each row (B, N), 1 <= count <= N; a row with a NaN gets NaN.

    On a CPU it is exact. On a device no value waits for the host: of many values a bracketed secant
    search for the threshold on the logarithm of how many lie above it, every third step a
    bisection; of few, selection.
    """
    if values.is_cpu and len(values) and (len(values) == 1 or values.shape[1] >= _WIDE):
        return _selected(values.numpy(), count)
    if not values.is_cpu and values.numel() >= _SEARCHED and values.shape[1] >= _STEPS:
        return _search(values, count)
    place = values.shape[1] - count + 1
    high = values.kthvalue(place, dim=1, keepdim=True).values
    low = torch.nextafter(high, torch.full_like(high, -math.inf))
    # sums of signs, because sums of booleans are slow
    signs = (values - high).sign_()
    net, unequal = signs.sum(dim=1, keepdim=True), signs.square_().sum(dim=1, keepdim=True)
    equal = (values.shape[1] - unequal).clamp_(min=1.0)
    return Cut(low, high, (count - (unequal + net) / 2) / equal)


def _selected(values: Floats, count: int) -> Cut:
    """In the host's memory, row by row; without a weight if nobody shares a positive k-th value."""
    high, weight = [], [1.0] * len(values)
    plain = True
    for number, row in enumerate(values):
        least = math.nan if math.isnan(row.min()) else _kth(row, count)
        high.append(least)
        upto = np.count_nonzero(row >= least)
        if not least > 0.0 or upto != count:
            plain = False
            above = np.count_nonzero(row > least)
            weight[number] = (count - above) / (upto - above) if upto > above else math.nan
    ends = np.array([high, high], values.dtype)
    np.nextafter(ends[0], -np.inf, out=ends[0], dtype=values.dtype)
    low, top = torch.from_numpy(ends).unsqueeze(2)
    return Cut(low, top, None if plain else low.new_tensor(weight).unsqueeze(1))


def _kth(row: Floats, count: int) -> float:
    """The `count`-th largest of a row (N,) without a NaN.

    Not by NumPy's selection, which many equal values, such as a ReLU's zeros, slow a hundredfold. A
    sample tells between which values it lies, and only what is there is sorted (Floyd and Rivest,
    "Expected time bounds for selection", 1975).
    """
    width = len(row)
    if width < _WIDE:
        return torch.from_numpy(row).kthvalue(width - count + 1).values.item()
    share = count / width
    sample = row.take(_sample(width))
    sample.sort()
    place = len(sample) * (1.0 - share)
    slack = _SLACK * math.sqrt(place * share) + 2.0
    start, end = math.floor(place - slack), math.ceil(place + slack)
    inside = row >= sample[start] if start >= 0 else np.ones(width, np.bool_)
    above = 0
    if end < len(sample):
        above = int(np.count_nonzero(row > sample[end]))
        inside &= row <= sample[end]
    few = row[inside]
    rank = len(few) - (count - above)
    if not 0 <= rank < len(few):
        few, rank = row, width - count
    return float(np.sort(few)[rank])


@functools.lru_cache(maxsize=16)
def _sample(width: int) -> Places:
    """Places of a row, drawn evenly and always the same."""
    drawn = np.random.default_rng(width).choice(width, min(_SAMPLED, width // 8), replace=False)
    drawn.sort()
    return drawn


def _search(values: Tensor, count: int) -> Cut:
    width = values.shape[1]
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny
    low = low - (high - low) * 1e-3 - low.abs() * 1e-6 - tiny
    below = torch.full_like(low, float(width))  # values above `low`
    above = torch.zeros_like(low)  # values above `high`
    at_low = torch.full_like(low, math.log(width / count))
    at_high = torch.full_like(low, math.log(0.5 / count))
    side = torch.zeros_like(low)
    signs = torch.empty_like(values)
    for step in range(_STEPS):
        if step % 3 == 2:
            place = (low + high) / 2
        else:
            place = (low * at_high - high * at_low) / (at_high - at_low)
            place = torch.minimum(torch.maximum(place, low), high)
        # a value at the place counts as half above it
        found = torch.sub(values, place, out=signs).sign_().sum(dim=1, keepdim=True)
        found = found.add_(width).mul_(0.5)
        size = (found.clamp(min=0.5) / count).log_()
        more = found > count
        # the Illinois rule: an end that stays twice counts half
        at_high = torch.where(more, torch.where(side > 0.0, at_high / 2, at_high), size)
        at_low = torch.where(more, size, torch.where(side < 0.0, at_low / 2, at_low))
        low, high = torch.where(more, place, low), torch.where(more, high, place)
        below, above = torch.where(more, found, below), torch.where(more, above, found)
        side = more.to(values.dtype) * 2.0 - 1.0
    weight = ((count - above) / (below - above).clamp(min=0.5)).clamp_(0.0, 1.0)
    return Cut(low, high, weight)


class Quantiles:
    """Quantiles of all values of a stream, from one histogram of 8 MiB whatever the stream's size.

    Bins are the leading bits of a float32, so a quantile is within 2^-11 of the order statistic,
    relative to it, at any scale; zero is exact.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(1 << _BITS, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """Take finite values of any shape."""
        bits = values.float().reshape(-1).contiguous().view(torch.int32)
        # the order of the integers becomes that of the floats
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        bins = (bits >> (32 - _BITS)) + (1 << (_BITS - 1))
        self._counts += torch.bincount(bins, minlength=1 << _BITS)

    def at(self, share: float) -> float:
        """The value below which this share of the stream lies; `ContractError` where none came."""
        upto = self._counts.cumsum(dim=0)
        number = int(upto[-1])
        if not number:
            raise ContractError("the reference holds no row that is finite; nothing to learn from")
        place = share * (number - 1)
        index = int(torch.searchsorted(upto, torch.tensor(place, device=upto.device), right=True))
        index = min(index, len(upto) - 1)
        inside = int(self._counts[index])
        before = int(upto[index]) - inside
        start, end = _edge(index), _edge(index + 1)
        if start == 0.0:
            return 0.0
        return start + (end - start) * min(max((place - before + 0.5) / inside, 0.0), 1.0)


def _edge(index: int) -> float:
    """The smallest value of a bin."""
    key = torch.tensor((index - (1 << (_BITS - 1))) << (32 - _BITS), dtype=torch.int64)
    key = key.clamp(-(1 << 31), (1 << 31) - 1).to(torch.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return float(value.nan_to_num(nan=0.0))
