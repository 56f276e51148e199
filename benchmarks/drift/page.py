"""Puts what the drift benchmark found into docs/alarms.md: tables and figures, by one command.

python -m benchmarks.drift.page [FOLDER]

FOLDER is where `python -m benchmarks.drift` wrote `drift.csv` and `alarms.json`; they are kept in
docs/measured, and without a folder the page is made of what is there.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from benchmarks.drift import peers, table
from benchmarks.drift.ours import OURS
from benchmarks.drift.table import Row

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = ROOT / "docs" / "measured" / "drift.json.gz"
PAGE: Final = ROOT / "docs" / "alarms.md"
IMAGES: Final = ROOT / "docs" / "images"
BEGIN: Final = "<!-- made by python -m benchmarks.drift.page -->"
END: Final = "<!-- end of what is made -->"


def rows_of(path: Path) -> list[Row]:
    """Back from `table.save`."""
    kinds = {field.name: str(field.type) for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{n: _value(kinds[n], v) for n, v in line.items()})
            for line in csv.DictReader(file)
        ]


def _value(kind: str, text: str) -> Any:
    if kind == "bool":
        return text == "True"
    return {"float": float, "int": int}.get(kind, str)(text)


def keep(rows: Sequence[Row], alarms: Mapping[str, Any]) -> None:
    """One small file: the same bytes for the same figures."""
    told = {
        "fields": [field.name for field in fields(Row)],
        "rows": [[_short(getattr(row, field.name)) for field in fields(Row)] for row in rows],
        "alarms": alarms,
    }
    KEPT.write_bytes(gzip.compress(json.dumps(told, separators=(",", ":")).encode(), mtime=0))


def _short(value: object) -> object:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def kept() -> tuple[list[Row], dict[str, dict[str, list[int]]]]:
    """Back from `keep`."""
    told = json.loads(gzip.decompress(KEPT.read_bytes()))
    rows = []
    for line in told["rows"]:
        values: Iterable[Any] = (math.nan if value is None else value for value in line)
        rows.append(Row(**dict(zip(told["fields"], values, strict=True))))
    return rows, told["alarms"]


def tables(rows: Sequence[Row], alarms: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """Every stream, and within it every kind of change."""
    parts = []
    every = [*OURS, *peers.MAIN, *peers.BENCH, *peers.ALIBI]
    for stream in dict.fromkeys(row.stream for row in rows):
        block = [row for row in rows if row.stream == stream]
        # "5 % kmnist" and "100 % kmnist" are one table, all changes of a made stream another.
        kinds: dict[str, list[str]] = {}
        for change in dict.fromkeys(row.change for row in block):
            _, share, kind = change.partition("% ")
            kinds.setdefault(kind if share and kind != "novel" else "", []).append(change)
        for place, (kind, changes) in enumerate(kinds.items()):
            title = f"{stream}{f', {kind}' if kind else ''}"
            parts.append(f"**{title}**\n\n{_table(block, changes, whole=not place)}")
        run = {row.contender for row in block}
        missing = [name for name in every if name not in run]
        if missing:
            parts.append(f"Not run on this stream: {'; '.join(missing)}.")
        parts.append(f"![{stream}](images/drift-{table.slug(stream)}.png)")
    if alarms:
        parts.append(f"**Streams that drift by themselves**\n\n{_drifting(alarms)}")
        parts.append("![alarms over time](images/drift-real-streams.png)")
    return "\n\n".join(parts)


def _table(block: Sequence[Row], changes: Sequence[str], *, whole: bool) -> str:
    head = ["test", "run length", *changes, "repetitions"]
    head += ["values/s", "state, bytes"] if whole else []
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for name in dict.fromkeys(row.contender for row in block):
        mine = {row.change: row for row in block if row.contender == name}
        first = next(iter(mine.values()))
        length = f"{'> ' if first.at_least else ''}{first.run_length:,.0f}"
        length += " (**broken**)" if first.kept == "NO" else ""
        done = [mine[change].repetitions for change in changes if change in mine]
        often = f"{min(done)} to {max(done)}" if len(set(done)) > 1 else f"{(done or [0])[0]}"
        cells = [_cell(mine[change]) if change in mine else "not run" for change in changes]
        line = [name, length, *cells, often]
        if whole:
            line += [f"{first.values_per_second:,.0f}", f"{first.state_bytes or '–'}"]
        lines.append(_line(line))
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if not row.found:
        return "missed"
    text = f"{row.delay:,.0f}"
    if math.isfinite(row.ratio):
        text += f" ({row.ratio:.1f})"
    if math.isfinite(row.times):
        text += f" ×{row.times:.1f}"
    return f"{text}, {row.missed} of {row.repetitions} missed" if row.missed else text


def _drifting(alarms: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    streams = sorted({stream for found in alarms.values() for stream in found})
    lines = [_line(["test", *(f"{stream}: alarms" for stream in streams)])]
    lines.append(_line(["---", *["---:"] * len(streams)]))
    for name, found in alarms.items():
        counts = [f"{len(found[s])}" if s in found else "too slow" for s in streams]
        lines.append(_line([name, *counts]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Keep, draw, write."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        keep(rows_of(folder / "drift.csv"), json.loads((folder / "alarms.json").read_text()))
    rows, alarms = kept()
    drawn = [*table.plot(rows, IMAGES), *table.plot_drifting(alarms, IMAGES)]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has no place for it: {BEGIN} … {END}")
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(rows, alarms)}\n\n{END}{after}", encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(rows)} rows, {len(drawn)} figures")


if __name__ == "__main__":
    main()
