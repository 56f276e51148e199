"""Shipped conformity checks: every component, plugins included, is held to its contract.

A plugin's own tests need one parametrised function:

    from oodmon.checks import checks_for, subjects

    @pytest.mark.parametrize("check", checks_for("detectors"), ids=lambda check: check.__name__)
    @pytest.mark.parametrize("detector", subjects("detectors", "mine"), ids=repr)
    def test_contract(detector, check):
        check(detector)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from oodmon.errors import UnknownName
from oodmon.registry import kinds

__all__ = ["KINDS", "Outcome", "checks_for", "conform", "examples_of", "subjects"]

KINDS: Final = ("taps", "detectors", "feeds", "drift", "sinks", "triggers", "config")
"""What can be checked: the kinds of component, and `config`, which any of them can be put to."""

Check = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check said of one component.

    Attributes:
        check: name of the check, with the options that were tried where they are not the defaults.
        passed: whether the component holds to that part of its contract.
        message: what was found instead; empty when it passed.
    """

    check: str
    passed: bool
    message: str = ""


def _module(kind: str) -> ModuleType:
    # Imported only here: the checks of detectors and taps need torch.
    if kind not in KINDS:
        raise UnknownName(f"checks: there is no kind {kind!r}; kinds: {', '.join(KINDS)}")
    return importlib.import_module(f"oodmon.checks.{kind}")


def checks_for(kind: str) -> tuple[Check, ...]:
    """The checks of one kind: each takes a component and raises `AssertionError` with the reason.

    `UnknownName` for a kind that is not one of `KINDS`.
    """
    checks: tuple[Check, ...] = _module(kind).CHECKS
    return checks


def subjects(kind: str, name: str) -> Sequence[Any]:
    """The instances of one component that the checks are to be run on.

    `UnknownName` and `BrokenPlugin` as in the registry.
    """
    module = _module(kind)
    if kind not in kinds:
        raise UnknownName(f"checks: {kind!r} is no kind of component; take one of the others")
    cases: Sequence[Any] = module.cases(kinds[kind].get(name))
    return cases


def examples_of(cls: type[Any]) -> Sequence[Mapping[str, Any]]:
    """The options that a class is to be tried with: of its classmethod `examples`, or its defaults.

    ``examples() -> Sequence[Mapping[str, Any]]``.
    """
    examples = getattr(cls, "examples", None)
    return (examples() if examples is not None else ()) or ({},)


def conform(kind: str, name: str) -> list[Outcome]:
    """Run every check of the kind, and those of options, on every case of one component.

    Nothing is raised by a check; `UnknownName` and `BrokenPlugin` as in the registry.
    """
    cases = subjects(kind, name)
    return [
        _outcome(check, case, f" {case!r}" if len(cases) > 1 else "")
        for case in cases
        for check in (*checks_for(kind), *checks_for("config"))
    ]


def _outcome(check: Check, case: Any, label: str) -> Outcome:
    title = check.__name__.removeprefix("check_").replace("_", " ") + label
    try:
        check(case)
    except Exception as error:
        # A component that raises fails the check as one that answers wrongly does.
        what = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Outcome(title, passed=False, message=f"{what}{error}")
    return Outcome(title, passed=True)
