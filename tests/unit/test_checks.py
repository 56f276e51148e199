from __future__ import annotations

import pytest

from oodmon import checks
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.errors import UnknownName
from oodmon.registry import drift
from tests.contracts.broken_drift import AlarmedByNothing, SignedProbability


@pytest.mark.parametrize("kind", checks.KINDS)
def test_every_kind_has_checks_that_say_what_they_check(kind: str) -> None:
    found = checks.checks_for(kind)
    assert len(found) >= 3
    for check in found:
        assert check.__name__.startswith("check_")
        assert check.__doc__
    names = [check.__name__ for check in found]
    assert len(names) == len(set(names))


def test_unknown_kinds_and_names_are_named() -> None:
    with pytest.raises(UnknownName, match="drfit"):
        checks.checks_for("drfit")
    with pytest.raises(UnknownName, match="no kind of component"):
        checks.subjects("config", "drift")
    with pytest.raises(UnknownName, match="psy"):
        checks.conform("drift", "psy")
    with pytest.raises(UnknownName, match="`oodmon catalog drift` lists them"):
        drift.get("qqqqqqq")


def test_conform_runs_the_kinds_checks_and_those_of_options() -> None:
    outcomes = checks.conform("drift", "ks")
    assert len(outcomes) == len(checks.checks_for("drift")) + len(checks.checks_for("config"))
    assert all(outcome.passed for outcome in outcomes), outcomes
    assert {outcome.message for outcome in outcomes} == {""}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name for a class that has two faults, or that cannot even be asked."""

    class Faulty(SignedProbability, AlarmedByNothing):
        """Has two faults, on two sets of options."""

        @classmethod
        def examples(cls) -> tuple[dict[str, float], ...]:
            return ({"alpha": 0.01}, {"alpha": 0.02})

        def promise(self, window_seconds: float) -> str:
            raise ZeroDivisionError(window_seconds)

    monkeypatch.setitem(drift._classes, "faulty", Faulty)


@pytest.mark.usefixtures("broken")
def test_conform_tells_every_fault_of_every_case_and_never_raises() -> None:
    outcomes = checks.conform("drift", "faulty")
    failed = {outcome.check: outcome.message for outcome in outcomes if not outcome.passed}
    assert any("p_value" in message for message in failed.values())
    assert any(message.startswith("ZeroDivisionError: ") for message in failed.values())
    assert any("alpha=0.01" in name for name in failed)
    assert any("alpha=0.02" in name for name in failed)
    assert len({outcome.check for outcome in outcomes}) == len(outcomes)


def test_subjects_are_the_examples_of_the_class() -> None:
    assert checks.subjects("drift", "ks") == [KolmogorovSmirnov(**KolmogorovSmirnov.examples()[0])]
