"""What a detector has to do to be compared. numpy only: peers run in environments of their own."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Contender", "OneByOne", "Tumbling"]

F8 = npt.NDArray[np.float64]


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
        """Size of the state that a restart needs; 0 where it cannot be stored."""


class OneByOne(Contender):
    """A detector that takes one value at a time.

    Args:
        build: from the reference to a function that takes a value and says whether to alarm, and
            the object to be weighed.
    """

    def __init__(self, build: Callable[[F8], tuple[Callable[[float], bool], Any]]) -> None:
        self._build = build
        self._step: Callable[[float], bool] = _never
        self._object: Any = None

    def begin(self, reference: F8) -> None:
        self._step, self._object = self._build(reference)

    def first_alarm(self, values: F8) -> int:
        step = self._step
        for count, value in enumerate(values.tolist(), 1):
            if step(value):
                return count
        return 0

    def state_bytes(self) -> int:
        try:
            return len(pickle.dumps(self._object))
        except Exception:
            return 0


def _never(value: float) -> bool:
    del value
    return False


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
        return int(self._reference.nbytes) + 8 * self.length
