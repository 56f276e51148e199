"""The catalogue as Markdown: a table of all components, and a section for each of them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["entries", "overview"]

Row = Mapping[str, Any]

_COLUMNS: Final = {
    "name": "`type`",
    "summary": "in one sentence",
    "reads": "reads",
    "cost": "cost",
    "module": "file",
    "paper": "paper",
}
_NEEDED: Final = ("name", "summary", "module")

_LABELLED: Final = re.compile(r"(Reads|Options|Learns|Score|Reference|Statistic|Threshold)\s\s")
"""A docstring's line that belongs to its block: a word, then spaces up to a column."""


def overview(rows: Iterable[Row]) -> str:
    """One table; columns that no component fills are left out."""
    shown = [row for row in rows if "broken" not in row]
    columns = [c for c in _COLUMNS if c in _NEEDED or any(row.get(c) for row in shown)]
    lines = [
        _line(_COLUMNS[column] for column in columns),
        _line("---" for _ in columns),
    ]
    lines += [_line(_cell(row, column) for column in columns) for row in shown]
    return "\n".join(lines) + "\n"


def entries(rows: Iterable[Row]) -> str:
    """Per component: what its docstring says, its options with their defaults, its paper."""
    return "\n".join(_entry(row) for row in rows if "broken" not in row)


def _entry(row: Row) -> str:
    parts = [f"### `{row['name']}`", *_prose(row["doc"])]
    if row["options"]:
        table = [_line(("option", "takes", "default")), _line(["---"] * 3)]
        for option in row["options"]:
            default = option["default"]
            shown = "required" if default is None else f"`{default}`"
            table.append(_line((f"`{option['name']}`", _escaped(option["takes"]), shown)))
        parts.append("\n".join(table))
    notes = [row["stability"], f"[`{_file(row)}`](../{_file(row)})"]
    notes += [f"cost {row['cost']}"] if row.get("cost") else []
    notes += [_cited(row)] if row.get("paper") else []
    parts.append(" · ".join(note for note in notes if note))
    return "\n\n".join(parts) + "\n"


def _prose(doc: str) -> list[str]:
    """Paragraphs; the aligned block of Reads, Learns, Score and Reference stays as it is set."""
    found = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        if _LABELLED.match(paragraph):
            found.append(f"```text\n{paragraph}\n```")
        else:
            # a line of reST's literal marks would print them
            found.append(paragraph.replace("``", "`"))
    return found


def _cited(row: Row) -> str:
    title = row["title"]
    linked = f"[{title}]({row['url']})" if row["url"] else title
    return f"{linked}, {row['paper']}"


def _file(row: Row) -> str:
    module = str(row["module"])
    package = hasattr(sys.modules.get(module), "__path__")
    return module.replace(".", "/") + ("/__init__.py" if package else ".py")


def _cell(row: Row, column: str) -> str:
    if column == "name":
        return f"[`{row['name']}`](#{row['name']})"
    if column == "module":
        return f"`{_file(row).removesuffix('/__init__.py').rpartition('/')[2]}`"
    if column == "paper" and row.get("paper"):
        return _escaped(_short(row["paper"]))
    return _escaped(str(row.get(column) or ""))


def _short(paper: str) -> str:
    """At most two authors, then venue and year."""
    authors, _, venue = paper.rpartition(", ")
    first, *others = re.split(r", | and ", authors)
    return f"{first} et al., {venue}" if len(others) > 1 else paper


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
