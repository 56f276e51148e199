"""The counters behind one open pane: what a window is before it closes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES, expected_errors
from oodmon.records import BIN_EDGES, SAMPLE_SIZE, Histogram, ScoreBatch, Window

__all__ = ["Bins", "Cell", "Stream", "dense"]

_BINS: Final = len(BIN_EDGES) - 1
_MAX_CLASSES: Final = 4096
"""Predicted classes counted apart; higher ones are counted as the last."""
_MAX_ORIGINS: Final = 1024
"""Streams whose last sample is remembered, to pair it with the first of their next batch."""
_UNITS: Final = np.round(1000.0 * NORMAL_SCORES).astype(np.int64)
"""Normal scores in thousandths: whole numbers, so that sums of them add exactly in any order."""
_SQUARES: Final = np.round(1000.0 * NORMAL_SCORES**2).astype(np.int64)

Bins = Mapping[str, npt.NDArray[np.int64]]


@dataclass(slots=True)
class Stream:
    """What one detector has in one open pane and segment."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    invalid: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    sample: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    pairs: int = 0
    jumps: int = 0
    judged: int = 0
    errors: int = 0
    classes: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    swings: int = 0

    @property
    def bound(self) -> int:
        """Keys from here on cannot enter the sample."""
        return 2**64 - 1 if len(self.keys) < SAMPLE_SIZE else int(self.keys[-1])

    def take(
        self,
        keys: npt.NDArray[np.uint64],
        scores: npt.NDArray[np.float32],
        classes: npt.NDArray[np.int32],
    ) -> None:
        """Keep the scores with the smallest keys, and their predicted classes."""
        keys = np.concatenate([self.keys, keys])
        scores = np.concatenate([self.sample, scores])
        classes = np.concatenate([self.classes, classes])
        order = np.argsort(keys, kind="stable")[:SAMPLE_SIZE]
        self.keys, self.sample, self.classes = keys[order], scores[order], classes[order]

    def pair(self, bins: npt.NDArray[np.int64], origin: str, last: dict[str, int]) -> None:
        """Count neighbours of one origin, over the borders of batches too.

        Args:
            bins: of the samples that have a score, in order.
            origin: names the source, the segment and the detector.
            last: bin of the last sample of each origin; kept up to date.
        """
        if not len(bins):
            return
        before = last.pop(origin, None)
        if before is not None:
            bins = np.concatenate([[before], bins])
        units, squares = _UNITS.take(bins), _SQUARES.take(bins)
        jumps, swings = units[1:] - units[:-1], squares[1:] - squares[:-1]
        self.pairs += len(jumps)
        self.jumps += int(jumps @ jumps)
        self.swings += int(swings @ swings)
        if len(last) >= _MAX_ORIGINS:
            del last[next(iter(last))]
        last[origin] = int(bins[-1])


@dataclass(slots=True)
class Cell:
    """One open pane of one segment."""

    samples: int = 0
    dropped: int = 0
    late: int = 0
    streams: dict[str, Stream] = field(default_factory=dict)
    predicted: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    bound: int = 2**64 - 1

    def count(
        self,
        batch: ScoreBatch,
        bins: Bins,
        rows: npt.NDArray[np.intp] | None,
        origin: str,
        last: dict[str, int],
        judging: Collection[str] = (),
    ) -> None:
        """Add the rows of one batch that belong here.

        Args:
            batch: where they come from.
            bins: detector → `Calibration.bins` of its column.
            rows: which rows; None means all.
            origin: names the source and the segment.
            last: bin of the last sample of each origin and detector; kept up to date.
            judging: detectors whose scores are the probability of a wrong answer.
        """
        if not batch.repeats:
            self.samples += batch.rows if rows is None else len(rows)
        keys = _keys(batch)
        if rows is not None:
            keys = keys[rows]
        # Few rows can still enter the sample once it is full, so the sort below is rare.
        new = len(self.streams) < len(bins)
        candidates = np.flatnonzero(keys < np.uint64(2**64 - 1 if new else self.bound))
        classes = np.full(len(keys), -1, np.int32)
        if len(candidates) and len(batch.predicted):
            classes = batch.predicted if rows is None else batch.predicted[rows]
        for name, column in bins.items():
            stream = self.streams.get(name)
            if stream is None:
                stream = self.streams[name] = Stream()
            found = column if rows is None else column[rows]
            counted = np.bincount(found + 1, minlength=_BINS + 1)
            stream.invalid += int(counted[0])
            stream.counts += counted[1:]
            scored = found[found >= 0] if counted[0] else found
            stream.pair(scored, f"{origin}\0{name}", last)
            if name in judging:
                scores = batch.scores[name] if rows is None else batch.scores[name][rows]
                stream.judged += int(counted[1:].sum())
                stream.errors += expected_errors(scores[found >= 0])
            if len(candidates):
                valid = candidates[found[candidates] >= 0]
                scores = batch.scores[name]
                if rows is not None:
                    scores = scores[rows]
                stream.take(keys[valid], scores[valid], classes[valid])
        if len(candidates):
            self.bound = max(stream.bound for stream in self.streams.values())
        if len(batch.predicted) and not batch.repeats:
            self._classify(batch.predicted if rows is None else batch.predicted[rows])

    def _classify(self, classes: npt.NDArray[np.int32]) -> None:
        classes = np.minimum(classes[classes >= 0], _MAX_CLASSES - 1)
        counted = np.bincount(classes, minlength=len(self.predicted))
        counted[: len(self.predicted)] += self.predicted
        self.predicted = counted

    def window(self, model: str, version: str, segment: str, start: int, end: int) -> Window:
        """What was counted, as a record."""
        detectors = {
            name: Histogram(
                s.counts.copy(),
                s.invalid,
                s.keys,
                s.sample,
                s.pairs,
                s.jumps,
                s.judged,
                s.errors,
                s.classes,
                s.swings,
            )
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


def dense(pairs: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """(label, count) pairs as an array of counts."""
    dense = np.zeros(1 + max((label for label, _ in pairs), default=-1), np.int64)
    for label, seen in pairs:
        dense[label] = seen
    return dense


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
