"""Drift tests whose threshold `oodmon fit` finds, so that a stated run length holds.

The thresholds of the textbooks hold for independent samples, some of them in the limit only. A test
that derives from `Tunable` can be moved along a scale of textbook run lengths; `Tuned` is one that
was put where resampled reference windows gave the run length which its user asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

from oodmon.contracts import Arrays, DriftTest
from oodmon.errors import ContractError
from oodmon.promises import Promise
from oodmon.records import DriftResult, Window

__all__ = ["Tunable", "Tuned"]

S = TypeVar("S")


class Tunable(DriftTest[S]):
    """A drift test with a nominal run length, and a promise that it may be tuned to.

    Attributes:
        false_alarms: "" takes the textbook threshold of the other options; "1 per 30 days" has
            `oodmon fit` find the threshold, over all detectors of a segment together.
    """

    false_alarms: str

    @abstractmethod
    def nominal(self, windows: float) -> Self:
        """The same test, with the threshold whose textbook run length is so many windows.

        Its `false_alarms` is "". A larger number never alarms sooner.
        """

    @staticmethod
    def result(
        window: Window,
        reference: Window,
        detector: str,
        *,
        statistic: float,
        threshold: float,
        drifted: bool,
        effect: float,
        p_value: float | None = None,
    ) -> DriftResult:
        """The decision on this window; how many samples it rests on is counted here."""
        return DriftResult(
            window.model,
            window.version,
            "",
            detector,
            window.segment,
            window.start,
            window.end,
            statistic,
            threshold,
            drifted,
            effect,
            window.histogram(detector).scored,
            reference.histogram(detector).scored,
            p_value,
        )

    def check_promise(self) -> None:
        """`ContractError` where `false_alarms` cannot be read; for `__post_init__`."""
        if self.false_alarms:
            Promise.parse(self.false_alarms)

    def refuse_untuned(self) -> None:
        """`ContractError` where the threshold that the promise needs was not found yet."""
        if self.false_alarms:
            raise ContractError(
                f"drift.{self.name}: false_alarms {self.false_alarms!r} needs a threshold that "
                "`oodmon fit` finds; build the test through the config, or leave the option out"
            )


@dataclass(frozen=True)
class Tuned(DriftTest[S]):
    """A test at the threshold that was found for its promise.

    Args:
        test: at that threshold.
        false_alarms: what it was tuned to.
        detectors: that share the promise.
        samples: in the windows that it was tuned on.
    """

    test: Tunable[S]
    false_alarms: str
    detectors: int
    samples: int

    name: ClassVar[str] = "tuned"

    @property
    def disjoint(self) -> bool:  # type: ignore[override]
        """As the test within."""
        return self.test.disjoint

    def start(self, reference: Window) -> S:
        """As the test within."""
        return self.test.start(reference)

    def step(self, state: S, window: Window, detector: str) -> tuple[S, DriftResult]:
        """As the test within."""
        return self.test.step(state, window, detector)

    def freeze(self, state: S) -> Arrays:
        """As the test within."""
        return self.test.freeze(state)

    def thaw(self, reference: Window, arrays: Arrays) -> S:
        """As the test within."""
        return self.test.thaw(reference, arrays)

    def combine(
        self, results: Sequence[DriftResult], others: Sequence[DriftResult] = ()
    ) -> Sequence[DriftResult]:
        """As the test within."""
        return self.test.combine(results, others)

    def outlook(self, reference: Window) -> str:
        """As the test within."""
        return self.test.outlook(reference)

    def measurements(self, state: S) -> Mapping[str, float]:
        """As the test within."""
        return self.test.measurements(state)

    def run_length(self, window_seconds: float) -> float:
        """Windows of one stream between false alarms, so that all detectors keep the promise."""
        return Promise.parse(self.false_alarms).windows(window_seconds) * self.detectors

    def promise(self, window_seconds: float) -> str:
        """What was tuned, in words."""
        del window_seconds
        return (
            f"about {self.false_alarms.strip()} on average over {self.detectors} "
            f"detector{'s' if self.detectors > 1 else ''} in each segment, as found on resampled "
            f"reference windows of {self.samples} samples"
        )
