"""What a detector has to do to be compared. numpy only: peers run in environments of their own."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Contender", "OneByOne", "SideBySide", "Tumbling"]

F8 = npt.NDArray[np.float64]
READY = 40
"""References whose detector is kept ready."""


class Contender(ABC):
    """One detector with its settings, on one stream at a time."""

    promise: float = 0.0
    """Values between false alarms that the settings state; 0 says that nothing is stated."""

    @abstractmethod
    def begin(self, reference: F8) -> None:
        """Start anew with these scores as the reference."""

    @abstractmethod
    def first_alarm(self, values: F8) -> int:
        """Feed the values in order up to the first alarm: how many that took, 0 for no alarm."""

    @abstractmethod
    def state_bytes(self) -> int:
        """State that a restart needs beside the reference, where that can be told apart.

        0 where it cannot be stored.
        """


class SideBySide(Contender):
    """A contender that takes all repetitions of a cell together."""

    @abstractmethod
    def first_alarms(
        self, references: Sequence[F8], values: Sequence[F8], quiet: int
    ) -> list[tuple[int, int]]:
        """Per repetition: values up to the first alarm after `quiet` of them, and alarms before.

        0 values say that none came; after an alarm before `quiet` it starts anew.
        """


class OneByOne(Contender):
    """A detector that takes one value at a time.

    What was made ready with a reference is kept and copied, so that a detector with a costly set-up
    starts anew as often as it alarms.

    Args:
        build: from the reference to a detector that is ready, or a tuple that begins with one.
        step: feeds it a value and says whether to alarm.
    """

    def __init__(self, build: Callable[[F8], Any], step: Callable[[Any, float], bool]) -> None:
        self._build = build
        self._step = step
        self._ready: dict[bytes, Any] = {}
        self._detector: Any = None

    def begin(self, reference: F8) -> None:
        key = reference.tobytes()
        if key not in self._ready:
            if len(self._ready) == READY:
                self._ready.pop(next(iter(self._ready)))
            self._ready[key] = self._build(reference)
        self._detector = copy.deepcopy(self._ready[key])

    def first_alarm(self, values: F8) -> int:
        step, detector = self._step, self._detector
        for count, value in enumerate(values.tolist(), 1):
            if step(detector, value):
                return count
        return 0

    def state_bytes(self) -> int:
        made = self._detector
        try:
            return len(pickle.dumps(made[0] if isinstance(made, tuple) else made))
        except Exception:
            return 0


class Tumbling(Contender):
    """A two-sample test at the end of each window of `length` values.

    Args:
        length: values in a window.
        drifted: from the sorted reference and a window to a decision.
    """

    def __init__(self, length: int, drifted: Callable[[F8, F8], bool]) -> None:
        self.length = length
        self._drifted = drifted
        self._reference: F8 = np.empty(0)

    def begin(self, reference: F8) -> None:
        self._reference = np.sort(reference)

    def first_alarm(self, values: F8) -> int:
        for end in range(self.length, len(values) + 1, self.length):
            if self._drifted(self._reference, values[end - self.length : end]):
                return end
        return 0

    def state_bytes(self) -> int:
        return 8 * self.length
