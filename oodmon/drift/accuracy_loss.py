"""Does a change matter: alarms when the estimated accuracy falls by more than is tolerated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from oodmon.calibration import NORMAL_SCORES
from oodmon.contracts import Arrays, DriftTest, Paper
from oodmon.drift.neighbours import Neighbours
from oodmon.drift.together import LOG10_FLOOR, together
from oodmon.errors import ContractError
from oodmon.promises import Promise
from oodmon.records import DriftResult, Histogram, Window
from oodmon.registry import drift

__all__ = ["AccuracyLoss"]

_SECOND: Final = 1_000_000_000
_MILLIONTHS: Final = 1e6
_WORSE: Final = np.geomspace(0.004, 0.9, 16)
"""Alternatives: the error rate is so much of the way from what is tolerated to 1."""
_ROOM: Final = math.log(1024.0)
"""Log evidence of one stream beyond the alarm: so many streams may share the promise."""
_SURELY: Final = 1.0 - 1e-6
_HALVINGS: Final = 60

F8 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """One stream.

    Attributes:
        known: the reference's scores.
        bets: (2, J): log of what a wrong and a right answer pay; (2, 0) where nothing is judged.
        log_m: (J,) log of the Shiryaev-Roberts sums.
        gains, starts: (J,) log of what each bet gained since the best moment to begin it; that
            moment, ns.
        seen: int64 (64,) counts of the traffic, which tell how correlated it is.
        recent: errors and samples since a change was suspected.
        neighbours: how alike neighbouring samples are.
    """

    known: Histogram
    bets: F8
    log_m: F8
    gains: F8
    starts: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int64]
    recent: tuple[float, float]
    neighbours: Neighbours

    @property
    def log_mean(self) -> float:
        """Log of the evidence."""
        if not len(self.log_m):
            return -math.inf
        return float(np.logaddexp.reduce(self.log_m)) - math.log(len(self.log_m))

    @property
    def onset(self) -> int:
        """Since when the best bet has only gained, ns; 0 where that is no more than luck."""
        if not len(self.gains):
            return 0
        best = int(np.argmax(self.gains))
        return int(self.starts[best]) if self.gains[best] > math.log(len(self.gains)) else 0

    @property
    def block(self) -> float:
        """Samples that count as one."""
        total = max(int(self.known.counts.sum()), 1)
        mean = float(self.known.counts @ NORMAL_SCORES) / total
        spread = float(self.known.counts @ (NORMAL_SCORES - mean) ** 2) / total
        alike = float(self.neighbours.believed(self.seen, max(spread, 0.01)))
        return (1.0 + alike) / (1.0 - alike)


@drift.register("accuracy_loss")
@dataclass(frozen=True)
class AccuracyLoss(DriftTest[_State]):
    """E-detector on the expected errors: the model seems to be wrong more often than is tolerated.

    Reads      sums of expected errors per base window, of detectors that measure them
               (`expected_error`); all others are left alone
    Statistic  log10 of the mean over streams and alternatives q of M_q, with M_q <- L_q (1 + M_q),
               L_q = (q/m)^S ((1 - q)/(1 - m))^(n - S), S the errors expected among n samples
    Threshold  log10 A, A = the allowed span between false alarms in base windows
    Reference  Shin, Ramdas and Rinaldo, E-detectors, NEJSDS 2024 (arXiv 2203.03532)

    m is the error that is tolerated: the reference's expected error as high as its n samples allow
    (the upper Chernoff bound at 1 - `calibration_risk`), plus `tolerated_loss`. For q > m and any x
    in [0, 1] with a mean of at most m, E (q/m)^x ((1 - q)/(1 - m))^(1 - x) <= 1, since that is
    convex in x and so at most the line between its ends, which earns nothing at m. So the expected
    time to a false alarm is at least A base windows while each sample's expected error, given the
    past, is at most m: whatever the law of the scores and the dependence between streams.
    Neighbours that are alike are counted for what they are worth, as in `budget`. (Scores of `kind:
    threshold` show less correlation than there is: beyond a lag-one correlation of some 0.6 they
    alarm more often than promised; docs/alarms.md has figures.)

    It is silent about changes that leave the model as sure as it was, and about improvements. It
    judges the *estimate*: where doubt no longer means what it meant (concept drift), it is as blind
    as that is. The effect is the loss of estimated accuracy since the change seems to have begun.

    Args:
        false_alarms: how often a false alarm may come: "1 per 30 days", "1 per 10000 windows".
        tolerated_loss: of accuracy, that needs no alarm, in [0, 0.5].
        calibration_risk: that the reference's error is higher than is reckoned with.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = Paper(
        "E-detectors: a nonparametric framework for sequential change detection",
        "Shin, Ramdas and Rinaldo",
        "New England Journal of Statistics in Data Science",
        2024,
        "https://arxiv.org/abs/2203.03532",
    )
    disjoint: ClassVar[bool] = True

    false_alarms: str = "1 per 30 days"
    tolerated_loss: float = 0.02
    calibration_risk: float = 0.05

    def __post_init__(self) -> None:
        Promise.parse(self.false_alarms)
        if not 0.0 <= self.tolerated_loss <= 0.5:
            raise ContractError(f"tolerated_loss: {self.tolerated_loss} is not in [0, 0.5]")
        if not 0.0 < self.calibration_risk < 1.0:
            raise ContractError(f"calibration_risk: {self.calibration_risk} is not in (0, 1)")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({}, {"false_alarms": "1 per 500 windows", "tolerated_loss": 0.0})

    @cached_property
    def _allowed(self) -> Promise:
        return Promise.parse(self.false_alarms)

    def run_length(self, window_seconds: float) -> float:
        """A: the promised expected number of base windows between false alarms."""
        return self._allowed.windows(window_seconds)

    def promise(self, window_seconds: float) -> str:
        """In words, for the alert and the report."""
        return (
            f"false alarms come at most {self.false_alarms.strip()} on average, over all streams "
            f"together ({self.run_length(window_seconds):,.0f} windows of {window_seconds:g} s), "
            f"while the estimated accuracy falls by less than {self.tolerated_loss:.1%}"
        )

    def outlook(self, reference: Window) -> str:
        """The accuracy below which it looks for evidence."""
        for known in reference.detectors.values():
            if known.judged:
                tolerated = 1.0 - self._tolerated(known)
                return (
                    f"estimated accuracy {known.accuracy:.1%}; looks for less than {tolerated:.1%}"
                )
        return "no expected errors: it has nothing to look at"

    def _tolerated(self, known: Histogram) -> float:
        """m: the error rate that needs no alarm."""
        rate = known.errors / _MILLIONTHS / known.judged
        bar = math.log(1.0 / self.calibration_risk) / known.judged
        low, high = rate, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2.0
            low, high = (middle, high) if _divergence(rate, middle) <= bar else (low, middle)
        return min(high + self.tolerated_loss, _SURELY)

    # --- one stream -------------------------------------------------------------------------

    def start(self, reference: Window) -> _State:
        """No evidence yet."""
        known = next(iter(reference.detectors.values()), Histogram.empty())
        bets = np.empty((2, 0))
        if known.judged:
            m = self._tolerated(known)
            q = m + (1.0 - m) * _WORSE
            bets = np.log(np.stack([q / m, (1.0 - q) / (1.0 - m)]))
        found = bets.shape[1]
        none = np.zeros(len(known.counts), np.int64)
        log_m, starts = np.full(found, -np.inf), np.zeros(found, np.int64)
        return _State(known, bets, log_m, np.zeros(found), starts, none, (0.0, 0.0), Neighbours())

    def rearm(self, state: _State, reference: Window) -> _State:
        """No evidence; how alike neighbours are is kept."""
        return replace(self.start(reference), seen=state.seen, neighbours=state.neighbours)

    def step(self, state: _State, window: Window, detector: str) -> tuple[_State, DriftResult]:
        """Take one base window; one without expected errors leaves the state as it is."""
        histogram = window.histogram(detector)
        limit = math.log(self.run_length((window.end - window.start) / _SECOND))
        if histogram.judged and len(state.log_m):
            state = _bet(state, histogram, window.start, limit)
        return state, DriftResult(
            window.model,
            window.version,
            "",
            detector,
            window.segment,
            window.start,
            window.end,
            max(state.log_mean / math.log(10.0), LOG10_FLOOR),
            limit / math.log(10.0),
            drifted=False,  # decided over all streams together, in `combine`
            effect=_loss(state),
            samples=histogram.scored,
            reference_samples=state.known.judged,
            since=state.onset,
        )

    def moved(self, state: _State) -> Mapping[str, Any]:
        """Estimated accuracy in the reference, and since the change seems to have begun."""
        errors, samples = state.recent
        if not samples:
            return {}
        return {
            "samples": int(samples),
            "accuracy_reference": state.known.accuracy,
            "accuracy_since": 1.0 - errors / samples,
        }

    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        """Decide on the mean evidence of the streams that have expected errors.

        A silent one keeps what it has; one without expected errors can never have any, and would
        only take its share of the promise.
        """
        judging = [result for result in (*results, *others) if result.reference_samples]
        return together(results, judging)

    # --- storage ----------------------------------------------------------------------------

    def freeze(self, state: _State) -> Arrays:
        """Three numbers an alternative and a histogram: 1 kB."""
        return {
            "log_m": state.log_m,
            "gains": state.gains,
            "starts": state.starts,
            "seen": state.seen,
            "recent": np.array(state.recent),
            "neighbours": state.neighbours.numbers(),
        }

    def thaw(self, reference: Window, arrays: Arrays) -> _State:
        """Back from `freeze`; a state of another set of alternatives starts anew."""
        fresh = self.start(reference)
        if np.shape(arrays["log_m"]) != fresh.log_m.shape:
            return fresh
        errors, samples = (float(value) for value in arrays["recent"])
        return replace(
            fresh,
            log_m=np.asarray(arrays["log_m"], np.float64),
            gains=np.asarray(arrays["gains"], np.float64),
            starts=np.asarray(arrays["starts"], np.int64),
            seen=np.asarray(arrays["seen"], np.int64),
            recent=(errors, samples),
            neighbours=Neighbours.of(np.asarray(arrays["neighbours"], np.float64)),
        )


def _bet(state: _State, histogram: Histogram, start: int, limit: float) -> _State:
    """After one more window, in which so much evidence (log) is an alarm."""
    near = state.neighbours.after([histogram], histogram.counts[None])
    met = replace(state, neighbours=near)
    wrong = histogram.errors / _MILLIONTHS
    pay = (wrong * state.bets[0] + (histogram.judged - wrong) * state.bets[1]) / met.block
    grown = pay + np.logaddexp(0.0, state.log_m)
    starts = np.where(state.gains > 0.0, state.starts, start)
    gains = np.maximum(state.gains + pay, 0.0)
    # More than holds the alarm of many streams is not needed; with less the episode can end.
    most = limit + _ROOM + math.log(len(pay))
    errors, samples = state.recent if state.onset else (0.0, 0.0)
    return replace(
        met,
        log_m=np.minimum(grown, most),
        gains=np.minimum(gains, most),
        starts=starts,
        seen=state.seen + histogram.counts,
        recent=(errors + wrong, samples + histogram.judged),
    )


def _loss(state: _State) -> float:
    """Of estimated accuracy since a change was suspected, against the reference."""
    errors, samples = state.recent
    return errors / samples - (1.0 - state.known.accuracy) if samples else 0.0


def _divergence(rate: float, other: float) -> float:
    """Kullback-Leibler divergence of two coins, nats."""
    found = 0.0
    if rate > 0.0:
        found += rate * math.log(rate / other)
    if rate < 1.0:
        found += (1.0 - rate) * math.log((1.0 - rate) / max(1.0 - other, 1e-300))
    return found
