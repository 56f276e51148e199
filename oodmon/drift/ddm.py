"""The drift detection method on the share of exceedances (DDM)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from oodmon.contracts import Paper
from oodmon.drift.series import exceeding
from oodmon.drift.tuned import Tunable
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window
from oodmon.registry import drift

__all__ = ["Ddm"]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """One stream.

    Attributes:
        reference: what windows are compared by.
        values: float64 (4,): samples and exceedances since the last alarm; the least share plus its
            standard error, and that standard error.
    """

    reference: Window
    values: npt.NDArray[np.float64]


@drift.register("ddm")
@dataclass(frozen=True)
class Ddm(Tunable[_State]):
    """Alarms when the share of exceedances is some standard errors above its own minimum.

    Reads      exceedances: samples with a tail probability of at most `level`
    Statistic  (p + s - p_min) / s_min; p the share of exceedances since the last alarm, s =
               sqrt(p (1 - p) / n), p_min and s_min where p + s was least
    Threshold  `deviations`
    Reference  Gama, Medas, Castillo and Rodrigues, SBIA 2004

    It compares the stream with its own past, not with the reference, and sees increases only; the
    longer all was quiet, the slower it is, since p is an average over everything. It is fed with
    counts, so its cost does not grow with the traffic and it decides once per window. The minimum
    is over all times, so that three deviations are no rate of false alarms: nothing is promised
    unless `false_alarms` is given. After an alarm it starts over. The effect is p - p_min.

    Args:
        deviations: standard errors above the minimum, above 1.
        level: tail probability that counts as an exceedance, in (0, 0.5].
        least_samples: seen before the first decision, at least 30.
        false_alarms: instead of `deviations`: "1 per 30 days" has `oodmon fit` find them.
    """

    deviations: float = 3.0
    level: float = 0.05
    least_samples: int = 500
    false_alarms: str = ""

    disjoint: ClassVar[bool] = True  # every sample counts once
    paper: ClassVar[Paper | None] = Paper(
        "Learning with drift detection",
        "J. Gama, P. Medas, G. Castillo, P. Rodrigues",
        "Brazilian Symposium on Artificial Intelligence",
        2004,
        "https://doi.org/10.1007/978-3-540-28645-5_29",
    )

    def __post_init__(self) -> None:
        if not 1.0 < self.deviations < math.inf:
            raise ContractError(f"drift.ddm.deviations: {self.deviations} is not above 1")
        if not 0.0 < self.level <= 0.5:
            raise ContractError(f"drift.ddm.level: {self.level} is not in (0, 0.5]")
        if self.least_samples < 30:
            raise ContractError(f"drift.ddm.least_samples: {self.least_samples} is below 30")
        self.check_promise()

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({}, {"deviations": 4.0, "level": 0.1})

    def nominal(self, windows: float) -> Self:
        """sqrt(2 ln windows): about the largest of so many independent normal deviations."""
        return replace(
            self, deviations=math.sqrt(2.0 * math.log(max(windows, 2.0))), false_alarms=""
        )

    def start(self, reference: Window) -> _State:
        """Nothing counted."""
        self.refuse_untuned()
        return _State(reference, np.zeros(4))

    def step(self, state: _State, window: Window, detector: str) -> tuple[_State, DriftResult]:
        """Count one window; an empty one is left out."""
        seen, known = window.histogram(detector), state.reference.histogram(detector)
        samples, exceedances, least, error = state.values.tolist()
        statistic, drifted, effect = 0.0, False, 0.0
        if seen.scored and known.scored:
            samples += seen.scored
            exceedances += exceeding(seen, self.level)
            if samples >= self.least_samples:
                # A share of 0 or 1 would have no error.
                share = min(max(exceedances, 0.5), samples - 0.5) / samples
                now = math.sqrt(share * (1.0 - share) / samples)
                if not error or share + now < least:
                    least, error = share + now, now
                effect = share - (least - error)
                statistic = (share + now - (least - error)) / error
                drifted = statistic >= self.deviations
        kept = np.array([samples, exceedances, least, error])
        return _State(state.reference, np.zeros(4) if drifted else kept), self.result(
            window,
            state.reference,
            detector,
            statistic=statistic,
            threshold=self.deviations,
            drifted=drifted,
            effect=effect,
        )

    def freeze(self, state: _State) -> Mapping[str, npt.NDArray[Any]]:
        """Four numbers."""
        return {"values": state.values}

    def thaw(self, reference: Window, arrays: Mapping[str, npt.NDArray[Any]]) -> _State:
        """Back from `freeze`."""
        return _State(reference, np.array(arrays["values"], np.float64))

    def promise(self, window_seconds: float) -> str:
        """There is none without `false_alarms`."""
        del window_seconds
        return f"none: {self.deviations:g} deviations from a minimum are no rate of false alarms"
