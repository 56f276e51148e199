"""The default drift test: alarms at most as often as the user allows, and as soon as that permits.

How it works, and why the promise holds, is told in the class below and in docs/alarms.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from oodmon.bets import F8, Bets, bets
from oodmon.contracts import Arrays, DriftTest, Paper
from oodmon.errors import ContractError
from oodmon.records import ALL, BIN_EDGES, DriftResult, Histogram, Window
from oodmon.registry import drift

__all__ = ["Budget"]

_SECOND: Final = 1_000_000_000
_UNITS: Final = {
    "second": 1.0,
    "minute": 60.0,
    "hour": 3600.0,
    "day": 86400.0,
    "week": 604800.0,
    "year": 31557600.0,
}
_PROMISE: Final = re.compile(
    r"\s*1\s+per\s+(?P<number>\d+(?:\.\d+)?)\s+(?P<unit>[a-z]+?)s?\s*", re.IGNORECASE
)
_LOG10_FLOOR: Final = -9.0
"""Evidence below this is reported as this: it is as good as none."""

_SAFETY: Final = 3.0
"""Standard errors added to the measured autocorrelation; one is about sqrt(3 / pairs)."""
_MOST_CORRELATED: Final = 0.98
_MEMORY: Final = 2.0**20
"""Pairs beyond which the older half counts half: correlation may change over the months."""


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """One stream.

    Attributes:
        table: shared by all streams of one reference.
        log_m: (J,) log of the Shiryaev-Roberts statistics.
        recent: int64 (64,) counts since the evidence last was below one.
        since: when that was, ns.
        pairs, jumps: of neighbouring samples so far, older ones with less weight.
    """

    table: Bets
    log_m: F8
    recent: npt.NDArray[np.int64]
    since: int
    pairs: float = 0.0
    jumps: float = 0.0

    @property
    def autocorrelation(self) -> float:
        """Lag-one autocorrelation of the normal scores, if their law is the reference's; [0, 1].

        From the squared jumps between neighbours (von Neumann's ratio): unlike products, they do
        not rise when the mean does, so a shift does not pass for correlation.
        """
        if not self.pairs:
            return 0.0
        found = 1.0 - self.jumps / self.pairs / (2.0 * self.table.variance)
        return min(max(found, 0.0), 1.0)

    @property
    def block_length(self) -> float:
        """Samples that carry the evidence of one independent sample, with the estimate's error."""
        if not self.pairs:
            return 1.0
        upper = min(self.autocorrelation + _SAFETY / math.sqrt(self.pairs), _MOST_CORRELATED)
        return (1.0 + upper) / (1.0 - upper)


@drift.register("budget")
@dataclass(frozen=True)
class Budget(DriftTest[_State]):
    """E-detector whose expected run length to a false alarm is at least the one asked for.

    Reads      counts of tail probabilities per base window (pane); every sample once
    Statistic  log10 of the mean over streams and bets of M_j, with M_j <- L_j (1 + M_j) and
               L_j = prod_k f̃_jk^c_k (Shiryaev-Roberts sum of betting wealths)
    Threshold  log10 A, A = the allowed span between false alarms in base windows
    Reference  Shin, Ramdas and Rinaldo, E-detectors, NEJSDS 2024 (arXiv 2203.03532)

    A bet f_j is a bounded table over the bins, the likelihood ratio of one alternative (shifts and
    spreads of the normal score, a share of novel samples, excess mass below several α). It is
    divided by the most that it can earn under the null "the law of the scores is within total
    variation δ = `tolerated_fraction` of the reference law":

        f̃_j = f_j / (Σ_k q_k f_jk + δ (max_k f_jk - min_k f_jk) + ε_n Σ_k |f_j,k+1 - f_jk|)

    The last term pays for the n calibration samples: by Dvoretzky-Kiefer-Wolfowitz-Massart, the
    distribution function of the reference is known to ε_n = sqrt(ln(2/η) / 2n) with probability
    1 - η (`calibration_risk`), and summation by parts turns that into the total variation of the
    table. So E f̃_j <= 1 for every law in the ball, M_j - t is a supermartingale where samples are
    independent given the past, and the expected time to a false alarm is at least A base windows,
    whatever the dependence between detectors and segments. Bets are clipped where that grows
    faster under their own alternative (Huber's censored ratios), which is what makes a large δ or a
    small n affordable. Ranks are frozen (against the calibration sample alone): they cost nothing
    per sample and add over replicas (docs/adr/0002).

    Neighbouring requests are often alike. The test measures the lag-one autocorrelation φ of the
    normal scores and counts b = (1 + φ) / (1 - φ) samples as one: log L_j / b. For shifts of AR(1)
    traffic that is the exact worth of correlated samples, for the other bets it is less than that,
    and with b > 1 it stays fair for independent ones (E f̃^(1/b) <= 1 by Jensen). φ and b are
    published. Correlation that lasts for more than a few samples at a low φ is not seen by it.

    The effect is a lower bound in plain words: the largest difference between the share of samples
    below some tail probability, since the evidence began to grow, and the reference's share.

    Args:
        false_alarms: how often a false alarm may come: "1 per 30 days", "1 per 10000 windows".
        tolerated_fraction: share of traffic that may change without an alarm, in [0, 0.5].
        calibration_risk: η above.
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
    tolerated_fraction: float = 0.01
    calibration_risk: float = 0.05

    def __post_init__(self) -> None:
        if not _PROMISE.fullmatch(self.false_alarms) or self._allowed[0] <= 0:
            units = ", ".join(f"{unit}s" for unit in (*_UNITS, "window"))
            raise ContractError(
                f"false_alarms: expected `1 per <number> <unit>` with a unit of {units}; "
                f"found {self.false_alarms!r}"
            )
        if not 0.0 <= self.tolerated_fraction <= 0.5:
            raise ContractError(f"tolerated_fraction: {self.tolerated_fraction} is not in [0, 0.5]")
        if not 0.0 < self.calibration_risk < 1.0:
            raise ContractError(f"calibration_risk: {self.calibration_risk} is not in (0, 1)")

    @cached_property
    def _allowed(self) -> tuple[float, str]:
        match = _PROMISE.fullmatch(self.false_alarms)
        if match is None:
            return 0.0, ""
        number, unit = float(match["number"]), match["unit"].lower()
        if unit == "window":
            return number, unit
        return number * _UNITS.get(unit, 0.0), "second"

    def run_length(self, window_seconds: float) -> float:
        """A: the promised expected number of base windows between false alarms."""
        number, unit = self._allowed
        return max(number if unit == "window" else number / window_seconds, 1.0)

    def promise(self, window_seconds: float) -> str:
        """In words, for the alert and the report."""
        windows = self.run_length(window_seconds)
        return (
            f"false alarms come at most {self.false_alarms.strip()} on average, over all "
            f"detectors and segments together ({windows:,.0f} windows of {window_seconds:g} s), "
            f"while less than {self.tolerated_fraction:.1%} of the traffic changes"
        )

    def outlook(self, reference: Window) -> str:
        """What the calibration's size and the tolerated fraction leave to be found."""
        table = self.start(reference).table
        if not len(table.log_bets):
            return f"{table.n} calibration scores are too few to tell any change from chance"
        found = []
        if table.least_shift:
            found.append(f"shifts of {table.least_shift:g} σ of all samples")
        if table.least_share:
            found.append(f"{table.least_share:.0%} of novel samples")
        what = " or ".join(found) or "changes of spread"
        return f"{table.n} calibration scores: finds {what}, and more"

    # --- one stream -------------------------------------------------------------------------

    def start(self, reference: Window) -> _State:
        """No evidence yet."""
        counts = sum(
            (histogram.counts for histogram in reference.detectors.values()),
            np.zeros(len(BIN_EDGES) - 1, np.int64),
        )
        table = bets(tuple(counts.tolist()), self.tolerated_fraction, self.calibration_risk)
        bins = table.q.shape[0]
        return _State(table, np.full(len(table.log_bets), -np.inf), np.zeros(bins, np.int64), 0)

    def step(self, state: _State, window: Window, detector: str) -> tuple[_State, DriftResult]:
        """Take one base window; an empty one leaves the state as it is."""
        histogram = window.histogram(detector)
        scored = histogram.scored
        limit = math.log(self.run_length((window.end - window.start) / _SECOND))
        if scored and len(state.log_m):
            state = self._update(state, histogram, window.start, limit)
        statistic = self._log10(state)
        table = state.table
        return state, DriftResult(
            window.model,
            window.version,
            "",
            detector,
            window.segment,
            window.start,
            window.end,
            statistic,
            limit / math.log(10.0),
            drifted=False,  # decided over all streams together, in `combine`
            effect=_distance(state.recent, table.q),
            samples=scored,
            reference_samples=table.n,
            since=state.since,
        )

    @staticmethod
    def _update(state: _State, histogram: Histogram, start: int, limit: float) -> _State:
        bets, counts = len(state.log_m), histogram.counts
        weight = 0.5 if state.pairs > _MEMORY else 1.0
        state = replace(
            state,
            pairs=weight * state.pairs + histogram.pairs,
            jumps=weight * state.jumps + histogram.jumps / 1e6,
        )
        log_l = state.table.log_bets @ counts / state.block_length
        grown = log_l + np.logaddexp(0.0, state.log_m)
        # Beyond the point where one bet alone holds the alarm, more wealth would only delay its
        # end; a smaller M keeps the promise.
        log_m = np.minimum(grown, limit + math.log(2.0 * bets))
        quiet = not state.recent.any() or np.logaddexp.reduce(state.log_m) - math.log(bets) < 0.0
        recent = counts.copy() if quiet else state.recent + counts
        return replace(state, log_m=log_m, recent=recent, since=start if quiet else state.since)

    def measurements(self, state: _State) -> Mapping[str, float]:
        """The measured autocorrelation and the block length that follows from it."""
        return {
            "autocorrelation_ratio": state.autocorrelation,
            "block_length_samples": state.block_length,
        }

    @staticmethod
    def _log10(state: _State) -> float:
        if not len(state.log_m):
            return _LOG10_FLOOR
        log_mean = np.logaddexp.reduce(state.log_m) - math.log(len(state.log_m))
        return max(float(log_mean) / math.log(10.0), _LOG10_FLOOR)

    # --- all streams ------------------------------------------------------------------------

    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        """Decide on the mean evidence of all streams; name the streams by e-d-BH.

        A stream that had no traffic keeps its evidence. The mean of e-detectors is one whatever
        their dependence. Which streams: the k of D streams with the most evidence, k the largest
        for which the k-th has at least A D / k (Dandapanthula and Ramdas, arXiv 2501.04130).
        """
        if not results:
            return results
        everything = [*results, *others]
        evidence = np.array([result.statistic for result in everything])
        threshold = results[0].threshold
        mean = float(np.logaddexp.reduce(evidence * math.log(10.0))) / math.log(10.0)
        mean -= math.log10(len(everything))
        ordered = np.sort(evidence)[::-1]
        streams = len(ordered)
        bars = threshold + np.log10(streams / np.arange(1, streams + 1))
        reached = np.flatnonzero(ordered >= bars)
        bar = ordered[reached[-1]] if len(reached) else math.inf
        named = [replace(result, drifted=bool(result.statistic >= bar)) for result in results]
        first = results[0]
        worst = max(everything, key=lambda result: result.statistic)
        overall = replace(
            first,
            detector=ALL,
            segment=ALL,
            statistic=mean,
            drifted=mean >= threshold,
            effect=worst.effect,
            since=worst.since,
            samples=max(result.samples for result in results),
            reference_samples=worst.reference_samples,
        )
        return [*named, overall]

    # --- storage ----------------------------------------------------------------------------

    def freeze(self, state: _State) -> Arrays:
        """J floats and one histogram."""
        return {
            "log_m": state.log_m,
            "recent": state.recent,
            "since": np.array([state.since], np.int64),
            "neighbours": np.array([state.pairs, state.jumps]),
        }

    def thaw(self, reference: Window, arrays: Arrays) -> _State:
        """Back from `freeze`; a state of another set of bets starts anew."""
        fresh = self.start(reference)
        log_m = np.asarray(arrays["log_m"], np.float64)
        if log_m.shape != fresh.log_m.shape:
            return fresh
        return _State(
            fresh.table,
            log_m,
            np.asarray(arrays["recent"], np.int64),
            int(arrays["since"][0]),
            *(float(value) for value in arrays["neighbours"]),
        )


def _distance(counts: npt.NDArray[np.int64], q: F8) -> float:
    """Kolmogorov distance between counts and the reference's bins, 0 without counts."""
    total = int(counts.sum())
    if not total:
        return 0.0
    return float(np.abs(np.cumsum(counts / total - q)).max())
