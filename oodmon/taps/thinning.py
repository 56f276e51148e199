"""Dropout whose masks are decided by a seed: one thinned network for all rows of a batch.

While it is in force, in its own thread only, every call of a dropout function drops the units that
the seed, the number of the call and the unit's place decide, whatever mode the modules are in. So
batch norms stay in evaluation mode, the rows of a batch and of all batches meet the same networks,
no global generator is touched, and the same masks come out on every device.

With several seeds the first dropout makes K·B rows of B, those of the first network, then those of
the second: what comes before it is computed once, and what follows once on many rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from oodmon.errors import ContractError

__all__ = ["Thinning", "uniform"]

_MASK: Final = 0xFFFFFFFF
_GOLDEN: Final = 0x9E3779B9
_ROUNDS: Final = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""Shifts and factors of the integer hash lowbias32 (Wellons, "Hash function prospector")."""

_SMALL: Final = 1 << 14
"""Numbers of so few units are kept from batch to batch."""

_ALPHA: Final = -1.7580993408473766
"""What a dropped unit of a self-normalising network is set to (Klambauer et al., NeurIPS 2017)."""

_UNITS: Final = (functional.dropout, torch.dropout)
_CHANNELS: Final = (
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    torch.feature_dropout,
)
_ALPHAS: Final = (functional.alpha_dropout, torch.alpha_dropout)
_DROPOUTS: Final = (*_UNITS, *_CHANNELS, *_ALPHAS)


def uniform(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """(count,) float32 in [0, 1): a hash of seed, stream and place, the same on every device."""
    start = _mixed((seed & _MASK) ^ _mixed((stream + 1) * _GOLDEN & _MASK))
    x = torch.arange(count, device=device, dtype=torch.int64)
    x = (x * _GOLDEN + start) & _MASK
    for shift, factor in _ROUNDS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    # 24 bits are what a float32 below 1 can hold
    return ((x ^ (x >> 16)) >> 8).to(torch.float32) / (1 << 24)


@functools.lru_cache(maxsize=512)
def _remembered(seed: int, stream: int, count: int, device: torch.device) -> Tensor:
    """`uniform`, which is the same for every batch; 32 MiB at most. Must not be written to."""
    return uniform(seed, stream, count, device)


def _mixed(x: int) -> int:
    for shift, factor in _ROUNDS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 16)


class Thinning(TorchFunctionMode):
    """Puts seeded masks in the place of dropout while it is entered.

    Args:
        seeds: each names a thinned network. With several of them the caller has to see that the
            model bears rows that become more on the way (`stacks`).
        rate: share of units to drop; 0 leaves the model's own rates.
        rows: B, to tell the rows' dimension where it is not the first (sequences first).
    """

    def __init__(self, seeds: Sequence[int], rate: float, rows: int) -> None:
        super().__init__()
        self._seeds = seeds
        self._rate = rate
        self._rows = rows
        self._dim = -1
        self.networks = len(seeds)
        self.calls = 0
        self.width = 0
        """Bytes of a row that the first dropout was given."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers dropout calls, and passes all others on."""
        named = dict(kwargs or {})
        if func not in _DROPOUTS:
            return func(*args, **named)
        tensor, rate, in_place = _arguments(args, named)
        if rate <= 0.0:  # switched off by whoever built the model
            return tensor
        rate = self._rate or rate
        self.calls += 1
        dim = self._dim_of(tensor)
        if self.calls == 1:
            self.width = tensor.nbytes // max(1, self._rows)
        wide = tensor
        if self.networks > 1:
            repeated = tensor.shape[dim] != self._rows
            shape = list(tensor.shape)
            shape[dim : dim + 1] = [self.networks, -1] if repeated else [1, shape[dim]]
            wide = tensor.reshape(shape)
        kept = self._kept(tensor, dim, rate, whole_channels=func in _CHANNELS)
        if func in _ALPHAS:
            dropped = _dropped_alpha(wide, kept, rate)
        elif rate >= 1.0:
            dropped = wide * 0.0
        else:
            dropped = wide * (kept / (1.0 - rate)).to(tensor.dtype)
        if wide is not tensor:
            dropped = dropped.flatten(dim, dim + 1)
        return tensor.copy_(dropped) if in_place and dropped.shape == tensor.shape else dropped

    def _dim_of(self, tensor: Tensor) -> int:
        """Which dimension holds the rows; `ContractError` where several networks cannot tell."""
        shape, alone = tensor.shape, self.networks == 1
        if alone:
            second = len(shape) > 1 and shape[0] != self._rows and shape[1] == self._rows
            return int(second)
        stacked = self.networks * self._rows
        fits = [
            dim
            for dim, size in enumerate(shape[:2])
            # rows that are not yet repeated are B; later there may be more, a row's heads for one
            if size == self._rows or (self._dim >= 0 and size % stacked == 0)
        ]
        if not fits:
            raise ContractError(f"no rows of {self._rows} in a dropout's {tuple(shape)}")
        if self._dim < 0:
            self._dim = fits[0]
        return self._dim if self._dim in fits else fits[0]

    def _kept(self, tensor: Tensor, dim: int, rate: float, *, whole_channels: bool) -> Tensor:
        """1 where a unit stays, of the tensor's shape but for the rows: 1, or K and 1."""
        shape = list(tensor.shape)
        if not shape:
            return torch.ones((), device=tensor.device)
        shape[dim] = 1
        if whole_channels and len(shape) > 2:
            shape[2:] = [1] * (len(shape) - 2)
        count = math.prod(shape)
        draw = _remembered if count <= _SMALL else uniform
        found = [draw(seed, self.calls, count, tensor.device).view(shape) for seed in self._seeds]
        numbers = torch.stack(found, dim) if len(found) > 1 else found[0]
        return (numbers >= rate).to(torch.float32)


def _arguments(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, float, bool]:
    """Tensor, rate and whether to work in place, of any dropout function's call."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | named
    return given["input"], float(given.get("p", 0.5)), bool(given.get("inplace", False))


def _dropped_alpha(tensor: Tensor, kept: Tensor, rate: float) -> Tensor:
    """Affine so that mean 0 and variance 1 are kept (Klambauer et al. 2017, equation 6)."""
    stay = 1.0 - rate
    if stay <= 0.0:
        return tensor * 0.0
    scale = (stay + _ALPHA**2 * stay * rate) ** -0.5
    moved = torch.where(kept.bool(), tensor.float(), torch.full_like(kept, _ALPHA))
    found: Tensor = scale * moved - scale * rate * _ALPHA
    return found.to(tensor.dtype)
