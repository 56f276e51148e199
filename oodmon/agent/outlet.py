"""The way out of the agent: score batches, numbered without gaps, into the writer of a feed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.agent.lanes import Measured
from oodmon.agent.passes import Pass, Passes
from oodmon.contracts import Writer
from oodmon.records import ScoreBatch

__all__ = ["Outlet", "Tally"]

log = logging.getLogger(__name__)

_NOTICES_CARRIED: Final = 64


@dataclass(slots=True)
class Tally:
    """What one scoring thread did; written by it alone."""

    scored: int = 0
    dropped: int = 0
    batches: int = 0
    failures: int = 0
    sampled: int = 0
    tap_seconds: float = 0.0
    scoring_seconds: float = 0.0
    serving_seconds: float = 0.0


class Outlet:
    """Makes batches and writes them; used by the scoring thread alone.

    Args:
        open_writer: called when the first batch is there; where it fails, batches are shed and it
            is tried again at the next one.
        stamp: model, version, source of the batches.
        digests: detector → digest of its scorer, in the order of the score columns.
        queue: has counted what was shed, and has notices of the tap.
        tally: counts what was written.
        repeats: the samples are counted by another source's batches.
    """

    def __init__(
        self,
        open_writer: Callable[[], Writer],
        stamp: tuple[str, str, str],
        digests: Mapping[str, str],
        queue: Passes,
        tally: Tally,
        *,
        repeats: bool = False,
    ) -> None:
        self._open_writer = open_writer
        self._writer: Writer | None = None
        self._stamp = stamp
        self._digests = dict(digests)
        self._queue = queue
        self._tally = tally
        self._repeats = repeats
        self._sequence = 0
        self._dropped = 0
        self._notices: list[str] = []
        self._feed_failing = False

    @property
    def dropped(self) -> int:
        """Samples shed so far, told to the daemon or not yet."""
        return self._tally.dropped + self._dropped + self._queue.shed_untold

    def rename(self, digests: Mapping[str, str]) -> None:
        """From the next batch on, the columns are made by these."""
        self._digests = {name: digests[name] for name in self._digests}

    def lose(self, rows: int, why: str) -> None:
        """Samples that could not be scored at all."""
        self._dropped += rows
        self.tell(why)

    def send(self, group: Sequence[Pass], measured: Measured) -> None:
        """One batch out of the passes of a group and their scores."""
        rows = sum(item.rows for item in group)
        ids, segment, segments = self._names(group, rows)
        self._notices += self._queue.take_notices()
        model, version, source = self._stamp
        self._dropped += self._queue.take_shed()
        self._write(
            ScoreBatch(
                model=model,
                version=version,
                source=source,
                sequence=self._sequence,
                observed_at=group[0].observed_at,
                scores={
                    name: np.ascontiguousarray(column)
                    for name, column in zip(self._digests, measured.scores, strict=True)
                },
                digests=self._digests,
                sample_ids=ids,
                segment=segment,
                segments=segments,
                predicted=measured.predicted,
                dropped=self._dropped,
                sampled_fraction=group[0].fraction,
                notices=tuple(self._notices),
                repeats=self._repeats,
            )
        )

    def _names(
        self, group: Sequence[Pass], rows: int
    ) -> tuple[tuple[str, ...], npt.NDArray[np.int32], tuple[str, ...]]:
        ids: list[str] = []
        segments: list[str] = []
        named = segmented = False
        source = self._stamp[2]
        for item in group:
            asked = item.request
            own = item.sample_ids()
            named = named or bool(own)
            begin = len(ids)
            ids += own or [f"{source}/{self._sequence}/{begin + i}" for i in range(item.rows)]
            own = asked.segments(item.rows) if asked is not None else ()
            segmented = segmented or bool(own)
            segments += own or [""] * item.rows
            if asked is not None and (complaint := asked.complaint(item.rows)):
                self.tell(complaint)
        table = tuple(sorted(set(segments))) if segmented else ()
        places = {name: place for place, name in enumerate(table)}
        codes = np.array([places[s] for s in segments] if segmented else [], np.int32)
        return tuple(ids) if named and len(ids) == rows else (), codes, table

    def _write(self, batch: ScoreBatch) -> None:
        accepted = False
        try:
            if self._writer is None:
                self._writer = self._open_writer()
            accepted = self._writer.put(batch)
        except Exception:
            self._tally.failures += 1
            if not self._feed_failing:
                log.exception("the feed failed; scores are shed until it works again")
            self._feed_failing = True
        if accepted:
            self._feed_failing = False
            # A batch that was shed does not use up its number: sequences have no gaps.
            self._sequence += 1
            self._tally.batches += 1
            self._tally.scored += batch.rows
            self._tally.dropped += batch.dropped
            self._dropped = 0
            self._notices.clear()
        else:
            self._dropped += batch.rows
            del self._notices[:-_NOTICES_CARRIED]

    def tell(self, text: str) -> None:
        """A notice for the next batch, unless it waits already."""
        if text not in self._notices:
            self._notices.append(text)

    def close(self, now_ns: int, fraction: float) -> None:
        """Tell what no batch has carried yet, in a batch without rows, and close the writer."""
        self._notices += self._queue.take_notices()
        self._dropped += self._queue.take_shed()
        if self._dropped or self._notices:
            model, version, source = self._stamp
            self._write(
                ScoreBatch(
                    model=model,
                    version=version,
                    source=source,
                    sequence=self._sequence,
                    observed_at=now_ns,
                    scores={name: np.empty(0, np.float32) for name in self._digests},
                    digests=self._digests,
                    dropped=self._dropped,
                    sampled_fraction=fraction,
                    notices=tuple(self._notices),
                    repeats=self._repeats,
                )
            )
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception:
                log.exception("the feed's writer could not be closed")
