"""Blurred copies of images: by singular values, by cosine transform, by a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

from oodmon.errors import ContractError

__all__ = ["Blur", "blur_of", "dct_blur", "gaussian_blur", "just_visible", "svd_blur"]

Blur = Literal["gaussian", "dct", "svd"]

_VISIBLE: Final = 0.15
"""A blur is just visible when the mean squared change is this share of the mean variance."""

_ROUNDING: Final = 1e-9
"""A mean squared change below this share of the mean square is float32's rounding."""

_LOOKED_AT: Final = 512
"""Images on which a blur's strength is chosen."""

_CHUNK: Final = 4096
"""Images whose singular values are taken at once."""

_TRUNCATE: Final = 4.0
"""A Gaussian kernel ends at this many standard deviations."""

_SIGMAS: Final = tuple(0.25 * step for step in range(1, 41))


def svd_blur(images: Tensor, removed: int) -> Tensor:
    """Without the `removed` smallest of the singular values that are not 0, per channel.

    Counted from the numerical rank of each image; at least one value stays.
    """
    parts = []
    for part in torch.split(images, _CHUNK):
        left, values, right = torch.linalg.svd(part, full_matrices=False)
        limit = max(part.shape[-2:]) * torch.finfo(part.dtype).eps
        rank = (values > limit * values[..., :1]).sum(dim=-1, keepdim=True)
        stays = (rank - removed).clamp_(min=1)
        index = torch.arange(values.shape[-1], device=values.device)
        parts.append((left * torch.where(index < stays, values, 0.0).unsqueeze(-2)) @ right)
    return torch.cat(parts)


def dct_blur(images: Tensor, kept: int) -> Tensor:
    """With the `kept` × `kept` lowest frequencies of the two-dimensional cosine transform only."""
    return _both_ways(images, lambda size: _low_frequencies(size, kept))


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Smoothed by a Gaussian of `sigma` pixels; the image is mirrored at its borders."""
    return _both_ways(images, lambda size: _smoothing(size, sigma))


def blur_of(images: Tensor, kind: Blur, strength: float) -> Tensor:
    """The blur of this kind: `strength` is σ in pixels, frequencies kept, or values removed."""
    if kind == "gaussian":
        return gaussian_blur(images, strength)
    return (dct_blur if kind == "dct" else svd_blur)(images, int(strength))


def just_visible(images: Tensor, kind: Blur) -> float:
    """The mildest strength that changes images by `_VISIBLE` of their mean pixel variance.

    So it needs no outliers to choose. `ContractError` where no strength does: the images are flat.
    """
    spread = images.var(dim=0, correction=0).mean()
    looked_at = images[:_LOOKED_AT]
    least = torch.maximum(_VISIBLE * spread, _ROUNDING * looked_at.square().mean())
    smaller = min(images.shape[-2:])
    strengths: dict[Blur, list[float]] = {
        "gaussian": list(_SIGMAS),
        "dct": [float(kept) for kept in range(smaller - 1, 0, -1)],
        "svd": [float(removed) for removed in range(1, smaller)],
    }
    for strength in strengths[kind]:
        change = (blur_of(looked_at, kind, strength) - looked_at).square().mean()
        if bool(change >= least):
            return strength
    raise ContractError(f"blur {kind!r} does not change these images; they have no detail to lose")


def _both_ways(images: Tensor, matrix: Callable[[int], Tensor]) -> Tensor:
    height, width = images.shape[-2:]
    down, across = (matrix(size).to(images) for size in (height, width))
    return down @ images @ across.T


def _low_frequencies(size: int, kept: int) -> Tensor:
    """Projection (size, size) on the `kept` lowest cosines."""
    place = torch.arange(size, dtype=torch.float64) + 0.5
    frequency = torch.arange(min(kept, size), dtype=torch.float64).unsqueeze(1)
    basis = torch.cos(math.pi / size * frequency * place) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.T @ basis


def _smoothing(size: int, sigma: float) -> Tensor:
    """Matrix (size, size) of a cut, mirrored Gaussian; its rows add to 1."""
    reach = max(1, math.ceil(_TRUNCATE * sigma))
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel /= kernel.sum()
    here = torch.arange(size).unsqueeze(1)
    # … 1 0 | 0 1 2 … n-1 | n-1 n-2 …, with period 2n
    there = (here + offset.long()) % (2 * size)
    there = torch.where(there < size, there, 2 * size - 1 - there)
    matrix = torch.zeros((size, size), dtype=torch.float64)
    return matrix.scatter_add_(1, there, kernel.expand(size, -1))
