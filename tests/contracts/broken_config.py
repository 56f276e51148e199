"""One component per check of `oodmon.checks.config` that breaks this one rule, on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oodmon.checks import config as checks
from oodmon.secret import Secret

__all__ = ["BROKEN", "Sound"]


@dataclass(frozen=True)
class Sound:
    """Breaks nothing: url, token, timeout_seconds, max_bytes, labels, tags."""

    url: str
    token: Secret = field(default_factory=Secret)
    timeout_seconds: float = 10.0
    max_bytes: int = 1024
    labels: tuple[str, ...] = ()
    tags: str | tuple[str, ...] = "auto"


@dataclass
class Thawed:
    """Its option: level."""

    level: float = 0.5


@dataclass(frozen=True)
class TakesAFunction:
    """Its option: score."""

    score: Callable[[], float] = float


@dataclass(frozen=True)
class Abbreviates:
    """Its option: timeout_ms."""

    timeout_ms: int = 100


@dataclass(frozen=True)
class KeepsItsUnitToItself:
    """Its option: timeout."""

    timeout: float = 10.0


@dataclass(frozen=True)
class SaysNothing:
    """Options: see the code."""

    threshold: float = 0.5


_SHARED: dict[str, str] = {}


@dataclass(frozen=True)
class SharesItsDefault:
    """Its option: labels."""

    labels: Any = field(default_factory=lambda: _SHARED)


@dataclass(frozen=True)
class ShowsItsPassword:
    """Its option: password."""

    password: str = ""


@dataclass(frozen=True)
class RevealsItsToken:
    """Its option: token."""

    token: Secret = field(default_factory=Secret)

    def __repr__(self) -> str:
        return f"RevealsItsToken({self.token.reveal()})"


@dataclass(frozen=True)
class ChangesItsOptions:
    """Its option: level."""

    level: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", self.level / 2)


BROKEN: tuple[tuple[Callable[[Any], None], type[Any]], ...] = (
    (checks.check_is_a_frozen_dataclass, Thawed),
    (checks.check_options_are_plain, TakesAFunction),
    (checks.check_options_are_named_by_the_rules, Abbreviates),
    (checks.check_options_say_their_unit, KeepsItsUnitToItself),
    (checks.check_options_are_explained, SaysNothing),
    (checks.check_defaults_are_immutable, SharesItsDefault),
    (checks.check_secrets_are_typed, ShowsItsPassword),
    (checks.check_secrets_are_hidden, RevealsItsToken),
    (checks.check_options_survive_yaml, ChangesItsOptions),
)
