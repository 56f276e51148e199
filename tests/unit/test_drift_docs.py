"""The options table of docs/drift.md is the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from oodmon.registry import drift

PAGE = Path(__file__).resolve().parents[2] / "docs" / "drift.md"


def test_the_options_table_holds_every_option_with_its_default() -> None:
    told: dict[tuple[str, str], str] = {}
    test = ""
    table = PAGE.read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    for line in table.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"[\d.]+", cells[2]):
            test = cells[0] or test
            told[test, cells[1]] = cells[2]
    known = {
        (name, field.name): str(field.default)
        for name in drift.names()
        if name != "budget"
        for field in dataclasses.fields(drift.get(name))  # type: ignore[arg-type]
        if field.name != "false_alarms"
    }
    assert told == known


def test_every_test_is_in_the_overview() -> None:
    overview = PAGE.read_text(encoding="utf-8").split("## Options")[0]
    for name in drift.names():
        assert f"| `{name}` |" in overview
