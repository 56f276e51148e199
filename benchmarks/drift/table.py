"""Cells → one table: printed, as CSV, and as plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.drift.best import best
from benchmarks.drift.streams import Pools, Stream
from benchmarks.drift.worker import Cell, Plan

__all__ = ["Row", "plot", "plot_drifting", "rows", "save", "show", "show_drifting", "slug"]

BUDGET: Final = "oodmon budget"
MARKERS: Final = {
    "oodmon": "*",
    "river": "o",
    "frouros": "s",
    "menelaus": "D",
    "nonconform": "v",
    "alibi-detect": "P",
}
"""By the first word of the name; all others are crosses."""


@dataclass(frozen=True)
class Row:
    """One contender on one stream under one change.

    Attributes:
        run_length: values between false alarms, time at risk over alarms.
        at_least: whether `run_length` is only a lower bound: it never alarmed.
        promise: what its settings state, 0 where they state nothing.
        kept: "yes", "no" (measured below the promise by more than two standard errors), "" without
            a promise.
        delay, error: mean over the changes that were found, and its standard error.
        missed: repetitions in which the change was not found.
        best: delay of the CUSUM that knows the change, at the same run length; NaN where none is
            known.
        ratio: delay / best; NaN where nothing was found.
        waited: mean over all repetitions, those in which it was missed counted as all that came
            after the change: less than the truth.
        budget: that of our budget at the same run length, between those of its promises; NaN where
            it was not run.
        times: waited / budget: above 1 the budget is sooner at equal run length.
    """

    stream: str
    change: str
    contender: str
    run_length: float
    at_least: bool
    promise: float
    kept: str
    delay: float
    error: float
    found: int
    missed: int
    false_before: int
    best: float
    ratio: float
    values_per_second: float
    state_bytes: int
    repetitions: int
    waited: float
    budget: float = math.nan
    times: float = math.nan


def rows(cells: Iterable[Cell], streams: Sequence[Stream], pools: Pools) -> list[Row]:
    """Join each change with the run length of the same contender on the same stream."""
    cells = list(cells)
    quiet = {(cell.contender, cell.stream): cell for cell in cells if not cell.change}
    yardsticks = {
        (stream.name, change.name): best(stream, change, pools)
        for stream in streams
        for change in stream.changes
    }
    made = []
    for cell in cells:
        at_rest = quiet.get((cell.contender, cell.stream))
        if not cell.change or at_rest is None:
            continue
        length = at_rest.values / max(at_rest.alarms, 1)
        yardstick = yardsticks.get((cell.stream, cell.change))
        least = yardstick.delay(length) if yardstick is not None else math.nan
        mean = cell.values / cell.alarms if cell.alarms else math.nan
        spread = max(cell.squares / cell.alarms - mean**2, 0.0) if cell.alarms else math.nan
        made.append(
            Row(
                cell.stream,
                cell.change,
                cell.contender,
                length,
                at_rest.alarms == 0,
                cell.promise,
                _kept(at_rest, cell.promise),
                mean,
                math.sqrt(spread / max(cell.alarms - 1, 1)),
                cell.alarms,
                cell.repetitions - cell.alarms,
                cell.false,
                least,
                mean / least,
                at_rest.rate,
                at_rest.state_bytes,
                cell.repetitions,
                (cell.values + Plan.after * (cell.repetitions - cell.alarms)) / cell.repetitions,
            )
        )
    return _beside(made)


def _beside(made: Sequence[Row]) -> list[Row]:
    """With the budget at equal run length, by its own promises: the logarithm's line between them.

    A budget that never alarmed is taken to keep no more than its promise.
    """
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in made:
        if row.contender == f"{BUDGET} {row.promise:,.0f}":
            length = max(row.run_length, row.promise) if row.at_least else row.run_length
            points = lines.setdefault((row.stream, row.change), [])
            points.append((math.log(length), row.waited))
    out = []
    for row in made:
        points = sorted(lines.get((row.stream, row.change), ()))
        if row.contender.startswith(BUDGET) or not points:
            out.append(row)
            continue
        at, waited = (np.array(column) for column in zip(*points, strict=True))
        budget = float(np.interp(math.log(row.run_length), at, waited))
        out.append(replace(row, budget=budget, times=row.waited / budget))
    return out


def _kept(quiet: Cell, promise: float) -> str:
    if not promise:
        return ""
    allowed = quiet.values / promise
    return "yes" if quiet.alarms <= allowed + 2.0 * math.sqrt(max(allowed, 1.0)) else "NO"


def show(table: Sequence[Row]) -> None:
    """One block per stream, one line per contender."""
    for stream in dict.fromkeys(row.stream for row in table):
        block = [row for row in table if row.stream == stream]
        changes = list(dict.fromkeys(row.change for row in block))
        width = max(len(row.contender) for row in block)
        print(
            f"\n== {stream}: mean delay ± standard error (missed of repetitions), ratio to the "
            "best possible at this run length; x: times the budget's at this run length"
        )
        head = "".join(f"{change:>30}" for change in changes)
        print(
            f"{'':{width}}{'run length':>12} {'promise':>10} {'kept':>4}{head}"
            f"{'values/s':>12}{'state B':>9}"
        )
        for name in dict.fromkeys(row.contender for row in block):
            mine = {row.change: row for row in block if row.contender == name}
            first = next(iter(mine.values()))
            text = f"{name:{width}}{'>' if first.at_least else '':>2}{first.run_length:>10,.0f} "
            text += (
                f"{first.promise:>10,.0f} {first.kept:>4}" if first.promise else f"{'-':>10}     "
            )
            text += "".join(f"{_delay(mine[c]) if c in mine else '':>30}" for c in changes)
            print(f"{text}{first.values_per_second:>12,.0f}{first.state_bytes or '-':>9}")


def _delay(row: Row) -> str:
    if not row.found:
        return f"missed {row.missed}"
    missed = f" ({row.missed}/{row.repetitions})" if row.missed else ""
    ratio = f"{row.ratio:5.1f}" if math.isfinite(row.ratio) else "    -"
    times = f" x{row.times:.1f}" if math.isfinite(row.times) else ""
    return f"{row.delay:,.0f}±{row.error:,.0f}{missed} {ratio}{times}"


def save(table: Sequence[Row], path: Path) -> None:
    """The whole table as CSV."""
    names = list(Row.__dataclass_fields__)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in table:
            values: Mapping[str, object] = {name: getattr(row, name) for name in names}
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values.values()])


def plot(table: Sequence[Row], folder: Path) -> list[Path]:
    """One figure per stream: delay against run length, with the best possible as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    for stream in dict.fromkeys(row.stream for row in table):
        block = [row for row in table if row.stream == stream]
        changes = list(dict.fromkeys(row.change for row in block))
        columns = min(len(changes), 4)
        lines = -(-len(changes) // columns)
        names = list(dict.fromkeys(row.contender for row in block))
        legend = 0.4 + 0.16 * -(-(len(names) + 1) // 4)
        height = 3.4 * lines + 0.4 + legend
        figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, height), squeeze=False)
        colors = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
        for place, change in enumerate(changes):
            axis = axes[place // columns][place % columns]
            mine = [row for row in block if row.change == change]
            lengths = sorted({row.run_length for row in mine if math.isfinite(row.best)})
            least = {row.run_length: row.best for row in mine}
            if lengths:
                best_delays = [least[at] for at in lengths]
                axis.plot(lengths, best_delays, "k--", lw=1, label="best possible")
            for row in mine:
                if row.found <= row.missed:
                    continue  # a mean over a minority of the runs would flatter it
                library = row.contender.split()[0]
                axis.errorbar(
                    row.run_length,
                    row.delay,
                    row.error,
                    fmt=MARKERS.get(library, "X"),
                    ms=11 if library == "oodmon" else 5,
                    color=colors[row.contender],
                    label=row.contender,
                )
            scale = "log" if axis.has_data() else "linear"
            axis.set(xscale=scale, yscale=scale, title=change)
            axis.set(xlabel="values between false alarms", ylabel="values to the alarm")
            axis.grid(alpha=0.3)
        handles: dict[str, Any] = {}
        for axis in axes.flat[len(changes) :]:
            axis.set_visible(False)
        for axis in axes.flat:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.suptitle(f"{stream} (no point: missed in half of the runs or more)")
        figure.legend(handles=list(handles.values()), loc="lower center", ncols=4, fontsize=7)
        figure.tight_layout(rect=(0, legend / height, 1, 1))
        path = folder / f"drift-{slug(stream)}.png"
        figure.savefig(path, dpi=90)
        plt.close(figure)
        made.append(path)
    return made


def show_drifting(alarms: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Alarms on streams that drift by themselves; nobody knows the change points."""
    for stream in sorted({stream for found in alarms.values() for stream in found}):
        print(f"\n== {stream}: alarms over time, starting anew after each (no known change point)")
        for name, found in alarms.items():
            if stream in found:
                at = found[stream]
                first = ", ".join(f"{place:,}" for place in at[:6]) + (", …" if len(at) > 6 else "")
                print(f"{name:40}{len(at):>6} alarms: {first}")


def plot_drifting(alarms: Mapping[str, Mapping[str, Sequence[int]]], folder: Path) -> list[Path]:
    """One line per contender, one mark per alarm."""
    streams = sorted({stream for found in alarms.values() for stream in found})
    if not streams:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name, found in alarms.items() if found][::-1]
    height = 0.22 * len(names) + 1.0
    figure, axes = plt.subplots(
        1, len(streams), figsize=(7.0 * len(streams), height), sharey=True, squeeze=False
    )
    for axis, stream in zip(axes[0], streams, strict=True):
        axis.eventplot([alarms[name].get(stream, ()) for name in names], linelengths=0.7)
        axis.set(title=f"{stream}: alarms", xlabel="value")
        axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.tight_layout()
    path = folder / "drift-real-streams.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return [path]


def slug(name: str) -> str:
    """As a part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")
