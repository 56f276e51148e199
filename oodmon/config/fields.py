"""The options of a component: the fields of its dataclass, with their annotations."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, Final

__all__ = ["names_path", "options_of"]

_PATHS: Final = ("_path", "_file", "_folder", "_cafile", "_certfile", "_keyfile")


def names_path(name: str) -> bool:
    """Whether an option of this name holds a file or a folder, by the naming rule of options."""
    return name == "path" or name.endswith(_PATHS)


def options_of(cls: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Option → (field, annotation) of a dataclass; `TypeError` where that cannot be told."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} is not a dataclass")
    options = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        # Only the options: what else a class keeps may be annotated with names that exist for
        # the type checker alone.
        own = {n: a for n, a in inspect.get_annotations(owner).items() if n in options}
        holder = type("Options", (), {"__annotations__": own, "__module__": owner.__module__})
        hints |= typing.get_type_hints(holder, include_extras=True)
    return {name: (option, hints[name]) for name, option in options.items()}
