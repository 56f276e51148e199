"""Windows in which nothing changed, resampled from held-out scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import EXPECTED_ERROR, Calibration, expected_errors
from oodmon.cells import Cells
from oodmon.contexts import Context
from oodmon.records import BIN_EDGES, SAMPLE_SIZE, Histogram, Window

__all__ = ["Held", "block_length", "resampled"]

_SECOND: Final = 1_000_000_000
_BLOCKS: Final = 80.0
"""A block of b breaks about a share 2 φ / (b (1 - φ²)) of the correlation: a fortieth here."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The held-out scores of one detector as they came.

    Attributes:
        calibration: made of them.
        scores: float32 (n,) in the order of the data.
        predicted: int64 (n,) their predicted classes, or empty.
        block: neighbours that are drawn together; 1 draws one by one.
        ranked: float32 (n,) what they are ranked by, where that is not the scores: `within`.
        reference: so many of them make a reference; 0 is all of them.
    """

    calibration: Calibration
    scores: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]
    block: int = 1
    ranked: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    reference: int = 0

    def within(self, context: Context, *, in_order: bool) -> Held:
        """Ranked within contexts, among as few as the smallest cell has.

        That is the law that all cells have in service, whatever the mix (`Cells`): a sample stands
        where it stands among its like.
        """
        cells = Cells(self.calibration, context)
        ranked = np.empty(len(self.scores), np.float32)
        ranked[np.argsort(self.scores, kind="stable")] = cells.ranks()
        block = block_length(ranked) if in_order else 1
        return replace(self, block=block, ranked=ranked, reference=cells.least)


def block_length(scores: npt.NDArray[np.float32]) -> int:
    """Neighbours to draw together, from the lag-one correlation of the scores' ranks in order.

    80 φ / (1 - φ²): long enough to keep nearly all of the correlation, so short that a window is
    made of several, or it could only be one that was seen. At most a tenth of the scores, 1 where φ
    is within three standard errors of zero.
    """
    n = len(scores)
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable").astype(np.float64)
    ranks -= ranks.mean()
    power = float(ranks @ ranks)
    phi = float(ranks[1:] @ ranks[:-1]) / power if power else 0.0
    if phi < 3.0 / math.sqrt(n):
        return 1
    phi = min(phi, 0.99)
    return max(min(math.ceil(_BLOCKS * phi / (1.0 - phi**2)), n // 10), 1)


def _drawn(n: int, block: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """(count,) of n places, in blocks of neighbours (Künsch's moving blocks)."""
    blocks = -(-count // block)
    starts = rng.integers(0, n - block + 1, blocks)
    places: npt.NDArray[np.int64] = (starts[:, None] + np.arange(block)).ravel()[:count]
    return places


def resampled(
    held: Held, samples: int, windows: int, rng: np.random.Generator, window_seconds: float = 1.0
) -> tuple[Window, Iterator[Window]]:
    """A reference and so many windows of `samples` samples, all drawn from the held-out scores."""
    n = len(held.scores)
    own = _drawn(n, held.block, held.reference or n, rng)
    ranked = held.ranked if len(held.ranked) else held.scores
    predicted = held.predicted[own] if len(held.predicted) else None
    name = held.calibration.detector
    measures, digest = held.calibration.measures, held.calibration.digest
    drawn = Calibration.from_scores(name, digest, ranked[own], predicted, measures)
    span = round(window_seconds * _SECOND)
    places = _drawn(n, held.block, windows * samples, rng)
    bins = len(BIN_EDGES) - 1
    found = drawn.bins(ranked[places]).reshape(windows, samples)
    offsets = found + bins * np.arange(windows)[:, None]
    counts = np.bincount(offsets.ravel(), minlength=windows * bins).reshape(windows, bins)
    keys = np.arange(min(samples, SAMPLE_SIZE), dtype=np.uint64)

    def closed() -> Iterator[Window]:
        for index in range(windows):
            rows = places[index * samples : (index + 1) * samples]
            classes = {}
            if len(held.predicted):
                seen = np.bincount(held.predicted[rows])
                classes = {int(label): int(seen[label]) for label in seen.nonzero()[0]}
            judged = samples if measures == EXPECTED_ERROR else 0
            wrong = held.calibration.wrong_at(held.scores[rows]) if judged else held.scores[:0]
            errors = expected_errors(wrong)
            histogram = Histogram(
                counts[index],
                0,
                keys,
                held.scores[rows[: len(keys)]],
                judged=judged,
                errors=errors,
            )
            yield Window(
                "",
                "",
                "",
                index * span,
                (index + 1) * span,
                samples,
                detectors={name: histogram},
                predicted=classes,
            )

    return drawn.reference(), closed()
