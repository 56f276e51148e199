"""One YAML node → the value that an option's annotation asks for, or a problem at its place.

The annotation leads, not YAML's own guess: a plain ``1e-3`` is a number where a number is expected
(YAML 1.1 takes it for text), ``on`` is never silently true where text is expected, ``010`` is
never silently eight. ``${NAME}`` is replaced before the value is read, so a number can come from
the environment. A `Secret` can come from nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Union

import yaml

from oodmon.config.document import Problems
from oodmon.config.wording import TAGS, VARIABLE, describe, found, listed, unquote
from oodmon.registry import names_path, near, options_of
from oodmon.secret import Secret

__all__ = ["MISSING", "Converter"]

MISSING: Final = object()
"""No value: the problems say why."""

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/@:\s]*:([^/@\s]+)@")
_MAX_DIGITS = 400
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Converter:
    """Reads nodes of one file.

    Args:
        problems: where problems go.
        environment: what ``${NAME}`` stands for.
        folder: what relative paths are relative to.
    """

    problems: Problems
    environment: Mapping[str, str]
    folder: Path

    def value(self, node: yaml.Node, annotation: Any, path: str, *, is_path: bool = False) -> Any:
        """The value, or `MISSING` after a problem was noted."""
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            return self.value(node, typing.get_args(annotation)[0], path, is_path=is_path)
        if annotation is Any:
            return self._anything(node, path)
        if origin in (Union, types.UnionType):
            return self._first_of(node, typing.get_args(annotation), path, is_path)
        if origin is Literal:
            return self._choice(node, typing.get_args(annotation), path)
        if origin in (tuple, list, Sequence, frozenset, set):
            return self._sequence(node, annotation, path, is_path)
        if origin in (dict, Mapping):
            return self._mapping(node, annotation, path)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self.instance(node, annotation, path)
        return self._scalar(node, annotation, path, is_path)

    def instance(self, node: yaml.Node, cls: type[Any], path: str) -> Any:
        """A dataclass from a map of its options."""
        entries = self.entries(node, path)
        if entries is None:
            return MISSING
        values, complete = self.options(node, entries, options_of(cls), path)
        return self.construct(cls, values, node, entries, path, complete=complete)

    def entries(self, node: yaml.Node, path: str) -> dict[str, tuple[yaml.Node, yaml.Node]] | None:
        """Key → (key node, value node) of a map; nothing after a problem was noted."""
        if not isinstance(node, yaml.MappingNode):
            self.problems.add(node, path, f"expected a map of options, found {found(node)}")
            return None
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                pairs.setdefault(key.value, (key, value))
        return pairs

    def options(
        self,
        node: yaml.Node,
        entries: Mapping[str, tuple[yaml.Node, yaml.Node]],
        known: Mapping[str, tuple[dataclasses.Field[Any], Any]],
        path: str,
        *,
        ignore: Iterable[str] = (),
    ) -> tuple[dict[str, Any], bool]:
        """Option → value of what can be used in `entries`, and whether that is all of it."""
        before = len(self.problems)
        values: dict[str, Any] = {}
        skipped = set(ignore)
        for name, (key, value) in entries.items():
            if name in known:
                option, annotation = known[name]
                as_path = bool(option.metadata.get("path")) or names_path(name)
                read = self.value(value, annotation, f"{path}.{name}", is_path=as_path)
                if read is not MISSING:
                    values[name] = read
            elif name not in skipped:
                hint = near(name, [*known, *skipped]) or listed([*known, *skipped])
                self.problems.add(key, f"{path}.{name}", f"unknown option{hint}")
        for name, (option, annotation) in known.items():
            if (
                name not in entries
                and option.default is dataclasses.MISSING
                and option.default_factory is dataclasses.MISSING
            ):
                what = f"is required and missing; expected {describe(annotation)}"
                self.problems.add(node, f"{path}.{name}", what)
        return values, len(self.problems) == before

    def construct(
        self,
        cls: type[Any],
        values: Mapping[str, Any],
        node: yaml.Node,
        entries: Mapping[str, tuple[yaml.Node, yaml.Node]],
        path: str,
        *,
        complete: bool,
    ) -> Any:
        """The component itself: what its own check of the options says becomes a problem.

        Where some options could not be used (`complete` is false), the others are still tried, so
        that one run tells everything; only what is clearly about one of them is then told.
        """
        try:
            made = cls(**values)
        except Exception as error:
            text = str(error) or type(error).__name__
            named = next((name for name in _leading_words(text) if name in entries), "")
            unusable = [name for name in entries if name not in values]
            if not complete and (
                named not in values
                or any(re.search(rf"\b{re.escape(n)}\b", text) for n in unusable)
            ):
                return MISSING
            where = entries[named][1] if named else node
            tail = re.sub(rf"^[\w.]*\b{named}\b\s*[:=]?\s*", "", text) if named else text
            self.problems.add(where, f"{path}.{named}" if named else path, tail or text)
            return MISSING
        return made if complete else MISSING

    def text(self, node: yaml.Node, path: str) -> str | None:
        """A scalar with its variables replaced; nothing after a problem was noted."""
        if not isinstance(node, yaml.ScalarNode):
            return None
        missing: list[str] = []
        malformed = False

        def replace(match: re.Match[str]) -> str:
            nonlocal malformed
            if match.group() == "$${":
                return "${"
            name = match.group(1)
            if name is None:
                malformed = True
                return ""
            if name not in self.environment:
                missing.append(name)
                return ""
            value = self.environment[name]
            self.problems.hide(value, name)
            return value

        result = VARIABLE.sub(replace, str(node.value))
        for name in missing:
            self.problems.add(node, path, f"environment variable {name} is not set")
        if malformed:
            what = "`${` starts the name of a variable, as in ${NAME}; write `$${` for the text"
            self.problems.add(node, path, what)
        return None if missing or malformed else result

    def _mismatch(self, node: yaml.Node, annotation: Any, path: str, hint: str = "") -> Any:
        what = f"expected {describe(annotation)}, found {found(node)}{hint}"
        self.problems.add(node, path, what)
        return MISSING

    def _scalar(self, node: yaml.Node, annotation: Any, path: str, is_path: bool) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            if annotation is Secret:
                self.problems.add(node, path, f"expected one secret, found {found(node)}")
                return MISSING
            return self._mismatch(node, annotation, path)
        variable = VARIABLE.search(node.value) is not None
        if annotation is Secret and not re.search(r"\$\{[A-Za-z_]", node.value):
            what = "a secret does not belong in a file; name an environment variable: ${NAME}"
            self.problems.add(node, path, what)
            return MISSING
        text = self.text(node, path)
        if text is None:
            return MISSING
        plain = node.style is None or variable
        if annotation is Secret:
            return Secret(text)
        if annotation in (str, Path):
            return self._string(node, annotation, path, text, is_path)
        if annotation in (int, float):
            return self._number(node, annotation, path, text, plain)
        if annotation is bool:
            if plain and text.lower() in _WORDS:
                return _WORDS[text.lower()]
            return self._mismatch(node, bool, path, unquote(node, text.lower() in _WORDS))
        if annotation in (None, type(None)):
            if plain and text.lower() in ("", "~", "null"):
                return None
            return self._mismatch(node, annotation, path)
        self.problems.add(node, path, "this option cannot be given in a file")
        return MISSING

    def _string(
        self, node: yaml.ScalarNode, annotation: Any, path: str, text: str, is_path: bool
    ) -> Any:
        raw = str(node.value)
        if node.style is None and node.tag in TAGS and not VARIABLE.search(raw):
            hint = f'; write "{raw}" in quotes' if raw else ""
            return self._mismatch(node, annotation, path, hint)
        password = _PASSWORD.search(raw)
        if password and not VARIABLE.search(password.group(1)):
            what = "a password does not belong in a file; name a variable: scheme://user:${NAME}@…"
            self.problems.add(node, path, what)
            return MISSING
        if is_path or annotation is Path:
            if not text or "\0" in text:
                return self._mismatch(node, Path, path)
            joined = self.folder / text
            return joined if annotation is Path else str(joined)
        return text

    def _number(
        self, node: yaml.ScalarNode, annotation: Any, path: str, text: str, plain: bool
    ) -> Any:
        text = text.strip()
        whole = len(text) <= _MAX_DIGITS and _INTEGER.fullmatch(text) is not None
        if annotation is int:
            if plain and whole:
                return int(text)
            return self._mismatch(node, annotation, path, unquote(node, whole))
        try:
            number = float({".inf": "inf", "-.inf": "-inf"}.get(text.lower(), text))
        except ValueError:
            return self._mismatch(node, annotation, path)
        leading_zero = re.match(r"[-+]?0[0-9]", text) is not None
        if not plain or math.isnan(number) or leading_zero or not text.isascii():
            return self._mismatch(node, annotation, path, unquote(node, not leading_zero))
        if math.isinf(number) and "inf" not in text.lower():
            return self._mismatch(node, annotation, path, "; it is out of range")
        return number

    def _choice(self, node: yaml.Node, choices: tuple[Any, ...], path: str) -> Any:
        text = self.text(node, path) if isinstance(node, yaml.ScalarNode) else None
        if text is None:
            if not isinstance(node, yaml.ScalarNode):
                self._mismatch(node, Literal[choices], path)
            return MISSING
        for choice in choices:
            if isinstance(choice, bool):
                if _WORDS.get(text.lower()) is choice:
                    return choice
            elif str(choice) == text:
                return choice
        hint = near(text, [str(choice) for choice in choices])
        return self._mismatch(node, Literal[choices], path, hint)

    def _sequence(self, node: yaml.Node, annotation: Any, path: str, is_path: bool) -> Any:
        arguments = typing.get_args(annotation)
        fixed = typing.get_origin(annotation) is tuple and arguments[-1:] != (Ellipsis,)
        if not isinstance(node, yaml.SequenceNode):
            hint = "; write it as [ … ]" if isinstance(node, yaml.ScalarNode) else ""
            return self._mismatch(node, annotation, path, hint)
        if fixed and len(arguments) != len(node.value):
            hint = f" of {len(node.value)} values"
            return self._mismatch(node, annotation, path, hint)
        inner = arguments if fixed else arguments[:1] * len(node.value)
        values = [
            self.value(item, kind, f"{path}[{i}]", is_path=is_path)
            for i, (item, kind) in enumerate(zip(node.value, inner, strict=True))
        ]
        if any(value is MISSING for value in values):
            return MISSING
        origin = typing.get_origin(annotation)
        return frozenset(values) if origin in (frozenset, set) else tuple(values)

    def _mapping(self, node: yaml.Node, annotation: Any, path: str) -> Any:
        pairs = self.entries(node, path)
        if pairs is None:
            return MISSING
        kind = (*typing.get_args(annotation), Any, Any)[1]
        values = {
            name: self.value(value, kind, f"{path}.{name}") for name, (_, value) in pairs.items()
        }
        return MISSING if any(value is MISSING for value in values.values()) else values

    def _first_of(self, node: yaml.Node, choices: tuple[Any, ...], path: str, is_path: bool) -> Any:
        # Narrow kinds first: a plain 3 is a whole number before it is a number or a text.
        order = {bool: 0, type(None): 0, int: 1, float: 2, Secret: 4, str: 5, Path: 5}
        tried = Converter(self.problems.scratch(), self.environment, self.folder)
        for choice in sorted(choices, key=lambda c: order.get(c, 3)):
            value = tried.value(node, choice, path, is_path=is_path)
            if value is not MISSING:
                return value
        if isinstance(node, yaml.ScalarNode) and self.text(node, path) is None:
            return MISSING
        fitting = [c for c in choices if _fits(node, c)]
        if len(fitting) == 1:
            return self.value(node, fitting[0], path, is_path=is_path)
        return self._mismatch(node, Union[choices], path)  # noqa: UP007  # built at run time

    def _anything(self, node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, Mapping[str, Any], path)
        if isinstance(node, yaml.SequenceNode):
            return self._sequence(node, tuple[Any, ...], path, is_path=False)
        return self._first_of(node, (bool, type(None), int, float, str), path, is_path=False)


def _fits(node: yaml.Node, annotation: Any) -> bool:
    """Whether a node has the outline that the annotation asks for."""
    origin = typing.get_origin(annotation)
    if isinstance(node, yaml.SequenceNode):
        return origin in (tuple, list, Sequence, frozenset, set)
    if isinstance(node, yaml.MappingNode):
        return origin in (dict, Mapping) or dataclasses.is_dataclass(annotation)
    return origin in (None, Literal) and not dataclasses.is_dataclass(annotation)


def _leading_words(text: str) -> list[str]:
    """The words of a message's subject: ``budget.false_alarms: …`` → false_alarms, budget."""
    subject = re.match(r"[\w.]+", text)
    return subject.group().split(".")[::-1] if subject else []
