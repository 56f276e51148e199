"""The short form of `make fuzz`: the same inputs at every run; and that it would find bugs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from oodmon.errors import WireError
from tests.fuzz.drive import drive
from tests.fuzz.targets import TARGETS, Target

INPUTS = {"config YAML": 80, "spool segments": 500, "states": 500}


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_do_no_harm(name: str) -> None:
    outcome = drive(TARGETS[name], INPUTS.get(name, 2000), seed=7)
    assert not outcome.bugs, outcome.bugs[0]
    assert outcome.inputs >= INPUTS.get(name, 2000)


def broken(run: Callable[[bytes], object]) -> Target:
    @contextmanager
    def opened() -> Iterator[Callable[[bytes], object]]:
        yield run

    return Target("wire frames", lambda: [b"12345678"], (), opened, 0.0, 1 << 16, 4)


def crash(data: bytes) -> None:
    if len(data) < 8:
        raise KeyError("short")
    raise WireError("a proper answer")


def hang(data: bytes) -> None:
    end = time.process_time() + 0.03
    while time.process_time() < end:
        pass


def swell(data: bytes) -> None:
    bytearray(1 << 20)


@pytest.mark.parametrize(("run", "word"), [(crash, "KeyError"), (hang, "took"), (swell, "bytes")])
def test_a_bug_is_found(
    run: Callable[[bytes], object], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run is hang:
        monkeypatch.setattr("tests.fuzz.drive._HANG_SECONDS", 0.01)
    outcome = drive(broken(run), 5 if run is hang else 400, seed=1)
    assert outcome.bugs
    assert word in outcome.bugs[0][1]


def test_the_same_seed_makes_the_same_inputs() -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        given: list[bytes] = []
        drive(broken(given.append), 100, seed=5)
        seen.append(given)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 80
