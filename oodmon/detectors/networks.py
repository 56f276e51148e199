"""Small networks as flat mappings of tensors: shapes, first weights, forward passes; no modules.

A network is named by a prefix. Its weights are `<prefix>.conv<i>.weight` and
`<prefix>.linear<i>.weight`, with the biases beside them: a detector's state as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Shapes",
    "convolution_shapes",
    "decode",
    "decoder_shapes",
    "dense_shapes",
    "encode",
    "encoder_shapes",
    "grow",
    "initial",
    "shrink",
]

Shapes = dict[str, tuple[int, ...]]
"""Name of a tensor → its shape, in the order in which they are applied."""

_STRIDES: Final = (2, 2, 1)
"""Of the three 3×3 convolutions of an encoder."""

_GAIN: Final = math.sqrt(2.0)
"""Of the orthogonal initialisation, for layers that a rectifier follows (Saxe et al., 2014)."""


def dense_shapes(prefix: str, widths: Sequence[int], *, bias: bool = True) -> Shapes:
    """Linear maps between these widths."""
    shapes: Shapes = {}
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        shapes[f"{prefix}.linear{i}.weight"] = (after, before)
        if bias:
            shapes[f"{prefix}.linear{i}.bias"] = (after,)
    return shapes


def convolution_shapes(prefix: str, channels: Sequence[int], *, bias: bool = True) -> Shapes:
    """3×3 convolutions between these numbers of channels."""
    shapes: Shapes = {}
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        shapes[f"{prefix}.conv{i}.weight"] = (after, before, 3, 3)
        if bias:
            shapes[f"{prefix}.conv{i}.bias"] = (after,)
    return shapes


def encoder_shapes(
    prefix: str,
    row: Sequence[int],
    width: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    bias: bool = True,
) -> Shapes:
    """Of a network from rows of this shape, (D,) or (C, H, W), to `outputs` values.

    Images pass three convolutions of `width`, 2·`width` and 2·`width` channels first. `hidden` are
    the widths of the linear layers between.
    """
    if len(row) != 3:
        return dense_shapes(prefix, (row[0], *hidden, outputs), bias=bias)
    shapes = convolution_shapes(prefix, (row[0], width, 2 * width, 2 * width), bias=bias)
    height, breadth = _sizes(row)[-1]
    widths = (2 * width * height * breadth, *hidden, outputs)
    return {**shapes, **dense_shapes(prefix, widths, bias=bias)}


def decoder_shapes(
    prefix: str, row: Sequence[int], width: int, hidden: Sequence[int], inputs: int
) -> Shapes:
    """Of a network from `inputs` values to rows of this shape, an encoder the other way round."""
    if len(row) != 3:
        return dense_shapes(prefix, (inputs, *hidden, row[0]))
    height, breadth = _sizes(row)[-1]
    shapes = dense_shapes(prefix, (inputs, *hidden, 2 * width * height * breadth))
    return {**shapes, **convolution_shapes(prefix, (2 * width, width, width, row[0]))}


def initial(shapes: Mapping[str, tuple[int, ...]], draw: torch.Generator) -> dict[str, Tensor]:
    """First weights on the CPU: orthogonal ones, biases of zero."""
    return {
        name: torch.zeros(shape) if name.endswith(".bias") else _orthogonal(shape, draw)
        for name, shape in shapes.items()
    }


def encode(values: Tensor, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """(B, D) or (B, C, H, W) → (B, outputs)."""
    if values.ndim == 4:
        values = shrink(values, state, prefix).flatten(1)
    return _dense(values, state, prefix)


def shrink(values: Tensor, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """An encoder's convolutions: (B, C, H, W) → (B, 2·width, H/4, W/4), rounded up."""
    for i, stride in enumerate(_STRIDES):
        values = functional.leaky_relu(_convolve(values, state, f"{prefix}.conv{i}", stride))
    return values


def decode(code: Tensor, state: Mapping[str, Tensor], prefix: str, row: Sequence[int]) -> Tensor:
    """(B, inputs) → (B, *row)."""
    values = _dense(code, state, prefix)
    if len(row) != 3:
        return values
    # the channels are those of the first convolution: a batch of no rows tells nothing
    channels = state[f"{prefix}.conv0.weight"].shape[1]
    values = functional.leaky_relu(values).reshape(len(code), channels, *_sizes(row)[-1])
    return grow(values, state, prefix, row)


def grow(values: Tensor, state: Mapping[str, Tensor], prefix: str, row: Sequence[int]) -> Tensor:
    """A decoder's convolutions: (B, 2·width, H/4, W/4) → (B, C, H, W)."""
    whole, half, _ = _sizes(row)
    for i, size in enumerate((half, whole)):
        values = functional.interpolate(values, size=size)
        values = functional.leaky_relu(_convolve(values, state, f"{prefix}.conv{i}", 1))
    return _convolve(values, state, f"{prefix}.conv2", 1)


def _sizes(row: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Height and width of an image before, after one and after two convolutions of stride 2."""
    sizes = [(row[1], row[2])]
    for _ in range(2):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return tuple(sizes)


def _convolve(values: Tensor, state: Mapping[str, Tensor], name: str, stride: int) -> Tensor:
    bias = state.get(f"{name}.bias")
    return functional.conv2d(values, state[f"{name}.weight"], bias, stride=stride, padding=1)


def _dense(values: Tensor, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    for layer in itertools.count():
        name = f"{prefix}.linear{layer}"
        values = functional.linear(values, state[f"{name}.weight"], state.get(f"{name}.bias"))
        if f"{prefix}.linear{layer + 1}.weight" not in state:
            break
        values = functional.leaky_relu(values)
    return values


def _orthogonal(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Orthogonal rows or columns times `_GAIN`, from this generator."""
    rows, columns = shape[0], math.prod(shape[1:])
    tall = torch.randn((max(rows, columns), min(rows, columns)), generator=draw)
    basis, triangle = torch.linalg.qr(tall)
    basis = basis * triangle.diagonal().sign()
    turned = basis if rows >= columns else basis.T
    return torch.mul(turned, _GAIN).reshape(tuple(shape)).contiguous()
