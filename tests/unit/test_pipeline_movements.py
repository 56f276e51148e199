"""Which classes and segments moved: before and since, also over a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from oodmon.drift.budget import Budget
from oodmon.pipeline import Pipeline
from oodmon.pipeline.movements import Movements, is_suspicious
from oodmon.records import DriftResult, Window
from oodmon.rules import Rule
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, alerts, batch, calibration

QUIET = DriftResult("m", "1", "b", "d", "", 0, 1, 1.0, 4.0, False, 0.1, 10, 100, since=5)


def _pane(segment: str, classes: dict[int, int]) -> Window:
    return Window("m", "1", segment, 0, 1, sum(classes.values()), predicted=classes)


def test_suspicion_takes_half_an_alarm_and_an_onset() -> None:
    assert not is_suspicious(QUIET)
    assert is_suspicious(replace(QUIET, statistic=2.0))
    assert not is_suspicious(replace(QUIET, statistic=2.0, since=0))
    assert is_suspicious(replace(QUIET, drifted=True))


def test_those_that_moved_most_come_first_with_both_counts() -> None:
    found = Movements()
    for _ in range(10):
        found.take([_pane("eu", {1: 90, 2: 10}), _pane("us", {1: 80, 3: 20})], suspicious=False)
    assert found.told() == {}
    found.take([_pane("eu", {1: 20, 2: 80}), _pane("us", {1: 80, 3: 20})], suspicious=True)
    told = found.told()
    assert [row["name"] for row in told["classes"]] == ["2", "1"]
    row = told["classes"][0]
    assert (row["before"], row["since"]) == (100, 80)
    assert (row["share_before"], row["share_since"]) == (0.05, 0.4)
    assert "segments" not in told

    again = Movements()
    again.thaw(json.loads(json.dumps(found.freeze())))
    assert again.told() == told
    # It came to nothing: what was counted apart is part of the ordinary again.
    found.take([_pane("eu", {1: 100})], suspicious=False)
    assert found.told() == {}
    assert found.freeze()["calm"]["classes"]["2"] == 180


def test_an_alert_says_in_words_what_moved_since_when_and_how_much() -> None:
    rng = np.random.default_rng(0)
    pipeline = Pipeline(
        "m",
        "1",
        {"msp": calibration(5000)},
        Windowing(10, 0, 0),
        {"b": Budget("1 per 1000 windows", tolerated_fraction=0.0)},
        {"r": Rule("b")},
    )
    facts = []
    for at in range(40):
        scores = rng.normal(size=100)
        classes = rng.integers(0, 4, 100).astype(np.int32)
        if at >= 30:
            novel = rng.random(100) < 0.3
            scores, classes = scores + 5 * novel, np.where(novel, 7, classes).astype(np.int32)
        facts += pipeline.step(batch(scores, 10.0 * at, at, predicted=classes))
        if at % 7 == 0:
            data = pipeline.freeze()
            pipeline = Pipeline(
                "m",
                "1",
                pipeline.calibrations,
                pipeline.windowing,
                pipeline.tests,
                {"r": Rule("b")},
            )
            pipeline.thaw(data)
    facts += pipeline.advance(EPOCH + 420 * SECOND)
    (alert,) = alerts(facts)
    told = alert.evidence
    (stream,) = told["streams"]
    assert stream["changed_fraction_at_least"] <= 0.3 <= stream["changed_fraction"] + 0.12
    band = next(b for b in stream["bins"] if b["p_at_most"] == 0.001)
    assert band["found"] > 20 * band["expected"]
    assert told["classes"][0]["name"] == "7"
    assert told["classes"][0]["before"] == 0
    assert "2023-11-14T22:18:20" in told["since"]  # EPOCH + 300 s
    for words in (
        "began at about 2023-11-14 22:18:20 UTC",
        "msp",
        "Predicted class 7 went from 0.0%",
    ):
        assert words in told["summary"]
