"""Runs one contender on every stream and prints a JSON line per cell.

python -m benchmarks.drift.worker CONTENDER, with a plan as JSON on standard input, and under `done`
what need not be run again: [stream, change].
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.drift import streams as laws
from benchmarks.drift.contender import F8, Contender, SideBySide
from benchmarks.drift.streams import QUIET, Change, Pools, Stream

__all__ = ["Cell", "Plan"]

LEAST = 3
"""Repetitions that a slow contender is given."""
SLOW = 5.0
"""Beyond so many times the seconds of a cell not even those."""
DRIFTING = 2_000
"""Values that are the reference on a stream which drifts by itself."""
SLOWEST = 20_000
"""Values per second below which a contender is not put on those."""
MOST = 200
"""Alarms on such a stream, after which it is left."""


@dataclass(frozen=True)
class Plan:
    """How much to do.

    Attributes:
        repetitions: of each cell, at most.
        seconds: of processor time in a cell, after which no repetition is begun; a detector that
            is slow to set up is given `LEAST` of them all the same.
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
        seconds: of processor time that the cell took.
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
    seconds: float = 0.0


class _Clock:
    """Processor time of a cell, and of it what setting up cost."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun = time.process_time()
        self._set_up = 0.0

    def begin(self, one: Contender, reference: F8) -> None:
        """Set the contender up for a repetition."""
        start = time.process_time()
        one.begin(reference)
        self._set_up += time.process_time() - start

    @property
    def spent(self) -> float:
        """Seconds, with all."""
        return time.process_time() - self._begun

    @property
    def fed(self) -> float:
        """Seconds, less those of setting up."""
        return self.spent - self._set_up

    def up(self, done: int) -> bool:
        """Whether no further repetition is to be begun after so many."""
        most = SLOW * self._seconds
        if done >= LEAST:
            return self.fed > self._seconds or self.spent > most
        return self.fed > most


def alarms(
    one: Contender, stream: Stream, change: Change, plan: Plan, pools: Pools, clock: _Clock
) -> list[tuple[int, int, int]]:
    """Of each repetition: values up to the first alarm after the change, alarms before, all values.

    0 says that it did not alarm. Without a change every alarm is one after it.
    """
    quiet = QUIET if change.name else 0
    after = plan.after if change.name else plan.control

    def drawn(repetition: int) -> tuple[F8, F8]:
        rng = stream.generator(change.name, repetition)
        reference = stream.reference(repetition, plan.reference, pools)
        return reference, stream.draw(rng, quiet, after, change, pools)

    if isinstance(one, SideBySide):
        references, values = zip(*map(drawn, range(plan.repetitions)), strict=True)
        told = one.first_alarms(references, values, quiet)
        return [(found, false, quiet + after) for found, false in told]
    done: list[tuple[int, int, int]] = []
    while len(done) < plan.repetitions and not (done and clock.up(len(done))):
        reference, stretch = drawn(len(done))
        clock.begin(one, reference)
        at, false = 0, 0
        while at < len(stretch):
            found = one.first_alarm(stretch[at:])
            at += found
            if not found or at > quiet:
                break
            false += 1
            one.begin(reference)
        done.append((at if at > quiet and found else 0, false, len(stretch)))
    return done


def run_length(one: Contender, name: str, stream: Stream, plan: Plan, pools: Pools) -> Cell:
    """Time to the first alarm without a change, cut at `plan.control`; and the speed."""
    clock = _Clock(plan.seconds)
    done = alarms(one, stream, Change(""), plan, pools, clock)
    at_risk = sum(found or size for found, _, size in done)
    return Cell(
        name,
        stream.name,
        "",
        len(done),
        sum(found > 0 for found, _, _ in done),
        float(at_risk),
        rate=at_risk / max(clock.fed, 1e-9),
        state_bytes=one.state_bytes(),
        promise=one.promise,
        seconds=clock.spent,
    )


def delay(
    one: Contender, name: str, stream: Stream, change: Change, plan: Plan, pools: Pools
) -> Cell:
    """Values from the change to the alarm; an alarm before it makes the contender start anew."""
    clock = _Clock(plan.seconds)
    done = alarms(one, stream, change, plan, pools, clock)
    waited = [found - QUIET for found, _, _ in done if found]
    return Cell(
        name,
        stream.name,
        change.name,
        len(done),
        len(waited),
        float(sum(waited)),
        float(sum(each**2 for each in waited)),
        sum(false for _, false, _ in done),
        promise=one.promise,
        seconds=clock.spent,
    )


def over_time(one: Contender, values: F8) -> list[int]:
    """Where it alarms on a stream that drifts by itself; it starts anew after each alarm.

    The reference is always what came before: the `DRIFTING` values up to the alarm.
    """
    alarms: list[int] = []
    at = DRIFTING
    while at < len(values) and len(alarms) < MOST:
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
    """All cells of one contender that are not done yet."""
    name = sys.argv[1]
    asked = json.load(sys.stdin)
    done = {(stream, change) for stream, change in asked.pop("done", ())}
    plan = Plan(**asked)
    warnings.simplefilter("ignore")
    pools = laws.load(plan.pools)
    one = contender(name)
    for stream in plan.streams(pools):
        for change in (Change(""), *stream.changes):
            if (stream.name, change.name) in done:
                continue
            if change.name:
                cell = delay(one, name, stream, change, plan, pools)
            else:
                cell = run_length(one, name, stream, plan, pools)
            print(json.dumps(asdict(cell)), flush=True)
    for stream_name in sorted(found for found in pools if found.startswith("drifting/")):
        told = stream_name.removeprefix("drifting/")
        if (told, "") in done or plan.only not in told:
            continue
        values = pools[stream_name]
        at = None if _slow(one, values) else over_time(one, values)
        print(json.dumps({"contender": name, "drifting": told, "at": at}), flush=True)


def _slow(one: Contender, values: F8) -> bool:
    """Whether it takes too long; one that alarms at once is not asked.

    Nor is one that is slow only while it is alone.
    """
    if isinstance(one, SideBySide):
        return False
    one.begin(values[:DRIFTING])
    start = time.process_time()
    fed = one.first_alarm(values[DRIFTING : 2 * DRIFTING]) or DRIFTING
    return fed > DRIFTING // 10 and fed < SLOWEST * (time.process_time() - start)


if __name__ == "__main__":
    main()
