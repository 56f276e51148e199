"""The counters behind one open pane: what a window is before it closes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES, Calibration, expected_errors
from oodmon.records import BIN_EDGES, SAMPLE_SIZE, Histogram, ScoreBatch, Window

__all__ = ["Bins", "Cell", "Last", "Rows", "Stream", "dense"]

_BINS: Final = len(BIN_EDGES) - 1
_MAX_CLASSES: Final = 4096
"""Predicted classes counted apart; higher ones are counted as the last."""
_MAX_ORIGINS: Final = 1024
"""Streams whose last sample is remembered, to pair it with the first of their next batch."""
_UNITS: Final = np.round(1000.0 * NORMAL_SCORES).astype(np.int64)
"""Normal scores in thousandths: whole numbers, so that sums of them add exactly in any order."""
_SQUARES: Final = np.round(1000.0 * NORMAL_SCORES**2).astype(np.int64)

Bins = Mapping[str, npt.NDArray[np.int64]]
Last = dict[str, dict[str, int]]
"""Origin (source and segment) → detector → bin of its last sample."""

_NONE: Final[Mapping[str, Calibration]] = {}
_NO_KEYS: Final = np.empty(0, np.uint64)
_NO_SCORES: Final = np.empty(0, np.float32)
_NO_CLASSES: Final = np.empty(0, np.int32)


@dataclass(slots=True)
class Stream:
    """What one detector has in one open pane and segment."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    invalid: int = 0
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: _NO_KEYS)
    sample: npt.NDArray[np.float32] = field(default_factory=lambda: _NO_SCORES)
    pairs: int = 0
    jumps: int = 0
    judged: int = 0
    errors: int = 0
    classes: npt.NDArray[np.int32] = field(default_factory=lambda: _NO_CLASSES)
    swings: int = 0

    @property
    def bound(self) -> int:
        """Keys from here on cannot enter the sample."""
        return 2**64 - 1 if len(self.keys) < SAMPLE_SIZE else int(self.keys[-1])


@dataclass(slots=True)
class Drawn:
    """The rows of one batch and cell that may enter the raw sample.

    The streams of a cell nearly always hold the same rows, so what is drawn for one of them, its
    `keys` in hand, is drawn for all.
    """

    keys: npt.NDArray[np.uint64]
    classes: npt.NDArray[np.int32]
    _known: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    def into(self, stream: Stream, scores: npt.NDArray[np.float32]) -> None:
        """Keep the scores with the smallest keys, and their predicted classes."""
        found = self._known.get(id(stream.keys))
        if found is None:
            keys = np.concatenate([stream.keys, self.keys])
            order = np.argsort(keys, kind="stable")[:SAMPLE_SIZE]
            classes = np.concatenate([stream.classes, self.classes])[order]
            # The old keys too: as long as they are held, their id is nobody else's.
            found = self._known[id(stream.keys)] = (keys[order], order, classes, stream.keys)
        stream.keys, order, stream.classes, _ = found
        stream.sample = np.concatenate([stream.sample, scores])[order]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a batch: those of one segment.

    Attributes:
        batch: where they come from.
        detectors: whose columns they have.
        bins: int64 (D, n) `Calibration.bins` of each.
        keys: uint64 (n,) hashes of their places.
        picked: which rows of the batch they are; None means all.
    """

    batch: ScoreBatch
    detectors: Sequence[str]
    bins: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    picked: npt.NDArray[np.intp] | None = None

    @staticmethod
    def of(batch: ScoreBatch, bins: Bins) -> Rows:
        """All rows."""
        table = np.empty((len(bins), batch.rows), np.int64)
        for place, column in enumerate(bins.values()):
            table[place] = column
        return Rows(batch, tuple(bins), table, _keys(batch))

    def by_segment(self) -> Iterator[tuple[str, Rows]]:
        """Each segment with its rows, in their order."""
        batch = self.batch
        if not len(batch.segment):
            yield "", self
            return
        order = np.argsort(batch.segment, kind="stable")
        indices, starts = np.unique(batch.segment[order], return_index=True)
        for index, picked in zip(indices.tolist(), np.split(order, starts[1:]), strict=True):
            yield (
                batch.segments[index],
                Rows(batch, self.detectors, self.bins[:, picked], self.keys[picked], picked),
            )

    def __len__(self) -> int:
        return len(self.keys)

    def scores(self, detector: str) -> npt.NDArray[np.float32]:
        """Their raw scores."""
        scores = self.batch.scores[detector]
        return scores if self.picked is None else scores[self.picked]

    @property
    def predicted(self) -> npt.NDArray[np.int32]:
        """Their predicted classes, or empty."""
        classes = self.batch.predicted
        return classes if self.picked is None or not len(classes) else classes[self.picked]


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
        self, rows: Rows, origin: str, last: Last, judging: Mapping[str, Calibration] = _NONE
    ) -> None:
        """Add rows of one batch.

        Args:
            rows: those that belong here.
            origin: names the source and the segment.
            last: kept up to date.
            judging: the calibrations whose scores are the probability of a wrong answer.
        """
        if not rows.batch.repeats:
            self.samples += len(rows)
        table, detectors = rows.bins, rows.detectors
        streams = []
        # Few rows can still enter the sample once it is full, so sorting is rare.
        bound = self.bound
        for name in detectors:
            stream = self.streams.get(name)
            if stream is None:
                stream, bound = Stream(), 2**64 - 1
                self.streams[name] = stream
            streams.append(stream)
        offsets = (_BINS + 1) * np.arange(len(detectors))[:, None] + 1
        counted = np.bincount((table + offsets).ravel(), minlength=(_BINS + 1) * len(detectors))
        counted = counted.reshape(len(detectors), _BINS + 1)
        ends = _pair(streams, rows, last.pop(origin, {}), invalid=bool(counted[:, 0].any()))
        if len(last) >= _MAX_ORIGINS:
            del last[next(iter(last))]
        last[origin] = ends
        candidates = np.flatnonzero(rows.keys < np.uint64(bound))
        classes = rows.predicted if len(rows.predicted) else np.full(len(rows), -1, np.int32)
        drawn = Drawn(rows.keys[candidates], classes[candidates])
        for name, stream, found, (invalid, *_), counts in zip(
            detectors, streams, table, counted[:, :1].tolist(), counted[:, 1:], strict=True
        ):
            stream.invalid += invalid
            stream.counts += counts
            if name in judging:
                stream.judged += int(counts.sum())
                scores = rows.scores(name)[found >= 0]
                stream.errors += expected_errors(judging[name].wrong_at(scores))
            if len(candidates):
                scores = rows.scores(name)[candidates]
                if invalid:
                    valid = found[candidates] >= 0
                    some = Drawn(drawn.keys[valid], drawn.classes[valid])
                    some.into(stream, scores[valid])
                else:
                    drawn.into(stream, scores)
        if len(candidates):
            self.bound = max((stream.bound for stream in self.streams.values()), default=self.bound)
        if len(rows.predicted) and not rows.batch.repeats:
            self._classify(rows.predicted)

    def _classify(self, classes: npt.NDArray[np.int32]) -> None:
        classes = np.minimum(classes[classes >= 0], _MAX_CLASSES - 1)
        counted = np.bincount(classes, minlength=len(self.predicted))
        counted[: len(self.predicted)] += self.predicted
        self.predicted = counted

    def window(self, model: str, version: str, segment: str, start: int, end: int) -> Window:
        """What was counted, as a record; nothing may be counted after that."""
        detectors = {
            name: Histogram(
                s.counts,
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


def _pair(
    streams: Sequence[Stream], rows: Rows, before: dict[str, int], *, invalid: bool
) -> dict[str, int]:
    """Count neighbours of one origin, over the borders of batches too.

    Args:
        streams: of the detectors of `rows`.
        rows: in order.
        before: detector → bin of the last sample of the batch before.
        invalid: whether any of them has no score; its neighbours count as each other's.

    Returns:
        `before` for the next batch.
    """
    table, names = rows.bins, rows.detectors
    prior = [before.get(name, -1) for name in names]
    if invalid or len({place >= 0 for place in prior}) > 1:
        ends = dict(before)
        for name, stream, place, column in zip(names, streams, prior, table, strict=True):
            column = np.concatenate([[place], column])
            column = column[column >= 0]
            _add_steps([stream], column[None])
            ends[name] = int(column[-1]) if len(column) else -1
        return ends
    if prior and prior[0] >= 0:
        table = np.concatenate([np.array(prior)[:, None], table], axis=1)
    _add_steps(streams, table)
    return {**before, **dict(zip(names, table[:, -1].tolist(), strict=True))}


def _add_steps(streams: Sequence[Stream], bins: npt.NDArray[np.int64]) -> None:
    """(D, n) bins of the samples of each stream, all with a score."""
    if bins.shape[1] < 2:
        return
    units, squares = _UNITS.take(bins), _SQUARES.take(bins)
    jumps, swings = units[:, 1:] - units[:, :-1], squares[:, 1:] - squares[:, :-1]
    far = np.einsum("ij,ij->i", jumps, jumps).tolist()
    wide = np.einsum("ij,ij->i", swings, swings).tolist()
    for stream, jump, swing in zip(streams, far, wide, strict=True):
        stream.pairs += jumps.shape[1]
        stream.jumps += jump
        stream.swings += swing


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
