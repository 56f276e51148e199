"""Options of every registered component keep the rules; each check rejects one that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from oodmon.checks import config as checks
from oodmon.registry import kinds
from tests.contracts.broken_config import BROKEN, Sound


def _registered() -> Iterator[tuple[str, type[Any]]]:
    for kind, registry in kinds.items():
        for name in registry.names():
            yield f"{kind}.{name}", registry.get(name)


COMPONENTS = dict(_registered())


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_keeps_the_rules(component: str, check: Callable[[Any], None]) -> None:
    for case in checks.cases(COMPONENTS[component]):
        check(case)


def test_every_kind_is_looked_at() -> None:
    assert {name.partition(".")[0] for name in COMPONENTS} == set(kinds)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_a_sound_component_passes(check: Callable[[Any], None]) -> None:
    for case in checks.cases(Sound):
        check(case)


@pytest.mark.parametrize(("check", "cls"), BROKEN, ids=lambda part: part.__name__)
def test_each_check_rejects_its_counterpart(check: Callable[[Any], None], cls: type[Any]) -> None:
    (case,) = checks.cases(cls)
    with pytest.raises(AssertionError, match=r"\w"):
        check(case)


def test_every_check_has_a_counterpart() -> None:
    assert {check for check, _ in BROKEN} == set(checks.CHECKS)
