"""Order statistics without a sort: of the values of each row, and of a stream in bounded memory."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from oodmon.errors import ContractError

__all__ = ["Cut", "Quantiles", "largest", "top_values"]

_SEARCHED: Final = 1 << 16
"""From so many values on a search beats selection: it reads them in order, 16 times."""

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
        if self.weight is None:  # of one row
            return functional.threshold(values, self.low.item(), 0.0)
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

    No value waits for the host. Many values: a bracketed secant search for the threshold on the
    logarithm of how many lie above it, every third step a bisection. Few: selection.
    """
    if len(values) == 1 and values.is_cpu:
        found = _alone(values, count)
        if found is not None:
            return found
    if values.numel() < _SEARCHED or values.shape[1] < _STEPS:
        place = values.shape[1] - count + 1
        high = values.kthvalue(place, dim=1, keepdim=True).values
        low = torch.nextafter(high, torch.full_like(high, -math.inf))
        # sums of signs, because sums of booleans are slow
        signs = (values - high).sign_()
        net, unequal = signs.sum(dim=1, keepdim=True), signs.square_().sum(dim=1, keepdim=True)
        equal = (values.shape[1] - unequal).clamp_(min=1.0)
        return Cut(low, high, (count - (unequal + net) / 2) / equal)
    return _search(values, count)


def _alone(values: Tensor, count: int) -> Cut | None:
    """Of one row in the host's memory, if its k-th value is positive and nobody shares it."""
    row = values.numpy()[0]
    place = len(row) - count
    # not NumPy's selection, which many equal values, such as a ReLU's zeros, slow a hundredfold
    least = row.dtype.type(values.kthvalue(place + 1, dim=1).values.item())
    # a NaN is above nothing, so where there is one the number is another
    if not least > 0.0 or np.count_nonzero(row >= least) != count:
        return None
    ends = torch.from_numpy(np.array([[np.nextafter(least, -np.inf)], [least]], row.dtype))
    return Cut(ends[:1], ends[1:], None)


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
