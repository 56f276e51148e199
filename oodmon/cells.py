"""Ranks within a context: each score against the reference scores of its own class, segment, hour.

Where the mix of traffic changes and no context looks different, ranks among all reference scores
change and ranks within the context do not (Mondrian conformal prediction: Vovk, Gammerman and
Shafer, *Algorithmic Learning in a Random World*, section 4.5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import Calibration
from oodmon.contexts import HOURS, Context
from oodmon.errors import ContractError
from oodmon.ranks import uniforms
from oodmon.records import BIN_EDGES, ScoreBatch, Window

__all__ = ["LEAST", "Cells", "contexts_of"]

LEAST: Final = 50
"""Reference scores that make a cell of its own; contexts with fewer share one."""
_MISSING: Final = {
    "predicted": "predicted classes; run `oodmon fit` again, with logits tapped",
    "segment": "segments; run `oodmon fit` again, on data that says the `segments` of its samples",
    "hour": "event times; run `oodmon fit` again, on data that says the `times` of its samples",
}

Codes = npt.NDArray[np.int64]


class Cells:
    """The reference scores of one detector, cell by cell.

    The rank of a score in its cell, ties and the room between two places drawn at random, is
    uniform on (0, 1) in every cell while nothing changes. It is then rounded up to one of as many
    places as the smallest cell has: so the law of the bins is the same whatever the mix, and drift
    tests reckon with the smallest cell's error, which is too careful for the others.

    Contexts with few reference scores, and those that the reference never saw, share a cell: they
    are ranked among all rare ones, or among everything where these are too few as well.

    Args:
        calibration: with what the context needs of each score; `ContractError` names what it lacks.
        context: what to rank within.
    """

    def __init__(self, calibration: Calibration, context: Context) -> None:
        scores = calibration.scores
        parts = _parts(calibration, context)
        self.calibration = calibration
        self.context = context
        self._segments = {name: place for place, name in enumerate(calibration.segments)}
        self._radix = {
            "predicted": int(calibration.predicted.max(initial=-1)) + 1,
            "segment": len(calibration.segments),
            "hour": HOURS,
        }
        codes = self._coded(parts)
        seen, members = np.unique(codes, return_counts=True)
        # Cell 0 is for rare contexts, and for those that the reference never saw.
        self._own = seen[(members >= LEAST) & (seen >= 0)]
        cell = self._cell_of(codes)
        place = np.searchsorted(scores, scores, side="left")
        rare = cell == 0
        if np.count_nonzero(rare) < LEAST:
            # Too few to be ranked against: rare contexts are ranked against everything.
            cell = np.concatenate([cell[~rare], np.zeros(len(scores), np.int64)])
            place = np.concatenate([place[~rare], place])
        self._stride = len(scores) + 1
        self._keys = np.sort(cell * self._stride + place)
        self._sizes = np.bincount(cell, minlength=len(self._own) + 1)
        self._before = np.cumsum(self._sizes) - self._sizes
        self.least = int(self._sizes.min())
        mine = self._cell_of(codes) > 0
        none = np.zeros(len(mine), np.int64)
        places = set(np.unique(parts.get("segment", none)[mine]).tolist())
        self._known_segments = {
            name for place, name in enumerate(calibration.segments) if place in places
        }
        self._known_hours = set(np.unique(parts.get("hour", none)[mine]).tolist())

    def _coded(self, parts: Mapping[str, Codes]) -> Codes:
        """One number for what a sample has of each context; -1 where any of it is unknown."""
        codes, unknown = np.zeros(1, np.int64), np.zeros(1, np.bool_)
        for name, part in parts.items():
            unknown = unknown | (part < 0) | (part >= self._radix[name])
            codes = codes * self._radix[name] + part
        return np.where(unknown, -1, codes)

    def _cell_of(self, codes: Codes) -> Codes:
        if not len(self._own):
            return np.zeros(len(codes), np.int64)
        at = np.minimum(np.searchsorted(self._own, codes), len(self._own) - 1)
        return np.where(self._own[at] == codes, at + 1, 0)

    def _cells_of(self, batch: ScoreBatch) -> Codes:
        """(B,) each row's cell."""
        unknown = np.full(batch.rows, -1, np.int64)
        parts = {}
        for name in self.context.of:
            if name == "predicted":
                parts[name] = batch.predicted.astype(np.int64) if len(batch.predicted) else unknown
            elif name == "segment":
                names = batch.segments if len(batch.segment) else ("",)
                table = np.array([self._segments.get(name, -1) for name in names], np.int64)
                parts[name] = table[batch.segment] if len(batch.segment) else unknown * 0 + table
            else:
                parts[name] = unknown * 0 + self.context.hours([batch.observed_at])
        return self._cell_of(np.broadcast_to(self._coded(parts), (batch.rows,)))

    def strangers(self, batch: ScoreBatch) -> list[str]:
        """Hours and segments in a batch that have no cell of their own, in words."""
        found = []
        if "hour" in self.context.of:
            hour = int(self.context.hours([batch.observed_at])[0])
            if hour not in self._known_hours:
                found.append(f"hour {hour} of the day ({self.context.time_zone})")
        if "segment" in self.context.of:
            names = batch.segments if len(batch.segment) else ("",)
            for place, name in enumerate(names):
                if name not in self._known_segments and (
                    not len(batch.segment) or bool((batch.segment == place).any())
                ):
                    found.append(f"segment {name!r}")
        return found if batch.rows else []

    def bins(self, batch: ScoreBatch) -> npt.NDArray[np.int64]:
        """(B,) bin of `BIN_EDGES` of each row's rank within its cell; -1 for NaN.

        What is drawn depends on the batch's place alone, so a replay draws the same. A row of
        which the context is not known is ranked in the cell of rare ones.
        """
        values = np.asarray(batch.scores[self.calibration.detector], np.float32)
        cell = self._cells_of(batch)
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

    def ranks(self) -> npt.NDArray[np.float64]:
        """(n,) where each reference score stands within its cell, in (0, 1), 1 the highest.

        In the order of the calibration's scores.
        """
        cell = self._cell_of(self._coded(_parts(self.calibration, self.context)))
        n = len(self.calibration)
        order = np.argsort(cell, kind="stable")
        members = np.bincount(cell, minlength=len(self._sizes))
        first = np.cumsum(members) - members
        place = np.empty(n)
        place[order] = np.arange(n) - first[cell[order]]
        ranks = (place + 0.5) / members[cell]
        if members[0] < LEAST:
            # Ranked against everything.
            ranks[cell == 0] = (np.flatnonzero(cell == 0) + 0.5) / n
        return ranks

    def evenly(self) -> Calibration:
        """As many scores as the smallest cell has: the law of ranks within any cell."""
        own = self.calibration
        scores = np.arange(self.least, dtype=np.float32)
        return Calibration.from_scores(own.detector, own.digest, scores)

    def reference(self, model: str, version: str) -> Window:
        """As `Calibration.reference`, with the places of the smallest cell."""
        name = self.calibration.detector
        whole = self.calibration.reference(model, version)
        counts = self.evenly().reference().histogram(name).counts
        histogram = replace(whole.histogram(name), counts=counts)
        return replace(whole, samples=self.least, detectors={name: histogram})


def contexts_of(calibration: Calibration, context: Context) -> npt.NDArray[np.str_]:
    """(n,) the context of each reference score, as a name that is the same in any calibration."""
    parts = dict(_parts(calibration, context))
    if "segment" in parts:
        # Numbers of segments are each calibration's own.
        parts["segment"] = np.array(calibration.segments, np.str_)[parts["segment"]]
    names = np.full(len(calibration), "")
    for part in parts.values():
        names = np.char.add(np.char.add(names, "/"), part.astype(np.str_))
    return names


def _parts(calibration: Calibration, context: Context) -> dict[str, npt.NDArray[Any]]:
    """What each reference score has of each context, as numbers; or what the calibration lacks."""
    columns: dict[str, npt.NDArray[Any]] = {
        "predicted": calibration.predicted,
        "segment": calibration.segment,
        "hour": calibration.times,
    }
    for name in context.of:
        if not len(columns[name]):
            raise ContractError(
                f"context: the calibration of {calibration.detector!r} knows no {_MISSING[name]}"
            )
    return {
        name: context.hours(columns[name]) if name == "hour" else columns[name].astype(np.int64)
        for name in context.of
    }
