"""Ranges of many statistics per predicted class, taken from a stream in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from oodmon.contracts import Reference
from oodmon.detectors.logits import predicted, two_sided
from oodmon.errors import ContractError

__all__ = ["HeldOut", "MinMax", "Quantiles", "class_counts"]


class MinMax:
    """Smallest and largest value per class; the range over all classes where one has no row."""

    def __init__(self) -> None:
        self._lower: Tensor | None = None
        self._upper: Tensor | None = None

    def add(self, values: Tensor, label: Tensor, classes: int) -> None:
        """Take rows (R, N) with class (R,) below `classes`."""
        if self._lower is None or self._upper is None:
            shape = (classes, values.shape[1])
            self._lower = torch.full(shape, math.inf, dtype=values.dtype, device=values.device)
            self._upper = torch.full(shape, -math.inf, dtype=values.dtype, device=values.device)
        index = label[:, None].expand(values.shape)
        self._lower.scatter_reduce_(0, index, values, "amin")
        self._upper.scatter_reduce_(0, index, values, "amax")

    def result(self) -> tuple[Tensor, Tensor]:
        """Lower and upper (K, N); `ContractError` where no row came."""
        if self._lower is None or self._upper is None or not bool(self._lower.isfinite().any()):
            raise ContractError("gram: the reference has too few rows that are finite")
        empty = (self._lower > self._upper).any(dim=1, keepdim=True)
        lower = torch.where(empty, self._lower.amin(dim=0), self._lower)
        upper = torch.where(empty, self._upper.amax(dim=0), self._upper)
        return lower.float(), upper.float()


class Quantiles:
    """Quantiles q and 1 - q per class, linear between order statistics (numpy's default).

    Only the extremes that can matter are kept: at most q times the rows, at each end.

    Args:
        share: q.
        counts: at least the rows per class that will come.
    """

    def __init__(self, share: float, counts: Sequence[int]) -> None:
        self._share = share
        self._keep = [math.ceil(share * count) + 2 for count in counts]
        self._seen = [0] * len(counts)
        # per class, then one for all classes together
        self._keep.append(math.ceil(share * sum(counts)) + 2)
        self._seen.append(0)
        self._low: list[Tensor | None] = [None] * len(self._keep)
        self._high: list[Tensor | None] = [None] * len(self._keep)

    def add(self, values: Tensor, label: Tensor, classes: int) -> None:
        """Take rows (R, N) with class (R,) below `classes`."""
        for group in range(classes):
            self._take(group, values[label == group])
        self._take(classes, values)

    def _take(self, group: int, rows: Tensor) -> None:
        if not len(rows):
            return
        self._seen[group] += len(rows)
        for ends, largest in ((self._low, False), (self._high, True)):
            held = ends[group]
            both = rows if held is None else torch.cat([held, rows])
            count = min(self._keep[group], len(both))
            ends[group] = both.topk(count, dim=0, largest=largest, sorted=True).values

    def result(self) -> tuple[Tensor, Tensor]:
        """Lower and upper (K, N); `ContractError` where no row came."""
        everyone = len(self._seen) - 1
        if everyone < 0 or self._seen[everyone] == 0:
            raise ContractError("gram: the reference has too few rows that are finite")
        ends: list[Tensor] = []
        for kept in (self._low, self._high):
            rows = []
            for group in range(everyone):
                source = group if self._seen[group] else everyone
                extremes = kept[source]
                if extremes is None:
                    raise ContractError("gram: a class has rows but no extremes")
                place = self._share * (self._seen[source] - 1)
                whole = int(place)
                after = min(whole + 1, len(extremes) - 1)
                rows.append(torch.lerp(extremes[whole], extremes[after], place - whole))
            ends.append(torch.stack(rows).float())
        return ends[0], ends[1]


class HeldOut:
    """Rows set aside, in one block of memory.

    Kept as pieces between the batches' own tensors they would leave holes that no batch fits into,
    and a long reference would take many times their size.

    Args:
        limit: bytes; once they are reached nothing more is taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: Tensor | None = None
        self._count = 0
        self._labels: list[tuple[Tensor, Tensor]] = []

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        if self._rows is None:
            return False
        return self._count * self._rows.shape[1] * self._rows.element_size() >= self._limit

    def add(self, values: Tensor, label: Tensor, sure: Tensor) -> None:
        """Take rows (R, N) with class and confidence (R,)."""
        needed = self._count + len(values)
        if self._rows is None or needed > len(self._rows):
            fits = self._limit // max(1, values.shape[1] * values.element_size()) + 1
            larger = values.new_empty((max(fits, needed), values.shape[1]))
            if self._rows is not None:
                larger[: self._count] = self._rows[: self._count]
            self._rows = larger
        self._rows[self._count : needed] = values
        self._count = needed
        self._labels.append((label, sure))

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What was taken, as it came."""
        start = 0
        for label, sure in self._labels:
            if self._rows is not None:
                yield self._rows[start : start + len(label)], label, sure
            start += len(label)


def class_counts(reference: Reference) -> list[int]:
    """Rows per predicted class."""
    counts: Tensor | None = None
    for acts in reference:
        found = predicted(acts).bincount(minlength=two_sided(acts).shape[1])
        counts = found if counts is None else counts + found
    return [] if counts is None else [int(count) for count in counts]
