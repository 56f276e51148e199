"""YAML text → a node graph that still knows where everything stands, and the problems found so far.

The text is never turned into Python objects by the YAML library: nodes keep line and column, so
that each problem can be told at its place, and values are made by `convert`, which knows what the
option expects. Size, depth, nodes and aliases are limited before anything is built.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import yaml

__all__ = [
    "MAX_ALIASES",
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_NODES",
    "Place",
    "Problems",
    "compose",
    "place_of",
]

MAX_BYTES: Final = 1 << 18
MAX_DEPTH: Final = 24
MAX_NODES: Final = 5_000
MAX_ALIASES: Final = 64

_SHORTEST_SECRET: Final = 4
"""A shorter value of a variable may be repeated: a port, a level, a yes."""
_TELLING: Final = 8
"""So many characters from the beginning of a value are not shown either."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Line and column, both from 1."""

    line: int = 1
    column: int = 1


@dataclass(slots=True)
class Problems:
    """Everything that is wrong with one file.

    Args:
        file: the name that the user gave, as it stands at the start of each line.
    """

    file: str
    _found: dict[tuple[Place, str, str], None] = field(default_factory=dict)  # in order, each once
    _hidden: dict[str, str] = field(default_factory=dict)  # value → variable

    def add(self, place: Place | yaml.Node, path: str, what: str) -> None:
        """Note one problem; `path` is the dotted place in the config, "" for the whole file."""
        where = place if isinstance(place, Place) else place_of(place)
        self._found[where, path, what] = None

    def scratch(self) -> Problems:
        """An empty collection for the same file: to try something without telling."""
        return Problems(self.file, _hidden=self._hidden)

    def hide(self, value: str, variable: str) -> None:
        """What came from the environment may be a secret in a wrong place: its name is told."""
        if len(value) >= _SHORTEST_SECRET:
            self._hidden[value] = variable

    def __len__(self) -> int:
        return len(self._found)

    def lines(self) -> tuple[str, ...]:
        """``file:line:column: path: what`` each, in file order, safe to print anywhere."""
        ordered = sorted(self._found, key=lambda found: found[0])
        return tuple(
            _printable(
                f"{self.file}:{place.line}:{place.column}: {path}: {self._safe(what)}"
                if path
                else f"{self.file}:{place.line}:{place.column}: {self._safe(what)}"
            )
            for place, path, what in ordered
        )

    def _safe(self, what: str) -> str:
        """Without values of variables, also where only their beginning or a quoted form stands."""
        for value in sorted(self._hidden, key=len, reverse=True):
            for form in {value, repr(value)[1:-1]}:
                begin = form[:_TELLING]
                at = what.find(begin)
                while at >= 0:
                    same = itertools.takewhile(
                        lambda pair: pair[0] == pair[1], zip(what[at:], form, strict=False)
                    )
                    end = at + sum(1 for _ in same)
                    told = f"${{{self._hidden[value]}}}"
                    what = what[:at] + told + what[end:]
                    at = what.find(begin, at + len(told))
        return what


def place_of(node: yaml.Node) -> Place:
    """Where a node starts."""
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def compose(data: bytes, problems: Problems) -> yaml.Node | None:
    """The root node of the only document, or nothing where `problems` says why there is none."""
    if len(data) > MAX_BYTES:
        problems.add(Place(), "", f"the file holds {len(data)} bytes; the limit is {MAX_BYTES}")
        return None
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        place = _place_in(data[: error.start].decode(errors="replace"))
        problems.add(place, "", f"byte 0x{data[error.start]:02x} is not UTF-8")
        return None
    try:
        if not _within_limits(text, problems):
            return None
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place() if mark is None else Place(mark.line + 1, mark.column + 1)
        problems.add(place, "", _sentence(error, text, place))
        return None
    except yaml.reader.ReaderError as error:
        place = _place_in(text[: error.position])
        problems.add(place, "", f"the character {_code(error.character)} is not allowed in YAML")
        return None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # The YAML library lets the errors of chr() and int() through for odd escapes.
        problems.add(Place(), "", f"not valid YAML: {error}")
        return None
    if root is None:
        problems.add(Place(), "", "the file is empty; `oodmon init` writes a first one")
        return None
    for node, path in _nodes(root):
        _check_keys(node, path, problems)
    return root if _unfolds(root, problems) else None


def _within_limits(text: str, problems: Problems) -> bool:
    """Read the events one by one (no recursion, nothing built) and stop at the first limit."""
    depth = nodes = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        for count, limit, what in (
            (depth, MAX_DEPTH, "nested levels"),
            (nodes, MAX_NODES, "values"),
            (aliases, MAX_ALIASES, "aliases"),
        ):
            if count > limit:
                mark = event.start_mark
                place = Place() if mark is None else Place(mark.line + 1, mark.column + 1)
                problems.add(place, "", f"more than {limit} {what}")
                return False
    return True


def _nodes(root: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    """Every node once, with its dotted path; aliases may make the graph circular."""
    seen: set[int] = set()
    waiting = [(root, "")]
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node, path
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                waiting += [(key, path), (value, _join(path, name))]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{path}[{i}]") for i, item in enumerate(node.value)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unfolds(root: yaml.Node, problems: Problems) -> bool:
    """Whether the graph, written out without aliases, is finite and within the limits."""
    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        children = _children(node)
        if done:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            depths[id(node)] = 1 + max((depths[id(child)] for child in children), default=0)
            if sizes[id(node)] > MAX_NODES or depths[id(node)] > MAX_DEPTH + 1:
                problems.add(node, "", "its aliases unfold to more than the limits allow")
                return False
        elif id(node) in open_nodes:
            problems.add(node, "", "an alias stands for something that holds the alias itself")
            return False
        elif id(node) not in sizes:
            open_nodes.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child in children]
    return True


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.Node, path: str, problems: Problems) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.add(key, path, "a key must be a single word")
        elif key.tag == "tag:yaml.org,2002:merge":
            what = "merge keys (`<<`) are not read; name the options themselves"
            problems.add(key, path, what)
        elif key.value in first:
            line = place_of(first[key.value]).line
            what = f"stands here twice; the first is on line {line}"
            problems.add(key, _join(path, key.value), what)
        else:
            first[key.value] = key


def _sentence(error: yaml.MarkedYAMLError, text: str, place: Place) -> str:
    what = ": ".join(part for part in (error.context, error.problem) if part)
    lines = text.splitlines()
    line = lines[place.line - 1] if place.line <= len(lines) else ""
    hint = "; put `${NAME}` in quotes inside `{…}` and `[…]`" if _unquoted_variable(line) else ""
    return f"not valid YAML: {what}{hint}"


def _unquoted_variable(line: str) -> bool:
    return "${" in line and ('"' not in line and "'" not in line)


def _place_in(before: str) -> Place:
    """The place right after this text."""
    return Place(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def _code(character: object) -> str:
    return f"U+{character:04X}" if isinstance(character, int) else repr(character)


def _printable(line: str) -> str:
    """One line that any terminal takes: control characters and lone surrogates are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in line
    )
