"""The log sink: one line per event, at the level of its severity."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from oodmon.checks.sinks import event
from oodmon.records import Event, Notice
from oodmon.sinks.log import REMEMBERED, Log, level, line
from oodmon.wire import event_of


@pytest.mark.parametrize(
    ("severity", "expected"),
    [
        ("info", logging.INFO),
        ("critical", logging.CRITICAL),
        ("Error", logging.ERROR),
        ("page-me", logging.WARNING),
    ],
)
def test_level_follows_the_severity(severity: str, expected: int) -> None:
    alert = replace(event(), data={**event().data, "severity": severity})
    assert level(alert) == expected


def test_a_resolved_alert_is_information() -> None:
    assert level(event(status="resolved")) == logging.INFO


def test_the_daemons_failures_are_errors() -> None:
    failed = Event("1", "oodmon.daemon.reload_failed.v1", "/oodmon", "", 0, {"why": "x"})
    assert level(failed) == logging.ERROR
    assert line(failed) == "daemon reload_failed /oodmon why=x [1]"


def test_a_line_says_what_happened_where_and_why() -> None:
    text = line(event())
    assert text.startswith("FIRING novelty (critical) digits/1 detector=* statistic=12.5")
    assert text.endswith(f"[{event().id}]")
    assert "novel=" not in text


def test_a_line_tells_the_whole_summary_first() -> None:
    summary = "It shows most in gram. " * 20
    told = replace(event(), data={**event().data, "evidence": {"summary": summary, "effect": 0.5}})
    text = line(told)
    assert text.startswith(f"FIRING novelty (critical) digits/1: {summary.strip()}")
    assert text.count("It shows most") == 20
    assert "effect=0.5" in text
    assert "summary=" not in text


def test_a_line_is_one_line_whatever_an_agent_writes() -> None:
    notice = event_of(Notice("m", "1", "a", 5, "k", "breaker\n2026 CRITICAL forged\x1b[31m"))
    text = line(notice)
    assert text.isprintable()
    assert text.startswith("NOTICE m/1 breaker 2026 CRITICAL forged [31m")


def test_long_values_are_cut() -> None:
    long = Event("1", "oodmon.x.v1", "/oodmon/m/1", "", 0, {"text": "a" * 10_000})
    assert len(line(long)) < 300


def test_repeats_are_dropped_while_open_and_memory_is_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "mine")
    sink = Log(logger="mine")
    sink.open()
    sink.send([event(0), event(0)])
    assert len(caplog.records) == 1
    sink.send([Event(str(n), "oodmon.x.v1", "", "", 0, {}) for n in range(REMEMBERED + 10)])
    assert len(sink._seen) == REMEMBERED
    sink.close()
    assert not sink._seen
