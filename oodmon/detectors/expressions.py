"""Detectors that are made of detectors name them in text: ``gram(powers=(1, 2))``, or ``msp``."""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import Any

from oodmon.contracts import Detector
from oodmon.errors import ContractError, OodmonError
from oodmon.registry import detectors

__all__ = ["detector_of", "text_of"]


@functools.lru_cache(maxsize=1024)
def detector_of(text: str) -> Detector:
    """The detector that a text such as ``energy`` or ``energy(temperature=2)`` stands for.

    Options are given as in a Python call; words without quotes are texts, so that
    ``cosine(layer=stage.conv)`` needs none. `ContractError` says what cannot be read, or which
    name or option there is not.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unreadable(text) from None
    options: dict[str, Any] = {}
    if isinstance(tree, ast.Call):
        for keyword in tree.keywords:
            if keyword.arg is None:
                raise _unreadable(text)
            options[keyword.arg] = _value(keyword.value, text)
        if tree.args:
            raise _unreadable(text)
        tree = tree.func
    if not isinstance(tree, (ast.Name, ast.Attribute)):
        raise _unreadable(text)
    try:
        return detectors.create(ast.unparse(tree), **options)
    except (OodmonError, TypeError) as error:
        raise ContractError(f"{text!r}: {error}") from error


def text_of(detector: Detector) -> str:
    """The text that stands for this detector: options that are not the default, in their order."""
    given = [
        f"{field.name}={getattr(detector, field.name)!r}"
        for field in dataclasses.fields(detector)  # type: ignore[arg-type]  # all are dataclasses
        if getattr(detector, field.name) != field.default
    ]
    return f"{detector.name}({', '.join(given)})" if given else detector.name


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, (ast.Name, ast.Attribute)):
        word = ast.unparse(node)
        return {"true": True, "false": False}.get(word, word)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise _unreadable(text) from None
    if not isinstance(value, (bool, int, float, str)):
        raise _unreadable(text)
    return value


def _unreadable(text: str) -> ContractError:
    return ContractError(
        f"{text!r}: expected a detector's name, or name(option=value, …) with numbers, words or "
        "tuples of them; a text that is no word needs quotes"
    )
