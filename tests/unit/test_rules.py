"""Episodes: when an alert fires, when it is over, and that both have one name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oodmon.errors import ContractError
from oodmon.records import ALL, DriftResult
from oodmon.rules import Rule, Rules, Transition


def _result(at: int, drifted: bool, **fields: Any) -> DriftResult:
    values: dict[str, Any] = {
        "test": "ks",
        "detector": "msp",
        "segment": "",
        "statistic": 1.0,
        "threshold": 1.0,
        "effect": 0.0,
        "samples": 10,
        "reference_samples": 10,
    } | fields
    return DriftResult("m", "1", start=at, end=at + 1, drifted=drifted, **values)


def _run(rules: Rules, pattern: str) -> list[tuple[int, bool, int]]:
    found = []
    for at, letter in enumerate(pattern):
        found += [
            (at, t.resolved, t.episode.started_at) for t in rules.step([_result(at, letter == "x")])
        ]
    return found


def test_fires_after_for_windows_in_a_row_and_resolves_after_calm_ones() -> None:
    rules = Rules({"r": Rule("ks", for_windows=2, resolve_after_windows=3)}, {})
    assert _run(rules, ".x.xx..x...xx...") == [
        (4, False, 3),
        (10, True, 3),
        (12, False, 11),
        (15, True, 11),
    ]


def test_streams_have_episodes_of_their_own_unless_the_test_speaks_of_all() -> None:
    rules = Rules({"r": Rule("ks")}, {"model": "m"})
    two = [_result(0, True), _result(0, True, detector="gram", segment="eu")]
    first = rules.step(two)
    assert [(t.episode.detector, t.episode.segment) for t in first] == [("msp", ""), ("gram", "eu")]
    assert rules.step(two) == []

    overall = Rules({"r": Rule("ks")}, {})
    (only,) = overall.step([*two, _result(0, True, detector=ALL, segment=ALL)])
    assert only.episode.labels == {"test": "ks", "detector": ALL, "segment": ALL}

    picky = Rules({"r": Rule("ks", detectors=("gram",), segments=("eu",))}, {})
    (picked,) = picky.step([*two, _result(0, True, detector=ALL, segment=ALL)])
    assert picked.episode.detector == "gram"
    assert Rules({"r": Rule("psi")}, {}).step(two) == []


def test_freeze_and_thaw_in_the_middle_changes_nothing() -> None:
    pattern = "..xxx.x....xx.xx...."
    rule = {"r": Rule("ks", for_windows=2, resolve_after_windows=2)}
    whole = _run(Rules(rule, {}), pattern)
    rules, found = Rules(rule, {}), []
    for at, letter in enumerate(pattern):
        frozen = json.loads(json.dumps(rules.freeze()))
        rules = Rules(rule, {})
        rules.thaw(frozen)
        found += [
            (at, t.resolved, t.episode.started_at) for t in rules.step([_result(at, letter == "x")])
        ]
    assert found == whole


def test_an_episode_of_a_rule_that_is_gone_is_resolved_under_its_old_name() -> None:
    old = Rules({"r": Rule("ks", labels={"team": "vision"}, severity="critical")}, {"model": "m"})
    (fired,) = old.step([_result(0, True)])
    new = Rules({"other": Rule("ks", for_windows=9)}, {"model": "m"})
    new.thaw(json.loads(json.dumps(old.freeze())))
    (over,) = new.step([_result(1, False)])
    assert isinstance(over, Transition)
    assert over.resolved
    assert over.episode.labels == fired.episode.labels
    assert over.episode.labels["team"] == "vision"
    assert over.episode.severity == "critical"
    assert new.step([_result(2, False)]) == []


def test_bad_options_are_named() -> None:
    with pytest.raises(ContractError, match="for_windows"):
        Rule("ks", for_windows=0)
