"""A few reference samples as the model is called with them: to learn from, and held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from oodmon.detectors.outliers import OUTLIER
from oodmon.fitting.shares import Shares
from oodmon.fitting.sources import Batch, Source

__all__ = ["rows_of", "sampled", "sized"]

_SLACK: Final = 1.25
"""A sample that has grown to this many times its limit is thinned out."""


class _Sample:
    """At most so many rows of a stream, each as likely as any other: those of the smallest keys."""

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._draw = torch.Generator().manual_seed(seed)
        self._held: list[tuple[Tensor, Batch]] = []

    def add(self, batch: Batch) -> None:
        key = torch.rand(batch.rows, generator=self._draw, dtype=torch.float64)
        self._held.append((key, batch))
        if sum(len(key) for key, _ in self._held) > _SLACK * self._limit:
            self._thin()

    def batches(self) -> list[Batch]:
        self._thin()
        return [batch for _, batch in self._held]

    def _thin(self) -> None:
        keys = torch.cat([key for key, _ in self._held]) if self._held else torch.empty(0)
        if len(keys) <= self._limit:
            return
        last = keys.kthvalue(self._limit).values if self._limit else torch.tensor(-1.0)
        thinned = [(key[key <= last], rows_of(batch, key <= last)) for key, batch in self._held]
        self._held = [(key, batch) for key, batch in thinned if len(key)]


def sampled(
    source: Source,
    learn: int,
    held: int,
    *,
    learn_share: float,
    seed: int,
    run: int = 1,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Batch], list[Batch]]:
    """Uniform samples of the two shares that `fit` makes of a source with the same arguments.

    So what a detector has learnt from in `fit` is never among those held out. The source is read
    once; at most `learn` and `held` samples are kept, as the model is called with them. `progress`
    is told how many were read.
    """
    done = 0
    shares = Shares(Path(), learn_share, seed, run)
    both = _Sample(learn, seed), _Sample(held, seed + 1)
    for whole in source.batches():
        batch = whole
        if whole.labels is not None and bool((whole.labels == OUTLIER).any()):
            batch = rows_of(whole, whole.labels != OUTLIER)
        chosen = torch.from_numpy(shares.choose(batch.rows))
        for sample, mask in zip(both, (chosen, ~chosen), strict=True):
            if bool(mask.any()):
                sample.add(rows_of(batch, mask))
        done += whole.rows
        if progress is not None:
            progress(done)
    return both[0].batches(), both[1].batches()


def rows_of(batch: Batch, chosen: Tensor | slice) -> Batch:
    """Some rows of a batch."""
    count = batch.rows
    return dataclasses.replace(
        batch,
        arguments=_rows(batch.arguments, chosen, count),
        named=_rows(batch.named, chosen, count),
        labels=None if batch.labels is None else batch.labels[chosen],
        places={},
    )


def sized(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same rows in batches of `size`; as they are where their shapes differ."""
    if not batches:
        return []
    try:
        whole = Batch(
            _joined([batch.arguments for batch in batches]),
            _joined([batch.named for batch in batches]),
            _joined([batch.labels for batch in batches]),
        )
    except (RuntimeError, TypeError, KeyError):
        return list(batches)
    return [rows_of(whole, slice(at, at + size)) for at in range(0, whole.rows, size)]


def _rows(values: Any, chosen: Tensor | slice, count: int) -> Any:
    if isinstance(values, Mapping):
        return {name: _rows(value, chosen, count) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_rows(value, chosen, count) for value in values)
    has_rows = isinstance(values, Tensor) and values.ndim and len(values) == count
    return values[chosen] if has_rows else values


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_joined(list(column)) for column in zip(*values, strict=True))
    return torch.cat(list(values)) if isinstance(first, Tensor) and first.ndim else first
