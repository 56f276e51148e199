"""The store's rows of one model version, brought into the shape that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import covered
from oodmon.records import ALL, BIN_EDGES
from oodmon.report.accuracy import Estimate, estimates
from oodmon.report.flags import Flags, flags
from oodmon.store.events import Store

__all__ = ["Line", "Seen", "Segment", "Timeline", "gather"]

CELLS: Final = 360
"""Points on a time axis; longer histories are shown in as many sums of neighbouring windows."""

MOST_NOVEL: Final = 24
_NOVEL_ROWS: Final = 400
_SEVERITIES: Final = ("critical", "warning", "info")
_BINS: Final = len(BIN_EDGES) - 1

Counts = npt.NDArray[np.int64]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """What was counted along the time axis, all segments together.

    Attributes:
        starts, ends: int64 (T,) bounds of the cells, ns UTC.
        counts: detector → int64 (T, 64) over `BIN_EDGES`.
    """

    starts: Counts
    ends: Counts
    counts: Mapping[str, Counts]


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One stream of one drift test along time.

    Attributes:
        label: detector and segment, in words.
        at: int64 (K,) ends of the windows, ns UTC.
        statistic, threshold: float64 (K,); of several windows in a cell the highest statistic.
    """

    label: str
    at: Counts
    statistic: npt.NDArray[np.float64]
    threshold: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One segment in numbers; `before` and `after` are shares of p ≤ 0.05, None where unseen."""

    name: str
    detector: str
    samples: int
    before: float | None
    after: float | None
    drifted: int


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Everything that the report tells.

    Attributes:
        others: other model versions in the same store, as ``model/version``.
        changed_at: where "after" begins, ns UTC; 0 where nothing fired.
        before, after: detector → counts (64,) in disjoint windows before and after the change.
        classes: predicted class → (before, after).
        lines: drift test → its streams, those of all together alone where there are such.
        tests: one row per drift test: name, streams, decisions, drifted, promise.
        accuracy: what the accuracy is without labels, per detector that measures it.
        flags: per detector, how many samples each threshold flags, and how many falsely.
        headline: the episode that is told first: still firing, severe, early. None where none is.
    """

    model: str
    version: str
    others: Sequence[str]
    timeline: Timeline
    changed_at: int
    samples: int
    windows: int
    dropped: int
    late: int
    invalid: int
    before: Mapping[str, Counts]
    after: Mapping[str, Counts]
    classes: Mapping[int, tuple[int, int]]
    segments: Sequence[Segment]
    accuracy: Sequence[Estimate]
    flags: Sequence[Flags]
    lines: Mapping[str, Sequence[Line]]
    tests: Sequence[Row]
    alerts: Sequence[Row]
    headline: Row | None
    agents: Sequence[Row]
    notices: Sequence[Row]
    firings: Sequence[Row]
    novel: Sequence[Row]
    flagged: int


def gather(
    store: Store, model: str | None, version: str | None, promises: Mapping[str, str]
) -> Seen | None:
    """Read one model version: the one named, or the one seen last. None where nothing was seen."""
    newest = store.windows(model=model, version=version, newest_first=True, limit=1)
    if not newest:
        return None
    model, version = newest[0]["model"], newest[0]["version"]
    asked: dict[str, Any] = {"model": model, "version": version}
    rows = store.windows(**asked)
    alerts = store.alerts(**asked)
    results = store.drift_results(**asked)
    exceedances = store.exceedances(most_novel_first=True, limit=_NOVEL_ROWS, **asked)

    spans = sorted({(row["window_start_ns"], row["window_end_ns"]) for row in rows})
    cell = _cells(spans)
    headline = min(alerts, key=_urgency, default=None)
    changed_at = _changed_at(headline)
    disjoint = _disjoint(spans)
    once = [row for row in rows if (row["window_start_ns"], row["window_end_ns"]) in disjoint]
    windows = _windows(once)
    return Seen(
        model=model,
        version=version,
        others=_others(store, model, version),
        timeline=_timeline(rows, spans, cell),
        changed_at=changed_at,
        samples=sum(row["samples"] for row in windows),
        windows=len(spans),
        dropped=sum(row["dropped"] for row in windows),
        late=sum(row["late"] for row in windows),
        invalid=sum(row["invalid"] for row in once),
        before=_totals(once, changed_at, after=False),
        after=_totals(once, changed_at, after=True),
        classes=_classes(windows, changed_at),
        segments=_segments(once, results, changed_at),
        accuracy=estimates(once, changed_at),
        flags=flags(once, results, changed_at),
        lines=_lines(results),
        tests=_tests(results, alerts, promises),
        alerts=alerts[::-1],
        headline=headline,
        agents=[a for a in store.agents() if (a["model"], a["version"]) == (model, version)],
        notices=store.notices(newest_first=True, limit=50, **asked),
        firings=store.firings(newest_first=True, limit=20),
        novel=_novel(exceedances),
        flagged=len({row["sample_id"] for row in store.exceedances(**asked)}),
    )


def _others(store: Store, model: str, version: str) -> list[str]:
    """The other model versions that the agents in this store serve."""
    names = {(agent["model"], agent["version"]) for agent in store.agents()}
    return sorted(f"{m}/{v}" for m, v in names if (m, v) != (model, version))


def _cells(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Span → place on the time axis."""
    places = np.arange(len(spans)) * min(CELLS, len(spans)) // max(len(spans), 1)
    return dict(zip(spans, places.tolist(), strict=True))


def _disjoint(spans: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """Spans that do not overlap: sliding windows count a sample several times."""
    chosen, free_from = set(), -1
    for start, end in spans:
        if start >= free_from:
            chosen.add((start, end))
            free_from = end
    return chosen


def _urgency(alert: Row) -> tuple[bool, int, int]:
    severity = alert["severity"]
    rank = _SEVERITIES.index(severity) if severity in _SEVERITIES else len(_SEVERITIES)
    return alert["status"] != "firing", rank, alert["started_at_ns"]


def _changed_at(alert: Row | None) -> int:
    """When the episode's change began: as its test estimates it, or when it fired; 0 for none."""
    if alert is None:
        return 0
    for field in ("since", "window_start"):
        told = alert["evidence"].get(field)
        if isinstance(told, str):
            try:
                moment = datetime.fromisoformat(told)
            except ValueError:
                continue
            return round(moment.timestamp() * 1e9)
    return int(alert["started_at_ns"])


def _timeline(
    rows: Sequence[Row], spans: Sequence[tuple[int, int]], cell: Mapping[tuple[int, int], int]
) -> Timeline:
    length = min(CELLS, len(spans))
    starts = np.full(length, np.iinfo(np.int64).max)
    ends = np.zeros(length, np.int64)
    for (start, end), place in cell.items():
        starts[place], ends[place] = min(starts[place], start), max(ends[place], end)
    counts: dict[str, Counts] = {}
    for row in rows:
        if row["detector"]:
            table = counts.setdefault(row["detector"], np.zeros((length, _BINS), np.int64))
            table[cell[row["window_start_ns"], row["window_end_ns"]]] += np.asarray(row["counts"])
    return Timeline(starts, ends, {name: counts[name] for name in sorted(counts)})


def _is_after(row: Row, changed_at: int) -> bool:
    return bool(changed_at) and row["window_start_ns"] >= changed_at


def _totals(rows: Sequence[Row], changed_at: int, *, after: bool) -> dict[str, Counts]:
    totals: dict[str, Counts] = {}
    for row in rows:
        if row["detector"] and _is_after(row, changed_at) == after:
            known = totals.setdefault(row["detector"], np.zeros(_BINS, np.int64))
            known += np.asarray(row["counts"])
    return totals


def _windows(rows: Sequence[Row]) -> list[Row]:
    """One row per segment and window: what is not a detector's own is repeated for each."""
    one = {(row["segment"], row["window_start_ns"]): row for row in rows}
    return list(one.values())


def _classes(windows: Sequence[Row], changed_at: int) -> dict[int, tuple[int, int]]:
    counts: dict[int, list[int]] = {}
    for row in windows:
        side = int(_is_after(row, changed_at))
        for label, count in row["predicted"].items():
            counts.setdefault(label, [0, 0])[side] += count
    return {label: (counts[label][0], counts[label][1]) for label in sorted(counts)}


def _share(counts: Counts) -> float | None:
    """Share of p ≤ 0.05, linear within the bin that holds it."""
    total = int(counts.sum())
    return float(counts @ covered(0.05)) / total if total else None


def _segments(rows: Sequence[Row], results: Sequence[Row], changed_at: int) -> list[Segment]:
    """Per segment, the detector whose share of small p grew most."""
    drifted: dict[tuple[str, str], set[int]] = {}
    for result in results:
        if result["drifted"] and result["detector"] != ALL:
            stream = (result["segment"], result["detector"])
            drifted.setdefault(stream, set()).add(result["window_start_ns"])
    sums: dict[tuple[str, str], Counts] = {}
    samples: dict[str, int] = {}
    for row in rows:
        if row["detector"]:
            stream = (row["segment"], row["detector"])
            table = sums.setdefault(stream, np.zeros((2, _BINS), np.int64))
            table[int(_is_after(row, changed_at))] += np.asarray(row["counts"])
    for row in _windows(rows):
        samples[row["segment"]] = samples.get(row["segment"], 0) + row["samples"]

    def growth(stream: tuple[str, str]) -> float:
        before, after = (_share(side) for side in sums[stream])
        return (after if after is not None else before or 0.0) - (before or 0.0)

    found = []
    for name in sorted(name for name in samples if samples[name]):
        streams = sorted(stream for stream in sums if stream[0] == name)
        if not streams:
            found.append(Segment(name, "", samples[name], None, None, 0))
            continue
        worst = max(streams, key=growth)
        before, after = (_share(side) for side in sums[worst])
        times = set().union(*(drifted.get(stream, set()) for stream in streams))
        found.append(Segment(name, worst[1], samples[name], before, after, len(times)))
    return sorted(found, key=lambda segment: -(segment.after or segment.before or 0.0))


def _lines(results: Sequence[Row]) -> dict[str, tuple[Line, ...]]:
    """The streams of each test, highest evidence first."""
    per_test: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in results:
        if row["statistic"] is not None and row["threshold"] is not None:
            streams = per_test.setdefault(row["test"], {})
            streams.setdefault((row["detector"], row["segment"]), []).append(row)
    lines: dict[str, tuple[Line, ...]] = {}
    for test in sorted(per_test):
        streams = per_test[test]
        shared = {key: rows for key, rows in streams.items() if key == (ALL, ALL)}
        made = [_line(key, rows) for key, rows in (shared or streams).items()]
        made.sort(key=lambda line: -float((line.statistic - line.threshold).max()))
        lines[test] = tuple(made)
    return lines


def _line(key: tuple[str, str], rows: Sequence[Row]) -> Line:
    at = np.array([row["window_end_ns"] for row in rows], np.int64)
    statistic = np.array([row["statistic"] for row in rows], np.float64)
    threshold = np.array([row["threshold"] for row in rows], np.float64)
    if len(at) > CELLS:
        # The highest of each run of windows: a peak must not be thinned away.
        runs = np.array_split(np.arange(len(at)), CELLS)
        picked = np.array([run[statistic[run].argmax()] for run in runs])
        at, statistic, threshold = at[picked], statistic[picked], threshold[picked]
    detector, segment = key
    words = "all streams together" if key == (ALL, ALL) else detector
    if segment not in ("", ALL):
        words += f" · {segment}"
    return Line(words, at, statistic, threshold)


def _tests(results: Sequence[Row], alerts: Sequence[Row], promises: Mapping[str, str]) -> list[Row]:
    told = {alert["test"]: alert["evidence"].get("promise", "") for alert in alerts}
    told |= promises
    rows: list[Row] = []
    for test in sorted({row["test"] for row in results}):
        mine = [row for row in results if row["test"] == test]
        shared = [row for row in mine if (row["detector"], row["segment"]) == (ALL, ALL)]
        rows.append(
            {
                "test": test,
                "streams": len(
                    {(row["detector"], row["segment"]) for row in mine if row["detector"] != ALL}
                ),
                "decisions": len(shared or mine),
                "drifted": sum(row["drifted"] for row in shared or mine),
                "promise": told.get(test, ""),
            }
        )
    return rows


def _novel(exceedances: Sequence[Row]) -> Sequence[Row]:
    """The most novel samples, each once, with the detectors that flagged it."""
    found: dict[str, dict[str, Any]] = {}
    for row in exceedances:
        known = found.setdefault(row["sample_id"], {**row, "detectors": []})
        if row["detector"] not in known["detectors"]:
            known["detectors"].append(row["detector"])
    ordered = sorted(found.values(), key=lambda row: (row["p"], -len(row["detectors"])))
    return ordered[:MOST_NOVEL]
