"""Batches → windows by event time: tumbling or sliding, with lateness, closed by the watermark.

Time is cut into *panes* of one step; a window is the sum of the panes that it covers, so tumbling
and sliding windows are one thing. The watermark is the greatest event time seen; a pane closes when
the watermark has passed its end by the allowed lateness, or when `advance` says that time has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES, SAMPLE_SIZE, Histogram, ScoreBatch, Window

__all__ = ["Closed", "Windowing", "Windows"]

_SECOND: Final = 1_000_000_000
_BINS: Final = len(BIN_EDGES) - 1
_MAX_SEGMENTS: Final = 256
"""Distinct segments; those that come first have a place, the rest is counted as `OTHER`."""
OTHER: Final = "other"
_MAX_CLASSES: Final = 4096
"""Predicted classes counted apart; higher ones are counted as the last."""

Bins = Mapping[str, npt.NDArray[np.int64]]


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


@dataclass(slots=True)
class _Stream:
    """What one detector has in one open pane and segment."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    invalid: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    sample: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def bound(self) -> int:
        """Keys from here on cannot enter the sample."""
        return 2**64 - 1 if len(self.keys) < SAMPLE_SIZE else int(self.keys[-1])

    def take(self, keys: npt.NDArray[np.uint64], scores: npt.NDArray[np.float32]) -> None:
        keys = np.concatenate([self.keys, keys])
        scores = np.concatenate([self.sample, scores])
        order = np.argsort(keys, kind="stable")[:SAMPLE_SIZE]
        self.keys, self.sample = keys[order], scores[order]


@dataclass(slots=True)
class _Cell:
    """One open pane of one segment."""

    samples: int = 0
    dropped: int = 0
    late: int = 0
    streams: dict[str, _Stream] = field(default_factory=dict)
    predicted: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    bound: int = 2**64 - 1

    def window(self, model: str, version: str, segment: str, start: int, end: int) -> Window:
        detectors = {
            name: Histogram(s.counts.copy(), s.invalid, s.keys, s.sample)
            for name, s in sorted(self.streams.items())
        }
        return Window(
            model,
            version,
            segment,
            start,
            end,
            self.samples,
            self.dropped,
            self.late,
            detectors,
            {int(label): int(self.predicted[label]) for label in np.flatnonzero(self.predicted)},
        )


class Windows:
    """The open panes of one model: a fold over batches.

    Memory is bounded by the lateness and the number of segments, whatever the traffic.
    """

    def __init__(self, model: str, version: str, options: Windowing) -> None:
        self.model = model
        self.version = version
        self.options = options
        self.watermark = 0
        self.closed_until = 0
        self.segments: dict[str, None] = {}
        self._open: dict[int, dict[str, _Cell]] = {}
        # Closed panes that sliding windows still cover: segment → panes, oldest first.
        self._recent: dict[str, list[Window]] = {}

    def add(self, batch: ScoreBatch, bins: Bins) -> None:
        """Count one batch; `bins` holds `Calibration.bins` of each column."""
        step = self.options.step
        start = batch.observed_at - batch.observed_at % step
        late = start + step <= self.closed_until
        # Late samples and drops are told in the oldest pane that is still open.
        cells = self._open.setdefault(self.closed_until if late else start, {})
        if batch.dropped:
            self._cell(cells, "").dropped += batch.dropped
        rows = batch.rows
        if rows and not len(batch.segment):
            self._count(self._cell(cells, ""), batch, bins, None, late)
        elif rows:
            for index in np.unique(batch.segment):
                cell = self._cell(cells, batch.segments[index])
                self._count(cell, batch, bins, np.flatnonzero(batch.segment == index), late)
        self.watermark = max(self.watermark, batch.observed_at)

    def _cell(self, cells: dict[str, _Cell], segment: str) -> _Cell:
        return cells.setdefault(self.place(segment), _Cell())

    def place(self, segment: str) -> str:
        """The name under which a segment is counted."""
        if segment not in self.segments:
            if len(self.segments) >= _MAX_SEGMENTS:
                return OTHER
            self.segments[segment] = None
        return segment

    @staticmethod
    def _count(
        cell: _Cell,
        batch: ScoreBatch,
        bins: Bins,
        rows: npt.NDArray[np.intp] | None,
        late: bool,
    ) -> None:
        count = batch.rows if rows is None else len(rows)
        if late:
            cell.late += count
            return
        cell.samples += count
        keys = _keys(batch)
        if rows is not None:
            keys = keys[rows]
        # Few rows can still enter the sample once it is full, so the sort below is rare.
        new = len(cell.streams) < len(bins)
        candidates = np.flatnonzero(keys < np.uint64(2**64 - 1 if new else cell.bound))
        for name, column in bins.items():
            stream = cell.streams.get(name)
            if stream is None:
                stream = cell.streams[name] = _Stream()
            found = column if rows is None else column[rows]
            counted = np.bincount(found + 1, minlength=_BINS + 1)
            stream.invalid += int(counted[0])
            stream.counts += counted[1:]
            if len(candidates):
                valid = candidates[found[candidates] >= 0]
                scores = batch.scores[name]
                if rows is not None:
                    scores = scores[rows]
                stream.take(keys[valid], scores[valid])
        if len(candidates):
            cell.bound = max(stream.bound for stream in cell.streams.values())
        if len(batch.predicted):
            classes = batch.predicted if rows is None else batch.predicted[rows]
            classes = np.clip(classes[classes >= 0], None, _MAX_CLASSES - 1)
            counted = np.bincount(classes, minlength=len(cell.predicted))
            counted[: len(cell.predicted)] += cell.predicted
            cell.predicted = counted

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
            cell = cells.get(segment, _Cell())
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
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        cells: list[dict[str, object]] = []
        panes = [
            (start, segment, False, cell.window(self.model, self.version, segment, start, 0))
            for start, row in sorted(self._open.items())
            for segment, cell in sorted(row.items())
        ]
        panes += [
            (pane.start, segment, True, pane)
            for segment, row in sorted(self._recent.items())
            for pane in row
        ]
        for index, (start, segment, closed, pane) in enumerate(panes):
            names = list(pane.detectors)
            cells.append(
                {
                    "start": start,
                    "segment": segment,
                    "closed": closed,
                    "samples": pane.samples,
                    "dropped": pane.dropped,
                    "late": pane.late,
                    "detectors": names,
                    "invalid": [pane.detectors[name].invalid for name in names],
                    "predicted": [[label, seen] for label, seen in pane.predicted.items()],
                }
            )
            for number, name in enumerate(names):
                histogram = pane.detectors[name]
                arrays[f"windows/{index}/{number}/counts"] = histogram.counts
                arrays[f"windows/{index}/{number}/keys"] = histogram.keys
                arrays[f"windows/{index}/{number}/sample"] = histogram.sample
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
        for index, row in enumerate(cells):
            cell = _Cell(_whole(row["samples"]), _whole(row["dropped"]), _whole(row["late"]))
            predicted, names, invalid = row["predicted"], row["detectors"], row["invalid"]
            if not (
                isinstance(predicted, list)
                and isinstance(names, list)
                and isinstance(invalid, list)
            ):
                raise ContractError(f"windows state: cell {index} is malformed")
            cell.predicted = _dense([(int(label), int(seen)) for label, seen in predicted])
            for number, name in enumerate(names):
                at = f"windows/{index}/{number}"
                cell.streams[str(name)] = _Stream(
                    np.array(arrays[f"{at}/counts"], np.int64),
                    int(invalid[number]),
                    np.array(arrays[f"{at}/keys"], np.uint64),
                    np.array(arrays[f"{at}/sample"], np.float32),
                )
            cell.bound = max((s.bound for s in cell.streams.values()), default=cell.bound)
            start, segment = _whole(row["start"]), str(row["segment"])
            if row["closed"]:
                pane = cell.window(
                    self.model, self.version, segment, start, start + self.options.step
                )
                self._recent.setdefault(segment, []).append(pane)
            else:
                self._open.setdefault(start, {})[segment] = cell


def _dense(pairs: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    dense = np.zeros(1 + max((label for label, _ in pairs), default=-1), np.int64)
    for label, seen in pairs:
        dense[label] = seen
    return dense


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise ContractError(f"windows state: expected a whole number, found {value!r}")
    return value


def _keys(batch: ScoreBatch) -> npt.NDArray[np.uint64]:
    """(B,) uint64: a hash of each sample's place (source, sequence, row).

    The place names the sample as its id does, and hashes without a loop: splitmix64 (Steele, Lea
    and Flood, OOPSLA 2014) over the rows, from a start that the place of the batch gives.
    """
    place = f"{batch.source}/{batch.sequence}".encode()
    start = np.uint64(int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big"))
    z = start + np.arange(1, batch.rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
