"""A few rows that leave none of the others far from all of them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from oodmon.contracts import Reference

__all__ = ["coreset"]

_PROJECTED: Final = 64
"""Dimensions in which a coreset is chosen: distances survive a random projection (Johnson and
Lindenstrauss), and choosing is bound by reading the rows once per point."""


def coreset(rows: Tensor, count: int, reference: Reference, note: str = "coreset") -> Tensor:
    """Places (M,) of at most `count` rows that leave none of rows (N, D) far from all of them.

    Greedy k-center (Gonzalez, 1985; as in PatchCore): each point is the row farthest from those
    chosen so far. Its radius is at most twice the smallest possible, in the projected space. Fewer
    points where the rest are copies of those chosen.
    """
    draw = reference.generator()
    if rows.shape[1] > _PROJECTED:
        mix = torch.randn((rows.shape[1], _PROJECTED), generator=draw) / _PROJECTED**0.5
        rows = rows @ mix.to(rows.device)
    at = int(torch.randint(len(rows), (1,), generator=draw))
    chosen = [at]
    apart = (rows - rows[at]).square().sum(dim=1)
    size = rows.square().sum(dim=1)
    while len(chosen) < count:
        at = int(apart.argmax())
        if not float(apart[at]) > 0.0:
            break
        chosen.append(at)
        step = torch.addmv(size + size[at], rows, rows[at], alpha=-2.0)
        torch.minimum(apart, step, out=apart)
        apart[at] = 0.0
        if len(chosen) % 256 == 0:
            reference.progress(len(chosen) / count, note)
    return torch.tensor(chosen, device=rows.device)
