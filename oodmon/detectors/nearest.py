"""Exact search of a bank of features: one product with it, and the k best without sorting them.

The bank is taken in chunks, so that memory does not grow with it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from oodmon.errors import ContractError

__all__ = ["best", "distance", "half_squares"]

_LIKENESSES: Final = 1 << 21
"""Likenesses held at once: 8 MB of float32, whatever the batch and the bank."""

_BLOCK: Final = 64
"""The largest of so many likenesses tells whether one of them can be among the best."""

_ROWS: Final = 1024
"""Samples compared with the bank at once."""


def best(rows: Tensor, bank: Tensor, half: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest x·b - half_b of each row, in no order, and their places in the bank, (B, k)."""
    if len(rows) > _ROWS:
        parts = [best(part, bank, half, k) for part in torch.split(rows, _ROWS)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    step = min(len(bank), max(k, _LIKENESSES // max(1, len(rows))))
    # one for all chunks, because memory that is new costs as much as choosing the best does
    room = rows.new_empty((len(rows), step))
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), max(1, step)):
        part = bank[start : start + step]
        alike = room[:, : len(part)]
        if half is None:
            torch.mm(rows, part.T, out=alike)
        else:
            torch.addmm(half[start : start + step], rows, part.T, beta=-1.0, out=alike)
        value, place = _largest(alike, min(k, len(part)))
        place = place + start
        if found is not None:
            value = torch.cat([found[0], value], dim=1)
            place = torch.cat([found[1], place], dim=1)
            value, chosen = value.topk(k, dim=1, sorted=False)
            place = place.gather(1, chosen)
        found = value, place
    if found is None:
        raise ContractError("the bank is empty")
    return found


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (B, n) and their places, from the k blocks of the largest maxima.

    Whatever is in another block is no larger than k values are.
    """
    blocks = values.shape[1] // _BLOCK
    if blocks < 4 * k:  # the chosen blocks would be much of the row
        found = values.topk(k, dim=1, sorted=False)
        return found.values, found.indices
    whole = values[:, : blocks * _BLOCK].view(len(values), blocks, _BLOCK)
    chosen = whole.amax(dim=2).topk(k, dim=1, sorted=False).indices[:, :, None]
    inside = torch.arange(_BLOCK, device=values.device)
    left = torch.arange(blocks * _BLOCK, values.shape[1], device=values.device)
    places = torch.cat([(chosen * _BLOCK + inside).flatten(1), left.expand(len(values), -1)], dim=1)
    value, of = values.gather(1, places).topk(k, dim=1, sorted=False)
    return value, places.gather(1, of)


def distance(rows: Tensor, bank: Tensor, half: Tensor, k: int) -> Tensor:
    """To the k-th nearest of the bank, (B,): found by products, then measured as a difference."""
    value, place = best(rows, bank, half, k)
    last = place.gather(1, value.argmin(dim=1, keepdim=True)).squeeze(1)
    found: Tensor = torch.linalg.vector_norm(rows - bank[last], dim=1)
    return found.clamp_(max=torch.finfo(found.dtype).max)


def half_squares(bank: Tensor) -> Tensor:
    """Half the squared length of each row (N, D): (N,)."""
    return bank.square().sum(dim=1) / 2.0
