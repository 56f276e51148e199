"""What is posted to the intake → records: score batches, and outputs in the form of V2.

Nothing in a body is believed: size is limited by the server; depth and the number of containers are
limited before JSON is parsed, so that no body grows to more than some twenty times its size.

References: CloudEvents 1.0 HTTP binding (binary and structured mode); Open Inference Protocol V2
with its binary tensor extension, as KServe's and Triton's loggers send it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.errors import ContractError, WireError
from oodmon.records import ScoreBatch
from oodmon.wire import MAX_DETECTORS, MAX_ROWS, decode_batch

__all__ = [
    "FRAME_TYPE",
    "MAX_CONTAINERS",
    "MAX_DEPTH",
    "Outputs",
    "labels_of",
    "outputs_of",
    "scores_of",
]

FRAME_TYPE: Final = "application/vnd.oodmon.score-batch"
MAX_DEPTH: Final = 16
MAX_CONTAINERS: Final = 1 << 15

_TOKENS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_LONGEST_NAME: Final = 256
_MAX_TENSORS: Final = 256
_MAX_LABELS: Final = 10_000
_GREATEST_CLASS: Final = 2**31 - 1
_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_FLOATS: Final = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What a server answered to one request.

    Attributes:
        id: of the event, "" where it has none; the same when it is sent again.
        model, version: that the server says it is, "" where it does not.
        logits: float32 (B, C).
        observed_at: ns UTC; 0 where the event has no time.
        name: of the request, for the samples' names; "" where it has none.
    """

    id: str
    model: str
    version: str
    logits: npt.NDArray[np.float32]
    observed_at: int
    name: str


def scores_of(body: bytes, content_type: str) -> tuple[ScoreBatch, bool]:
    """A score batch, in a frame or as JSON, and whether its sender numbers its batches.

    In JSON the field names are those of `ScoreBatch`, columns are lists, and null is a row that
    could not be scored. What may be left out is then "", 0 or empty. `WireError` says what is
    wrong.
    """
    if content_type == FRAME_TYPE:
        return decode_batch(body), True
    record = _object(_json(body), "the body")
    known = {
        "model", "version", "source", "sequence", "observed_at", "scores", "digests",
        "sample_ids", "segment", "segments", "predicted", "dropped", "sampled_fraction", "notices",
    }  # fmt: skip
    if odd := sorted(set(record) - known):
        raise WireError(f"unknown fields: {', '.join(odd)[:200]}")
    columns = _object(record.get("scores"), "scores")
    if len(columns) > MAX_DETECTORS:
        raise WireError(f"scores: more than {MAX_DETECTORS} detectors")
    try:
        batch = ScoreBatch(
            model=_text(record, "model"),
            version=_text(record, "version"),
            source=_text(record, "source"),
            sequence=_whole(record, "sequence"),
            observed_at=_whole(record, "observed_at"),
            scores={name: _column(values, f"scores.{name}") for name, values in columns.items()},
            digests=_texts_of(_object(record.get("digests", {}), "digests")),
            sample_ids=_texts(record, "sample_ids"),
            segment=_codes(record, "segment"),
            segments=_texts(record, "segments"),
            predicted=_codes(record, "predicted"),
            dropped=_whole(record, "dropped"),
            sampled_fraction=_number(record.get("sampled_fraction", 1.0), "sampled_fraction"),
            notices=_texts(record, "notices"),
        )
    except ContractError as error:
        raise WireError(str(error)) from None
    return batch, "sequence" in record


def labels_of(body: bytes) -> Mapping[str, int]:
    """Sample id → number of the true class, from ``{"labels": {…}}``; `WireError` as above."""
    record = _object(_json(body), "the body")
    if odd := sorted(set(record) - {"labels"}):
        raise WireError(f"unknown fields: {', '.join(odd)[:200]}")
    labels = _object(record.get("labels"), "labels")
    if len(labels) > _MAX_LABELS:
        raise WireError(f"labels: more than {_MAX_LABELS:,}")
    for name, label in labels.items():
        if not name:
            raise WireError("labels: a sample id is empty")
        if type(label) is not int or not 0 <= label <= _GREATEST_CLASS:
            raise WireError(
                f"labels.{name[:_LONGEST_NAME]}: expected the number of a class, 0 or more; "
                f"found {str(label)[:50]}"
            )
    return labels


def outputs_of(body: bytes, headers: Mapping[str, str], output: str = "") -> Outputs | None:
    """The logits in an event; none where it is no answer of a model (a request, say).

    Args:
        body: as posted.
        headers: with names in lower case.
        output: name of the tensor that holds the logits; "" takes the only one that can.

    Raises:
        WireError: what is wrong, where, and what was expected.
    """
    attributes = {
        name.removeprefix("ce-"): value for name, value in headers.items() if name[:3] == "ce-"
    }
    split = headers.get("inference-header-content-length", "")
    if headers.get("content-type", "").split(";")[0].strip() == "application/cloudevents+json":
        envelope = _object(_json(body), "the event")
        attributes = {k: v for k, v in envelope.items() if isinstance(v, str)}
        answer, binary = _inside(envelope), b""
    elif split:
        if not re.fullmatch(r"[0-9]{1,10}", split) or int(split) > len(body):
            raise WireError("Inference-Header-Content-Length: not a length within the body")
        answer, binary = _json(body[: int(split)]), body[int(split) :]
    else:
        answer, binary = None, b""
    if attributes.get("specversion", "1.0") != "1.0":
        raise WireError("specversion: only CloudEvents 1.0 is read")
    if attributes.get("type", "").endswith("request"):
        return None
    answer = _object(_json(body) if answer is None else answer, "the answer")
    return Outputs(
        id="\n".join((attributes.get("source", ""), attributes["id"]))[: 2 * _LONGEST_NAME]
        if attributes.get("id")
        else "",
        model=_text(answer, "model_name"),
        version=_text(answer, "model_version"),
        logits=_logits(answer, binary, output),
        observed_at=_time(attributes.get("time", "")),
        name=_text(answer, "id") or attributes.get("id", "")[:_LONGEST_NAME],
    )


def _inside(envelope: Mapping[str, Any]) -> Any:
    if "data_base64" not in envelope:
        return envelope.get("data")
    try:
        return _json(base64.b64decode(_text(envelope, "data_base64", len_limit=0), validate=True))
    except (binascii.Error, ValueError):
        raise WireError("data_base64: not base64") from None


def _logits(answer: Mapping[str, Any], binary: bytes, wanted: str) -> npt.NDArray[np.float32]:
    outputs = answer.get("outputs")
    if not isinstance(outputs, list) or not 0 < len(outputs) <= _MAX_TENSORS:
        raise WireError(f"outputs: expected a list of 1 to {_MAX_TENSORS} tensors")
    found: list[tuple[str, npt.NDArray[np.float32]]] = []
    begin = 0
    for n, tensor in enumerate(outputs):
        tensor = _object(tensor, f"outputs[{n}]")
        name, datatype = _text(tensor, "name"), _text(tensor, "datatype")
        size = _object(tensor.get("parameters", {}), "parameters").get("binary_data_size")
        data: Any = tensor.get("data")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(binary) - begin:
                raise WireError(f"outputs[{n}]: binary_data_size lies outside of the body")
            data = binary[begin : begin + size]
            begin += size
        shape = tensor.get("shape")
        fits = (
            datatype in _FLOATS
            and isinstance(shape, list)
            and len(shape) == 2
            and all(type(side) is int and side >= 0 for side in shape)
        )
        if fits and isinstance(shape, list) and wanted in ("", name):
            found.append((name, _matrix(data, shape, datatype, f"outputs[{n}]")))
    if len(found) != 1:
        names = ", ".join(name for name, _ in found)[:200] or "none"
        what = wanted or "one floating tensor (B, C)"
        raise WireError(f"outputs: expected {what}, found {names}")
    logits = found[0][1]
    if logits.shape[1] == 0:
        raise WireError("outputs: a tensor without classes")
    return logits


def _matrix(data: Any, shape: list[int], datatype: str, where: str) -> npt.NDArray[np.float32]:
    rows, classes = shape
    if isinstance(data, bytes):
        if len(data) != math.prod(shape) * np.dtype(_FLOATS[datatype]).itemsize:
            raise WireError(f"{where}: {len(data)} bytes do not hold {datatype} {shape}")
        array = np.frombuffer(data, _FLOATS[datatype])
    else:
        if isinstance(data, list) and data and isinstance(data[0], list):
            if not all(isinstance(row, list) and len(row) == classes for row in data):
                raise WireError(f"{where}: rows of different lengths")
            data = [value for row in data for value in row]
        array = _column(data, where)
    if array.size != math.prod(shape) or rows > MAX_ROWS:
        raise WireError(f"{where}: {array.size} values do not fill {shape}")
    with np.errstate(over="ignore"):
        return array.reshape(rows, classes).astype(np.float32)


# Values ------------------------------------------------------------------------------------------


def _json(body: bytes) -> Any:
    depth = containers = 0
    for token in _TOKENS.finditer(body):
        first = body[token.start()]
        if first in b"[{":
            depth += 1
            containers += 1
            if depth > MAX_DEPTH or containers > MAX_CONTAINERS:
                raise WireError(
                    f"JSON of more than {MAX_DEPTH} levels or {MAX_CONTAINERS} lists and objects"
                )
        elif first in b"]}":
            depth -= 1
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {str(error)[:200]}") from None


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError(f"{what[:200]}: expected an object, found {type(value).__name__}")
    return value


def _text(record: Mapping[str, Any], name: str, *, len_limit: int = _LONGEST_NAME) -> str:
    value = record.get(name, "")
    if not isinstance(value, str) or (len_limit and len(value) > len_limit):
        raise WireError(f"{name}: expected a text of at most {len_limit} characters")
    return value


def _whole(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise WireError(f"{name}: expected a whole number, not negative, of 63 bits")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise WireError(f"{what}: expected a number")
    return float(value)


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = record.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise WireError(f"{name}: expected a list of texts")
    return tuple(values)


def _texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in values.values()):
        raise WireError("digests: expected texts")
    return dict(values)


def _column(values: Any, what: str) -> npt.NDArray[np.float32]:
    if not isinstance(values, list) or len(values) > MAX_ROWS * 64:
        raise WireError(f"{what[:200]}: expected a list of numbers")
    if not all(value is None or type(value) in (int, float) for value in values):
        raise WireError(f"{what[:200]}: expected numbers or null")
    try:
        with np.errstate(over="ignore"):
            return np.array(values, np.float64).astype(np.float32)
    except (OverflowError, ValueError, TypeError):
        raise WireError(f"{what[:200]}: a number that is out of range") from None


def _codes(record: Mapping[str, Any], name: str) -> npt.NDArray[np.int32]:
    values = record.get(name, [])
    limit = 1 << 31
    if not isinstance(values, list) or not all(
        type(value) is int and -limit <= value < limit for value in values
    ):
        raise WireError(f"{name}: expected a list of whole numbers of 32 bits")
    return np.array(values, np.int32)


def _time(text: str) -> int:
    """RFC 3339 → ns UTC; 0 for no text."""
    if not text:
        return 0
    found = _TIME.fullmatch(text[:64])
    if found is None:
        raise WireError("time: expected RFC 3339")
    day, clock, decimals, zone = found.groups()
    offset = "+00:00" if zone in "Zz" else zone
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}{offset}")
        whole = round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    except (ValueError, OverflowError):
        raise WireError("time: no such time") from None
    if whole < 0:
        raise WireError("time: before 1970")
    return whole * 1_000_000_000 + int((decimals or "").ljust(9, "0"))
