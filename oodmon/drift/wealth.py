"""What the bets of one stream hold: how evidence grows from window to window.

`drift.budget.Budget` says what for, and why its promise holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.drift.bets import F8, Bets
from oodmon.drift.neighbours import Neighbours
from oodmon.ranks import ranked
from oodmon.records import Histogram

__all__ = ["I8", "Wealth"]

F4 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int64]

_ROOM: Final = math.log(1024.0)
"""Log evidence of one stream beyond the alarm, at least: where more streams share the promise it is
twice their number, so that one of them that changes can still raise it alone."""
_LEAST: Final = -1e3
"""Logs below this are as good as minus infinity, of which no difference can be taken."""
_TINY: Final = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True, eq=False)
class Wealth:
    """The state of one stream; or of S streams of one reference, every array with an axis before.

    Attributes:
        table: shared by all streams of one reference.
        log_m: float32 (J,) log of the Shiryaev-Roberts statistics.
        gains: float32 (J,) log of what each bet has gained since the best moment to begin it, >= 0.
        starts: int64 (J,) that moment, ns.
        seen: int64 (64,) counts of the traffic in which no change was found.
        recent: int64 (64,) counts since a gain outweighed the number of bets.
        neighbours: how alike neighbouring samples are.
    """

    table: Bets
    log_m: F4
    gains: F4
    starts: I8
    seen: I8
    recent: I8
    neighbours: Neighbours

    @staticmethod
    def stacked(states: Sequence[Wealth]) -> Wealth:
        """Streams of one reference as one state."""
        count = len(states)
        if count == 1:
            one, near = states[0], states[0].neighbours
            return Wealth(
                one.table,
                one.log_m[None],
                one.gains[None],
                one.starts[None],
                one.seen[None],
                one.recent[None],
                near,
            )

        def rows(arrays: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
            # A tenth of the time of np.stack.
            return np.concatenate(list(arrays)).reshape(count, -1)

        return Wealth(
            states[0].table,
            rows(state.log_m for state in states),
            rows(state.gains for state in states),
            rows(state.starts for state in states),
            rows(state.seen for state in states),
            rows(state.recent for state in states),
            Neighbours.of(np.array([state.neighbours.row() for state in states])),
        )

    def split(self) -> list[Wealth]:
        """The streams one by one; each row is copied, so that none keeps the others in memory."""
        if len(self.log_m) == 1:
            return [
                Wealth(
                    self.table,
                    self.log_m[0],
                    self.gains[0],
                    self.starts[0],
                    self.seen[0],
                    self.recent[0],
                    self.neighbours,
                )
            ]
        return [
            Wealth(
                self.table,
                self.log_m[row].copy(),
                self.gains[row].copy(),
                self.starts[row].copy(),
                self.seen[row].copy(),
                self.recent[row].copy(),
                Neighbours(*near),
            )
            for row, near in enumerate(self.neighbours.numbers().tolist())
        ]

    @property
    def log_mean(self) -> F8:
        """Log of the evidence; minus infinity where there is none."""
        return _log_sum(self.log_m + self.table.log_weights)

    @property
    def onset(self) -> I8:
        """Since when the best bet has only gained, ns; 0 where no gain outweighs the bets' number.

        The CUSUM estimate of a change point.
        """
        weighted = self.gains + self.table.log_weights
        if not weighted.shape[-1]:
            return np.zeros(weighted.shape[:-1], np.int64)
        best = np.argmax(weighted, -1)
        began = self.starts.reshape(-1, weighted.shape[-1])[np.arange(best.size), best.ravel()]
        return np.where(weighted.max(-1) > 0.0, began.reshape(best.shape), 0)

    @property
    def effect(self) -> F8:
        """Kolmogorov distance between the recent counts and the reference's bins, 0 without any."""
        total = self.recent.sum(-1, keepdims=True)
        found = self.recent / np.maximum(total, 1)
        found -= self.table.q
        found = np.abs(found.cumsum(-1)).max(-1)
        return np.where(total[..., 0] > 0, found, 0.0)

    @property
    def correlation(self) -> F8:
        """Lag-one autocorrelation that is reckoned with."""
        return self.neighbours.believed(self.seen, self.table.variance)

    def bet(
        self,
        histograms: Sequence[Histogram],
        starts: I8,
        limit: float,
        sharing: float,
        names: Sequence[bytes],
        *,
        alarming: bool = False,
    ) -> Wealth:
        """S streams after one more window each; of streams with bets alone.

        Args:
            histograms: of the windows, none empty.
            starts: int64 (S,) of the windows, ns.
            limit: log of the mean evidence that is an alarm.
            sharing: log of the number of streams that it is the mean of.
            names: of stream and window: the seeds of what is drawn for them.
            alarming: the mean has reached it.
        """
        table = self.table
        counts = np.concatenate([each.counts for each in histograms]).reshape(len(histograms), -1)
        neighbours = self.neighbours.after(histograms, counts)
        log_l = np.empty(self.log_m.shape)
        cut = table.sequential
        log_l[:, cut:] = counts @ table.log_bets[cut:].T
        if cut:
            drawn = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
            seeds = np.frombuffer(drawn, ">u8").astype(np.uint64) >> np.uint64(1)
            log_l[:, :cut] = ranked(counts, table.places + self.seen, seeds) @ (
                table.log_bets[:cut].T
            )
        log_l /= table.worth(neighbours.alike(self.seen, table.variance, table.of_squares))
        grown = log_l + np.maximum(self.log_m, 0.0) + np.log(1.0 + np.exp(-np.abs(self.log_m)))
        evidence = _log_sum(grown + table.log_weights)[:, None]
        begins = (self.gains + table.log_weights).max(1, keepdims=True) > 0.0
        begun = np.where(self.gains > 0.0, self.starts, starts[:, None])
        gains = np.maximum(self.gains + log_l, 0.0)
        # More than holds the alarm of many streams is not needed; a smaller M keeps the promise,
        # and lets the episode end.
        most = limit + max(_ROOM, sharing + math.log(2.0))
        # Ranks among a pool that is held still are not sequential ones: a promise that is kept by
        # them needs a pool that learns until there is an alarm, of all streams together.
        held = limit if alarming else limit + sharing
        return Wealth(
            table,
            (grown - np.maximum(evidence - most, 0.0)).astype(np.float32),
            # Each for itself: were all lowered with the first, a long change would look like a new
            # one whenever two bets that pay alike change places.
            np.minimum(gains, most - table.log_weights).astype(np.float32),
            begun,
            self.seen + counts * (evidence < held),
            counts + self.recent * begins,
            neighbours,
        )


def _log_sum(logs: F8) -> F8:
    """Log of the sum of the exponentials along the last axis."""
    if not logs.shape[-1]:
        return np.full(logs.shape[:-1], -np.inf)
    most = np.maximum(logs.max(-1, keepdims=True), _LEAST)
    summed = np.exp(logs - most).sum(-1)
    found = np.log(np.maximum(summed, _TINY)) + most[..., 0]
    return np.where(summed > 0.0, found, -np.inf)
