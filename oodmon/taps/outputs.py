"""Tensors out of what modules take and return: logits from a model's output, rows from inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

__all__ = ["find_logits", "first_floating", "first_tensor", "shapes"]

_LOGIT_KEYS: Final = ("logits", "out", "output", "scores", "pred")
_MOST_DEPTH: Final = 4
"""Outputs nested deeper than this are not searched: the search runs in the serving thread."""


def find_logits(output: Any, classes: int = 0) -> Tensor | None:
    """The (B, C) floating tensor of a model's output, or none.

    Args:
        output: a tensor, or a tuple, list, mapping or dataclass of such, nested or not.
        classes: C, where it is known: a tensor with so many columns wins over an earlier one.

    Fields called `logits`, `out` … come first, then the order of the output.
    """
    first: Tensor | None = None
    for tensor in _tensors(output, _MOST_DEPTH):
        if tensor.ndim == 2 and tensor.is_floating_point():
            if not classes or tensor.shape[1] == classes:
                return tensor
            if first is None:
                first = tensor
    return first


def first_floating(value: Any) -> Tensor | None:
    """The first floating tensor in a module's input or output: its activations."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    return next((t for t in _tensors(value, _MOST_DEPTH) if t.is_floating_point()), None)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The model's main input: its first tensor argument, whatever its type."""
    for value in args:
        if isinstance(value, Tensor):
            return value
    for value in kwargs.values():
        if isinstance(value, Tensor):
            return value
    return next(_tensors((args, kwargs), _MOST_DEPTH), None)


def shapes(value: Any) -> str:
    """What was found, for a message: the type and the shapes of the tensors in it."""
    found = [f"{tuple(t.shape)}" for t in _tensors(value, _MOST_DEPTH)]
    return f"{type(value).__name__} with {', '.join(found) if found else 'no tensor'}"


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0:
        return
    for member in _members(value):
        yield from _tensors(member, depth - 1)


def _members(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        keys = sorted(value, key=_rank)
        return [value[key] for key in keys]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [getattr(value, name) for name in sorted(value._fields, key=_rank)]
    if isinstance(value, list | tuple):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [getattr(value, name) for name in sorted(names, key=_rank)]
    # Other output classes of model libraries keep their logits under this name.
    logits = getattr(value, "logits", None)
    return [logits] if isinstance(logits, Tensor) else []


def _rank(name: object) -> int:
    """Known names first; `sorted` keeps the order of the rest."""
    return _LOGIT_KEYS.index(name) if name in _LOGIT_KEYS else len(_LOGIT_KEYS)
