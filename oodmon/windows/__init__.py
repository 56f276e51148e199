"""Batches → windows by event time: tumbling or sliding, with lateness, closed by the watermark.

Time is cut into *panes* of one step; a window is the sum of the panes that it covers, so tumbling
and sliding windows are one thing. The watermark is the greatest event time seen; a pane closes when
the watermark has passed its end by the allowed lateness, or when `advance` says that time has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import Calibration
from oodmon.errors import ContractError
from oodmon.records import Histogram, ScoreBatch, Window
from oodmon.windows.panes import Bins, Cell, Last, Rows, Stream, dense

__all__ = ["Closed", "Windowing", "Windows"]

_SECOND: Final = 1_000_000_000
_MAX_SEGMENTS: Final = 256
"""Distinct segments; those that come first have a place, the rest is counted as `OTHER`."""
OTHER: Final = "other"
_sums: Final = attrgetter("invalid", "pairs", "jumps", "judged", "errors", "swings")


@dataclass(frozen=True)
class Windowing:
    """How event time is cut.

    Args:
        length_seconds: span of a window.
        every_seconds: a new window begins this often; 0 means `length_seconds` (tumbling). Must
            divide the length.
        allowed_lateness_seconds: how long a window waits for stragglers; older ones are counted
            as late and not merged.
    """

    length_seconds: float = 60.0
    every_seconds: float = 0.0
    allowed_lateness_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.length_seconds) and self.length_seconds >= 1e-3):
            raise ContractError(f"length_seconds: {self.length_seconds} is not at least 0.001")
        if not (math.isfinite(self.every_seconds) and self.every_seconds >= 0):
            raise ContractError(f"every_seconds: {self.every_seconds} is negative")
        late = self.allowed_lateness_seconds
        if not (math.isfinite(late) and late >= 0):
            raise ContractError(f"allowed_lateness_seconds: {late} is negative")
        if self.every_seconds and (self.length % self.step or self.step > self.length):
            raise ContractError(
                f"every_seconds: {self.every_seconds} does not divide length_seconds "
                f"{self.length_seconds}"
            )

    @property
    def length(self) -> int:
        """Span of a window, ns."""
        return round(self.length_seconds * _SECOND)

    @property
    def step(self) -> int:
        """Span of a pane, ns."""
        return round((self.every_seconds or self.length_seconds) * _SECOND)

    @property
    def lateness(self) -> int:
        """Allowed lateness, ns."""
        return round(self.allowed_lateness_seconds * _SECOND)


@dataclass(frozen=True, slots=True)
class Closed:
    """One end of a pane: the pane itself and the window that ends with it."""

    pane: Window
    window: Window


class Windows:
    """The open panes of one model: a fold over batches.

    Memory is bounded by the lateness and the number of segments, whatever the traffic.

    Args:
        model, version: what is served.
        options: how event time is cut.
        judging: the calibrations whose scores are the probability of a wrong answer.
    """

    def __init__(
        self,
        model: str,
        version: str,
        options: Windowing,
        judging: Mapping[str, Calibration] | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.options = options
        self.judging = dict(judging or {})
        self.watermark = 0
        self.closed_until = 0
        self.segments: dict[str, None] = {}
        self.last: Last = {}
        self._open: dict[int, dict[str, Cell]] = {}
        # Closed panes that sliding windows still cover: segment → panes, oldest first.
        self._recent: dict[str, list[Window]] = {}

    def add(self, batch: ScoreBatch, bins: Bins) -> None:
        """Count one batch; `bins` holds `Calibration.bins` of each column."""
        step = self.options.step
        start = batch.observed_at - batch.observed_at % step
        late = start + step <= self.closed_until
        # Late samples and drops are told in the oldest pane that is still open.
        cells = self._open.setdefault(self.closed_until if late else start, {})
        if batch.dropped and not batch.repeats:
            self._cell(cells, "").dropped += batch.dropped
        if batch.rows:
            for segment, rows in Rows.of(batch, bins).by_segment():
                cell = self._cell(cells, segment)
                if late:
                    cell.late += len(rows)
                else:
                    cell.count(rows, f"{batch.source}\0{segment}", self.last, self.judging)
        self.watermark = max(self.watermark, batch.observed_at)

    def _cell(self, cells: dict[str, Cell], segment: str) -> Cell:
        segment = self.place(segment)
        cell = cells.get(segment)
        if cell is None:
            cell = cells[segment] = Cell()
        return cell

    def place(self, segment: str) -> str:
        """The name under which a segment is counted."""
        if segment not in self.segments:
            if len(self.segments) >= _MAX_SEGMENTS:
                return OTHER
            self.segments[segment] = None
        return segment

    def advance(self, now: int) -> Iterator[Closed]:
        """Time has passed although nothing came: close what ends before `now` less the lateness."""
        self.watermark = max(self.watermark, now)
        yield from self.close()

    def close(self) -> Iterator[Closed]:
        """Close every pane that the watermark has passed, in order of time, then segment."""
        step = self.options.step
        horizon = self.watermark - self.options.lateness
        until = horizon - horizon % step
        while self._open or self._recent:
            first = min(self._open) if self._open else self.closed_until
            if self._recent:
                first = min(first, self.closed_until)
            if first + step > until:
                break
            yield from self._close_pane(first, first + step)
        self.closed_until = max(self.closed_until, until)

    def _close_pane(self, start: int, end: int) -> Iterator[Closed]:
        cells = self._open.pop(start, {})
        self.closed_until = end
        slides = self.options.step < self.options.length
        for segment in sorted({*cells, *self._recent}):
            cell = cells.get(segment, Cell())
            pane = cell.window(self.model, self.version, segment, start, end)
            if not slides:
                yield Closed(pane, pane)
                continue
            begin = end - self.options.length
            covered = [p for p in self._recent.get(segment, []) if p.start >= begin]
            if cell.samples or cell.dropped or cell.late:
                covered.append(pane)
            if covered:
                self._recent[segment] = covered
                window = Window(self.model, self.version, segment, begin, end)
                for part in covered:
                    window += part
                yield Closed(pane, window)
            else:
                self._recent.pop(segment, None)

    def freeze(self) -> tuple[dict[str, npt.NDArray[np.generic]], list[dict[str, object]]]:
        """Open and recent panes as arrays and as plain descriptions of which array is whose."""
        parts: list[Stream | Histogram] = []
        cells: list[dict[str, object]] = []
        for start, row in sorted(self._open.items()):
            for segment, cell in sorted(row.items()):
                streams = dict(sorted(cell.streams.items()))
                predicted = {int(n): int(cell.predicted[n]) for n in np.flatnonzero(cell.predicted)}
                cells.append(_described(start, segment, cell, streams, predicted, closed=False))
                parts += streams.values()
        for segment, panes in sorted(self._recent.items()):
            for pane in panes:
                held = pane.detectors
                cells.append(
                    _described(pane.start, segment, pane, held, pane.predicted, closed=True)
                )
                parts += held.values()
        # All in few arrays: of many segments and detectors, names would outweigh numbers.
        parts.append(Histogram.empty())
        counts = np.stack([part.counts for part in parts])
        arrays = {
            "windows/counts": counts.astype(np.min_scalar_type(int(counts.max(initial=0)))),
            "windows/sums": np.array([[*_sums(part), len(part.keys)] for part in parts], np.int64),
            "windows/keys": np.concatenate([part.keys for part in parts]),
            "windows/sample": np.concatenate([part.sample for part in parts]),
            "windows/classes": np.concatenate([part.classes for part in parts]),
        }
        return arrays, cells

    def thaw(
        self,
        watermark: int,
        closed_until: int,
        arrays: Mapping[str, npt.NDArray[np.generic]],
        cells: list[dict[str, object]],
    ) -> None:
        """Back from `freeze`."""
        self.watermark, self.closed_until = watermark, closed_until
        self._open, self._recent = {}, {}
        place = begin = 0
        told = arrays["windows/sums"].tolist()
        for index, row in enumerate(cells):
            cell = Cell(_whole(row["samples"]), _whole(row["dropped"]), _whole(row["late"]))
            predicted, names = row["predicted"], row["detectors"]
            if not (isinstance(predicted, list) and isinstance(names, list)):
                raise ContractError(f"windows state: cell {index} is malformed")
            cell.predicted = dense([(int(label), int(seen)) for label, seen in predicted])
            for name in names:
                invalid, pairs, jumps, judged, errors, swings, kept = told[place]
                end = begin + kept
                cell.streams[str(name)] = Stream(
                    np.array(arrays["windows/counts"][place], np.int64),
                    invalid,
                    np.array(arrays["windows/keys"][begin:end], np.uint64),
                    np.array(arrays["windows/sample"][begin:end], np.float32),
                    pairs,
                    jumps,
                    judged,
                    errors,
                    np.array(arrays["windows/classes"][begin:end], np.int32),
                    swings,
                )
                place, begin = place + 1, end
            cell.bound = max((s.bound for s in cell.streams.values()), default=cell.bound)
            start, segment = _whole(row["start"]), str(row["segment"])
            if row["closed"]:
                pane = cell.window(
                    self.model, self.version, segment, start, start + self.options.step
                )
                self._recent.setdefault(segment, []).append(pane)
            else:
                self._open.setdefault(start, {})[segment] = cell


def _described(
    start: int,
    segment: str,
    pane: Cell | Window,
    held: Mapping[str, Stream | Histogram],
    predicted: Mapping[int, int],
    *,
    closed: bool,
) -> dict[str, object]:
    """What is no array of one pane; `thaw` reads it."""
    return {
        "start": start,
        "segment": segment,
        "closed": closed,
        "samples": pane.samples,
        "dropped": pane.dropped,
        "late": pane.late,
        "detectors": list(held),
        "predicted": [[label, seen] for label, seen in predicted.items()],
    }


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise ContractError(f"windows state: expected a whole number, found {value!r}")
    return value
