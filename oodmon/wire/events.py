"""Facts → events, and events → CloudEvents 1.0 JSON objects."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote, unquote

import numpy as np

from oodmon.errors import WireError
from oodmon.records import Alert, DriftResult, Event, Exceedance, Fact, Notice, Window

__all__ = ["cloud_event", "event_of", "event_source", "plain", "rfc3339"]

_INT64: Final = range(-(1 << 63), 1 << 63)


def rfc3339(ns: int) -> str:
    """``2026-01-31T12:00:00.000000001Z``: ns UTC as text, with as many decimals as it needs."""
    if ns not in _INT64:
        raise WireError(f"{ns} is no time in ns")
    seconds, rest = divmod(int(ns), 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    decimals = f"{rest:09d}"
    while decimals.endswith("000"):
        decimals = decimals[:-3]
    return f"{text}.{decimals}Z" if decimals else f"{text}Z"


def event_source(model: str, version: str) -> str:
    """``/oodmon/<model>/<version>``, percent-encoded: CloudEvents wants a URI reference."""
    return f"/oodmon/{quote(model, '', errors='replace')}/{quote(version, '', errors='replace')}"


def plain(value: Any, path: str = "data") -> Any:
    """The value as JSON can hold it: numpy unwrapped, tuples as lists, non-finite as null.

    Raises:
        WireError: something within is no JSON value; its path is named.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(value[key], f"{path}.{key}") for key in value}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{n}]") for n, item in enumerate(value)]
    raise WireError(f"{path}: {type(value).__name__} is no JSON value")


def event_of(fact: Fact) -> Event:
    """The envelope of a fact. Its id is the same on every replay, so receivers can drop repeats."""
    if isinstance(fact, Alert):
        model, version = fact.labels.get("model", ""), fact.labels.get("version", "")
        return Event(
            fact.id,
            f"oodmon.alert.{fact.status}.v1",
            event_source(model, version),
            fact.fingerprint,
            fact.started_at if fact.status == "firing" else fact.ended_at,
            {
                "rule": fact.rule,
                "status": fact.status,
                "severity": fact.severity,
                "started_at": rfc3339(fact.started_at),
                "ended_at": rfc3339(fact.ended_at) if fact.ended_at else None,
                "fingerprint": fact.fingerprint,
                "labels": plain(fact.labels, "labels"),
                "evidence": plain(fact.evidence, "evidence"),
                "model": model,
                "version": version,
            },
        )
    kind, subject, time, names, data = _told(fact)
    data = {"model": fact.model, "version": fact.version, **plain(data)}
    text = json.dumps([kind, fact.model, fact.version, *names])
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    source = event_source(fact.model, fact.version)
    return Event(f"{kind.split('.')[0]}-{digest}", f"oodmon.{kind}.v1", source, subject, time, data)


def _told(
    fact: Window | DriftResult | Exceedance | Notice,
) -> tuple[str, str, int, tuple[Any, ...], dict[str, Any]]:
    """Type, subject, time, what makes the id beside model and version, and the data."""
    data: dict[str, Any]
    names: tuple[Any, ...]
    if isinstance(fact, Notice):
        data = {
            "source": fact.source,
            "key": fact.key,
            "text": fact.text,
            "observed_at": rfc3339(fact.observed_at),
        }
        return "notice", fact.source, fact.observed_at, (fact.source, fact.key), data
    if isinstance(fact, Exceedance):
        data = {
            "sample_id": fact.sample_id,
            "detector": fact.detector,
            "segment": fact.segment,
            "observed_at": rfc3339(fact.observed_at),
            "score": fact.score,
            "p": fact.p,
        }
        # The score is in the id because callers may give several samples of a request one name.
        names = (
            fact.sample_id,
            fact.detector,
            fact.segment,
            fact.observed_at,
            repr(float(fact.score)),
        )
        return "sample.flagged", fact.detector, fact.observed_at, names, data
    span: dict[str, Any] = {
        "start": rfc3339(fact.start),
        "end": rfc3339(fact.end),
        "segment": fact.segment,
    }
    if isinstance(fact, DriftResult):
        data = {
            **span,
            "test": fact.test,
            "detector": fact.detector,
            "statistic": fact.statistic,
            "threshold": fact.threshold,
            "drifted": fact.drifted,
            "effect": fact.effect,
            "p_value": fact.p_value,
            "since": rfc3339(fact.since) if fact.since else None,
            "samples": fact.samples,
            "reference_samples": fact.reference_samples,
        }
        stream = (fact.test, fact.detector, fact.segment)
        names = (*stream, fact.start, fact.end)
        return "drift.evaluated", "/".join(stream), fact.end, names, data
    data = {
        **span,
        "samples": fact.samples,
        "dropped": fact.dropped,
        "late": fact.late,
        "predicted": dict(sorted(fact.predicted.items())),
        "detectors": {
            name: {
                "counts": histogram.counts,
                "scored": histogram.scored,
                "invalid": histogram.invalid,
            }
            for name, histogram in sorted(fact.detectors.items())
        },
    }
    names = (fact.segment, fact.start, fact.end)
    return "window.closed", fact.segment or "all", fact.end, names, data


def cloud_event(event: Event) -> dict[str, Any]:
    """The CloudEvents 1.0 JSON object; `partitionkey` keeps the order per model in Kafka."""
    out = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "time": rfc3339(event.time),
        "datacontenttype": "application/json",
        "partitionkey": unquote(event.source.removeprefix("/oodmon/")),
        "data": plain(event.data),
    }
    if event.subject:  # the specification forbids an empty one
        out["subject"] = event.subject
    return out
