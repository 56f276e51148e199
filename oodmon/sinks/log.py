"""Events as one readable line each, through the standard `logging`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from oodmon.contracts import Sink
from oodmon.records import Event
from oodmon.registry import sinks

__all__ = ["Log", "line"]

REMEMBERED: Final = 4096
"""Ids kept while open, so that an event that is sent again is not printed again."""

LONGEST_VALUE: Final = 200
"""Characters of one value in a line; a list of novel samples would otherwise fill the screen."""
_LONGEST_SUMMARY: Final = 1000

_SEVERITIES: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}

_HIDDEN: Final = frozenset(
    {"fingerprint", "started_at", "ended_at", "summary", "streams", "classes", "segments", "novel"}
)
"""What a person does not need in the line: the database and the report have it."""


@sinks.register("log")
@dataclass(frozen=True)
class Log(Sink):
    """One line per event; the level follows the severity.

    Firing alerts are logged at their severity (an unknown severity counts as warning), resolved
    ones at info. Failures of the daemon are errors, notices warnings, everything else info.

    Options:
        logger: name of the logger; handlers and format are the application's business.
    """

    logger: str = "oodmon.events"
    _seen: OrderedDict[str, None] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def open(self) -> None:
        """Nothing to connect to."""

    def send(self, events: Sequence[Event]) -> None:
        """Log each event that was not logged since `open`."""
        logger = logging.getLogger(self.logger)
        for event in events:
            if event.id in self._seen:
                continue
            logger.log(level(event), "%s", line(event))
            self._seen[event.id] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)

    def close(self) -> None:
        """Forget what was logged."""
        self._seen.clear()


def level(event: Event) -> int:
    """The `logging` level of an event."""
    if event.type.startswith("oodmon.alert.firing."):
        severity = str(event.data.get("severity", "")).lower()
        return _SEVERITIES.get(severity, logging.WARNING)
    if "failed" in event.type:
        return logging.ERROR
    if event.type.startswith("oodmon.notice.") or event.data.get("drifted") is True:
        return logging.WARNING
    return logging.INFO


def line(event: Event) -> str:
    """One event in one line without control characters: what happened, to which model, and why."""
    data = event.data
    where = event.source.removeprefix("/oodmon/")
    if event.type.startswith("oodmon.alert."):
        evidence = data.get("evidence")
        details = evidence if isinstance(evidence, Mapping) else {}
        head = (
            f"{str(data.get('status', 'alert')).upper()} {data.get('rule', '?')} "
            f"({data.get('severity', '?')}) {where}"
        )
        labels = data.get("labels")
        shown = {
            key: value
            for key, value in (labels.items() if isinstance(labels, Mapping) else ())
            if key not in ("model", "version")
        }
        # What a person reads first; the numbers behind it follow.
        summary = str(details.get("summary") or "")[:_LONGEST_SUMMARY]
        parts = [f"{head}: {summary}" if summary else head, _pairs(shown), _pairs(details)]
    elif event.type.startswith("oodmon.notice.") and "text" in data:
        parts = [f"NOTICE {where}", str(data["text"])]
    else:
        what = event.type.removeprefix("oodmon.").rsplit(".v", 1)[0].replace(".", " ")
        parts = [f"{what} {where}", _pairs(data)]
    parts.append(f"[{event.id}]")
    return "".join(c if c.isprintable() else " " for c in " ".join(filter(None, parts)))


def _pairs(values: Mapping[str, Any]) -> str:
    words = []
    for key, value in values.items():
        if key in _HIDDEN or value is None:
            continue
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        if len(text) > LONGEST_VALUE:
            text = text[: LONGEST_VALUE - 1] + "…"
        words.append(f"{key}={text}")
    return " ".join(words)
