"""Which forward passes are read, so that watching costs no more than its budget.

Passes are chosen whole: one that is passed by costs next to nothing. The n-th pass is read when
frac(phase + n * golden ratio) < fraction. Of all such sequences the golden ratio's spreads most
evenly, for every fraction at once, and it does not fall into step with periodic traffic.
"""

from __future__ import annotations

import itertools
from typing import Final

__all__ = ["FLOOR", "Sampler"]

_GOLDEN: Final = 0.6180339887498949

FLOOR: Final = 0.001
"""The fraction never falls below: a model that is watched at all is seen now and then."""

_FIRST: Final = 0.1
"""Before anything is measured."""

_MEMORY: Final = 0.9
"""Share of what was measured that is kept at each measurement: the last ten or so count."""

_FASTEST_UP: Final = 2.0
_FASTEST_DOWN: Final = 0.25

PASSED_BY_SECONDS: Final = 10e-6
"""What the hooks cost a pass that is not read, rounded up from measurements on a few hooks."""


class Sampler:
    """Admits passes, and learns from what they cost which fraction the budget allows.

    With w seconds of serving and c seconds of watching per read pass, a fraction f costs
    f * c / w of the serving time; so f moves towards (budget * w - passing by) / c, by at most a
    factor of two upwards and four downwards at once.

    Args:
        budget: share of serving time, (0, 1]; 1 reads every pass.
        seed: moves the phase of the choice; the same seed chooses the same passes.
        first: the fraction before anything is measured.
    """

    def __init__(self, budget: float, seed: int = 0, first: float = _FIRST) -> None:
        self._budget = budget
        self._phase = (seed * _GOLDEN) % 1.0
        # Its next() is atomic, so serving threads need no lock.
        self._count = itertools.count()
        self.fraction = 1.0 if budget >= 1.0 else first
        self._passes = self._serving = self._cost = 0.0
        self._warm = False

    def admit(self) -> bool:
        """Whether the pass that starts now is read. Called in serving threads."""
        fraction = self.fraction
        if fraction >= 1.0:
            return True
        return self.draw() < fraction

    def draw(self) -> float:
        """The place of the pass that starts now, in [0, 1): it is read if that is below a fraction.

        Of two samplers that go by the same place the smaller one's passes are all the other's.
        """
        return (self._phase + next(self._count) * _GOLDEN) % 1.0

    def measured(self, passes: int, serving_seconds: float, cost_seconds: float) -> None:
        """So many read passes took so long to serve, and so long to read and score.

        Called in the scoring thread only. The very first measurement holds what happens once
        (loading kernels, allocating) and is left out.
        """
        if self._budget >= 1.0 or passes == 0:
            return
        if not self._warm:
            self._warm = True
            return
        self._passes = _MEMORY * self._passes + passes
        self._serving = _MEMORY * self._serving + serving_seconds
        self._cost = _MEMORY * self._cost + cost_seconds
        allowed = self._budget * self._serving - PASSED_BY_SECONDS * self._passes
        target = allowed / max(self._cost, 1e-9)
        fraction = self.fraction
        target = min(max(target, _FASTEST_DOWN * fraction), _FASTEST_UP * fraction)
        self.fraction = min(max(target, FLOOR), 1.0)
