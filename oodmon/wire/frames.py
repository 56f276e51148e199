"""The frame: named arrays and one JSON text, as a safetensors file in memory.

All metadata sits in one JSON text under the key ``oodmon``: safetensors writes several keys in
random order, and the same record should give the same bytes. That text always has ``schema``, such
as ``oodmon.score_batch/1``, and ``needs``, the oldest release that reads this schema; both stay
whatever else changes.

Decoding trusts nothing: every length is checked against the bytes at hand before anything of that
length is allocated, and whatever is wrong comes out as `WireError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, TypeGuard

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from oodmon.errors import WireError

__all__ = [
    "COUNT",
    "MAX_STATE_HEADER_BYTES",
    "NEEDS",
    "Raw",
    "are_texts",
    "close_frame",
    "open_frame",
    "pack",
    "unpack",
]

MAX_STATE_HEADER_BYTES: Final = 1 << 24
"""JSON header of packed state, which may name an array per stream and test."""

NEEDS: Final = {"oodmon.score_batch/1": "0.1.0", "oodmon.arrays/1": "0.1.0"}
"""Schema → the release that introduced it."""

COUNT: Final = range(1 << 63)
"""What a count may be: int64 and not negative."""

_STATE_SCHEMA: Final = "oodmon.arrays/1"
_KEY: Final = "oodmon"
_MAX_DIMENSIONS: Final = 32  # numpy's own limit was 32 for long; nothing of ours has more than 3

Raw = dict[str, npt.NDArray[Any]]
"""Arrays as they lie in a frame."""

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


def close_frame(
    schema: str, body: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
) -> bytes:
    """One frame; the arrays must be C-contiguous and little-endian."""
    text = json.dumps({"schema": schema, "needs": NEEDS[schema], **body}, separators=(",", ":"))
    try:
        return bytes(save(dict(arrays), {_KEY: text}))
    except UnicodeEncodeError as error:
        raise WireError(f"an array's name is not valid text: {error}") from None


def open_frame(data: bytes | memoryview, header_limit: int) -> tuple[dict[str, Any], Raw]:
    """The JSON text and read-only views of the arrays, everything checked against `data`."""
    view = memoryview(data)
    if len(view) < 8:
        raise WireError(f"{len(view)} bytes are too few for a frame")
    length = int.from_bytes(view[:8], "little")
    if length > header_limit:
        raise WireError(f"header of {length} bytes; at most {header_limit} are allowed")
    start = 8 + length
    if start > len(view):
        raise WireError(f"header of {length} bytes in a frame of {len(view)}")
    header = _json(view[8:start], "header")
    meta = header.pop("__metadata__", None)
    if not isinstance(meta, dict) or not isinstance(meta.get(_KEY), str):
        raise WireError(f"no oodmon frame: the metadata has no {_KEY!r}")
    arrays: Raw = {}
    spans: list[tuple[int, int]] = []
    for name, spec in header.items():
        arrays[name], span = _array(name, spec, view[start:])
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise WireError("arrays overlap or leave gaps")
        end = last
    if end != len(view) - start:
        raise WireError(f"{len(view) - start - end} bytes belong to no array")
    return _json(meta[_KEY], "metadata"), arrays


def _json(text: str | memoryview, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text if isinstance(text, str) else str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"{what}: expected an object, found {type(value).__name__}")
    return value


def _array(name: str, spec: Any, body: memoryview) -> tuple[npt.NDArray[Any], tuple[int, int]]:
    if not isinstance(spec, dict):
        raise WireError(f"array {name!r}: expected an object")
    dtype = _DTYPES.get(spec["dtype"]) if isinstance(spec.get("dtype"), str) else None
    if dtype is None:
        raise WireError(f"array {name!r}: unknown dtype {str(spec.get('dtype'))[:40]!r}")
    shape, offsets = spec.get("shape"), spec.get("data_offsets")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise WireError(f"array {name!r}: bad shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise WireError(f"array {name!r}: bad offsets")
    first, last = offsets
    count = math.prod(shape)
    if not first <= last <= len(body) or last - first != count * dtype.itemsize:
        raise WireError(f"array {name!r}: offsets {first}..{last} do not hold {dtype} {shape}")
    try:
        array = np.frombuffer(body[first:last], dtype) if count else np.empty(0, dtype)
        array = array.reshape(shape)
    except ValueError as error:
        raise WireError(f"array {name!r}: {error}") from None
    if dtype.kind == "b" and count and array.view(np.uint8).max() > 1:
        raise WireError(f"array {name!r}: a boolean that is neither 0 nor 1")
    return array, (first, last)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n in COUNT for n in value)


def are_texts(value: Any) -> TypeGuard[list[str]]:
    """Whether this is a JSON list of strings."""
    return isinstance(value, list) and all(type(text) is str for text in value)


def pack(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, str]) -> bytes:
    """Named arrays and texts in one piece; the same input gives the same bytes.

    Raises:
        WireError: a dtype that is not a plain number or boolean, or too many names.
    """
    dense: Raw = {}
    for name, array in arrays.items():
        if name == "__metadata__" or array.dtype.newbyteorder("<") not in _DTYPES.values():
            raise WireError(f"array {name!r} of {array.dtype} cannot be packed")
        # safetensors reads memory as it lies, without a look at the strides
        dense[name] = np.array(array, array.dtype.newbyteorder("<"), order="C")
    texts = {str(key): str(meta[key]) for key in sorted(meta)}
    frame = close_frame(_STATE_SCHEMA, {"meta": texts}, dense)
    if int.from_bytes(frame[:8], "little") > MAX_STATE_HEADER_BYTES:
        raise WireError(f"names and texts exceed {MAX_STATE_HEADER_BYTES} bytes")
    return frame


def unpack(data: bytes | memoryview) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """What `pack` was given, the arrays as copies that may be written to; else `WireError`."""
    record, arrays = open_frame(data, MAX_STATE_HEADER_BYTES)
    schema, meta = record.get("schema"), record.get("meta")
    if schema != _STATE_SCHEMA:
        raise WireError(f"no packed state: schema {str(schema)[:64]!r}, expected {_STATE_SCHEMA!r}")
    if not isinstance(meta, dict) or not are_texts(list(meta.values())):
        raise WireError("packed state: meta is not a mapping of texts")
    return {n: a.astype(a.dtype.newbyteorder("=")) for n, a in arrays.items()}, meta
