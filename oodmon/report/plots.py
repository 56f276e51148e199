"""The report's figures as SVG that takes its colours from the page, in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, Final

import matplotlib.dates
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from oodmon.calibration import covered
from oodmon.records import BIN_EDGES
from oodmon.report.canvas import ALARM, MUTED, SERIES, plain, svg
from oodmon.report.gather import Line, Timeline

__all__ = ["classes", "evidence", "heat", "shares", "tails"]

LEVEL: Final = 0.05
_LINES: Final = 4
_CLASSES: Final = 24

_DATES: Final[Any] = matplotlib.dates  # untyped in matplotlib

_GAP: Final = 3.0
"""Windows that lie further apart than so many times the usual have a gap between them."""
_LEAST_SPACINGS: Final = 4

Spans = Sequence[tuple[int, int]]
"""When alarms fired: (start, end) in ns UTC."""


def _days(times: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    days: npt.NDArray[np.float64] = _DATES.date2num(times.astype("datetime64[ns]"))
    return days


def _with_gaps(
    at: npt.NDArray[np.int64], *columns: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], ...]:
    """Days and values to draw, with nothing where traffic stopped: a line over it would invent.

    The last value before a gap holds for one more window, so that one that stands alone is seen.
    """
    spacing = np.diff(at)
    if len(spacing) < _LEAST_SPACINGS:
        return _days(at), *columns
    usual = int(np.median(spacing))
    last = np.flatnonzero(spacing > _GAP * usual)
    places = np.repeat(last + 1, 2)
    times = np.insert(at, places, np.repeat(at[last] + usual, 2))
    held = [np.stack([c[last], np.full(len(last), np.nan)], axis=1).ravel() for c in columns]
    return _days(times), *map(np.insert, columns, [places] * len(held), held)


def _along_time(axes: Axes, bounds: tuple[int, int], alarms: Spans, changed_at: int) -> None:
    """The shared time axis: UTC, alarms shaded, the change marked."""
    left, right = _days(np.array(bounds))
    axes.set_xlim(left, max(right, left + 1e-9))
    locator = _DATES.AutoDateLocator(tz=UTC)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(_DATES.ConciseDateFormatter(locator, tz=UTC))
    for start, end in _merged(alarms):
        low, high = _days(np.array([start, end]))
        axes.axvspan(low, high, color=ALARM, alpha=0.13, linewidth=0)
        axes.axvline(low, color=ALARM, linewidth=1.0)
    if changed_at:
        axes.axvline(float(_days(np.array([changed_at]))[0]), color=MUTED, lw=0.9, ls=":")


def _merged(spans: Spans) -> list[tuple[int, int]]:
    """Overlapping spans as one, so that shades do not add up."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _legend(axes: Axes) -> None:
    """In the line of the title, to the right, where it hides nothing."""
    entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        ncols=entries,
        borderaxespad=0.0,
        columnspacing=1.2,
        handlelength=1.4,
    )


def evidence(
    lines: Mapping[str, Sequence[Line]],
    bounds: tuple[int, int],
    alarms: Mapping[str, Spans],
    changed_at: int,
) -> str:
    """Statistic against threshold, one panel per drift test with the alarms that rest on it."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (test, streams) in zip(panels, lines.items(), strict=True):
            _along_time(axes, bounds, alarms.get(test, ()), changed_at)
            shown = streams[:_LINES]
            for colour, line in zip(SERIES, shown, strict=False):
                marker = "." if len(line.at) < 3 else ""
                axes.plot(
                    *_with_gaps(line.at, line.statistic),
                    color=colour,
                    lw=1.4,
                    marker=marker,
                    label=line.label,
                )
            first = shown[0]
            axes.plot(
                _days(first.at), first.threshold, color=ALARM, lw=1.1, ls="--", label="threshold"
            )
            axes.set_ylabel("statistic")
            # What lies far below nothing is as good as nothing.
            lowest = min(float(line.statistic.min()) for line in shown)
            top = max(float(max(line.statistic.max(), line.threshold.max())) for line in shown)
            room = max(top, 1e-9) * 0.35
            axes.set_ylim(max(lowest, -room) - 0.04 * top, top + 0.08 * max(top, 1e-9))
            more = f"  (+ {len(streams) - _LINES} quieter)"
            axes.set_title(plain(test) + (more if len(streams) > _LINES else ""))
            _legend(axes)

    return svg("evidence", 0.7 + 1.9 * len(lines), draw, "Evidence against threshold over time")


def shares(timeline: Timeline, bounds: tuple[int, int], alarms: Spans, changed_at: int) -> str:
    """Share of samples with p ≤ 0.05 over time, per detector, with the expected level."""
    inside = covered(LEVEL)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _along_time(axes, bounds, alarms, changed_at)
        middles = (timeline.starts // 2 + timeline.ends // 2).astype(np.int64)
        top = 2.0 * LEVEL
        for colour, (name, counts) in zip(
            _cycle(len(timeline.counts)), timeline.counts.items(), strict=True
        ):
            totals = counts.sum(axis=1)
            with np.errstate(invalid="ignore"):
                share = np.where(totals > 0, counts @ inside / np.maximum(totals, 1), np.nan)
            axes.plot(*_with_gaps(middles, share), color=colour, lw=1.4, label=plain(name))
            if np.isfinite(share).any():
                top = max(top, float(np.nanmax(share)))
        axes.axhline(LEVEL, color=MUTED, lw=1.0, ls="--", label="expected, 5 %")
        axes.set_ylim(0.0, min(top * 1.1, 1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_ylabel("share of samples")
        axes.set_title(" ")
        _legend(axes)

    return svg("shares", 2.7, draw, "Share of samples with a tail probability of at most 0.05")


def tails(
    before: Mapping[str, npt.NDArray[np.int64]], after: Mapping[str, npt.NDArray[np.int64]]
) -> str:
    """Histograms of tail probabilities in twenty equal bins, before and after the change."""
    names = sorted({*before, *after})
    edges = np.linspace(0.0, 1.0, 21)

    def density(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        summed = np.concatenate([[0.0], np.cumsum(counts)])
        binned: npt.NDArray[np.float64] = np.diff(np.interp(edges, BIN_EDGES, summed))
        return binned / max(float(counts.sum()), 1.0)

    columns = min(len(names), 3)
    rows = -(-len(names) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(names):
                axes.set_visible(False)
                continue
            name = names[place]
            if name in after and after[name].sum():
                axes.bar(
                    edges[:-1],
                    density(after[name]),
                    width=0.05,
                    align="edge",
                    color=SERIES[1],
                    alpha=0.75,
                    linewidth=0,
                    label="after",
                )
            if name in before and before[name].sum():
                axes.stairs(
                    density(before[name]), edges, color=SERIES[0], linewidth=1.5, label="before"
                )
            axes.axhline(0.05, color=MUTED, lw=1.0, ls="--", label="expected")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_xlim(0.0, 1.0)
            axes.set_title(plain(name))
            if place == 0:
                axes.legend(loc="upper right")
            if place >= len(names) - columns:
                axes.set_xlabel("tail probability p")
            if place % columns == 0:
                axes.set_ylabel("share of samples")

    return svg("tails", 0.4 + 2.2 * rows, draw, "Histograms of tail probabilities")


def heat(timeline: Timeline, bounds: tuple[int, int], changed_at: int) -> str:
    """How much more or less of each tail probability than expected, over time."""
    names = list(timeline.counts)
    # Three bins in one, from the far tail at the top to p = 1 at the bottom.
    starts = np.arange(0, len(BIN_EDGES) - 1, 3)
    expected = np.add.reduceat(np.diff(BIN_EDGES), starts)
    # Nothing where the share is as expected, so that the page shows through in either theme.
    colours = LinearSegmentedColormap.from_list(
        "more_or_less",
        [
            (0.0, (0.16, 0.44, 0.85, 1.0)),
            (0.5, (0.5, 0.5, 0.5, 0.0)),
            (1.0, (0.86, 0.2, 0.12, 1.0)),
        ],
    )
    marks = [0.0001, 0.001, 0.01, 0.1, 0.5, 1.0]
    places = np.interp(marks, BIN_EDGES, np.arange(len(BIN_EDGES)) / 3.0)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        # What lies between two windows is a column of its own, with nothing in it.
        alone = np.append(timeline.ends[:-1] < timeline.starts[1:], True)
        edges = np.unique(np.concatenate([timeline.starts, timeline.ends[alone]]))
        columns = np.searchsorted(edges, timeline.starts)
        drawn = None
        for axes, name in zip(panels, names, strict=True):
            counts = np.add.reduceat(timeline.counts[name], starts, axis=1)
            wanted = counts.sum(axis=1, keepdims=True) * expected
            # One sample on either side keeps rare bins of small windows from shouting.
            ratio = np.log2((counts + 1.0) / (wanted + 1.0))
            shown = np.full((len(edges) - 1, len(starts)), np.nan)
            shown[columns] = ratio
            axes.grid(visible=False)
            _along_time(axes, bounds, (), changed_at)
            drawn = axes.pcolormesh(
                _days(edges),
                np.arange(len(starts) + 1),
                np.ma.masked_invalid(shown).T,
                cmap=colours,
                vmin=-3.0,
                vmax=3.0,
                rasterized=True,
            )
            axes.set_yticks(places, [f"{mark:g}" for mark in marks])
            axes.invert_yaxis()
            axes.set_title(plain(name))
            axes.set_ylabel("p")
        if drawn is not None:
            bar = figure.colorbar(drawn, ax=list(panels), fraction=0.025, pad=0.01)
            bar.set_ticks([-3, 0, 3], labels=["8× fewer", "as expected", "8× more"])
            bar.outline.set_visible(False)

    return svg("heat", 0.5 + 1.7 * len(names), draw, "Tail probabilities over time")


def classes(counts: Mapping[int, tuple[int, int]]) -> str:
    """Shares of the predicted classes before and after the change; the most frequent ones."""
    most = sorted(counts, key=lambda label: -sum(counts[label]))[:_CLASSES]
    shown = sorted(most)
    table = np.array([counts[label] for label in shown], np.float64)
    totals = np.maximum(np.array(list(counts.values())).sum(axis=0), 1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = np.arange(len(shown))
        both = bool(table[:, 1].any())
        width = 0.4 if both else 0.7
        shift = width / 2 if both else 0.0
        axes.bar(places - shift, table[:, 0] / totals[0], width, color=SERIES[0], label="before")
        if both:
            axes.bar(places + shift, table[:, 1] / totals[1], width, color=SERIES[1], label="after")
            axes.legend(loc="upper right")
        axes.grid(visible=False, axis="x")
        axes.set_xticks(places, [str(label) for label in shown])
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("predicted class")
        axes.set_ylabel("share of samples")

    return svg("classes", 2.4, draw, "Shares of the predicted classes")


def _cycle(length: int) -> list[str]:
    return [SERIES[place % len(SERIES)] for place in range(length)]
