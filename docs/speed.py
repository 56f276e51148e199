"""Tables of how fast the detectors are, from docs/measured/detectors.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["alone", "goals", "means", "methods"]

Row = Mapping[str, Any]

_FILE = Path(__file__).resolve().parent / "measured" / "detectors.json"


def means() -> str:
    """Geometric mean of peer's time / ours per batch size."""
    lines = [
        _line(["batch size", "methods", "lines", "geometric mean", "least", "lines below 1"]),
        _line(["---"] * 6),
    ]
    lines += [
        _line(
            [
                row["batch"],
                row["methods"],
                row["lines"],
                _short(row["geometric_mean"]),
                f"{row['minimum']:.2f}",
                row["below"],
            ]
        )
        for row in _read()["batches"]
    ]
    return "\n".join(lines) + "\n"


def methods() -> str:
    """Per method and batch size: peer's time / ours, and its range over the settings."""
    rows: list[Row] = [row for row in _read()["lines"] if row["ratio"] is not None]
    sizes = sorted({row["rows"] for row in rows})
    lines = [_line(["", *(f"{size}" for size in sizes)]), _line(["---"] * (len(sizes) + 1))]
    for method in sorted({row["method"] for row in rows}):
        cells = []
        for size in sizes:
            of = [row for row in rows if row["method"] == method and row["rows"] == size]
            cells.append(_spread(of))
        lines.append(_line([f"`{method}`", *cells]))
    return "\n".join(lines) + "\n"


def goals() -> str:
    """What was aimed at, and what was found."""
    lines = [_line(["", "goal", "found", ""]), _line(["---"] * 4)]
    lines += [
        _line(
            [
                row["what"],
                row["goal"],
                f"{_short(row['found'])}x",
                "reached" if row["reached"] else "**not reached**",
            ]
        )
        for row in _read()["goals"]
    ]
    below = [f"{r['method']} {r['what']} ({r['ratio']:.2f})" for r in _read()["below"]]
    strays = [f"{r['method']} {r['what']}" for r in _read()["ranks"]]
    lines += ["", f"Slower than the peer's: {'; '.join(below) or 'none'}.", ""]
    lines += [
        f"Of the same formula, and ranks agree by less than 0.9999: {', '.join(strays) or 'none'}."
    ]
    return "\n".join(lines) + "\n"


def alone() -> str:
    """Samples a second of what the peer has not, in the largest batch that was measured."""
    rows: list[Row] = [row for row in _read()["lines"] if row["ratio"] is None]
    known = {row["method"] for row in _read()["lines"] if row["ratio"] is not None}
    lines = [_line(["", "setting", "samples a second"]), _line(["---"] * 3)]
    for method in sorted({row["method"] for row in rows} - known):
        of = [row for row in rows if row["method"] == method]
        most = max(row["rows"] for row in of)
        lines += [
            _line([f"`{method}`", row["what"], f"{row['rows'] / row['seconds']:,.0f}"])
            for row in of
            if row["rows"] == most
        ]
    return "\n".join(lines) + "\n"


def _spread(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    ratios = [row["ratio"] for row in rows]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    if len(rows) == 1:
        return _short(mean)
    return f"{_short(mean)} ({_short(min(ratios))} … {_short(max(ratios))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20.0 else f"{value:.1f}" if value >= 5.0 else f"{value:.2f}"


def _read() -> Any:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
