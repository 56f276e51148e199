"""Who is told of what."""

from __future__ import annotations

import pytest

from oodmon.daemon.routes import KINDS, Routes
from oodmon.errors import ContractError
from oodmon.records import Alert, DriftResult, Exceedance, Fact, Notice, Window

LABELS = {"model": "m", "version": "1", "test": "budget", "detector": "*", "segment": "*"}
FACTS: dict[str, Fact] = {
    "alert": Alert("novelty", "firing", "critical", 5, 0, LABELS, {}),
    "notice": Notice("m", "1", "agent", 5, "key", "text"),
    "window": Window("m", "1", "", 0, 10),
    "drift": DriftResult("m", "1", "t", "d", "", 0, 10, 1.0, 2.0, False, 0.0, 1, 1),
    "sample": Exceedance("m", "1", "s", "d", "", 5, 1.0, 0.001),
}


def test_sinks_get_the_kinds_that_they_ask_for() -> None:
    assert set(FACTS) == set(KINDS)
    routes = Routes({kind: (kind,) for kind in KINDS} | {"all": tuple(KINDS), "none": ()})
    for kind, fact in FACTS.items():
        told = routes(fact)
        assert [receiver for receiver, _ in told] == [f"sinks.{kind}", "sinks.all"]
        assert told[0][1] is told[1][1], "one event for all"
    assert routes.watchers == ("sinks.notice", "sinks.all")


def test_triggers_get_the_firing_alerts_of_their_rules() -> None:
    routes = Routes({"log": ("alert",)}, {"novelty": ("retrain", "page"), "other": ("x",)})
    firing = FACTS["alert"]
    assert isinstance(firing, Alert)
    assert [receiver for receiver, _ in routes(firing)] == [
        "sinks.log",
        "triggers.retrain",
        "triggers.page",
    ]
    resolved = Alert("novelty", "resolved", "critical", 5, 9, LABELS, {})
    assert [receiver for receiver, _ in routes(resolved)] == ["sinks.log"]
    stranger = Alert("unruled", "firing", "critical", 5, 0, LABELS, {})
    assert [receiver for receiver, _ in routes(stranger)] == ["sinks.log"]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ContractError, match=r"sinks\.log\.events: 'alarms' is not one of alert"):
        Routes({"log": ("alarms",)})
