"""Records ⇄ bytes: versioned frames, packed state, and CloudEvents of facts."""

from __future__ import annotations

from oodmon.wire.batches import (
    MAX_DETECTORS,
    MAX_HEADER_BYTES,
    MAX_ROWS,
    SCHEMA,
    decode_batch,
    encode_batch,
)
from oodmon.wire.events import cloud_event, event_of, event_source, plain, rfc3339
from oodmon.wire.frames import MAX_STATE_HEADER_BYTES, pack, unpack

__all__ = [
    "MAX_DETECTORS",
    "MAX_HEADER_BYTES",
    "MAX_ROWS",
    "MAX_STATE_HEADER_BYTES",
    "SCHEMA",
    "cloud_event",
    "decode_batch",
    "encode_batch",
    "event_of",
    "event_source",
    "pack",
    "plain",
    "rfc3339",
    "unpack",
]
