"""The default drift test: alarms at most as often as the user allows, and as soon as that permits.

How it works, and why the promise holds, is told in the class below and in docs/alarms.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from oodmon.contracts import Arrays, DriftTest, Paper
from oodmon.drift.bets import bets
from oodmon.drift.neighbours import Neighbours
from oodmon.drift.together import LOG10_FLOOR, together
from oodmon.drift.wealth import Wealth
from oodmon.errors import ContractError
from oodmon.promises import Promise
from oodmon.records import BIN_EDGES, DriftResult, Window
from oodmon.registry import drift

__all__ = ["Budget"]

_SECOND: Final = 1_000_000_000
_LN10: Final = math.log(10.0)
_RANKS: Final = ("auto", "sequential", "frozen")
_RISK: Final = 0.05
"""That the share of changed traffic is less than what the alert says it is at least."""
_BANDS: Final = (10, 19, 28, 32, 37, 46, 55)
"""Edges of `BIN_EDGES` by which an alert tells what moved: 0.001, 0.01, 0.1, 0.2, …"""


@drift.register("budget")
@dataclass(frozen=True)
class Budget(DriftTest[Wealth]):
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
    small n affordable. So far these are *frozen* ranks: against the calibration sample alone.

    *Sequential* ranks are against the calibration sample and the stream so far (`oodmon.ranks`).
    While nothing changes they are independent and uniform for any n, so that no calibration error
    is paid for: the promise is exact at δ = 0, over the draw of calibration and stream together.
    At δ > 0 twice the price for δ is taken: the pool may have changed by δ one way when the traffic
    changes by δ the other. That the pool is a sample, and how a change that is tolerated shifts the
    ranks of those that are not changed, is not part of the proof, only of the simulations
    (docs/alarms.md). Sequential ranks find small changes with few calibration scores, and
    sooner the longer the stream was good; but a slow change enters the pool and is forgiven. Frozen
    ranks never forgive. So `auto` puts 85 % of the wealth on sequential and 15 % on frozen ranks: a
    mixture of e-detectors is one, at the price of 0.2 nats for the one and 1.9 for the other. A
    stream that by itself has the evidence for an alarm of all, and during an alarm one that has its
    share of that, adds nothing to its pool (docs/adr/0002).

    Neighbouring requests are often alike. The test measures the lag-one autocorrelation φ of the
    normal scores and counts b_j(φ) samples as one: log L_j / b_j, with b_j the factor by which the
    variance of a sum of the bet's logs grows in AR(1) traffic: (1 + φ) / (1 - φ) for a shift, less
    for all else; as much for all where the squares of neighbours say that samples repeat. With
    b > 1 a bet stays fair for independent samples (Jensen). φ and the b of a shift are published.
    Neighbours are those of one source. Where correlated traffic is dealt out to replicas, or is
    correlated at a low φ for long, means of windows lie further apart than φ explains; where
    that is sure, φ is what they tell. What lasts longer than windows is not seen (docs/adr/0004).

    The effect is the largest difference between the share of samples below some tail probability,
    since the change seems to have begun, and the reference's share.

    Args:
        false_alarms: how often a false alarm may come: "1 per 30 days", "1 per 10000 windows".
        tolerated_fraction: share of traffic that may change without an alarm, in [0, 0.5].
        calibration_risk: η above.
        ranks: "auto", "sequential" or "frozen".
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
    tolerated_fraction: float = 0.005
    calibration_risk: float = 0.05
    ranks: str = "auto"

    def __post_init__(self) -> None:
        Promise.parse(self.false_alarms)
        if not 0.0 <= self.tolerated_fraction <= 0.5:
            raise ContractError(f"tolerated_fraction: {self.tolerated_fraction} is not in [0, 0.5]")
        if not 0.0 < self.calibration_risk < 1.0:
            raise ContractError(f"calibration_risk: {self.calibration_risk} is not in (0, 1)")
        if self.ranks not in _RANKS:
            raise ContractError(f"ranks: expected one of {', '.join(_RANKS)}; found {self.ranks!r}")

    @cached_property
    def _allowed(self) -> Promise:
        return Promise.parse(self.false_alarms)

    def run_length(self, window_seconds: float) -> float:
        """A: the promised expected number of base windows between false alarms."""
        return self._allowed.windows(window_seconds)

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
        found = []
        if table.least_shift:
            found.append(f"shifts of {table.least_shift:g} σ of all samples")
        if table.least_share:
            found.append(f"{table.least_share:.0%} of novel samples")
        if not found:
            return f"{table.n} calibration scores are too few to tell any change from chance"
        return f"{table.n} calibration scores: finds {' or '.join(found)}, and more"

    # --- one stream -------------------------------------------------------------------------

    def start(self, reference: Window) -> Wealth:
        """No evidence yet."""
        counts = sum(
            (histogram.counts for histogram in reference.detectors.values()),
            np.zeros(len(BIN_EDGES) - 1, np.int64),
        )
        table = bets(
            tuple(counts.tolist()), self.tolerated_fraction, self.calibration_risk, self.ranks
        )
        found, none = len(table.log_bets), np.zeros(len(counts), np.int64)
        log_m, gains = np.full(found, -np.inf, np.float32), np.zeros(found, np.float32)
        return Wealth(table, log_m, gains, np.zeros(found, np.int64), none, none, Neighbours())

    def rearm(self, state: Wealth, reference: Window) -> Wealth:
        """No evidence; what was learnt from traffic that had not changed is kept."""
        fresh = self.start(reference)
        return replace(fresh, seen=state.seen, neighbours=state.neighbours)

    def step(self, state: Wealth, window: Window, detector: str) -> tuple[Wealth, DriftResult]:
        """Take one base window; an empty one leaves the state as it is."""
        return self.step_all([state], [window], [detector])[0]

    def step_all(
        self,
        states: Sequence[Wealth],
        windows: Sequence[Window],
        detectors: Sequence[str],
        *,
        sharing: int = 1,
        alarming: bool = False,
    ) -> list[tuple[Wealth, DriftResult]]:
        """One base window of each of many streams; those of one reference are reckoned together."""
        found: dict[int, tuple[Wealth, DriftResult]] = {}
        alike: dict[tuple[int, int], list[int]] = {}
        histograms = [w.histogram(d) for w, d in zip(windows, detectors, strict=True)]
        every = [histogram.counts for histogram in histograms]
        scored = np.concatenate(every).reshape(len(every), -1).sum(1).tolist() if every else []
        for row, (state, window) in enumerate(zip(states, windows, strict=True)):
            bets = bool(scored[row]) and len(state.log_m) > 0
            # The sign tells who bets.
            kind = (window.end - window.start) * (1 if bets else -1)
            alike.setdefault((id(state.table), kind), []).append(row)
        for (_, kind), rows in alike.items():
            limit = math.log(self.run_length(abs(kind) / _SECOND))
            many = Wealth.stacked([states[row] for row in rows])
            after = [states[row] for row in rows]
            if kind > 0:
                many = many.bet(
                    [histograms[row] for row in rows],
                    np.array([windows[row].start for row in rows], np.int64),
                    limit,
                    math.log(max(sharing, 1)),
                    [
                        f"{windows[row].start}/{windows[row].segment}/{detectors[row]}".encode()
                        for row in rows
                    ],
                    alarming=alarming,
                )
                after = many.split()
            told = (np.maximum(many.log_mean / _LN10, LOG10_FLOOR), many.effect, many.onset)
            for row, state, statistic, effect, since in zip(
                rows, after, *(column.tolist() for column in told), strict=True
            ):
                window = windows[row]
                found[row] = (
                    state,
                    DriftResult(
                        window.model,
                        window.version,
                        "",
                        detectors[row],
                        window.segment,
                        window.start,
                        window.end,
                        statistic,
                        limit / _LN10,
                        drifted=False,  # decided over all streams together, in `combine`
                        effect=effect,
                        samples=scored[row],
                        reference_samples=state.table.n,
                        since=since,
                    ),
                )
        return [found[row] for row in range(len(states))]

    def measurements(self, state: Wealth) -> Mapping[str, float]:
        """The measured autocorrelation and the block length that follows from it."""
        believed = float(state.correlation)
        found = state.neighbours.autocorrelation(state.seen, state.table.variance)
        return {
            "autocorrelation_ratio": float(found),
            "block_length_samples": (1.0 + believed) / (1.0 - believed),
        }

    def moved(self, state: Wealth) -> Mapping[str, Any]:
        """What the alert says of one stream, of the samples since the change was noticed.

        `changed_fraction`: share of the traffic that is different, by the effect; at least
        `changed_fraction_at_least` with probability 95 %. `bins`: samples with a tail probability
        of at most `p_at_most`, expected and found.
        """
        total = int(state.recent.sum())
        if not total:
            return {}
        found, expected = np.cumsum(state.recent), np.cumsum(state.table.q)
        believed = float(state.correlation)
        independent = total * (1.0 - believed) / (1.0 + believed)
        risk = math.log(2.0 / _RISK) / 2.0
        error = math.sqrt(risk / independent) + math.sqrt(risk / state.table.n)
        changed = float(state.effect)
        return {
            "samples": total,
            "changed_fraction": changed,
            "changed_fraction_at_least": max(changed - error, 0.0),
            "bins": [
                {
                    "p_at_most": round(float(BIN_EDGES[edge]), 4),
                    "expected": round(float(expected[edge - 1] * total), 1),
                    "found": int(found[edge - 1]),
                }
                for edge in _BANDS
            ],
        }

    # --- all streams ------------------------------------------------------------------------

    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        """Decide on the mean evidence of all streams; a silent one keeps what it has."""
        return together(results, [*results, *others])

    # --- storage ----------------------------------------------------------------------------

    def freeze(self, state: Wealth) -> Arrays:
        """Three numbers a bet and two histograms: some 2 kB."""
        near = state.neighbours.numbers()
        return {
            "log_m": state.log_m,
            "gains": state.gains,
            "starts": state.starts,
            "seen": _short(state.seen),
            "recent": _short(state.recent),
            "neighbours": near.reshape(*state.log_m.shape[:-1], near.shape[-1]),
        }

    def freeze_all(self, states: Sequence[Wealth]) -> list[tuple[list[int], Arrays]]:
        """`freeze` of the streams of one number of bets together."""
        alike: dict[int, list[int]] = {}
        for row, state in enumerate(states):
            alike.setdefault(len(state.log_m), []).append(row)
        return [
            (rows, self.freeze(Wealth.stacked([states[row] for row in rows])))
            for rows in alike.values()
        ]

    def thaw(self, reference: Window, arrays: Arrays) -> Wealth:
        """Back from `freeze`; a state of another set of bets starts anew."""
        fresh = self.start(reference)
        log_m = np.asarray(arrays["log_m"], np.float32)
        if log_m.shape != fresh.log_m.shape:
            return fresh
        return Wealth(
            fresh.table,
            log_m,
            np.asarray(arrays["gains"], np.float32),
            np.asarray(arrays["starts"], np.int64),
            np.asarray(arrays["seen"], np.int64),
            np.asarray(arrays["recent"], np.int64),
            Neighbours.of(np.asarray(arrays["neighbours"], np.float64)),
        )


def _short(counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """In the fewest bytes that hold them."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
