"""Tables of what was measured, from the JSON files in docs/measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs import speed

__all__ = ["PLACES", "experiments", "exposure", "published"]

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


def experiments() -> str:
    """Every acceptance experiment: its figures per seed, how far they scatter, and the bound."""
    rows: list[Row] = _read("acceptance")["figures"]
    parts = []
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        of = [row for row in rows if row["experiment"] == experiment]
        tests = dict.fromkeys(row["test"].partition("::")[0] for row in of)
        seeds = sorted({row["seed"] for row in of})
        lines = [_line(["", *(f"seed {seed}" for seed in seeds), "±3 s.d.", "bound", "expected"])]
        lines.append(_line(["---"] * (len(seeds) + 4)))
        for what in dict.fromkeys(row["what"] for row in of):
            found = {row["seed"]: row for row in of if row["what"] == what}
            one = next(iter(found.values()))
            values = [row["value"] for row in found.values()]
            cells = [f"{found[seed]['value']:.3f}" if seed in found else "" for seed in seeds]
            sign = "≤" if one["least"] is None else "≥"
            bound = one["most"] if one["least"] is None else one["least"]
            expected = "" if one["expected"] == bound else f"{sign} {one['expected']:g}"
            cells += [_reach(values, lower=sign == "≥"), f"{sign} {bound:g}", expected]
            lines.append(_line([what, *cells]))
        named = ", ".join(f"`{test}`" for test in tests)
        parts.append(f"### {experiment}\n\n{named}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


PLACES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "detectors.md": {
        "{{published}}": published,
        "{{exposure}}": exposure,
        "{{speed_means}}": speed.means,
        "{{speed_methods}}": speed.methods,
        "{{speed_goals}}": speed.goals,
        "{{speed_alone}}": speed.alone,
    },
    "acceptance.md": {"{{experiments}}": experiments},
}
"""Page → place in its template → what stands there."""


def _read(name: str) -> Any:
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _reach(values: Sequence[float], lower: bool) -> str:
    """Mean less, or plus, three standard deviations."""
    if len(values) < 2:
        return ""
    away = 3.0 * statistics.stdev(values)
    return f"{statistics.fmean(values) + (-away if lower else away):.3f}"


def _cell(figures: Row) -> str:
    return f"{figures['auroc']:.3f} / {figures['fpr95_ood']:.2f}"


def _named(text: str) -> str:
    name, comma, rest = text.partition(",")
    return f"`{name}`{comma}{rest}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
