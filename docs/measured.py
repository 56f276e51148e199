"""Tables of what was measured, from the JSON files in docs/measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["PLACES", "exposure", "published"]

Row = Mapping[str, Any]

_FOLDER = Path(__file__).resolve().parent / "measured"


def published() -> str:
    """AUROC and FPR95 of every detector on the published networks, best on average first."""
    rows: list[Row] = _read("published_weights")["lines"]
    parts = []
    for network in dict.fromkeys(row["network"] for row in rows):
        of = [row for row in rows if row["network"] == network]
        sets = list(dict.fromkeys(row["data"] for row in of))
        found: dict[str, dict[str, Row]] = {}
        for row in of:
            found.setdefault(row["detector"], {})[row["data"]] = row
        lines = [_line([f"{network}", *sets, "mean"]), _line(["---"] * (len(sets) + 2))]
        means = {
            name: sum(cell["ours"]["auroc"] for cell in cells.values()) / len(cells)
            for name, cells in found.items()
        }
        for name in sorted(means, key=lambda name: -means[name]):
            cells = [_cell(found[name][data]["ours"]) for data in sets]
            lines.append(_line([_named(name), *cells, f"{means[name]:.3f}"]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def exposure() -> str:
    """AUROC of msp before and after fine-tuning with outliers."""
    rows: list[Row] = _read("published_weights")["exposure"]
    lines = [_line(["network", "against", "before", "after"]), _line(["---"] * 4)]
    lines += [
        _line([row["network"], row["data"], f"{row['before']:.3f}", f"{row['after']:.3f}"])
        for row in rows
    ]
    return "\n".join(lines) + "\n"


PLACES: Mapping[str, Callable[[], str]] = {
    "{{published}}": published,
    "{{exposure}}": exposure,
}
"""Place in a template → what stands there."""


def _read(name: str) -> Any:
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _cell(figures: Row) -> str:
    return f"{figures['auroc']:.3f} / {figures['fpr95_ood']:.2f}"


def _named(text: str) -> str:
    name, comma, rest = text.partition(",")
    return f"`{name}`{comma}{rest}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
