"""Gives a target its inputs and judges it: no crash, no hang, memory within measure."""

from __future__ import annotations

import logging
import signal
import time
import tracemalloc
import warnings
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from oodmon.errors import OodmonError
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import Target, seeds_of

__all__ = ["Outcome", "drive"]

_HANG_SECONDS: Final = 1.0  # of processor time: a busy machine makes no hang
_ALARM_SECONDS: Final = 60.0  # by the wall: what sleeps is ended too
_MEASURED: Final = 101  # one input in so many has its memory measured, which is slow
_ENOUGH: Final = 50


@dataclass
class Outcome:
    """What became of one target.

    Attributes:
        inputs: so many were given.
        bugs: input and what it did.
        worst: the largest memory in multiples of what is allowed.
    """

    name: str
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    worst: float = 0.0
    bugs: list[tuple[bytes, str]] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.inputs / max(self.seconds, 1e-9)
        return (
            f"{self.name:<16} {self.inputs:>10,} inputs {rate:>8,.0f}/s  slowest "
            f"{self.slowest:.3f} s  memory {self.worst:.2f} of what is allowed  "
            f"{len(self.bugs)} bugs"
        )


class _Hang(BaseException):
    """Raised into whatever runs for too long."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _Hang


def drive(target: Target, inputs: int, seed: int) -> Outcome:
    """Give the target so many inputs; the same numbers give the same inputs."""
    outcome = Outcome(target.name)
    mutator = Mutator(seeds_of(target.name), target.words, seed)
    before = signal.signal(signal.SIGALRM, _alarm)
    logging.disable(logging.CRITICAL)
    begun = time.monotonic()
    try:
        with target.open() as run, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data in seeds_of(target.name):
                _one(run, data, target, outcome, measured=False)
            outcome.slowest = 0.0  # the first calls import what they need
            outcome.bugs.clear()
            for number in range(inputs):
                _one(run, mutator.next(), target, outcome, measured=number % _MEASURED == 1)
                if len(outcome.bugs) >= _ENOUGH:
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        logging.disable(logging.NOTSET)
    outcome.seconds = time.monotonic() - begun
    return outcome


def _one(run: object, data: bytes, target: Target, outcome: Outcome, *, measured: bool) -> None:
    assert callable(run)
    outcome.inputs += 1
    if measured:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, _ALARM_SECONDS)
    begun = time.process_time()
    try:
        run(data)
    except OodmonError:
        pass
    except _Hang:
        outcome.bugs.append((data, "hangs"))
    except BaseException as error:
        outcome.bugs.append((data, f"{type(error).__name__}: {error}"[:300]))
        if isinstance(error, KeyboardInterrupt):
            raise
    took = time.process_time() - begun
    signal.setitimer(signal.ITIMER_REAL, 0)
    if measured:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        share = peak / (target.spare_bytes + target.factor * len(data))
        outcome.worst = max(outcome.worst, share)
        if share > 1:
            outcome.bugs.append((data, f"took {peak} bytes for {len(data)}"))
    else:
        outcome.slowest = max(outcome.slowest, took)
        if took > _HANG_SECONDS:
            outcome.bugs.append((data, f"took {took:.1f} s"))
