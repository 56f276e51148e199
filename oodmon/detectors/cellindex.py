"""An index over a bank of features: it is cut into cells, and only the nearest cells are searched.

The cells are part of what a detector learns, so the same state gives the same answers anywhere. The
index itself is made from them at the first search, and kept as long as the bank lives.
"""

from __future__ import annotations

import importlib.util
import threading
import weakref
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from oodmon.errors import ContractError

__all__ = ["available", "learn_cells", "search"]

_PER_ROOT: Final = 4
"""Cells for each square root of the rows, as faiss advises."""

_SEED: Final = 1
_MADE: Final[dict[int, Any]] = {}
_LOCK: Final = threading.Lock()


def available() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def learn_cells(bank: Tensor, option: str) -> Tensor:
    """Centres (M, D) of the cells of bank (N, D), on the bank's device.

    `ContractError` names the option where faiss is not installed.
    """
    faiss = _faiss(option)
    count = max(1, min(round(_PER_ROOT * len(bank) ** 0.5), len(bank) // 4))
    means = faiss.Kmeans(bank.shape[1], count, seed=_SEED, min_points_per_centroid=1)
    means.train(_array(bank))
    return torch.from_numpy(np.ascontiguousarray(means.centroids)).to(bank.device)


def search(rows: Tensor, bank: Tensor, cells: Tensor, k: int, probes: int, option: str) -> Tensor:
    """Places (B, k) in the bank of the nearest of each row, ascending; -1 where there are none.

    Args:
        rows: (B, D); a row that holds a NaN has no neighbours.
        bank: (N, D), on the CPU.
        cells: (M, D), what `learn_cells` made of it.
        k: how many.
        probes: cells that are searched, the nearest ones.
        option: named where faiss is not installed.
    """
    faiss = _faiss(option)
    found = _index(bank, cells, faiss)
    chosen = faiss.SearchParametersIVF(nprobe=min(probes, len(cells)))
    _, places = found.search(_array(rows), k, params=chosen)
    return torch.from_numpy(places)


def _index(bank: Tensor, cells: Tensor, faiss: Any) -> Any:
    """The index of this very bank; made once, whatever threads ask for it."""
    key = id(bank)
    found = _MADE.get(key)
    if found is None:
        with _LOCK:
            found = _MADE.get(key)
            if found is None:
                width = bank.shape[1]
                coarse = faiss.IndexFlatL2(width)
                coarse.add(_array(cells))
                found = faiss.IndexIVFFlat(coarse, width, len(cells))
                found.add(_array(bank))
                # before it can be found, so that another bank at this address never meets it
                weakref.finalize(bank, _MADE.pop, key, None)
                _MADE[key] = found
    return found


def _array(rows: Tensor) -> Any:
    return np.ascontiguousarray(rows.detach().numpy(), np.float32)


def _faiss(option: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise ContractError(f"{option}: 'faiss' needs faiss: pip install 'oodmon[faiss]'") from None
    return faiss
