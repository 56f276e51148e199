"""One decision over many streams: whose evidence counts, and who is named."""

from __future__ import annotations

import pytest

from oodmon.drift.together import LOG10_FLOOR, together
from oodmon.records import ALL, DriftResult


def _result(statistic: float, detector: str) -> DriftResult:
    return DriftResult("m", "1", "t", detector, "", 0, 1, statistic, 2.0, False, statistic, 10, 99)


def test_a_silent_stream_counts_and_one_that_can_have_no_evidence_does_not() -> None:
    blind, silent = _result(LOG10_FLOOR, "blind"), _result(2.5, "silent")
    overall = together([blind], [silent])[-1]
    assert (overall.detector, overall.segment) == (ALL, ALL)
    assert overall.drifted
    assert overall.statistic == pytest.approx(2.5)
    assert overall.effect == 2.5
    # Among those that count the evidence is shared: 10^2.5 over four is below 10^2.
    others = [_result(LOG10_FLOOR, name) for name in "abc"]
    assert not together([blind], [silent, *others])[-1].drifted


def test_where_nobody_counts_nothing_is_decided() -> None:
    blind = _result(LOG10_FLOOR, "blind")
    assert [result.drifted for result in together([blind], [])] == [False, False]
    assert together([], [_result(9.0, "silent")]) == []


def test_streams_that_changed_together_are_named_together() -> None:
    # Of four, one needs 4 A by itself; two need 2 A each.
    two = [_result(2.4, "a"), _result(2.4, "b"), _result(0.0, "c"), _result(0.0, "d")]
    assert [r.drifted for r in together(two, two)[:-1]] == [True, True, False, False]
    one = [_result(2.4, "a"), *two[2:], _result(0.0, "e")]
    assert [r.drifted for r in together(one, one)[:-1]] == [False] * 4
