"""Raw scores → tail probabilities in (0, 1]: after this, all detectors speak one unit.

The tail probability of a score s against n held-out in-distribution scores r is the conformal
p-value of Bates, Candès, Lei, Romano and Sesia, *Testing for outliers with conformal p-values*
(Annals of Statistics 2023):

    p(s) = (1 + #{i : r_i >= s}) / (n + 1)

For a sample from the same law P(p <= α) <= α at every α, whatever the detector and whatever the
ties; α below 1/(n + 1) cannot be reached, which is the price of n.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from oodmon.errors import StateError
from oodmon.records import BIN_EDGES, SAMPLE_SIZE, Histogram, Window
from oodmon.trust import check_unshared, write_private

__all__ = ["EXPECTED_ERROR", "NORMAL_SCORES", "Calibration", "covered", "expected_errors"]

_SCHEMA: Final = "oodmon.calibration/1"
_KINDS: Final[Mapping[str, np.dtype[Any]]] = {
    "scores": np.dtype(np.float32),
    "predicted": np.dtype(np.int32),
    "segment": np.dtype(np.int32),
    "times": np.dtype(np.int64),
}
"""What a file holds of each score."""
_MAX_SCORES: Final = 10_000_000
_CERTAIN: Final = 1e-7
"""Probabilities beyond this are as sure as there is: their log odds are still numbers."""
EXPECTED_ERROR: Final = "expected_error"
"""`Calibration.measures` of scores that are the probability of a wrong answer."""


def _normal_scores() -> npt.NDArray[np.float64]:
    # The integral of -Phi^-1 over (a, b] is phi(Phi^-1(b)) - phi(Phi^-1(a)).
    normal = NormalDist()
    density = [0.0, *(normal.pdf(normal.inv_cdf(edge)) for edge in BIN_EDGES[1:-1]), 0.0]
    scores: npt.NDArray[np.float64] = np.diff(np.asarray(density)) / np.diff(BIN_EDGES)
    scores.setflags(write=False)
    return scores


NORMAL_SCORES: Final = _normal_scores()
"""float64 (64,): mean of the normal score Phi^-1(1 - p) over each bin of `BIN_EDGES`, p uniform."""


def covered(level: float) -> npt.NDArray[np.float64]:
    """(64,) how much of each bin of `BIN_EDGES` lies at or below a tail probability.

    Linear within the bin that it cuts; counts @ this are the samples with p <= level.
    """
    return np.clip((level - BIN_EDGES[:-1]) / np.diff(BIN_EDGES), 0.0, 1.0)


def expected_errors(scores: npt.NDArray[np.floating[Any]]) -> int:
    """Sum of probabilities (n,) in millionths, NaN left out: a whole number adds in any order."""
    shares = np.clip(np.asarray(scores, np.float64), 0.0, 1.0)
    return int(np.rint(np.nan_to_num(shares, nan=0.0) * 1e6).astype(np.int64).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Held-out scores of one detector, sorted.

    Attributes:
        detector: id of the detector in the configuration.
        digest: the scorer that made the scores; a column with another digest is refused.
        scores: float32 (n,) ascending, finite or ±inf, no NaN.
        predicted: int32 (n,) the class predicted for each of them, or empty where none is known.
        segment: int32 (n,) into `segments`, -1 for none, or empty where none is known.
        segments: names that `segment` points into.
        times: int64 (n,) when each was observed, ns UTC, or empty where that is not known.
        labelled: held-out samples with a known true class, whatever the detector; 0 for none.
        wrong: of these, how many the model answered wrongly.
        origin: where the scores come from, in words, where they are not of `oodmon fit`: what was
            accepted, when and by whom.
        measures: what a score is beside a rank (`Detector.measures`).
        slope, offset: where scores are probabilities of a wrong answer, how labels set them right:
            the log odds become slope · log odds + offset. Ranks are not touched.
    """

    detector: str
    digest: str
    scores: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    origin: str = ""
    measures: str = ""
    segment: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    segments: tuple[str, ...] = ()
    times: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    labelled: int = 0
    wrong: int = 0
    slope: float = 1.0
    offset: float = 0.0
    _cuts: npt.NDArray[np.float32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scores = np.ascontiguousarray(self.scores, np.float32)
        if scores.ndim != 1 or len(scores) == 0:
            raise StateError(f"calibration of {self.detector!r}: no scores (shape {scores.shape})")
        if np.isnan(scores).any():
            raise StateError(f"calibration of {self.detector!r}: scores hold NaN")
        if (np.diff(scores) < 0).any():
            raise StateError(f"calibration of {self.detector!r}: scores are not sorted")
        scores.setflags(write=False)
        object.__setattr__(self, "scores", scores)
        for name, what in (
            ("predicted", "predicted classes"),
            ("segment", "segments"),
            ("times", "event times"),
        ):
            column = np.ascontiguousarray(getattr(self, name), _KINDS[name])
            if column.shape not in ((0,), scores.shape):
                raise StateError(
                    f"calibration of {self.detector!r}: {column.shape} {what} for "
                    f"{len(scores)} scores"
                )
            column.setflags(write=False)
            object.__setattr__(self, name, column)
        if not 0 <= self.wrong <= self.labelled:
            raise StateError(
                f"calibration of {self.detector!r}: {self.wrong} of {self.labelled} answers wrong"
            )
        if not (self.slope > 0.0 and np.isfinite([self.slope, self.offset]).all()):
            raise StateError(
                f"calibration of {self.detector!r}: slope {self.slope}, offset {self.offset}: "
                "expected a finite slope above 0 and a finite offset"
            )
        if self.segment.max(initial=-1) >= len(self.segments):
            raise StateError(
                f"calibration of {self.detector!r}: segment {self.segment.max()} has no name"
            )
        object.__setattr__(self, "_cuts", self._score_cuts(scores))

    @staticmethod
    def from_scores(
        detector: str,
        digest: str,
        scores: npt.NDArray[np.floating[Any]],
        predicted: npt.NDArray[np.integer[Any]] | None = None,
        measures: str = "",
        segments: Sequence[str] | npt.NDArray[np.str_] = (),
        times: Sequence[int] | npt.NDArray[np.int64] = (),
    ) -> Calibration:
        """Calibrate on held-out scores; rows that the detector could not score are left out.

        Args:
            detector, digest, measures: as the attributes.
            scores: (n,) in any order.
            predicted: (n,) predicted classes, or none.
            segments: n names, or none.
            times: n times, ns UTC, or none.
        """
        values = np.asarray(scores, np.float32).ravel()
        valid = np.flatnonzero(~np.isnan(values))
        order = valid[np.argsort(values[valid], kind="stable")]
        classes = np.empty(0, np.int32)
        if predicted is not None and len(predicted):
            classes = np.asarray(predicted).astype(np.int32)[order]
        names, places = np.unique(np.asarray(segments, np.str_), return_inverse=True)
        return Calibration(
            detector,
            digest,
            values[order],
            classes,
            measures=measures,
            segment=places.astype(np.int32)[order] if len(segments) else np.empty(0, np.int32),
            segments=tuple(names.tolist()),
            times=np.asarray(times, np.int64)[order] if len(times) else np.empty(0, np.int64),
        )

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over scorer and scores: streams that began with others start anew."""
        made = hashlib.blake2b(self.digest.encode(), digest_size=8)
        for part in (self.scores, self.predicted, self.segment, self.times):
            made.update(part.tobytes())
        if self.segments:
            made.update(json.dumps(self.segments).encode())
        if self.is_set_right:
            made.update(np.array([self.slope, self.offset]).tobytes())
        return made.hexdigest()

    def __len__(self) -> int:
        return len(self.scores)

    @staticmethod
    def _score_cuts(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Per inner edge e of the bins, descending p: the greatest score whose p is above e.

        p(s) > e  ⇔  #{r >= s} > e (n + 1) - 1, so with m the least whole number above that, the
        greatest such s is the m-th largest score (none when m is 0: then every s qualifies).
        """
        n = len(scores)
        # Rounded first: e (n + 1) that is whole in theory must not miss by a bit.
        least = np.floor(np.round(BIN_EDGES[1:-1] * (n + 1), 9)).astype(np.int64)
        cuts = np.where(least > 0, scores[np.clip(n - least, 0, n - 1)], np.float32(np.inf))
        return np.ascontiguousarray(cuts[::-1], np.float32)

    def tail_probabilities(self, scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """(B,) float64 in (0, 1]; NaN for NaN."""
        values = np.asarray(scores, np.float32)
        n = len(self.scores)
        at_least = n - np.searchsorted(self.scores, values, side="left")
        return np.where(np.isnan(values), np.nan, (1 + at_least) / (n + 1))

    def bins(self, scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int64]:
        """(B,) index of the bin of `BIN_EDGES` that holds the tail probability; -1 for NaN.

        The same answer as binning `tail_probabilities`, by one search among 63 scores instead of
        one among n.
        """
        values = np.asarray(scores, np.float32)
        bins = len(self._cuts) - np.searchsorted(self._cuts, values, side="left")
        return np.where(np.isnan(values), -1, bins)

    @property
    def is_set_right(self) -> bool:
        """Whether labels have changed what its scores are taken for."""
        return (self.slope, self.offset) != (1.0, 0.0)

    def wrong_at(self, scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """(B,) probability of a wrong answer at scores that measure it; NaN for NaN."""
        shares = np.clip(np.asarray(scores, np.float64), 0.0, 1.0)
        if not self.is_set_right:
            return shares
        shares = np.clip(shares, _CERTAIN, 1.0 - _CERTAIN)
        odds = self.slope * np.log(shares / (1.0 - shares)) + self.offset
        # By the hyperbolic tangent, which does not overflow.
        return 0.5 * (1.0 + np.tanh(0.5 * odds))

    def score_at(self, level: float) -> float:
        """The least score whose tail probability is at most `level`, or at most 1 / (n + 1)."""
        n = len(self.scores)
        above = max(int(np.floor(round(level * (n + 1), 9))) - 1, 0)
        # p <= level  <=>  at most `above` scores are at least s  <=>  s > the next one down.
        if above >= n:
            return -np.inf
        return float(np.nextafter(self.scores[n - 1 - above], np.float32(np.inf)))

    def reference(self, model: str = "", version: str = "", segment: str = "") -> Window:
        """The calibration scores as a window: what a drift test starts from.

        Each score is binned by the tail probability of a fresh sample that comes to lie beside it,
        so with the one place above them all these are the n + 1 places that such a sample may take.
        """
        n = len(self.scores)
        counts = np.bincount(self.bins(self.scores), minlength=len(BIN_EDGES) - 1)
        picks = np.unique(np.linspace(0, n - 1, min(n, SAMPLE_SIZE)).round().astype(np.int64))
        histogram = Histogram(
            counts.astype(np.int64),
            0,
            picks.astype(np.uint64),
            self.scores[picks],
            judged=n if self.measures == EXPECTED_ERROR else 0,
            errors=expected_errors(self.wrong_at(self.scores))
            if self.measures == EXPECTED_ERROR
            else 0,
        )
        labels, seen = np.unique(self.predicted[self.predicted >= 0], return_counts=True)
        classes = dict(zip(labels.tolist(), seen.tolist(), strict=True))
        detectors = {self.detector: histogram}
        return Window(model, version, segment, 0, 0, n, detectors=detectors, predicted=classes)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, whole or not at all, readable by its owner only."""
        data = save(
            {name: np.array(getattr(self, name)) for name in _KINDS},
            {
                "schema": _SCHEMA,
                "detector": self.detector,
                "digest": self.digest,
                "origin": self.origin,
                "measures": self.measures,
                "segments": json.dumps(self.segments),
                "labelled": json.dumps(self.labelled),
                "wrong": json.dumps(self.wrong),
                "estimate": json.dumps([self.slope, self.offset]),
                "samples": json.dumps(len(self.scores)),
            },
        )
        write_private(path, data)

    @staticmethod
    def load(path: Path | str) -> Calibration:
        """Read what `save` wrote; `StateError` names the file and what is wrong with it."""
        check_unshared(path)
        try:
            with safe_open(path, framework="numpy") as file:
                meta = file.metadata() or {}
                schema = meta.get("schema", "none")
                if schema != _SCHEMA:
                    raise StateError(f"{path}: schema is {schema}, expected {_SCHEMA}")
                shape = file.get_slice("scores").get_shape()
                if len(shape) != 1 or shape[0] > _MAX_SCORES:
                    raise StateError(f"{path}: scores have shape {shape}")
                columns = {name: file.get_tensor(name) for name in _KINDS}
                segments = json.loads(meta.get("segments", "[]"))
                labelled, wrong = int(meta.get("labelled", "0")), int(meta.get("wrong", "0"))
                slope, offset = map(float, json.loads(meta.get("estimate", "[1.0, 0.0]")))
        except FileNotFoundError:
            raise StateError(f"{path}: no such file; `oodmon fit` makes it") from None
        except (OSError, SafetensorError, ValueError, TypeError, OverflowError) as error:
            raise StateError(f"{path}: not a calibration: {error}") from None
        for name, column in columns.items():
            if column.dtype != _KINDS[name]:
                raise StateError(f"{path}: {name} are {column.dtype}, expected {_KINDS[name]}")
        if not (isinstance(segments, list) and all(isinstance(name, str) for name in segments)):
            raise StateError(f"{path}: segments are no list of names")
        detector, digest, origin, measures = (
            meta.get(key, "") for key in ("detector", "digest", "origin", "measures")
        )
        return Calibration(
            detector,
            digest,
            origin=origin,
            measures=measures,
            segments=tuple(segments),
            labelled=labelled,
            wrong=wrong,
            slope=slope,
            offset=offset,
            **columns,
        )
