"""Score batches ⇄ frames, and the steps that bring older frames up to date."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from oodmon.errors import ContractError, NewerSchema, WireError
from oodmon.records import ScoreBatch
from oodmon.wire.frames import COUNT, Raw, are_texts, close_frame, open_frame

__all__ = [
    "MAX_DETECTORS",
    "MAX_HEADER_BYTES",
    "MAX_ROWS",
    "SCHEMA",
    "decode_batch",
    "encode_batch",
]

SCHEMA: Final = "oodmon.score_batch/1"
"""What `encode_batch` writes."""

MAX_ROWS: Final = 1 << 20
"""Samples in one batch; a forward pass has far fewer."""

MAX_DETECTORS: Final = 1024
"""Columns in one batch."""

MAX_HEADER_BYTES: Final = 1 << 18
"""JSON header of a score batch: names, digests, segment table, notices."""

_INT64: Final = range(-(1 << 63), 1 << 63)

_Upgrade = Callable[[dict[str, Any], Raw], tuple[dict[str, Any], Raw]]

_UPGRADES: dict[int, _Upgrade] = {}
"""n → the function that turns record and arrays of ``oodmon.score_batch/n`` into those of n + 1."""


def encode_batch(batch: ScoreBatch) -> bytes:
    """One frame of schema `SCHEMA`. The same batch gives the same bytes.

    Raises:
        WireError: the batch is beyond `MAX_ROWS`, `MAX_DETECTORS` or `MAX_HEADER_BYTES`.
    """
    rows, names = batch.rows, list(batch.scores)
    if rows > MAX_ROWS or len(names) > MAX_DETECTORS:
        raise WireError(
            f"batch of {len(names)} detectors × {rows} rows; "
            f"at most {MAX_DETECTORS} × {MAX_ROWS} fit a frame"
        )
    for what, value, allowed in (
        ("sequence", batch.sequence, COUNT),
        ("dropped", batch.dropped, COUNT),
        ("observed_at", batch.observed_at, _INT64),
    ):
        if value not in allowed:
            raise WireError(f"{what}: {value} does not fit 64 bits")
    scores = np.empty((len(names), rows), "<f4")
    for row, name in enumerate(names):
        scores[row] = batch.scores[name]
    arrays: Raw = {"scores": scores}
    if batch.sample_ids:
        arrays["sample_ids"] = np.frombuffer(_join(batch.sample_ids), np.uint8)
    if len(batch.segment):
        arrays["segment"] = np.ascontiguousarray(batch.segment, "<i4")
    if len(batch.predicted):
        arrays["predicted"] = np.ascontiguousarray(batch.predicted, "<i4")
    frame = close_frame(
        SCHEMA,
        {
            "model": batch.model,
            "version": batch.version,
            "source": batch.source,
            "sequence": int(batch.sequence),
            "observed_at": int(batch.observed_at),
            "detectors": names,
            "digests": dict(batch.digests),
            "segments": list(batch.segments),
            "dropped": int(batch.dropped),
            "sampled_fraction": float(batch.sampled_fraction),
            "notices": list(batch.notices),
            **({"repeats": True} if batch.repeats else {}),
        },
        arrays,
    )
    if int.from_bytes(frame[:8], "little") > MAX_HEADER_BYTES:
        raise WireError(f"names, segments and notices exceed {MAX_HEADER_BYTES} bytes")
    return frame


def decode_batch(data: bytes | memoryview) -> ScoreBatch:
    """The batch of a frame of this or any older schema; its arrays are copies.

    Raises:
        NewerSchema: a newer release wrote it; the message names the one to install.
        WireError: anything else that is wrong with the bytes.
    """
    record, arrays = open_frame(data, MAX_HEADER_BYTES)
    schema, needs = record.pop("schema", None), record.pop("needs", None)
    family, current = SCHEMA.rsplit("/", 1)
    found = re.fullmatch(re.escape(family) + r"/(0|[1-9][0-9]{0,5})", str(schema)[:64])
    if found is None:
        raise WireError(f"no score batch: schema {str(schema)[:64]!r}, expected {SCHEMA!r}")
    number = int(found[1])
    if number > int(current):
        named = re.fullmatch(r"[0-9A-Za-z.+-]{1,32}", str(needs))
        install = f"oodmon {needs} or newer" if named else "a newer release of oodmon"
        raise NewerSchema(
            f"frame of schema {schema}, this release reads up to {SCHEMA}: install {install}"
        )
    for step in range(number, int(current)):
        if step not in _UPGRADES:
            raise WireError(f"schema {schema} is too old: nothing upgrades {family}/{step}")
        try:
            record, arrays = _UPGRADES[step](record, arrays)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise WireError(f"damaged frame of schema {schema}: {error!r}") from None
    return _batch(record, arrays)


_FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "model": lambda v: type(v) is str,
    "version": lambda v: type(v) is str,
    "source": lambda v: type(v) is str,
    "sequence": lambda v: type(v) is int and v in COUNT,
    "observed_at": lambda v: type(v) is int and v in _INT64,
    "detectors": lambda v: are_texts(v) and len(set(v)) == len(v) <= MAX_DETECTORS,
    "digests": lambda v: type(v) is dict and are_texts(list(v.values())),
    "segments": lambda v: are_texts(v),
    "dropped": lambda v: type(v) is int and v in COUNT,
    "sampled_fraction": lambda v: type(v) is float,
    "notices": lambda v: are_texts(v),
    "repeats": lambda v: type(v) is bool,
}

_ARRAYS: Final = {
    "scores": (np.dtype("<f4"), 2),
    "sample_ids": (np.dtype("<u1"), 1),
    "segment": (np.dtype("<i4"), 1),
    "predicted": (np.dtype("<i4"), 1),
}


def _batch(record: dict[str, Any], arrays: Raw) -> ScoreBatch:
    record.setdefault("repeats", False)  # only written where it is true
    if record.keys() != _FIELDS.keys():
        odd = sorted(map(str, record.keys() ^ _FIELDS.keys()))[:5]
        raise WireError(f"missing or unknown fields: {', '.join(odd)[:200]}")
    for name, fits in _FIELDS.items():
        if not fits(record[name]):
            raise WireError(f"{name}: not a value of this field")
    for name, array in arrays.items():
        expected = _ARRAYS.get(name)
        if expected is None or (array.dtype, array.ndim) != expected:
            raise WireError(
                f"array {name[:64]!r}: {array.dtype} of {array.ndim} axes is unexpected"
            )
    names = record.pop("detectors")
    scores = arrays.pop("scores", None)
    if scores is None or len(scores) != len(names) or scores.shape[1] > MAX_ROWS:
        raise WireError("scores: missing, too many, or not one column for each detector")
    if not names and scores.shape[1]:
        raise WireError("scores: rows without a detector")
    own = scores.astype(np.float32)  # a copy: the batch outlives the buffer that it came in
    for name in ("segments", "notices"):
        record[name] = tuple(record[name])
    if "sample_ids" in arrays:
        record["sample_ids"] = _split(arrays.pop("sample_ids").tobytes(), scores.shape[1])
    for name, array in arrays.items():
        record[name] = array.astype(np.int32)
    try:
        return ScoreBatch(scores=dict(zip(names, own, strict=True)), **record)
    except ContractError as error:
        raise WireError(str(error)) from None


def _join(names: tuple[str, ...]) -> bytes:
    """One name a line; a backslash or a line break within a name is escaped."""
    text = "\n".join(names)
    if "\\" in text or text.count("\n") != len(names) - 1:
        text = "\n".join(name.replace("\\", "\\\\").replace("\n", "\\n") for name in names)
    return text.encode("utf-8", "surrogatepass")


def _split(data: bytes, rows: int) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise WireError(f"sample_ids: {error}") from None
    if text.count("\n") != rows - 1:
        raise WireError(f"sample_ids: {text.count(chr(10)) + 1} names for {rows} rows")
    names = text.split("\n")
    if "\\" in text:
        names = [re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], n) for n in names]
    return tuple(names)
