"""Shapes that a detector's state must have, in letters: the same letter, the same length."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from oodmon.contracts import State
from oodmon.errors import StateError

__all__ = ["expect"]


def expect(
    name: str, state: State, shapes: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> Mapping[str, int]:
    """`StateError` unless the state has exactly these tensors; the lengths that letters stand for.

    Args:
        name: of the detector, for the message.
        state: what is to be checked.
        shapes: tensor → its shape, letters and numbers with spaces between: ``"K D"``; "" is a
            scalar.
        dtype: of all of them.
    """
    if set(state) != set(shapes):
        raise StateError(f"{name}: state: expected {sorted(shapes)}, found {sorted(state)}")
    lengths: dict[str, int] = {}
    for key, text in shapes.items():
        tensor, letters = state[key], text.split()
        fits = tensor.ndim == len(letters)
        for letter, length in zip(letters, tensor.shape, strict=False):
            wanted = int(letter) if letter.isdigit() else lengths.setdefault(letter, length)
            fits = fits and length == wanted
        if not fits or tensor.dtype != dtype:
            known = ", ".join(f"{letter}={length}" for letter, length in lengths.items())
            raise StateError(
                f"{name}: state {key!r}: expected {dtype} ({', '.join(letters)}) "
                f"with {known or 'no lengths'}, found {tensor.dtype} {tuple(tensor.shape)}"
            )
    return lengths
