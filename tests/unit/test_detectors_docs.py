"""docs/detectors.md tells every detector, and every option with its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from oodmon.registry import detectors

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "detectors.md").read_text(encoding="utf-8")
OWN = [name for name in detectors.names() if detectors.get(name).__module__.startswith("oodmon.")]


def shown(default: object) -> str:
    return f'"{default}"' if isinstance(default, str) else str(default)


def test_the_options_table_holds_every_option_with_its_default() -> None:
    told: dict[tuple[str, str], str] = {}
    name = ""
    table = PAGE.split("## Options")[1].split("\n## ")[0]
    for line in table.splitlines()[4:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4:
            name = cells[0].strip("`") or name
            told[name, cells[1].strip("`")] = cells[2]
    known = {
        (name, field.name): shown(field.default)
        for name in OWN
        for field in dataclasses.fields(detectors.get(name))  # type: ignore[arg-type]
    }
    assert told == known


def test_every_detector_is_in_the_overview() -> None:
    overview = PAGE.split("## Options")[0]
    for name in OWN:
        assert f"| `{name}` |" in overview
