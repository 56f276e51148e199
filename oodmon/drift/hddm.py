"""Hoeffding's bound on the share of exceedances, window by window (HDDM)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from oodmon.contracts import Paper
from oodmon.drift.series import exceeding
from oodmon.drift.tuned import Tunable
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window
from oodmon.registry import drift

__all__ = ["Hddm"]

_STRONGEST: Final = 300.0
"""-log10 of the least p-value that is shown."""


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """One stream.

    Attributes:
        reference: what windows are compared by.
        values: float64 (6,): mean and spread weight of all since the last alarm, of the part up to
            the cut, and of the part after it. A spread weight is the sum of the squared weights of
            the samples in a mean, 1/n for an average; 0 where nothing was counted.
    """

    reference: Window
    values: npt.NDArray[np.float64]


@drift.register("hddm")
@dataclass(frozen=True)
class Hddm(Tunable[_State]):
    """Alarms when the share of exceedances is above its past by more than Hoeffding's bound.

    Reads      exceedances: samples with a tail probability of at most `level`
    Statistic  -log10 of exp(-2 d² / (v + w)), d the share since the cut less that before it, v and
               w the sums of the squared weights (1/n for averages); the cut is where the upper
               bound of the share was least
    Threshold  -log10 `alpha`
    Reference  Frías-Blanco et al., IEEE Trans. Knowl. Data Eng. 2015: HDDM_A, and HDDM_W where
               `decay` is above 0

    It compares the stream with its own past, not with the reference, and sees increases only. It is
    fed with counts, so its cost does not grow with the traffic and it decides once per window.
    Hoeffding's bound is far from sharp for rare events, and the cut is chosen among all, so that
    `alpha` is no rate: nothing is promised unless `false_alarms` is given, which finds an `alpha`
    of 0.1 to 0.5. After an alarm it starts over. The effect is d.

    Args:
        alpha: of the bound, in (0, 1).
        level: tail probability that counts as an exceedance, in (0, 0.5].
        decay: weight of the newest window in moving averages; 0 averages over everything.
        false_alarms: instead of `alpha`: "1 per 30 days" has `oodmon fit` find it.
    """

    alpha: float = 0.001
    level: float = 0.05
    decay: float = 0.0
    false_alarms: str = ""

    disjoint: ClassVar[bool] = True  # every sample counts once
    paper: ClassVar[Paper | None] = Paper(
        "Online and non-parametric drift detection methods based on Hoeffding's bounds",
        "I. Frías-Blanco, J. del Campo-Ávila, G. Ramos-Jiménez, et al.",
        "IEEE Transactions on Knowledge and Data Engineering",
        2015,
        "https://doi.org/10.1109/TKDE.2014.2345382",
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ContractError(f"drift.hddm.alpha: {self.alpha} is not in (0, 1)")
        if not 0.0 < self.level <= 0.5:
            raise ContractError(f"drift.hddm.level: {self.level} is not in (0, 0.5]")
        if not 0.0 <= self.decay < 1.0:
            raise ContractError(f"drift.hddm.decay: {self.decay} is not in [0, 1)")
        self.check_promise()

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01}, {"alpha": 0.01, "decay": 0.05})

    def nominal(self, windows: float) -> Self:
        """`alpha` is where a normal tail of the share of exceedances is one in so many windows.

        Hoeffding's bound allows for a variance of 1/4, where it is level (1 - level) = v: so the
        bound at one in N to the power of 4 v is about as strict as a normal tail of one in N.
        """
        power = 4.0 * self.level * (1.0 - self.level)
        return replace(self, alpha=max(windows, 1.001) ** -power, false_alarms="")

    def start(self, reference: Window) -> _State:
        """Nothing counted."""
        self.refuse_untuned()
        return _State(reference, np.zeros(6))

    def _merged(self, mean: float, spread: float, share: float, n: int) -> tuple[float, float]:
        """A mean with one more window of n samples in it."""
        if not spread:
            return share, 1.0 / n
        # As weights that add up to one: an average gives each sample the same.
        weight = self.decay or n / (n + 1.0 / spread)
        return (
            mean + weight * (share - mean),
            weight**2 / n + (1.0 - weight) ** 2 * spread,
        )

    def step(self, state: _State, window: Window, detector: str) -> tuple[_State, DriftResult]:
        """Count one window; an empty one is left out."""
        seen, known = window.histogram(detector), state.reference.histogram(detector)
        n = seen.scored
        mean, spread, cut, cut_spread, late, late_spread = state.values.tolist()
        found, drifted, effect = 0.0, False, 0.0
        if n and known.scored:
            share = exceeding(seen, self.level) / n
            late, late_spread = self._merged(late, late_spread, share, n)
            mean, spread = self._merged(mean, spread, share, n)
            bound = math.log(1.0 / self.alpha) / 2.0
            if not cut_spread or mean + math.sqrt(bound * spread) <= cut + math.sqrt(
                bound * cut_spread
            ):
                cut, cut_spread, late, late_spread = mean, spread, 0.0, 0.0
            else:
                effect = late - cut
                excess = max(effect, 0.0) ** 2 / (late_spread + cut_spread)
                found = min(2.0 * excess / math.log(10.0), _STRONGEST)
                drifted = found >= -math.log10(self.alpha)
        values = np.array([mean, spread, cut, cut_spread, late, late_spread])
        return _State(state.reference, np.zeros(6) if drifted else values), self.result(
            window,
            state.reference,
            detector,
            statistic=found,
            threshold=-math.log10(self.alpha),
            drifted=drifted,
            effect=effect,
        )

    def freeze(self, state: _State) -> Mapping[str, npt.NDArray[Any]]:
        """Six numbers."""
        return {"values": state.values}

    def thaw(self, reference: Window, arrays: Mapping[str, npt.NDArray[Any]]) -> _State:
        """Back from `freeze`."""
        return _State(reference, np.array(arrays["values"], np.float64))

    def promise(self, window_seconds: float) -> str:
        """There is none without `false_alarms`."""
        del window_seconds
        return f"none: Hoeffding's bound at {self.alpha:g} is no rate of false alarms"
