"""Changed copies of reference inputs that the model was not made for: noise, blur, shuffled parts.

What is changed is the first floating input, or the first of whole numbers (tokens) where there is
none. Strengths follow the data's own range and spread, so nothing has to be told about its scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from oodmon.detectors.blurs import gaussian_blur, just_visible
from oodmon.errors import ContractError
from oodmon.fitting.sources import Batch

__all__ = ["Corruption", "corruptions_for"]

Corruption = Callable[[Batch], Batch]
"""A changed copy of a batch; the labels stay."""

Change = Callable[[Tensor, torch.Generator], Tensor]

_NOISE: Final = 0.5
"""Standard deviation of the noise, of that of the data."""

_LIGHT: Final = 0.4
"""Of the range that is left in the dark."""

_BLUR: Final = 2.0
"""Times the mildest Gaussian that can be seen."""

_GRID: Final = 4
"""Patches along each side of an image."""

_STRETCH: Final = 2.0
"""Times as far from the mean."""

_LOST: Final = 0.25
"""Share of the features that are set to their mean."""

_REPLACED: Final = 0.5
"""Share of the tokens that come from another sample."""


def corruptions_for(batches: Sequence[Batch], seed: int) -> Mapping[str, Corruption]:
    """Name → corruption for inputs like these; empty where no input can be changed.

    Images (B, C, H, W): noise, blur, dark, inverted, turned, patches. Other floating inputs:
    noise, stretched, mixed, lost. Tokens (B, T): shuffled, mixed. The same seed and batch give the
    same copy.
    """
    place = _place(batches[0]) if batches else None
    if place is None:
        return {}
    shape = _taken(batches[0], place).shape[1:]
    known = torch.cat([t for t in (_taken(b, place) for b in batches) if t.shape[1:] == shape])
    if known.is_floating_point():
        # a sample that is not finite has no range, and would leave the others none
        sound = known.flatten(1).isfinite().all(dim=1)
        known = known[sound] if bool(sound.any()) else known
    if not known.is_floating_point():
        changes = _of_tokens()
    elif known.ndim == 4 and min(known.shape[-2:]) >= _GRID:
        changes = _of_images(known)
    else:
        changes = _of_features(known)
    return {
        name: _on_batches(change, place, seed * 101 + number)
        for number, (name, change) in enumerate(changes.items())
    }


def _of_images(known: Tensor) -> Mapping[str, Change]:
    spread = float(known.std())
    low, high = known.amin(dim=(0, 2, 3), keepdim=True), known.amax(dim=(0, 2, 3), keepdim=True)

    def noise(images: Tensor, draw: torch.Generator) -> Tensor:
        moved = images + _NOISE * spread * _normal(images, draw)
        return torch.minimum(torch.maximum(moved, low.to(images)), high.to(images))

    def dark(images: Tensor, draw: torch.Generator) -> Tensor:
        del draw
        return low.to(images) + _LIGHT * (images - low.to(images))

    def inverted(images: Tensor, draw: torch.Generator) -> Tensor:
        del draw
        return (low + high).to(images) - images

    def turned(images: Tensor, draw: torch.Generator) -> Tensor:
        del draw
        square = images.shape[-1] == images.shape[-2]
        return images.rot90(1 if square else 2, dims=(-2, -1))

    changes: dict[str, Change] = {"noise": noise}
    try:
        sigma = _BLUR * just_visible(known.float(), "gaussian")
        changes["blur"] = lambda images, _: gaussian_blur(images, sigma)
    except ContractError:
        pass  # flat images: a blur of them is the image itself
    return {**changes, "dark": dark, "inverted": inverted, "turned": turned, "patches": _patches}


def _patches(images: Tensor, draw: torch.Generator) -> Tensor:
    """A 4 × 4 grid of patches, laid anew for each image; what the grid leaves over stays."""
    count, channels, height, width = images.shape
    tall, wide = height // _GRID, width // _GRID
    shape = (count, channels, _GRID, tall, _GRID, wide)
    inner = images[:, :, : _GRID * tall, : _GRID * wide].reshape(shape)
    cells = inner.permute(0, 2, 4, 1, 3, 5).reshape(count, _GRID**2, channels, tall, wide)
    order = torch.rand((count, _GRID**2), generator=draw).argsort(dim=1).to(images.device)
    cells = cells[torch.arange(count, device=images.device)[:, None], order]
    laid = cells.reshape(count, _GRID, _GRID, channels, tall, wide).permute(0, 3, 1, 4, 2, 5)
    found = images.clone()
    found[:, :, : _GRID * tall, : _GRID * wide] = laid.reshape(inner.flatten(4).flatten(2, 3).shape)
    return found


def _of_features(known: Tensor) -> Mapping[str, Change]:
    mean, spread = known.mean(dim=0), known.std(dim=0, correction=0)

    def noise(rows: Tensor, draw: torch.Generator) -> Tensor:
        return rows + _NOISE * spread.to(rows) * _normal(rows, draw)

    def stretched(rows: Tensor, draw: torch.Generator) -> Tensor:
        del draw
        return mean.to(rows) + _STRETCH * (rows - mean.to(rows))

    def lost(rows: Tensor, draw: torch.Generator) -> Tensor:
        gone = (torch.rand(rows.shape, generator=draw) < _LOST).to(rows.device)
        return torch.where(gone, mean.to(rows), rows)

    return {"noise": noise, "stretched": stretched, "mixed": _mixed, "lost": lost}


def _mixed(rows: Tensor, draw: torch.Generator) -> Tensor:
    """Each feature from a sample of its own: every one is usual, their company is not."""
    order = torch.rand(rows.shape, generator=draw).argsort(dim=0).to(rows.device)
    return rows.gather(0, order)


def _of_tokens() -> Mapping[str, Change]:
    def shuffled(tokens: Tensor, draw: torch.Generator) -> Tensor:
        order = torch.rand(tokens.shape, generator=draw).argsort(dim=1).to(tokens.device)
        return tokens.gather(1, order)

    def mixed(tokens: Tensor, draw: torch.Generator) -> Tensor:
        other = (torch.rand(tokens.shape, generator=draw) < _REPLACED).to(tokens.device)
        return torch.where(other, _mixed(tokens, draw), tokens)

    return {"shuffled": shuffled, "mixed": mixed}


def _normal(like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=draw).to(like)


def _on_batches(change: Change, place: int | str, seed: int) -> Corruption:
    def corrupted(batch: Batch) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        changed = change(_taken(batch, place), draw)
        if isinstance(place, str):
            return dataclasses.replace(batch, named={**batch.named, place: changed})
        arguments = (*batch.arguments[:place], changed, *batch.arguments[place + 1 :])
        return dataclasses.replace(batch, arguments=arguments)

    return corrupted


def _taken(batch: Batch, place: int | str) -> Tensor:
    found: Tensor = batch.named[place] if isinstance(place, str) else batch.arguments[place]
    return found


def _place(batch: Batch) -> int | str | None:
    """Which input is changed."""
    values: list[tuple[int | str, object]] = [*enumerate(batch.arguments), *batch.named.items()]
    rows = [(name, v) for name, v in values if isinstance(v, Tensor) and v.ndim > 1]
    floating = [name for name, tensor in rows if tensor.is_floating_point()]
    whole = [
        name
        for name, tensor in rows
        if tensor.dtype in (torch.int64, torch.int32) and tensor.ndim == 2
    ]
    return next(iter([*floating, *whole]), None)
