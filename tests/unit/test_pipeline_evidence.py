"""The sentences of an alert: of many streams at the bound, the one that moved most is told."""

from __future__ import annotations

from typing import Any

from oodmon.pipeline.evidence import evidence
from oodmon.records import ALL, DriftResult


def result(detector: str, statistic: float = 9.0) -> DriftResult:
    return DriftResult(
        "m", "1", "budget", detector, detector if detector == ALL else "", 0, 10, statistic, 6.0,
        statistic >= 6.0, 0.5, 100, 1000,
    )  # fmt: skip


def moved(least: float, found: int) -> dict[str, Any]:
    return {
        "samples": 100,
        "changed_fraction": least + 0.1,
        "changed_fraction_at_least": least,
        "bins": [{"p_at_most": 0.1, "expected": 10.0, "found": found}],
    }


def summary(*streams: tuple[DriftResult, dict[str, Any]]) -> str:
    return str(evidence(result(ALL), streams, {}, (), "rarely")["summary"])


def test_of_streams_with_as_much_evidence_the_one_that_changed_most_is_told() -> None:
    said = summary((result("msp"), moved(0.1, 2)), (result("gram"), moved(0.6, 70)))
    assert said == (
        "It shows most in gram: about 70% of the traffic since is different "
        "(100 samples; with 95 % certainty at least 60%). "
        "70 of them are among the most novel 10 % of the reference, where 10 were expected."
    )


def test_a_stream_that_did_not_drift_is_not_told_before_one_that_did() -> None:
    said = summary((result("msp"), moved(0.1, 2)), (result("gram", 1.0), moved(0.6, 70)))
    assert "It shows most in msp" in said
    assert "Only 2 of them are among" in said


def test_where_no_single_stream_drifted_the_one_with_the_most_evidence_is_told() -> None:
    said = summary((result("msp", 5.0), moved(0.1, 20)), (result("gram", 1.0), moved(0.6, 70)))
    assert "It shows most in msp" in said


def test_at_least_nothing_is_not_said() -> None:
    said = summary((result("msp"), moved(0.004, 30)))
    assert "about 10% of the traffic since is different (100 samples). 30 of them" in said
