"""The daemon's clock: jumps do no harm, what lasts is followed."""

from __future__ import annotations

from oodmon.daemon.steady import SteadyClock

SECOND = 1_000_000_000


class Clocks:
    """A wall clock and a monotonic one, both moved by hand."""

    def __init__(self) -> None:
        self.seconds = 50.0
        self.off = 0.0

    def wall(self) -> int:
        return round((1_000_000 + self.seconds + self.off) * SECOND)

    def monotonic(self) -> float:
        return self.seconds


def test_a_jump_is_not_followed_until_it_lasts() -> None:
    for jump in (7200.0, -7200.0):
        clocks = Clocks()
        steady = SteadyClock(clocks.wall, clocks.monotonic, doubt_seconds=30)
        clocks.off = jump
        for _ in range(29):
            clocks.seconds += 1.0
            assert steady() == round((1_000_000 + clocks.seconds) * SECOND)
        clocks.seconds += 3.0
        assert steady() == clocks.wall()


def test_a_jump_that_goes_back_leaves_no_trace() -> None:
    clocks = Clocks()
    steady = SteadyClock(clocks.wall, clocks.monotonic, doubt_seconds=30)
    for _ in range(20):  # each is doubted anew
        clocks.off = 86_400.0
        clocks.seconds += 10.0
        assert steady() < clocks.wall()
        clocks.off = 0.0
        clocks.seconds += 1.0
        assert steady() == clocks.wall()


def test_small_corrections_are_followed_at_once() -> None:
    clocks = Clocks()
    steady = SteadyClock(clocks.wall, clocks.monotonic)
    for _ in range(100):
        clocks.seconds += 1.0
        clocks.off += 0.2
        assert steady() == clocks.wall()
