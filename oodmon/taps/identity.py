"""Which weights a model has, as a short text: what tells a model that was trained again.

What a detector learnt holds for the weights that it was learnt on. Name and version of a model are
what people wrote; this is what is there. `oodmon fit` writes it into the states, and the agent
compares it with the model that it watches.

The text is ``1.layout.exact.bfloat16.float16``: hashes of the shapes; of dtypes and bytes; and of
the values rounded to either half precision, so that a copy in another precision is known for what
it is (and so is a training that moved no weight by more than that). It covers parameters and
persistent buffers in the order of the modules. Not in it are

- names: compiled, data-parallel and other wrappers put prefixes before them;
- non-persistent buffers: what no checkpoint holds is made from something else (masks, caches);
- buffers of one whole number: counters, such as a batch norm's `num_batches_tracked`, which no
  forward pass in evaluation mode reads. Its running mean and variance are in: outputs hang on them.

Of a tensor with many elements it reads even slices, so that the cost is bounded: 2^22 elements in
all, but 256 of each. Training changes nearly every element of a tensor that it changes.
An adversary, or an edit of a few rows by hand, can pass unseen.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import torch
from torch import Tensor, nn

__all__ = ["WORDS", "Difference", "compare", "identify"]

log = logging.getLogger(__name__)

Difference = Literal["", "rounding", "layout", "values"]
"""Between fitted and served weights: none that is known; rounding; other tensors; other values."""

WORDS: Final[Mapping[Difference, str]] = {
    "rounding": (
        "the same weights but for rounding, as in another precision; scores move a little, so fit "
        "with the model as it is served"
    ),
    "layout": (
        "a model with other parameters: it was converted or wrapped for serving, or is another "
        "architecture; scores may mean nothing, so fit with the model as it is served"
    ),
    "values": (
        "other weights than the model has now: it was trained again, or ran in train mode; run "
        "`oodmon fit` on these weights, and give them a version of their own"
    ),
}
"""For people, after "fitted on"."""

_FORM: Final = "1"
_DIGITS: Final = 16
_ELEMENTS: Final = 1 << 22
_SLICE: Final = 256
_ROUNDED: Final = (torch.bfloat16, torch.float16)
_PRECISIONS: Final = (*_ROUNDED, torch.float32, torch.float64)
"""Copies of one model for serving; what has other types was converted by more than rounding."""


def identify(model: nn.Module | None) -> str:
    """The text; "" where it cannot be told (no weights, or some that are elsewhere). Never raises.

    The same on every device and in every memory format; modes, gradients and tied weights do not
    matter. Some ten milliseconds; host and device wait for each other, so not in a serving thread.
    """
    if model is None:
        return ""
    try:
        with torch.no_grad():
            return _identified(list(_weights(model)))
    except Exception as error:
        # Sharded, packed, lazy or meta tensors, or none of ours: then it is as if nobody said.
        log.info(
            "the weights of %s cannot be told from others: %s: %s",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return ""


def compare(fitted: str, served: str) -> Difference:
    """What lies between two texts of `identify`; "" also where one is not known."""
    if not (fitted and served) or fitted == served:
        return ""
    own, other = fitted.split("."), served.split(".")
    if own[0] != other[0] or len(own) != len(other):
        return ""
    if own[1] != other[1]:
        return "layout"
    rounded_alike = any(a == b for a, b in zip(own[3:], other[3:], strict=True))
    return "rounding" if rounded_alike else "values"


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and persistent buffers but for counters, each once, module by module."""
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        fleeting = getattr(module, "_non_persistent_buffers_set", ())
        buffers = (
            buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in fleeting and not _counts(buffer)
        )
        for tensor in (*module.parameters(recurse=False), *buffers):
            if id(tensor) not in seen:
                seen[id(tensor)] = tensor
                yield tensor


def _counts(buffer: Tensor) -> bool:
    return buffer.ndim == 0 and not (buffer.is_floating_point() or buffer.is_complex())


def _identified(tensors: list[Tensor]) -> str:
    if not tensors:
        return ""
    share = max(_ELEMENTS // len(tensors), _SLICE)
    layout, exact = hashlib.sha256(), hashlib.sha256()
    rounded = [hashlib.sha256() for _ in _ROUNDED]
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            raise TypeError(f"a {type(tensor).__name__} is made of other tensors")
        rounds = tensor.dtype in _PRECISIONS
        layout.update(f"{tuple(tensor.shape)}{'' if rounds else tensor.dtype}\0".encode())
        exact.update(f"{tensor.dtype}\0".encode())
        part = _part(tensor, share)
        exact.update(_bytes(part))
        for dtype, digest in zip(_ROUNDED, rounded, strict=True):
            digest.update(_bytes(part.to(dtype) if rounds else part))
    texts = (digest.hexdigest()[:_DIGITS] for digest in (layout, exact, *rounded))
    return ".".join([_FORM, *texts])


def _part(tensor: Tensor, share: int) -> Tensor:
    """On the host, flat: all of it, or even slices of `share` elements together."""
    tensor = tensor.detach()
    if tensor.dtype not in _PRECISIONS and tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # eight-bit floats cannot be gathered
    count = tensor.numel()
    if count <= share:
        return tensor.cpu().flatten()
    slices = share // _SLICE
    starts = torch.arange(slices, device=tensor.device) * (count - _SLICE) // max(slices - 1, 1)
    places = starts[:, None] + torch.arange(_SLICE, device=tensor.device)
    # By logical place whatever the memory format, and nothing else of the tensor is copied.
    return tensor.take(places).cpu().flatten()


def _bytes(flat: Tensor) -> memoryview:
    return flat.contiguous().view(torch.uint8).numpy().data
