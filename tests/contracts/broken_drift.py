"""Drift tests that break their contract in one way each, keyed by the check that must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from oodmon.checks import drift as checks
from oodmon.checks.drift import promises, restarts, windows
from oodmon.contracts import Arrays, DriftTest
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.records import ALL, DriftResult, Window

Step = tuple[Window, DriftResult]


@dataclass(frozen=True)
class Honest(KolmogorovSmirnov):
    """What the broken ones are made of: each overrides one thing."""

    alpha: float = 0.01


class Undocumented(Honest):
    pass


class NeverWrong(Honest):
    def run_length(self, window_seconds: float) -> float:
        return float("inf")


class Speechless(Honest):
    def promise(self, window_seconds: float) -> str:
        return ""


class Miscounts(Honest):
    """Is off by one in the size of the reference."""

    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, reference_samples=result.reference_samples - 1)


class SignedProbability(Honest):
    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, p_value=result.statistic - 0.5)


class DriftedBelowThreshold(Honest):
    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, threshold=result.threshold + 1.0)


class AlarmedByNothing(Honest):
    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, drifted=result.drifted or result.samples == 0)


class UndefinedOnNothing(Honest):
    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, result if result.samples else replace(result, statistic=float("nan"))


class DividesBySpread(Honest):
    """Infinite where all samples share a bin."""

    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        counts = window.histogram(detector).counts
        spread = np.count_nonzero(counts) - 1
        effect = result.effect / spread if spread else float("inf")
        return state, replace(result, effect=effect)


class DrawsGlobally(Honest):
    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        noise = float(np.random.random())  # noqa: NPY002 - the fault that is to be found
        return state, replace(result, effect=noise)


@dataclass(frozen=True)
class Counting(DriftTest[list[int]]):
    """Counts its windows in a state that it changes in place."""

    def start(self, reference: Window) -> list[int]:
        return [0]

    def step(
        self, state: list[int], window: Window, detector: str
    ) -> tuple[list[int], DriftResult]:
        state[0] += 1
        _, result = Honest().step(window, window, detector)
        return state, replace(result, effect=float(state[0]))

    def freeze(self, state: list[int]) -> Arrays:
        return {"seen": np.array(state)}

    def thaw(self, reference: Window, arrays: Arrays) -> list[int]:
        return [int(arrays["seen"][0])]


class Forgetful(Counting):
    def thaw(self, reference: Window, arrays: Arrays) -> list[int]:
        return [0]


class KeepsOnTheClass(Honest):
    """Remembers the window before, of whatever stream."""

    before: ClassVar[dict[str, float]] = {}

    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        effect = self.before.get(detector, 0.0)
        self.before[detector] = result.statistic
        return state, replace(result, effect=effect)


class TakesTheFirstClass(Honest):
    """Depends on the order in which the parts of a window were added."""

    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, effect=float(next(iter(window.predicted), 0)))


@dataclass(frozen=True)
class Hoarding(DriftTest[tuple[Window, ...]]):
    """Keeps all that it ever saw."""

    def start(self, reference: Window) -> tuple[Window, ...]:
        return (reference,)

    def step(
        self, state: tuple[Window, ...], window: Window, detector: str
    ) -> tuple[tuple[Window, ...], DriftResult]:
        _, result = Honest().step(state[0], window, detector)
        return (*state, window), result

    def freeze(self, state: tuple[Window, ...]) -> Arrays:
        return {"counts": np.array([window.histogram("scored").counts for window in state])}

    def thaw(self, reference: Window, arrays: Arrays) -> tuple[Window, ...]:
        return (reference,)


class FreezesObjects(Honest):
    def freeze(self, state: Window) -> Arrays:
        return {"state": np.array([state], dtype=object)}


@dataclass(frozen=True)
class LendsItsArray(Counting):
    """Hands out the very array that it goes on to write to."""

    def start(self, reference: Window) -> Any:
        return np.zeros(1, np.int64)

    def freeze(self, state: Any) -> Arrays:
        return {"seen": state}


class DropsTheLast(Honest):
    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        return results[:-1]


class OnlyTheFirstCounts(Honest):
    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        if not results:
            return results
        return [*results, replace(results[0], detector=ALL, segment=ALL)]


class Deaf(Honest):
    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, drifted=False)


class FearsSmallChanges(Honest):
    """Takes what is far off for a fault of the measurement, and says nothing."""

    def step(self, state: Window, window: Window, detector: str) -> Step:
        state, result = super().step(state, window, detector)
        return state, replace(result, drifted=result.drifted and result.effect < 0.4)


class Boastful(Honest):
    """Promises a hundred times the run length that it was built for."""

    def run_length(self, window_seconds: float) -> float:
        return 2_000.0

    def step(self, state: Window, window: Window, detector: str) -> Step:
        return Honest(alpha=0.05).step(state, window, detector)


class AnyStreamCounts(Honest):
    """Tells every stream's alarm as one of all together, and promises what holds for one."""

    def step(self, state: Window, window: Window, detector: str) -> Step:
        return Honest(alpha=0.05).step(state, window, detector)

    def run_length(self, window_seconds: float) -> float:
        return 50.0

    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        if not results:
            return results
        worst = max(results, key=lambda result: result.statistic)
        return [*results, replace(worst, detector=ALL, segment=ALL)]


class MixesUpStreams(Honest):
    """Gives the results of many streams in another order than they came."""

    def step_all(
        self,
        states: Sequence[Window],
        windows: Sequence[Window],
        detectors: Sequence[str],
        *,
        sharing: int = 1,
        alarming: bool = False,
    ) -> list[Step]:
        every = super().step_all(states, windows, detectors, sharing=sharing, alarming=alarming)
        return every[::-1]


BROKEN: Mapping[Callable[[DriftTest[Any]], None], tuple[DriftTest[Any], ...]] = {
    checks.check_docstring_tells_the_four: (Undocumented(),),
    promises.check_says_how_often_it_is_wrong: (NeverWrong(), Speechless()),
    promises.check_fires_on_a_shift_and_sooner_on_a_larger_one: (Deaf(), FearsSmallChanges()),
    promises.check_false_alarms_stay_within_the_promise: (Boastful(),),
    promises.check_streams_together_stay_within_the_promise: (Boastful(), AnyStreamCounts()),
    windows.check_results_are_well_formed: (
        Miscounts(),
        SignedProbability(),
        DriftedBelowThreshold(),
    ),
    windows.check_empty_windows_never_drift: (AlarmedByNothing(), UndefinedOnNothing()),
    windows.check_constant_windows_are_defined: (DividesBySpread(),),
    restarts.check_deterministic: (DrawsGlobally(),),
    restarts.check_step_leaves_the_old_state_alone: (Counting(),),
    restarts.check_streams_share_no_state: (KeepsOnTheClass(),),
    restarts.check_split_windows_add_up: (TakesTheFirstClass(),),
    restarts.check_many_streams_at_once_equal_each_by_itself: (MixesUpStreams(),),
    restarts.check_replay_equals_live: (Forgetful(),),
    restarts.check_frozen_state_is_plain_and_bounded: (
        Hoarding(),
        FreezesObjects(),
        LendsItsArray(),
    ),
    restarts.check_combining_keeps_every_stream: (DropsTheLast(), OnlyTheFirstCounts(), Deaf()),
}
