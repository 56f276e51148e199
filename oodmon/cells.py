"""Ranks within a context: each score against the reference scores of its own predicted class.

Where the mix of traffic changes and no class looks different, ranks among all reference scores
change and ranks within the class do not (Mondrian conformal prediction: Vovk, Gammerman and Shafer,
*Algorithmic Learning in a Random World*, section 4.5).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import Calibration
from oodmon.errors import ContractError
from oodmon.ranks import uniforms
from oodmon.records import BIN_EDGES, ScoreBatch, Window

__all__ = ["CONTEXTS", "Cells"]

CONTEXTS: Final = ("", "predicted")
"""What ranks may be taken within: nothing, or the predicted class."""
_LEAST: Final = 50
"""Reference scores that make a cell of its own; classes with fewer share one."""


class Cells:
    """The reference scores of one detector, cell by cell.

    The rank of a score in its cell, ties and the room between two places drawn at random, is
    uniform on (0, 1) in every cell while nothing changes. It is then rounded up to one of as many
    places as the smallest cell has: so the law of the bins is the same whatever the mix, and drift
    tests reckon with the smallest cell's error, which is too careful for the others.

    Args:
        calibration: with predicted classes; `ContractError` where it has none.
    """

    def __init__(self, calibration: Calibration) -> None:
        classes, scores = calibration.predicted, calibration.scores
        if not len(classes):
            raise ContractError(
                f"context: the calibration of {calibration.detector!r} knows no predicted classes; "
                "run `oodmon fit` again, with logits tapped"
            )
        self.calibration = calibration
        labels, members = np.unique(np.maximum(classes, -1), return_counts=True)
        own = labels[(members >= _LEAST) & (labels >= 0)]
        rest = int(members.sum() - members[np.isin(labels, own)].sum())
        # label → cell; cell 0 is for rare classes, and for those that the reference never saw.
        self._cell = np.zeros(int(own.max(initial=-1)) + 2, np.int64)
        self._cell[own] = np.arange(1, len(own) + 1)
        cell = self._cell_of(classes)
        place = np.searchsorted(scores, scores, side="left")
        if rest < _LEAST:
            # Too few to be ranked against: rare classes are ranked against everything.
            cell = np.concatenate([cell[cell > 0], np.zeros(len(scores), np.int64)])
            place = np.concatenate([place[self._cell_of(classes) > 0], place])
        self._stride = len(scores) + 1
        self._keys = np.sort(cell * self._stride + place)
        self._sizes = np.bincount(cell, minlength=len(own) + 1)
        self._before = np.cumsum(self._sizes) - self._sizes
        self.least = int(self._sizes.min())

    def _cell_of(self, classes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        # The last entry of the table is cell 0, for labels beyond it and for -1.
        inside = (classes >= 0) & (classes < len(self._cell) - 1)
        found: npt.NDArray[np.int64] = self._cell[np.where(inside, classes, -1)]
        return found

    def bins(self, batch: ScoreBatch) -> npt.NDArray[np.int64]:
        """(B,) bin of `BIN_EDGES` of each row's rank within its cell; -1 for NaN.

        What is drawn depends on the batch's place alone, so a replay draws the same. A batch
        without predicted classes is ranked in the cell of rare ones.
        """
        values = np.asarray(batch.scores[self.calibration.detector], np.float32)
        classes = batch.predicted if len(batch.predicted) else np.full(len(values), -1, np.int32)
        cell = self._cell_of(classes)
        lower = np.searchsorted(self.calibration.scores, values, side="left")
        upper = np.searchsorted(self.calibration.scores, values, side="right")
        base, before, size = cell * self._stride, self._before[cell], self._sizes[cell]
        less = np.searchsorted(self._keys, base + lower, side="left") - before
        not_more = np.searchsorted(self._keys, base + upper, side="left") - before
        name = f"{batch.source}/{batch.sequence}/{self.calibration.detector}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
        drawn = uniforms(seed, len(values)) * (not_more - less + 1)
        p = np.ceil((size - not_more + drawn) / (size + 1) * (self.least + 1)) / (self.least + 1)
        # Above 0 even where the draw was 0; rounded, so that places fall on the same side of edges.
        found = np.searchsorted(BIN_EDGES, np.round(np.maximum(p, 1 / (self.least + 1)), 12)) - 1
        return np.where(np.isnan(values), -1, found)

    def reference(self, model: str, version: str) -> Window:
        """As `Calibration.reference`, with the places of the smallest cell."""
        name = self.calibration.detector
        evenly = Calibration.from_scores(name, "", np.arange(self.least, dtype=np.float32))
        whole = self.calibration.reference(model, version)
        counts = evenly.reference().histogram(name).counts
        histogram = replace(whole.histogram(name), counts=counts)
        return replace(whole, samples=self.least, detectors={name: histogram})
