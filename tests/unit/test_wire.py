"""Frames that are refused, schemas that are older or newer, and the events of facts."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from oodmon.errors import NewerSchema, WireError
from oodmon.records import (
    ALL,
    Alert,
    DriftResult,
    Event,
    Exceedance,
    Fact,
    Histogram,
    Notice,
    ScoreBatch,
    Window,
)
from oodmon.wire import (
    MAX_DETECTORS,
    MAX_ROWS,
    batches,
    cloud_event,
    decode_batch,
    encode_batch,
    event_of,
    event_source,
    pack,
    plain,
    rfc3339,
    unpack,
)
from tests.wire_records import assert_same_batch

AT = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z


def batch(**changes: Any) -> ScoreBatch:
    fields: dict[str, Any] = {
        "model": "digits",
        "version": "1",
        "source": "host",
        "sequence": 5,
        "observed_at": AT,
        "scores": {"msp": np.array([0.5, np.nan], np.float32)},
    }
    return ScoreBatch(**{**fields, **changes})


def frame(record: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    return bytes(save(arrays, {"oodmon": json.dumps(record)}))


def record_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    record: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["oodmon"])
    return record


def test_a_frame_is_a_safetensors_file() -> None:
    data = encode_batch(batch())
    assert load(data)["scores"].shape == (1, 2)
    assert record_of(data)["schema"] == "oodmon.score_batch/1"


def test_decoded_arrays_do_not_hang_on_the_buffer() -> None:
    data = bytearray(encode_batch(batch(predicted=np.array([1, 2], np.int32))))
    found = decode_batch(memoryview(data))
    data[-64:] = bytes(64)
    assert_same_batch(found, batch(predicted=np.array([1, 2], np.int32)))


def test_a_column_that_is_not_contiguous_is_sent_as_it_reads() -> None:
    wide = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = decode_batch(encode_batch(batch(scores={"msp": wide[:, 1]})))
    assert found.scores["msp"].tolist() == [1.0, 3.0, 5.0]
    state, _ = unpack(pack({"a": wide.T, "b": wide[:, 0]}, {}))
    assert state["a"].tolist() == wide.T.tolist()
    assert state["b"].tolist() == [0.0, 2.0, 4.0]


def test_lone_surrogates_in_names_survive() -> None:
    names = ("a\udc80", "b")
    assert decode_batch(encode_batch(batch(sample_ids=names))).sample_ids == names


@pytest.mark.parametrize("repeats", [False, True])
def test_whether_a_batch_repeats_survives(repeats: bool) -> None:
    assert decode_batch(encode_batch(batch(repeats=repeats))).repeats is repeats


@pytest.mark.parametrize(
    "beyond",
    [
        {"sequence": 2**63},
        {"observed_at": 2**63},
        {"dropped": 2**63},
        {"notices": ("x" * 300_000,)},
        {"scores": {"msp": np.zeros(MAX_ROWS + 1, np.float32)}},
        {"scores": {str(n): np.zeros(1, np.float32) for n in range(MAX_DETECTORS + 1)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_batch_beyond_the_bounds_is_not_encoded(beyond: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        encode_batch(batch(**beyond))


def test_the_largest_allowed_batch_is_read_back() -> None:
    large = batch(scores={"msp": np.zeros(MAX_ROWS, np.float32)})
    assert decode_batch(encode_batch(large)).rows == MAX_ROWS


def test_a_newer_schema_names_the_release_to_install() -> None:
    data = frame({"schema": "oodmon.score_batch/2", "needs": "0.4.0", "shape": "unknown"}, {})
    with pytest.raises(NewerSchema, match=r"install oodmon 0\.4\.0 or newer"):
        decode_batch(data)
    rude = frame({"schema": "oodmon.score_batch/2", "needs": "\n\x1b[31m"}, {})
    with pytest.raises(NewerSchema, match=r"install a newer release of oodmon"):
        decode_batch(rude)


def test_an_older_schema_goes_through_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a release that writes /3 would read what /1 and /2 wrote."""

    def names_the_source(record: Any, arrays: Any) -> Any:
        record["source"] = record.pop("agent")
        return record, arrays

    def adds_the_fraction(record: Any, arrays: Any) -> Any:
        return {**record, "sampled_fraction": 1.0}, {"scores": arrays.pop("column")[None, :]}

    now = encode_batch(batch())
    monkeypatch.setattr(batches, "SCHEMA", "oodmon.score_batch/3")
    monkeypatch.setitem(batches._UPGRADES, 1, names_the_source)
    monkeypatch.setitem(batches._UPGRADES, 2, adds_the_fraction)
    old = record_of(now)
    old["agent"] = old.pop("source")
    del old["sampled_fraction"]
    column = {"column": np.array([0.5, np.nan], np.float32)}
    assert_same_batch(
        decode_batch(frame({**old, "schema": "oodmon.score_batch/1"}, column)), batch()
    )
    old["source"] = old.pop("agent")
    assert_same_batch(
        decode_batch(frame({**old, "schema": "oodmon.score_batch/2"}, column)), batch()
    )
    del old["source"]
    with pytest.raises(WireError, match=r"damaged frame of schema oodmon\.score_batch/1"):
        decode_batch(frame({**old, "schema": "oodmon.score_batch/1"}, column))
    with pytest.raises(WireError, match=r"nothing upgrades oodmon\.score_batch/0"):
        decode_batch(frame({**old, "schema": "oodmon.score_batch/0"}, column))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schema": "oodmon.scorer/1"}, "no score batch"),
        ({"schema": "oodmon.score_batch/01"}, "no score batch"),
        ({"sequence": -1}, "sequence"),
        ({"sequence": True}, "sequence"),
        ({"observed_at": 1.5}, "observed_at"),
        ({"detectors": ["msp", "msp"]}, "detectors"),
        ({"detectors": ["a", "b"]}, "scores"),
        ({"detectors": []}, "scores"),
        ({"digests": {"msp": 1}}, "digests"),
        ({"sampled_fraction": 2.0}, "sampled_fraction"),
        ({"unknown": 1}, "unknown"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_record_is_refused(change: dict[str, Any], what: str) -> None:
    data = encode_batch(batch())
    arrays = dict(load(data))
    assert_same_batch(decode_batch(frame(record_of(data), arrays)), batch())
    with pytest.raises(WireError, match=what):
        decode_batch(frame({**record_of(data), **change}, arrays))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"scores": np.zeros((1, 2))},
        {"scores": np.zeros(2, np.float32)},
        {"scores": np.zeros((1, 2), np.float32), "extra": np.zeros(1, np.float32)},
        {"scores": np.zeros((1, 2), np.float32), "segment": np.zeros(2, np.int32)},
        {"scores": np.zeros((1, 2), np.float32), "predicted": np.zeros(3, np.int32)},
        {"scores": np.zeros((1, 2), np.float32), "sample_ids": np.zeros(1, np.uint8)},
        {"scores": np.zeros((1, 2), np.float32), "sample_ids": np.array([10, 255], np.uint8)},
    ],
    ids=lambda arrays: "+".join(arrays) or "none",
)
def test_wrong_arrays_are_refused(arrays: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_batch(frame(record_of(encode_batch(batch())), arrays))


def test_pack_refuses_what_is_no_plain_number() -> None:
    for array in (np.array([object()]), np.array(["text"]), np.array([1j])):
        with pytest.raises(WireError, match="cannot be packed"):
            pack({"x": array}, {})
    with pytest.raises(WireError):
        pack({"__metadata__": np.zeros(1)}, {})
    with pytest.raises(WireError, match="no packed state"):
        unpack(encode_batch(batch()))


def test_a_big_endian_array_arrives_with_its_values() -> None:
    found, _ = unpack(pack({"x": np.array([1.5, 2.5], ">f8")}, {}))
    assert found["x"].tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (AT, "2026-01-01T00:00:00Z"),
        (AT + 1_500_000_000, "2026-01-01T00:00:01.500Z"),
        (AT + 1_001, "2026-01-01T00:00:00.000001001Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (2**63 - 1, "2262-04-11T23:47:16.854775807Z"),
    ],
)
def test_times_are_rfc3339(ns: int, text: str) -> None:
    assert rfc3339(ns) == text


def test_a_time_beyond_64_bits_is_refused() -> None:
    with pytest.raises(WireError):
        rfc3339(2**63)


def alert(**changes: Any) -> Alert:
    fields: dict[str, Any] = {
        "rule": "novelty",
        "status": "firing",
        "severity": "critical",
        "started_at": AT,
        "ended_at": 0,
        "labels": {"model": "digits", "version": "1", "detector": ALL},
        "evidence": {"statistic": np.float32(np.inf), "samples": np.int64(7), "novel": ("a",)},
    }
    return Alert(**{**fields, **changes})


def test_an_alert_as_cloud_event() -> None:
    firing = alert()
    told = cloud_event(event_of(firing))
    assert told == {
        "specversion": "1.0",
        "id": firing.id,
        "source": "/oodmon/digits/1",
        "type": "oodmon.alert.firing.v1",
        "subject": firing.fingerprint,
        "time": "2026-01-01T00:00:00Z",
        "datacontenttype": "application/json",
        "partitionkey": "digits/1",
        "data": {
            "rule": "novelty",
            "status": "firing",
            "severity": "critical",
            "started_at": "2026-01-01T00:00:00Z",
            "ended_at": None,
            "fingerprint": firing.fingerprint,
            "labels": {"model": "digits", "version": "1", "detector": "*"},
            "evidence": {"statistic": None, "samples": 7, "novel": ["a"]},
            "model": "digits",
            "version": "1",
        },
    }
    resolved = event_of(alert(status="resolved", ended_at=AT + 10**9))
    assert resolved.type == "oodmon.alert.resolved.v1"
    assert resolved.subject == firing.fingerprint
    assert rfc3339(resolved.time) == resolved.data["ended_at"] == "2026-01-01T00:00:01Z"


def facts() -> list[Fact]:
    histogram = Histogram(
        np.arange(64, dtype=np.int64), 2, np.array([2**64 - 1], np.uint64), np.ones(1, np.float32)
    )
    return [
        Notice("digits", "1", "host", AT, "host/5/0", "breaker of `gram` opened"),
        Exceedance("digits", "1", "request/1", "msp", "", AT, 0.25, 0.0005),
        DriftResult("digits", "1", "ks", "msp", "eu", AT, AT + 1, 0.5, 0.1, True, 0.2, 10, 100),
        Window("digits", "1", "eu", AT, AT + 10**9, 9, 1, 2, {"msp": histogram}, {3: 9}),
    ]


@pytest.mark.parametrize("fact", facts(), ids=lambda fact: type(fact).__name__)
def test_a_fact_as_cloud_event(fact: Any) -> None:
    told = cloud_event(event_of(fact))
    text = json.dumps(told, allow_nan=False)
    assert json.loads(text) == told, "not plain JSON values"
    assert re.fullmatch(r"oodmon\.[a-z.]+\.v1", told["type"])
    assert told["source"] == "/oodmon/digits/1"
    assert (told["data"]["model"], told["data"]["version"]) == ("digits", "1")
    assert event_of(dataclasses.replace(fact)).id == told["id"]


def test_the_data_of_a_window() -> None:
    data = event_of(facts()[3]).data
    assert data["detectors"]["msp"]["counts"] == list(range(64))
    assert (data["detectors"]["msp"]["scored"], data["detectors"]["msp"]["invalid"]) == (2016, 2)
    assert (data["samples"], data["dropped"], data["late"]) == (9, 1, 2)
    assert data["predicted"] == {"3": 9}


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        (facts()[0], {"key": "host/6/0"}),
        (facts()[1], {"sample_id": "request/2"}),
        (facts()[1], {"detector": "gram"}),
        (facts()[1], {"score": 0.5}),
        (facts()[2], {"test": "psi"}),
        (facts()[2], {"segment": "us"}),
        (facts()[2], {"end": AT + 2}),
        (facts()[3], {"start": AT + 1}),
        (facts()[3], {"version": "2"}),
    ],
)
def test_other_facts_have_other_ids(fact: Any, changes: dict[str, Any]) -> None:
    assert event_of(dataclasses.replace(fact, **changes)).id != event_of(fact).id


def test_ids_are_what_receivers_have_already_seen() -> None:
    """A changed id would make every receiver take a replayed fact for a new one."""
    assert [event_of(fact).id for fact in facts()] == IDS


IDS = [
    "notice-c3293697ce5753de809df9a0bbef696f",
    "sample-17149ec9e6c8ada02fdad65d8cb2226d",
    "drift-a4366ad51a65e274155e222eb3ae63c1",
    "window-cc14932edb97086d397a9920cd428602",
]


def test_a_source_is_a_uri_reference() -> None:
    assert event_source("my model/ß", "1#2") == "/oodmon/my%20model%2F%C3%9F/1%232"
    event = Event("1", "t", event_source("a b", "1"), "", AT, {})
    assert cloud_event(event)["partitionkey"] == "a b/1"
    assert "subject" not in cloud_event(event)


def test_what_is_no_json_value_is_named() -> None:
    with pytest.raises(WireError, match=r"data\.a\[1\]: set"):
        plain({"a": [1, {2}]})
