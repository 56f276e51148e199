"""Checks that the decisions are the same however the traffic was cut, interrupted or ordered."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from oodmon.checks.drift.traffic import (
    DETECTOR,
    SAMPLES,
    Replica,
    decided,
    mixed,
    reference,
    shifted,
    stream,
    window,
)
from oodmon.contracts import DriftTest
from oodmon.records import ALL, DriftResult

Test = DriftTest[Any]

LARGEST_STATE: Final = 65_536
"""Bytes that a state may take when frozen, however long the stream."""


def _alike(a: DriftResult, b: DriftResult) -> bool:
    """Equal in every field; NaN equals NaN."""
    return repr(dataclasses.astuple(a)) == repr(dataclasses.astuple(b))


def _assert_alike(
    got: Sequence[DriftResult], wanted: Sequence[DriftResult], what: str, other: str
) -> None:
    for index, (a, b) in enumerate(itertools.zip_longest(got, wanted)):
        assert a is not None, f"{what}: result {index} is missing"
        assert b is not None, f"{what}: result {index} is one too many"
        assert _alike(a, b), f"{what}: window {index} gave {a}; {other} gave {b}"


def check_split_windows_add_up(test: Test) -> None:
    """A window and the sum of its parts, in any order, give the same result."""
    rng = np.random.default_rng(6)
    whole, forth, back = Replica(test), Replica(test), Replica(test)
    for index in range(140):
        law = shifted(0.8 if index > 110 else 0.0)
        parts = [
            window(rng.multinomial(50, law), index, classes=labels)
            for labels in ((0, 1), (2, 0), (1, 3))
        ]
        a, b, c = parts
        wanted = whole.step((a + b) + c)
        _assert_alike([forth.step(a + (b + c))], [wanted], "a + (b + c)", "(a + b) + c")
        _assert_alike([back.step(c + b + a)], [wanted], "c + b + a", "a + b + c")


def check_many_streams_at_once_equal_each_by_itself(test: Test) -> None:
    """`step_all` is `step` for every stream, but for the order in which sums are rounded."""
    rng = np.random.default_rng(9)
    names = [f"{DETECTOR}-{index % 2}" for index in range(7)]
    references = [reference(detector=name) for name in names]
    alone = [test.start(known) for known in references]
    together = list(alone)
    for index in range(40):
        law = shifted(0.8 if index > 25 else 0.0)
        sizes = rng.choice([0, 3, 20, 200], len(names))
        seen = [
            window(rng.multinomial(size, law), index, segment=f"s{row}", detector=names[row])
            for row, size in enumerate(sizes)
        ]
        each = [test.step(*row) for row in zip(alone, seen, names, strict=True)]
        every = test.step_all(together, seen, names)
        assert len(every) == len(each), f"{len(each)} streams in, {len(every)} results out"
        for (_, wanted), (_, got) in zip(each, every, strict=True):
            for field in dataclasses.fields(DriftResult):
                a, b = getattr(got, field.name), getattr(wanted, field.name)
                close = isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
                assert close or repr(a) == repr(b), (
                    f"{wanted.segment}, window {index}: {field.name} is {a!r} from step_all and "
                    f"{b!r} from step"
                )
        alone, together = [state for state, _ in each], [state for state, _ in every]


def check_replay_equals_live(test: Test) -> None:
    """Frozen and thawed at any moment, the stream goes on as if nothing had happened."""
    for seed in range(2):
        windows = mixed(seed)
        wanted = Replica(test).run(windows)
        rng = np.random.default_rng(seed)
        stops = set(rng.choice(len(windows), 20, replace=False).tolist())
        replica, got = Replica(test), []
        for index, seen in enumerate(windows):
            if index in stops:
                replica.restart()
            got.append(replica.step(seen))
        _assert_alike(got, wanted, "after restarts", "the undisturbed run")


def check_frozen_state_is_plain_and_bounded(test: Test) -> None:
    """Arrays of numbers, changed by nobody afterwards, no larger after a long stream."""
    replica = Replica(test)
    replica.run(mixed(7))
    frozen = test.freeze(replica.state)
    copies = {name: np.array(array) for name, array in frozen.items()}
    for name, array in frozen.items():
        assert isinstance(array, np.ndarray), f"{name} is a {type(array).__name__}, not an array"
        assert array.dtype.kind in "biuf", f"{name} is of {array.dtype}, not of plain numbers"
    replica.run(stream(8, (1_200, shifted())))
    for name, array in frozen.items():
        assert np.array_equal(array, copies[name], equal_nan=True), (
            f"the frozen array {name} changed when the stream went on"
        )
    size = sum(array.nbytes for array in test.freeze(replica.state).values())
    assert size <= LARGEST_STATE, (
        f"the state takes {size} bytes after 1,440 windows; at most {LARGEST_STATE} are allowed"
    )


def check_step_leaves_the_old_state_alone(test: Test) -> None:
    """Stepping from one state twice gives the same answer twice."""
    replica = Replica(test)
    for seen in stream(9, (110, shifted()), (8, shifted(1.0))):
        before = replica.state
        first = replica.step(seen)
        _, again = test.step(before, seen, DETECTOR)
        _assert_alike([again], [first], "the second step from a state", "the first")


def check_streams_share_no_state(test: Test) -> None:
    """Two streams through one test object, turn by turn, go as each would alone."""
    quiet, moving = stream(10, (200, shifted())), mixed(11)[:200]
    wanted = Replica(test).run(quiet), Replica(test).run(moving)
    one, other = Replica(test), Replica(test)
    turns = [(one.step(a), other.step(b)) for a, b in zip(quiet, moving, strict=True)]
    for place, name in enumerate(("the quiet stream", "the moving stream")):
        got = [turn[place] for turn in turns]
        _assert_alike(got, wanted[place], f"{name} beside another", "alone it")


def check_deterministic(test: Test) -> None:
    """The same windows give the same results, whatever the state of global random generators."""
    windows = mixed(12)
    kept = np.random.get_state()  # noqa: NPY002 - the global generator is what is tested here
    try:
        np.random.seed(1)  # noqa: NPY002
        first = Replica(test).run(windows)
        np.random.seed(2)  # noqa: NPY002
        second = Replica(dataclasses.replace(test)).run(windows)  # type: ignore[type-var]
    finally:
        np.random.set_state(kept)  # noqa: NPY002
    _assert_alike(second, first, "a second run", "the first")


def check_combining_keeps_every_stream(test: Test) -> None:
    """`combine` keeps one result per stream in any order, and finds the one that drifts."""
    assert not list(test.combine([])), "combine([]) makes up results"
    replicas = [Replica(test, segment=f"s{place}") for place in range(3)]
    laws = (shifted(), shifted(), shifted(1.5))
    found = False
    for index in range(170):
        results = []
        for place, replica in enumerate(replicas):
            law = laws[place] if index >= 130 else shifted()
            rng = np.random.default_rng([13, index, place])
            seen = window(rng.multinomial(SAMPLES, law), index, segment=f"s{place}")
            results.append(replica.step(seen))
        combined = list(test.combine(results))
        kept = sorted(one.segment for one in combined if one.segment != ALL)
        assert kept == ["s0", "s1", "s2"], f"combine of s0, s1, s2 gave results of {kept}"
        turned = sorted(test.combine(results[::-1]), key=lambda one: one.segment)
        _assert_same_decisions(sorted(combined, key=lambda one: one.segment), turned)
        found = found or (index >= 130 and decided(test, results))
    assert found, "one stream of three moved by 1.5 standard deviations, and nothing was decided"


def _assert_same_decisions(a: Sequence[DriftResult], b: Sequence[DriftResult]) -> None:
    for one, other in zip(a, b, strict=True):
        same = one.drifted == other.drifted and math.isclose(
            one.statistic, other.statistic, rel_tol=1e-9, abs_tol=1e-9
        )
        assert same, f"the order of the streams matters to combine: {one}, turned round {other}"
