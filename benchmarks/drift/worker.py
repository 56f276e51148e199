"""Runs one contender on every stream and prints a JSON line per cell.

python -m benchmarks.drift.worker CONTENDER, with a plan as JSON on standard input.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import numpy.typing as npt

from benchmarks.drift import streams as laws
from benchmarks.drift.contender import Contender
from benchmarks.drift.streams import QUIET, Change, Pools, Stream

__all__ = ["Cell", "Plan"]

LEAST = 3
"""Repetitions that even a slow contender is given."""
DRIFTING = 2_000
"""Values that are the reference on a stream which drifts by itself."""
SLOWEST = 20_000
"""Values per second below which a contender is not put on those."""


@dataclass(frozen=True)
class Plan:
    """How much to do.

    Attributes:
        repetitions: of each cell, at most.
        seconds: of a cell, after which no repetition is begun.
        reference: scores in the reference.
        control: values without a change, for the run length.
        after: values after a change, within which it has to be found.
        pools: npz file with scores of real models.
        only: part of the names of the streams to run; "" is all.
        shares: of novel data in the streams of real models.
    """

    repetitions: int
    seconds: float
    reference: int = 1_000
    control: int = 20_000
    after: int = 10_000
    pools: str = ""
    only: str = ""
    shares: tuple[float, ...] = (0.05, 1.0)

    def streams(self, pools: Pools) -> list[Stream]:
        """The streams of this plan."""
        every = (*laws.SYNTHETIC, *laws.pooled(pools, self.shares))
        return [stream for stream in every if self.only in stream.name]


@dataclass(frozen=True)
class Cell:
    """What one contender did on one stream under one change ("" is none).

    Attributes:
        repetitions: that were run.
        alarms: of the repetitions in which it alarmed: the run length's, or after the change.
        values: at risk without a change; for a change, the sum of the delays that were found.
        squares: sum of the squared delays.
        false: alarms before the change.
        rate: values per second of processor time; 0 where it was not taken.
        state_bytes: what a restart needs.
        promise: values between false alarms that the settings state.
    """

    contender: str
    stream: str
    change: str
    repetitions: int = 0
    alarms: int = 0
    values: float = 0.0
    squares: float = 0.0
    false: int = 0
    rate: float = 0.0
    state_bytes: int = 0
    promise: float = 0.0


def run_length(one: Contender, name: str, stream: Stream, plan: Plan, pools: Pools) -> Cell:
    """Time to the first alarm without a change, cut at `plan.control`; and the speed."""
    begun = time.process_time()
    done, alarms, at_risk, spent, fed = 0, 0, 0, 0.0, 0
    for repetition in range(plan.repetitions):
        rng = stream.generator("", repetition)
        reference = stream.reference(rng, plan.reference, pools)
        values = stream.draw(rng, plan.control, 0, Change(""), pools)
        one.begin(reference)
        start = time.process_time()
        found = one.first_alarm(values)
        spent += time.process_time() - start
        fed += found or len(values)
        alarms += found > 0
        at_risk += found or len(values)
        done += 1
        if done >= LEAST and time.process_time() - begun > plan.seconds:
            break
    return Cell(
        name,
        stream.name,
        "",
        done,
        alarms,
        float(at_risk),
        rate=fed / max(spent, 1e-9),
        state_bytes=one.state_bytes(),
        promise=one.promise,
    )


def delay(
    one: Contender, name: str, stream: Stream, change: Change, plan: Plan, pools: Pools
) -> Cell:
    """Values from the change to the alarm; an alarm before it makes the contender start anew."""
    begun = time.process_time()
    done, alarms, total, squares, false = 0, 0, 0.0, 0.0, 0
    for repetition in range(plan.repetitions):
        rng = stream.generator(change.name, repetition)
        reference = stream.reference(rng, plan.reference, pools)
        values = stream.draw(rng, QUIET, plan.after, change, pools)
        one.begin(reference)
        at, waited = 0, math.inf
        while at < len(values):
            found = one.first_alarm(values[at:])
            if not found:
                break
            at += found
            if at > QUIET:
                waited = at - QUIET
                break
            false += 1
            one.begin(reference)
        done += 1
        if math.isfinite(waited):
            alarms += 1
            total += waited
            squares += waited**2
        if done >= LEAST and time.process_time() - begun > plan.seconds:
            break
    return Cell(
        name, stream.name, change.name, done, alarms, total, squares, false, promise=one.promise
    )


def over_time(one: Contender, values: npt.NDArray[np.float64]) -> list[int]:
    """Where it alarms on a stream that drifts by itself; it starts anew after each alarm.

    The reference is always what came before: the `DRIFTING` values up to the alarm.
    """
    alarms: list[int] = []
    at = DRIFTING
    while at < len(values):
        one.begin(values[at - DRIFTING : at])
        found = one.first_alarm(values[at:])
        if not found:
            break
        at += found
        alarms.append(at)
    return alarms


def contender(name: str) -> Contender:
    """The contender of this name; the import of its package may fail."""
    from benchmarks.drift import peers

    for builds in (peers.MAIN, peers.BENCH, peers.ALIBI):
        if name in builds:
            return builds[name]()
    from benchmarks.drift.ours import OURS

    return OURS[name]()


def main() -> None:
    """All cells of one contender."""
    name = sys.argv[1]
    plan = Plan(**json.load(sys.stdin))
    warnings.simplefilter("ignore")
    pools = laws.load(plan.pools)
    one = contender(name)
    one.begin(np.random.default_rng(0).standard_normal(plan.reference))
    rates: list[float] = []
    for stream in plan.streams(pools):
        cells = [run_length(one, name, stream, plan, pools)]
        cells += [delay(one, name, stream, change, plan, pools) for change in stream.changes]
        for cell in cells:
            print(json.dumps(asdict(cell)), flush=True)
        rates.append(cells[0].rate)
    for stream_name in sorted(found for found in pools if found.startswith("drifting/")):
        if rates and min(rates) >= SLOWEST and not plan.only:
            told = {"contender": name, "drifting": stream_name.removeprefix("drifting/")}
            print(json.dumps(told | {"at": over_time(one, pools[stream_name])}), flush=True)


if __name__ == "__main__":
    main()
