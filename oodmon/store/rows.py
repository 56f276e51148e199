"""Facts → rows of `tables`: pure, and the same rows for the same facts whatever the dialect.

What comes from outside (request ids, source names) may hold anything. A text that the database
would refuse must not stop the daemon for ever, so here NUL bytes and lone surrogates are replaced,
texts in keys are cut to what an index takes, and NaN becomes NULL.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from sqlalchemy import Table

from oodmon.calibration import covered
from oodmon.errors import StoreError
from oodmon.records import (
    BIN_EDGES,
    SAMPLE_SIZE,
    Alert,
    DriftResult,
    Event,
    Exceedance,
    Fact,
    Histogram,
    Notice,
    Window,
)
from oodmon.store import tables

__all__ = ["Row", "clean", "compact", "decode", "fact_rows", "key", "outbox_row"]

Row = dict[str, Any]

_RAW_SCORES: Final = 32
"""Raw scores kept per window and detector, from which a new reference can be made."""
_KEY_BYTES: Final = 256
"""Longest text in a key: PostgreSQL's B-tree takes 2,704 bytes a row, and a key has up to 6."""

_DIGEST_DIGITS: Final = 16

_FOREIGN: Final = "�"

_MIDDLES: Final = (BIN_EDGES[1:] + BIN_EDGES[:-1]) / 2


_TOLD: Final = np.stack([covered(0.05), covered(0.01), _MIDDLES], axis=1)
"""(64, 3): counts @ this are the samples with p ≤ 0.05, with p ≤ 0.01, and the sum of p."""


def clean(value: str) -> str:
    """The text as both databases take it: no NUL, no lone surrogate."""
    if not value.isascii():
        value = value.encode("utf-8", "replace").decode("utf-8")
    return value.replace("\x00", _FOREIGN) if "\x00" in value else value


@lru_cache(maxsize=4096)
def key(value: str) -> str:
    """`clean`, and cut to 256 bytes of UTF-8 with a digest at the end that keeps it unique."""
    found = clean(value)
    data = found.encode()
    if len(data) <= _KEY_BYTES and found == value:
        return value
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]
    head = data[: _KEY_BYTES - _DIGEST_DIGITS - 1].decode("utf-8", "ignore")
    return f"{head}~{digest}"


def compact(value: Any) -> str:
    """JSON without blanks, ASCII; what is not finite becomes null.

    Errors:
        `StoreError`, not retryable, where the value is not plain JSON.
    """
    try:
        text = _ENCODER.encode(value)
        # PostgreSQL's jsonb refuses NUL and lone surrogates, and so would every query that casts
        # the column; receivers cannot encode the latter. (Pairs of surrogates pass unchanged.)
        if "\\u0000" not in text and "\\ud" not in text:
            return text
    except ValueError:
        pass
    except TypeError as error:
        raise StoreError(f"not plain JSON: {error}") from error
    return json.dumps(_acceptable(value), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}"[:_KEY_BYTES])


_ENCODER: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_plain)
"""Made once: `json.dumps` makes one for each value that it is given."""


def _acceptable(value: Any) -> Any:
    """The same value with null for what is not finite and with clean texts."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {_acceptable(name): _acceptable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_acceptable(item) for item in value]
    return value


def _number(value: float | None) -> float | None:
    """SQLite has no NaN: it reads back as NULL, so PostgreSQL is given NULL too."""
    return None if value is None or math.isnan(value) else float(value)


def fact_rows(facts: Iterable[Fact], pipeline: str) -> dict[Table, list[Row]]:
    """Table → rows, in the order of the facts."""
    found: dict[Table, list[Row]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for fact in facts:
        match fact:
            case Window():
                rows = _window_rows(fact)
                table = tables.windows
            case DriftResult():
                rows = [_drift_row(fact)]
                table = tables.drift_results
            case Alert():
                rows = [_alert_row(fact)]
                table = tables.alerts
            case Exceedance():
                rows = [_exceedance_row(fact)]
                table = tables.flagged_samples
                # The rows of one request may share its id: they are told apart by their order.
                place = (fact.model, fact.version, fact.detector, fact.sample_id, fact.observed_at)
                rows[0]["occurrence"] = seen[place]
                seen[place] += 1
            case Notice():
                rows = [_notice_row(fact)]
                table = tables.notices
        for row in rows:
            row["pipeline"] = pipeline
        found.setdefault(table, []).extend(rows)
    return found


def _window_rows(window: Window) -> list[Row]:
    """One row per detector; one with an empty detector where nothing was scored at all."""
    shared: Row = {
        "model": key(window.model),
        "version": key(window.version),
        "segment": key(window.segment),
        "window_start_ns": window.start,
        "window_end_ns": window.end,
        "samples": int(window.samples),
        "dropped": int(window.dropped),
        "late": int(window.late),
        "predicted": compact(
            {str(label): int(window.predicted[label]) for label in sorted(window.predicted)}
        ),
    }
    columns = sorted((window.detectors or {"": Histogram.empty()}).items())
    every = np.stack([histogram.counts for _, histogram in columns])
    scored = every.sum(1)
    told = (every @ _TOLD / np.maximum(scored, 1)[:, None]).tolist()
    return [
        {**shared, "detector": key(detector), **_histogram(histogram, *each)}
        for (detector, histogram), *each in zip(
            columns, every.tolist(), scored.tolist(), told, strict=True
        )
    ]


def _histogram(
    histogram: Histogram, counts: list[int], scored: int, told: Sequence[float | None]
) -> Row:
    p05, p01, p = told if scored else (None, None, None)
    return {
        "scored": scored,
        "invalid": int(histogram.invalid),
        "pairs": int(histogram.pairs),
        "jumps": int(histogram.jumps),
        "swings": int(histogram.swings),
        "judged": int(histogram.judged),
        "errors": int(histogram.errors),
        "share_p05": p05 if p05 is None else min(p05, 1.0),
        "share_p01": p01 if p01 is None else min(p01, 1.0),
        "mean_p": p,
        "estimated_accuracy": _number(histogram.accuracy),
        "counts": compact(counts),
        "raw": compact(_raw(histogram)),
    }


def _raw(histogram: Histogram) -> Mapping[str, Any]:
    """Some raw scores, drawn evenly by their keys, and which share of all scores they stand for.

    Their predicted classes stand beside them where any is known.
    """
    few = len(histogram.keys) > _RAW_SCORES or len(histogram.keys) == SAMPLE_SIZE
    taken = histogram.sample[:_RAW_SCORES]
    share = (int(histogram.keys[min(_RAW_SCORES, len(histogram.keys) - 1)]) / 2**64) if few else 1.0
    scores = base64.b64encode(taken.astype("<f4").tobytes()).decode()
    raw: dict[str, Any] = {"share": share, "scores": scores}
    classes = histogram.classes[:_RAW_SCORES]
    if (classes >= 0).any():
        raw["classes"] = classes.tolist()
    return raw


def _drift_row(result: DriftResult) -> Row:
    return {
        "model": key(result.model),
        "version": key(result.version),
        "test": key(result.test),
        "segment": key(result.segment),
        "detector": key(result.detector),
        "window_start_ns": result.start,
        "window_end_ns": result.end,
        "drifted": bool(result.drifted),
        "statistic": _number(result.statistic),
        "threshold": _number(result.threshold),
        "effect": _number(result.effect),
        "p_value": _number(result.p_value),
        "samples": int(result.samples),
        "reference_samples": int(result.reference_samples),
        "changed_since_ns": int(result.since),
    }


def _alert_row(alert: Alert) -> Row:
    evidence = compact(alert.evidence)
    firing = alert.status == "firing"
    labels = alert.labels
    return {
        "fingerprint": alert.fingerprint,
        "started_at_ns": alert.started_at,
        "ended_at_ns": alert.ended_at,
        "status": alert.status,
        "rule": clean(alert.rule),
        "severity": clean(alert.severity),
        **{
            name: key(labels.get(name, ""))
            for name in ("model", "version", "test", "segment", "detector")
        },
        "labels": compact({name: labels[name] for name in sorted(labels)}),
        "evidence": evidence if firing else "{}",
        "resolution": "{}" if firing else evidence,
    }


def _exceedance_row(flagged: Exceedance) -> Row:
    return {
        "model": key(flagged.model),
        "version": key(flagged.version),
        "detector": key(flagged.detector),
        "sample_id": key(flagged.sample_id),
        "observed_at_ns": flagged.observed_at,
        "segment": key(flagged.segment),
        "score": _number(flagged.score),
        "p": _number(flagged.p),
    }


def _notice_row(notice: Notice) -> Row:
    return {
        "model": key(notice.model),
        "version": key(notice.version),
        "source": key(notice.source),
        "key": key(notice.key),
        "observed_at_ns": notice.observed_at,
        "text": clean(notice.text),
    }


def outbox_row(receiver: str, event: Event) -> Row:
    """One event on its way to one receiver."""
    return {
        "receiver": receiver,
        "event_id": key(event.id),
        "type": clean(event.type),
        "source": clean(event.source),
        "subject": key(event.subject),
        "time_ns": event.time,
        "data": compact(event.data),
        "status": "pending",
        "attempts": 0,
        "not_before_ns": 0,
        "error": "",
        "first_failed_ns": 0,
        "last_failed_ns": 0,
    }


def decode(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows as plain dictionaries, their JSON columns as values and without the pipeline's name."""
    found = []
    for row in rows:
        plain = {name: value for name, value in row.items() if name != "pipeline"}
        for name in ("counts", "raw", "labels", "evidence", "resolution"):
            if name in plain:
                plain[name] = json.loads(plain[name])
        if "predicted" in plain:
            plain["predicted"] = {int(k): v for k, v in json.loads(plain["predicted"]).items()}
        found.append(plain)
    return found
