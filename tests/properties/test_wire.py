"""Any record survives the wire; any bytes give a record or `WireError`, cheaply."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from oodmon.errors import WireError
from oodmon.records import Alert, DriftResult, Exceedance, Notice, ScoreBatch
from oodmon.wire import cloud_event, decode_batch, encode_batch, event_of, pack, unpack
from tests.wire_records import assert_same_batch

_TEXT = st.text(max_size=12)
_INT64 = st.integers(-(2**63), 2**63 - 1)
_COUNT = st.integers(0, 2**63 - 1)


@st.composite
def batches(draw: st.DrawFn) -> ScoreBatch:
    names = draw(st.lists(_TEXT, unique=True, max_size=4))
    rows = draw(st.integers(0, 6)) if names else 0
    segments = tuple(draw(st.lists(_TEXT, min_size=1, max_size=3)))
    int32 = st.integers(-(2**31), 2**31 - 1)
    return ScoreBatch(
        model=draw(_TEXT),
        version=draw(_TEXT),
        source=draw(_TEXT),
        sequence=draw(_COUNT),
        observed_at=draw(_INT64),
        scores={n: draw(hnp.arrays(np.float32, rows, elements=st.floats(width=32))) for n in names},
        digests=draw(st.dictionaries(_TEXT, _TEXT, max_size=3)),
        sample_ids=tuple(draw(st.lists(_TEXT, min_size=rows, max_size=rows)))
        if draw(st.booleans())
        else (),
        segment=draw(
            hnp.arrays(np.int32, rows, elements=st.integers(0, len(segments) - 1))
            if draw(st.booleans())
            else st.just(np.empty(0, np.int32))
        ),
        segments=segments,
        predicted=draw(
            hnp.arrays(np.int32, rows, elements=int32)
            if draw(st.booleans())
            else st.just(np.empty(0, np.int32))
        ),
        dropped=draw(_COUNT),
        sampled_fraction=draw(st.floats(0, 1, exclude_min=True)),
        notices=tuple(draw(st.lists(_TEXT, max_size=2))),
    )


@given(batches())
def test_batch_survives_the_wire(batch: ScoreBatch) -> None:
    frame = encode_batch(batch)
    assert encode_batch(batch) == frame, "the same batch gave other bytes"
    assert_same_batch(decode_batch(frame), batch)
    assert_same_batch(decode_batch(memoryview(frame)), batch)


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from(["?", "u1", "i2", "i4", "i8", "u8", "f2", "f4", "f8"]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=4,
    ),
    st.dictionaries(_TEXT, _TEXT, max_size=4),
)
def test_packed_state_survives(arrays: dict[str, Any], meta: dict[str, str]) -> None:
    data = pack(arrays, meta)
    assert pack(arrays, dict(reversed(meta.items()))) == data
    found, texts = unpack(data)
    assert texts == meta
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable


def _json_frame(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


_SPEC = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "I32", "BOOL", "F64", "Q7", 3, None]),
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | st.just("1"),
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | st.none(),
    },
)
_RECORD = st.dictionaries(
    st.sampled_from(["schema", "needs", "model", "detectors", "sequence", "meta", "x"]),
    st.none()
    | st.integers()
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=2)
    | st.sampled_from(["oodmon.score_batch/1", "oodmon.score_batch/0", "oodmon.score_batch/99"]),
)
_HEADERS = st.dictionaries(
    st.sampled_from(["scores", "sample_ids", "segment", "x"]), _SPEC, max_size=3
)


def _gives_a_record_or_an_error(data: bytes) -> None:
    for decode in (decode_batch, unpack):
        with contextlib.suppress(WireError):
            decode(data)


@given(st.binary(max_size=200))
@example(b"")
@example((2**63).to_bytes(8, "little") + b"{}")
@example(_json_frame({"__metadata__": {"oodmon": "[" * 100_000}}, b""))
@example((200_000).to_bytes(8, "little") + b"[" * 200_000)
@example(_json_frame({"__metadata__": {"oodmon": "{}"}, "x": 1}, b""))
def test_any_bytes(data: bytes) -> None:
    _gives_a_record_or_an_error(data)


@given(_HEADERS, _RECORD, st.binary(max_size=32))
def test_any_header(header: dict[str, Any], record: dict[str, Any], body: bytes) -> None:
    meta = {"__metadata__": {"oodmon": json.dumps(record)}}
    _gives_a_record_or_an_error(_json_frame({**meta, **header}, body))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(batches(), st.data())
def test_damaged_frames(batch: ScoreBatch, data: st.DataObject) -> None:
    frame = bytearray(encode_batch(batch))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    _gives_a_record_or_an_error(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@pytest.mark.parametrize("shape", [[2**40], [2**31, 2**31], [0, 2**62], [1] * 40])
def test_a_lying_shape_allocates_nothing(shape: list[int]) -> None:
    record = json.dumps({"schema": "oodmon.arrays/1", "meta": {}})
    header = {
        "__metadata__": {"oodmon": record},
        "x": {"dtype": "F64", "shape": shape, "data_offsets": [0, 8]},
    }
    data = _json_frame(header, b"\0" * 8)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


_ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
_FACTS = st.one_of(
    st.builds(
        Alert,
        _TEXT,
        st.sampled_from(["firing", "resolved"]),
        _TEXT,
        _INT64,
        _INT64,
        st.dictionaries(_TEXT, _TEXT, max_size=3),
        st.dictionaries(_TEXT, _ANY_FLOAT | st.lists(_ANY_FLOAT, max_size=3), max_size=3),
    ),
    st.builds(Notice, _TEXT, _TEXT, _TEXT, _INT64, _TEXT, _TEXT),
    st.builds(Exceedance, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT, _INT64, _ANY_FLOAT, st.floats(0, 1)),
    st.builds(
        DriftResult,
        *([_TEXT] * 5),
        _INT64,
        _INT64,
        _ANY_FLOAT,
        _ANY_FLOAT,
        st.booleans(),
        _ANY_FLOAT,
        _COUNT,
        _COUNT,
    ),
)


@given(_FACTS)
def test_every_fact_is_a_cloud_event(fact: Alert | Notice | Exceedance | DriftResult) -> None:
    event = event_of(fact)
    assert event_of(fact) == event
    told = cloud_event(event)
    json.loads(json.dumps(told, allow_nan=False))
    assert told["id"]
    assert told["specversion"] == "1.0"
    assert told.get("subject") != ""
    assert told["source"].isascii()
