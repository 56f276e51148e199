"""Kolmogorov–Smirnov windowing on one value per window (river)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

from river.drift import KSWIN

from oodmon.contracts import Paper
from oodmon.drift.series import Followed, SeriesTest, standing
from oodmon.errors import ContractError
from oodmon.records import DriftResult, Window
from oodmon.registry import drift

__all__ = ["Kswin"]

SMALLEST_P: Final = 1e-300
"""A p-value of 0 is shown as this, so that its logarithm is finite."""


@drift.register("kswin")
@dataclass(frozen=True)
class Kswin(SeriesTest[KSWIN]):
    """Compares the latest windows with as many drawn from those before, at every window.

    Reads      one value per window: the mean normal score of its tail probabilities, standardised
               against the reference (`oodmon.drift.series`)
    Statistic  -log10 of the two-sample Kolmogorov–Smirnov p-value of the last `recent_windows`
               values against as many drawn from the `memory_windows` - `recent_windows` before
               them; river.drift.KSWIN with a fixed seed
    Threshold  -log10(1 / (2 `run_length_windows`)). At every window the p-value is at most a with
               probability at most a, so no alarm comes within t windows with probability at least
               1 - a t, and the expected run length is at least 1 / (2 a): whatever the law of the
               values, as long as they are independent
    Reference  Raab, Heusinger and Schleif, Neurocomputing 2020

    It compares the stream with its own past, not with the reference: what was already so at the
    start is not a change to it, and after an alarm it starts over and takes what follows as the new
    normal, so `drifted` holds for one window per change. Nothing is decided in the first
    `memory_windows` windows after a start. The effect is the shift of the window's mean normal
    score, in standard deviations of the reference.

    Args:
        run_length_windows: expected windows of one stream between false alarms, at least 2; no
            more than the smallest p-value of `recent_windows` values can carry.
        memory_windows: values kept.
        recent_windows: values at the end that are held against the others.
        seed: of the draws.
        false_alarms: instead of `run_length_windows`: "1 per 30 days" has `oodmon fit` find it.
    """

    run_length_windows: float = 10_000.0
    memory_windows: int = 100
    recent_windows: int = 30
    seed: int = 0
    false_alarms: str = ""

    paper: ClassVar[Paper | None] = Paper(
        "Reactive soft prototype computing for concept drift streams",
        "C. Raab, M. Heusinger, F.-M. Schleif",
        "Neurocomputing",
        2020,
        "https://doi.org/10.1016/j.neucom.2019.11.111",
    )

    def __post_init__(self) -> None:
        if not 2.0 <= self.run_length_windows < math.inf:
            raise ContractError(
                f"drift.kswin.run_length_windows: {self.run_length_windows} is below 2"
            )
        if not 2 <= self.recent_windows <= self.memory_windows // 2:
            raise ContractError(
                f"drift.kswin.recent_windows: {self.recent_windows} is not in 2 to half of "
                f"memory_windows, {self.memory_windows // 2}"
            )
        # Two samples of r values that do not overlap at all have p = 2 / binomial(2 r, r).
        smallest = 2.0 / math.comb(2 * self.recent_windows, self.recent_windows)
        if self._alpha < smallest:
            raise ContractError(
                f"drift.kswin.recent_windows: {self.recent_windows} values cannot reach the "
                f"p-value {self._alpha:.2g} that run_length_windows asks for; at best "
                f"{smallest:.2g}"
            )
        self.check_promise()

    @property
    def _alpha(self) -> float:
        return 1.0 / (2.0 * self.run_length_windows)

    def build(self) -> KSWIN:
        """river's detector at this run length."""
        return KSWIN(
            alpha=self._alpha,
            window_size=self.memory_windows,
            stat_size=self.recent_windows,
            seed=self.seed,
        )

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options that the conformity checks are run with."""
        return ({"run_length_windows": 200.0},)

    def nominal(self, windows: float) -> Self:
        """`run_length_windows` is so many, within what the values can carry."""
        smallest = 2.0 / math.comb(2 * self.recent_windows, self.recent_windows)
        longest = 0.5 / smallest
        return replace(self, run_length_windows=min(max(windows, 2.0), longest), false_alarms="")

    def step(
        self, state: Followed[KSWIN], window: Window, detector: str
    ) -> tuple[Followed[KSWIN], DriftResult]:
        """Feed one window; an empty one is left out."""
        seen, known = window.histogram(detector), state.reference.histogram(detector)
        stands = standing(seen, known)
        p_value, drifted, series = 1.0, False, state.series
        if stands is not None:
            series, river = state.series.feed(stands.value)
            drifted = river.drift_detected
            # Until its memory is full, river leaves the p-value at 0.
            if drifted or len(series.values) >= self.memory_windows:
                p_value = min(max(float(river.p_value), SMALLEST_P), 1.0)
        return Followed(state.reference, series), self.result(
            window,
            state.reference,
            detector,
            statistic=-math.log10(p_value) + 0.0,
            threshold=-math.log10(self._alpha),
            drifted=drifted,
            effect=0.0 if stands is None else stands.effect,
            p_value=p_value,
        )

    def promise(self, window_seconds: float) -> str:
        """The run length in words: a bound, where the others' is simulated."""
        return f"at most {super().promise(window_seconds)}"
