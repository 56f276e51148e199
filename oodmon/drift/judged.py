"""Drift tests that judge each window by itself against the reference, by a p-value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from oodmon.drift.tuned import Tunable
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window

__all__ = ["Judged", "Verdict", "gaps"]


class Verdict(NamedTuple):
    """What one window comes to.

    Attributes:
        statistic: compared with the threshold.
        threshold: at which the p-value is `alpha`.
        p_value: of the statistic, in [0, 1].
    """

    statistic: float
    threshold: float
    p_value: float


@dataclass(frozen=True)
class Judged(Tunable[Window]):
    """Nothing is remembered but the reference; the statistic is the effect.

    Args:
        alpha: false alarms per window and stream, in (0, 1).
        false_alarms: "" takes `alpha`; "1 per 30 days" has `oodmon fit` find it.
    """

    alpha: float = 0.001
    false_alarms: str = ""

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ContractError(f"drift.{self.name}.alpha: {self.alpha} is not in (0, 1)")
        self.check_promise()

    @abstractmethod
    def judge(self, window: Window, reference: Window, detector: str) -> Verdict:
        """Compare a window that holds scores with a reference that does."""

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"alpha": 0.01},)

    def nominal(self, windows: float) -> Self:
        """`alpha` is one in so many windows."""
        return replace(self, alpha=min(1.0 / windows, 0.5), false_alarms="")

    def start(self, reference: Window) -> Window:
        """Nothing is remembered but the reference."""
        self.refuse_untuned()
        return reference

    def step(self, state: Window, window: Window, detector: str) -> tuple[Window, DriftResult]:
        """Judge one window by itself."""
        n, m = window.histogram(detector).scored, state.histogram(detector).scored
        found = self.judge(window, state, detector) if n and m else Verdict(0.0, 1.0, 1.0)
        return state, self.result(
            window,
            state,
            detector,
            statistic=found.statistic,
            threshold=found.threshold,
            drifted=bool(n and m and found.statistic >= found.threshold),
            effect=found.statistic,
            p_value=min(max(found.p_value, 0.0), 1.0),
        )

    def freeze(self, state: Window) -> Mapping[str, npt.NDArray[Any]]:
        """Nothing to keep: the reference comes back by itself."""
        del state
        return {}

    def thaw(self, reference: Window, arrays: Mapping[str, npt.NDArray[Any]]) -> Window:
        """The reference."""
        del arrays
        return reference

    def run_length(self, window_seconds: float) -> float:
        """Windows of one stream between false alarms."""
        del window_seconds
        return 1.0 / self.alpha

    def promise(self, window_seconds: float) -> str:
        """The rate in words."""
        hours = window_seconds / self.alpha / 3600.0
        return (
            f"about {self.alpha:.2g} false alarms per window and stream on independent samples, "
            f"that is one per {hours:,.1f} hours of windows"
        )


def gaps(window: Window, reference: Window, detector: str) -> tuple[npt.NDArray[np.float64], float]:
    """F_n - F_m at the 65 edges of the bins, and the effective size n m / (n + m)."""
    seen, known = window.histogram(detector), reference.histogram(detector)
    n, m = seen.scored, known.scored
    gap = np.zeros(len(seen.counts) + 1)
    np.cumsum(seen.counts / n - known.counts / m, out=gap[1:])
    return gap, n * m / (n + m)
