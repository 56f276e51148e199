"""Checks of a component's options: what can stand in a YAML file, under a name that says its unit.

They hold for every kind of component, so a plugin runs them beside the checks of its own kind.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Union

import yaml

from oodmon.checks import examples_of
from oodmon.registry import options_of
from oodmon.secret import Secret

__all__ = ["CHECKS", "cases"]

_PLAIN: Final = (bool, int, float, str, type(None), Secret)
_FIXED: Final = (bool, int, float, str, bytes, type(None), Secret, tuple, frozenset)
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_MARK: Final = "v3ry-hidden"

_TIMES: Final = frozenset(
    [
        "timeout",
        "delay",
        "interval",
        "wait",
        "period",
        "cooldown",
        "lateness",
        "age",
        "ttl",
        "duration",
        "pause",
        "backoff",
    ]
)
_SIZES: Final = frozenset(["size", "memory", "buffer"])
_UNITS: Final = frozenset(
    ["seconds", "bytes", "windows", "samples", "batches", "rows", "tokens", "events"]
)
_OTHER_UNITS: Final = frozenset(
    [
        "s",
        "ms",
        "us",
        "ns",
        "sec",
        "secs",
        "msec",
        "minute",
        "minutes",
        "min",
        "hour",
        "hours",
        "day",
        "days",
        "kb",
        "mb",
        "gb",
        "kib",
        "mib",
        "gib",
    ]
)
_PRIVATE: Final = frozenset(
    ["password", "passphrase", "token", "secret", "credential", "credentials"]
)


def cases(cls: type[Any]) -> list[Any]:
    """Instances of a class: of its `examples()`, else with its defaults.

    Options without a default get a text or a number that is as good as any.
    """
    required = {
        field.name: _some(annotation)
        for field, annotation in _options(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return [cls(**{**required, **example}) for example in examples_of(cls)]


def check_is_a_frozen_dataclass(component: Any) -> None:
    """Options cannot be changed after they were checked."""
    cls = type(component)
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass"
    frozen = getattr(cls, "__dataclass_params__").frozen  # noqa: B009  # not in the type stubs
    assert frozen, f"{cls.__name__} is not frozen: @dataclass(frozen=True)"


def check_options_are_plain(component: Any) -> None:
    """Scalars, text, secrets, tuples of them, and maps from text to them: what YAML can say."""
    for field, annotation in _options(type(component)):
        assert _is_plain(annotation), (
            f"{field.name}: {field.type} cannot be given in a YAML file; use bool, int, float, "
            "str, Secret, Literal, tuple[…, ...] or Mapping[str, …]"
        )


def check_options_are_named_by_the_rules(component: Any) -> None:
    """Lower case with underscores; no abbreviation of a unit."""
    for field, _ in _options(type(component)):
        assert _NAME.fullmatch(field.name), f"{field.name}: expected lower_case_words"
        last = field.name.rpartition("_")[2]
        assert last not in _OTHER_UNITS or last == field.name, (
            f"{field.name}: durations end in _seconds, sizes in _bytes"
        )


def check_options_say_their_unit(component: Any) -> None:
    """A number that is a time or a size ends in its unit."""
    for field, annotation in _options(type(component)):
        if not _is_number(annotation):
            continue
        words = set(field.name.split("_"))
        for speaks_of, what, example in (
            (_TIMES, "a duration", f"{field.name}_seconds"),
            (_SIZES, "a size", f"{field.name}_bytes"),
        ):
            if words & speaks_of:
                assert words & _UNITS, f"{field.name}: {what} without a unit; say {example}"


def check_options_are_explained(component: Any) -> None:
    """The class docstring speaks of every option by its name."""
    text = inspect.getdoc(type(component)) or ""
    for field, _ in _options(type(component)):
        assert re.search(rf"\b{re.escape(field.name)}\b", text), (
            f"{field.name}: the docstring of {type(component).__name__} does not speak of it"
        )


def check_defaults_are_immutable(component: Any) -> None:
    """No two instances share something that one of them could change."""
    for field, _ in _options(type(component)):
        if field.default is not dataclasses.MISSING:
            assert isinstance(field.default, _FIXED), (
                f"{field.name}: the default {field.default!r} could be changed by whoever gets it"
            )
        elif field.default_factory is not dataclasses.MISSING:
            first, second = field.default_factory(), field.default_factory()
            assert isinstance(first, _FIXED) or first is not second, (
                f"{field.name}: every instance would share one {type(first).__name__}"
            )
        value = getattr(component, field.name)
        assert not isinstance(value, list | set | bytearray), (
            f"{field.name}: a {type(value).__name__} could be changed; use a tuple or a frozenset"
        )


def check_secrets_are_typed(component: Any) -> None:
    """What is called a password, token or secret is a `Secret`."""
    for field, annotation in _options(type(component)):
        if set(field.name.split("_")) & _PRIVATE and not _is_number(annotation):
            assert annotation is Secret, (
                f"{field.name}: expected type Secret, found {field.type}; a plain text would show "
                "in logs"
            )


def check_secrets_are_hidden(component: Any) -> None:
    """No secret shows in repr, str or format."""
    names = [field.name for field, annotation in _options(type(component)) if annotation is Secret]
    if not names:
        return
    given = {field.name: getattr(component, field.name) for field, _ in _options(type(component))}
    holding = type(component)(**given | {name: Secret(f"{_MARK}-{name}") for name in names})
    for shown in (repr(holding), str(holding), f"{holding}"):
        assert _MARK not in shown, f"{', '.join(names)}: a secret shows in {shown}"


def check_options_survive_yaml(component: Any) -> None:
    """Written to YAML and read again, the options make an equal component."""
    options = [(f.name, a) for f, a in _options(type(component)) if a is not Secret]
    given = {name: _writable(getattr(component, name)) for name, _ in options}
    read = yaml.safe_load(yaml.safe_dump(given)) or {}
    secrets = {
        f.name: getattr(component, f.name) for f, a in _options(type(component)) if a is Secret
    }
    again = type(component)(**{name: _frozen(value) for name, value in read.items()}, **secrets)
    assert again == component, f"{component!r} came back as {again!r}"


CHECKS: tuple[Callable[[Any], None], ...] = (
    check_is_a_frozen_dataclass,
    check_options_are_plain,
    check_options_are_named_by_the_rules,
    check_options_say_their_unit,
    check_options_are_explained,
    check_defaults_are_immutable,
    check_secrets_are_typed,
    check_secrets_are_hidden,
    check_options_survive_yaml,
)


def _options(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Every option with its annotation."""
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass"
    return list(options_of(cls).values())


def _is_plain(annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return all(isinstance(choice, (str, int, bool)) for choice in arguments)
    if origin in (Union, types.UnionType):
        return all(_is_plain(choice) for choice in arguments)
    if origin is tuple:
        return all(a is Ellipsis or _is_plain(a) for a in arguments)
    if origin is Mapping:
        return arguments[0] is str and _is_plain(arguments[1])
    return annotation in _PLAIN


def _is_number(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return any(_is_number(choice) for choice in typing.get_args(annotation))
    return annotation in (int, float)


def _some(annotation: Any) -> Any:
    """A value for an option without a default."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return arguments[0]
    if origin is tuple:
        return (_some(arguments[0]),)
    if origin is Mapping:
        return {}
    if annotation is Secret:
        return Secret("example")
    return {bool: True, int: 1, float: 1.0}.get(annotation, "example")


def _writable(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_writable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _writable(item) for name, item in value.items()}
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
