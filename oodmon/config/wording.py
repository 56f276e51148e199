"""How a problem is worded: what was expected, what was found, what may have been meant."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Union

import yaml

from oodmon.secret import Secret

__all__ = ["TAGS", "VARIABLE", "describe", "found", "listed", "unquote"]

_FEW: Final = 12

VARIABLE: Final = re.compile(r"\$(?:\$\{|\{([A-Za-z_][A-Za-z0-9_]*)\}|\{)")
"""``${NAME}`` (group 1), the escape ``$${``, or a ``${`` that is neither."""

TAGS: Final = {
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "the number",
    "tag:yaml.org,2002:float": "the number",
    "tag:yaml.org,2002:null": "nothing",
}
"""What YAML takes an unquoted word for, where that is not text."""


def listed(names: Sequence[str]) -> str:
    """``; the options are …`` where they are few enough to read."""
    if not names:
        return "; there are no options"
    return f"; the options are {', '.join(names)}" if len(names) <= _FEW else ""


def found(node: yaml.Node) -> str:
    """What stands there, in words. Never what a variable stands for."""
    if isinstance(node, yaml.MappingNode):
        return "a map"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if not isinstance(node, yaml.ScalarNode):
        return "nothing"
    shown = _short(node.value)
    if VARIABLE.search(node.value):
        return f"the text that {shown} stands for"
    kind = TAGS.get(node.tag, "the text") if node.style is None else "the text"
    if kind == "nothing":
        return "nothing"
    if kind == "the number":
        return f"{kind} {node.value}"
    return f"{kind} {shown}" if kind != "true or false" else f"{shown} (YAML: {kind})"


def describe(annotation: Any) -> str:
    """What an option takes, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Path: "a path",
        Secret: "a secret as ${NAME}",
        type(None): "nothing",
        Any: "a value",
    }
    if annotation in words:
        return words[annotation]
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(f"`{a}`" for a in arguments)
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        return f"a list of {len(arguments)} values"
    if origin in (tuple, list, Sequence, frozenset, set):
        return f"a list, each {describe(arguments[0])}"
    return "a map"


def unquote(node: yaml.ScalarNode, would_fit: bool) -> str:
    """The hint for a value that fits but stands in quotes."""
    return "; leave out the quotes" if node.style is not None and would_fit else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")
