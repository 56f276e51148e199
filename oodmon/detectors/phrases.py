"""How well strings of symbols compress: Lempel-Ziv phrases, counted for many strings at once."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

__all__ = ["SYMBOLS", "Tries", "compression_distance", "hilbert_order"]

SYMBOLS: Final = 4
"""Symbols that a string is made of: 0, 1, 2 and 3."""

_NODE_BYTES: Final = 4

_TABLE_BYTES: Final = 1 << 26
"""Of tries that are held at a time, whatever the batch."""


class Tries:
    """One Lempel-Ziv 78 trie per string (R of them), all read in step.

    A phrase ends with the first symbol that makes it new; it is then kept and the next one begins.
    `phrases` (R,) counts them, beginning at 1; one that has not ended is not counted.

    Args:
        strings: R.
        length: of all that will be read, at most.
        device: where they lie.
    """

    def __init__(self, strings: int, length: int, device: torch.device) -> None:
        self._nodes = torch.zeros(
            (strings, (_most_phrases(length) + 1) * SYMBOLS), dtype=torch.int32, device=device
        )
        self._at = torch.zeros(strings, dtype=torch.int64, device=device)
        self.phrases: Tensor = torch.ones(strings, dtype=torch.int32, device=device)

    def read(self, symbols: Tensor) -> Tensor:
        """Go on with these symbols (R, T) int64; the phrases so far, (R,)."""
        for symbol in symbols.unbind(dim=1):
            place = (self._at * SYMBOLS + symbol).unsqueeze(1)
            child = self._nodes.gather(1, place).squeeze(1)
            new = child == 0
            # the root is node 0, and so nobody's child: 0 says that there is none
            self._nodes.scatter_(1, place, torch.where(new, self.phrases, child).unsqueeze(1))
            self.phrases = self.phrases + new
            self._at = torch.where(new, 0, child).to(torch.int64)
        return self.phrases

    def repeated(self, times: int) -> Tries:
        """Copies that go on from here on their own: R · times, all of one time together."""
        made = Tries.__new__(Tries)
        made._nodes = self._nodes.repeat(times, 1)
        made._at = self._at.repeat(times)
        made.phrases = self.phrases.repeat(times)
        return made


def compression_distance(strings: Tensor, others: Tensor) -> Tensor:
    """Normalised compression distance of strings (B, C, T) to others (C, T): (B, C) float32.

    (min(c(uv), c(vu)) - min(c(u), c(v))) / max(c(u), c(v)) with c the number of phrases, where uv
    is u with v after it. Both hold int64 symbols. It is the same both ways round. Of a string to
    itself it is far from 0, because the phrases of its first half are too short for its second:
    only means over many strings say something.
    """
    _, channels, length = strings.shape
    known = Tries(channels, 2 * length, strings.device)
    base = known.read(others)
    bytes_each = 2 * channels * (_most_phrases(2 * length) + 1) * SYMBOLS * _NODE_BYTES
    parts = torch.split(strings, max(1, _TABLE_BYTES // max(bytes_each, 1)))
    return torch.cat([_distance(part, others, known, base) for part in parts])


def _distance(strings: Tensor, others: Tensor, known: Tries, base: Tensor) -> Tensor:
    """Of a few rows; `known` has read the others, in `base` phrases."""
    batch, channels, length = strings.shape
    u = strings.reshape(batch * channels, length)
    v = others.repeat(batch, 1)
    forward = Tries(batch * channels, 2 * length, strings.device)
    alone = forward.read(u)
    joint = torch.minimum(forward.read(v), known.repeated(batch).read(u))
    base = base.repeat(batch)
    found = (joint - torch.minimum(alone, base)) / torch.maximum(alone, base)
    return found.reshape(batch, channels).float()


@functools.cache
def hilbert_order(height: int, width: int) -> tuple[int, ...]:
    """Row-major places of a grid in the order of a Hilbert curve: neighbours stay neighbours.

    The curve is that of the next square with a power of two as its side; what lies outside of the
    grid is left out. A grid of one row or column is read from end to end.
    """
    if min(height, width) == 1:
        return tuple(range(height * width))
    side = 1
    while side < max(height, width):
        side *= 2
    places = []
    for step in range(side * side):
        row, column = _on_curve(side, step)
        if row < height and column < width:
            places.append(row * width + column)
    return tuple(places)


def _on_curve(side: int, step: int) -> tuple[int, int]:
    """Row and column of a step along the curve (Warren, Hacker's Delight, chapter 16)."""
    row = column = 0
    rest, size = step, 1
    while size < side:
        right = (rest // 2) & 1
        down = (rest ^ right) & 1
        if not down:
            if right:
                row, column = size - 1 - row, size - 1 - column
            row, column = column, row
        row += size * down
        column += size * right
        rest //= 4
        size *= 2
    return row, column


@functools.cache
def _most_phrases(length: int) -> int:
    """The most different phrases that a string of this length can hold: the shortest ones first."""
    phrases = used = 0
    size = 1
    while used < length:
        # of this size there are so many, and so many fit
        count = min(SYMBOLS**size, (length - used) // size)
        if count == 0:
            break
        phrases += count
        used += count * size
        size += 1
    return phrases + 1
