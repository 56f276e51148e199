"""What the bets of one stream hold: how evidence grows from window to window.

`drift.budget.Budget` says what for, and why its promise holds.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.bets import F8, Bets
from oodmon.neighbours import Neighbours
from oodmon.ranks import ranked
from oodmon.records import Histogram

__all__ = ["I8", "Wealth", "distance"]

I8 = npt.NDArray[np.int64]

_ROOM: Final = math.log(1024.0)
"""Log wealth of one bet beyond the alarm: so many streams may share the promise, and one of them
that changes can still raise it alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Wealth:
    """The state of one stream.

    Attributes:
        table: shared by all streams of one reference.
        log_m: (J,) log of the Shiryaev-Roberts statistics.
        gains: (J,) log of what each bet has gained since the best moment to begin it, >= 0.
        starts: int64 (J,) that moment, ns.
        seen: int64 (64,) counts of the traffic in which no change was found.
        recent: int64 (64,) counts since a gain outweighed the number of bets.
        neighbours: how alike neighbouring samples are.
    """

    table: Bets
    log_m: F8
    gains: F8
    starts: I8
    seen: I8
    recent: I8
    neighbours: Neighbours

    @property
    def log_mean(self) -> float:
        """Log of the evidence; minus infinity where there is no bet."""
        return float(np.logaddexp.reduce(self.log_m + self.table.log_weights, initial=-np.inf))

    @property
    def onset(self) -> int:
        """Since when the best bet has only gained, ns; 0 where no gain outweighs the bets' number.

        The CUSUM estimate of a change point.
        """
        if not len(self.gains):
            return 0
        weighted = self.gains + self.table.log_weights
        best = int(np.argmax(weighted))
        return int(self.starts[best]) if weighted[best] > 0.0 else 0

    @property
    def correlation(self) -> float:
        """Lag-one autocorrelation that is reckoned with."""
        return self.neighbours.believed(self.seen, self.table.variance)

    def bet(self, histogram: Histogram, start: int, limit: float, name: bytes) -> Wealth:
        """After one more window.

        Args:
            histogram: of the window.
            start: of the window, ns.
            limit: log of the evidence that is an alarm.
            name: of stream and window: the seed of what is drawn for it.
        """
        table, counts = self.table, histogram.counts
        neighbours = self.neighbours.met(histogram.pairs, histogram.jumps)
        log_l = np.empty(len(table.log_bets))
        cut = table.sequential
        log_l[cut:] = table.log_bets[cut:] @ counts
        if cut:
            seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
            log_l[:cut] = table.log_bets[:cut] @ ranked(counts, table.places + self.seen, seed)
        log_l /= table.worth(neighbours.believed(self.seen, table.variance))
        grown = log_l + np.logaddexp(0.0, self.log_m)
        evidence = float(np.logaddexp.reduce(grown + table.log_weights))
        starts = np.where(self.gains > 0.0, self.starts, start)
        gains = np.maximum(self.gains + log_l, 0.0)
        # More than holds the alarm of many streams is not needed; a smaller M keeps the promise,
        # and lets the episode end.
        most = limit + _ROOM
        lead = float((gains + table.log_weights).max())
        return Wealth(
            table,
            grown - max(evidence - most, 0.0),
            np.maximum(gains - max(lead - most, 0.0), 0.0),
            starts,
            self.seen + counts if evidence < limit else self.seen,
            self.recent + counts if self.onset else counts,
            neighbours,
        )


def distance(counts: I8, q: F8) -> float:
    """Kolmogorov distance between counts and the reference's bins, 0 without counts."""
    total = int(counts.sum())
    if not total:
        return 0.0
    return float(np.abs(np.cumsum(counts / total - q)).max())
