"""Sampler, breaker, queue and requests on their own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oodmon.agent.breaker import Breaker
from oodmon.agent.passes import Pass, Passes, joined
from oodmon.agent.request import Request, current, request
from oodmon.agent.sampling import FLOOR, PASSED_BY_SECONDS, Sampler
from oodmon.agent.scoring import Limits
from oodmon.errors import ContractError
from oodmon.records import Activations
from tests.waiting import PATIENCE_SECONDS


def a_pass(rows: int = 1, at: int = 0, width: int = 3) -> Pass:
    logits = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    acts = Activations(logits=logits, observed_at=at)
    return Pass(at, 0.0, 1.0, None, acts=acts, rows=rows, size=rows * width * 4)


@given(st.floats(0.002, 0.998), st.integers(0, 1000))
def test_the_chosen_share_is_close_for_every_stretch(fraction: float, seed: int) -> None:
    sampler = Sampler(0.01, seed)
    sampler.fraction = fraction
    chosen = np.array([sampler.admit() for _ in range(2000)])
    # The golden ratio's discrepancy grows with the logarithm only; a fair coin would be off by 45.
    counted = np.cumsum(chosen) - fraction * np.arange(1, 2001)
    assert np.abs(counted).max() < 4.0


def test_the_same_seed_chooses_the_same_passes() -> None:
    runs = []
    for seed in (1, 1, 2):
        sampler = Sampler(0.01, seed)
        sampler.fraction = 0.3
        runs.append([sampler.admit() for _ in range(100)])
    assert runs[0] == runs[1] != runs[2]


def test_periodic_traffic_is_sampled_in_every_phase() -> None:
    sampler = Sampler(0.01)
    sampler.fraction = 0.1
    phases = {n % 10 for n in range(2000) if sampler.admit()}
    assert phases == set(range(10))


@pytest.mark.parametrize("cost", [0.0005, 0.01, 0.3])
def test_the_fraction_settles_where_the_budget_is_kept(cost: float) -> None:
    budget, serving = 0.02, 0.01
    sampler = Sampler(budget)
    for _ in range(60):
        sampler.measured(4, 4 * serving, 4 * cost)
    spent = sampler.fraction * cost + PASSED_BY_SECONDS
    assert sampler.fraction == FLOOR or spent <= budget * serving * 1.001
    if FLOOR < sampler.fraction < 1.0:
        assert spent == pytest.approx(budget * serving, rel=0.01)


def test_the_fraction_follows_a_change_of_cost() -> None:
    sampler = Sampler(0.05)
    for _ in range(50):
        sampler.measured(1, 0.01, 0.001)
    before = sampler.fraction
    for _ in range(80):
        sampler.measured(1, 0.01, 0.01)
    assert before == pytest.approx(0.49, rel=0.05)
    assert sampler.fraction == pytest.approx(0.049, rel=0.05)


def test_cheap_scoring_of_a_slow_model_reads_everything_and_a_dear_one_the_floor() -> None:
    slow, fast = Sampler(0.01), Sampler(0.01)
    for _ in range(20):
        slow.measured(1, 1.0, 0.0001)
        fast.measured(1, 0.0001, 1.0)
    assert slow.fraction == 1.0
    assert fast.fraction == FLOOR
    whole = Sampler(1.0)
    whole.measured(1, 0.1, 100.0)
    whole.measured(1, 0.1, 100.0)
    assert whole.fraction == 1.0


def test_one_slow_measurement_at_the_start_is_forgotten() -> None:
    sampler = Sampler(0.01)
    before = sampler.fraction
    sampler.measured(1, 0.01, 1000.0)
    assert sampler.fraction == before


def test_the_breaker_opens_tries_waits_longer_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(3, 10.0, 35.0, now=lambda: now[0])
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert not breaker.allows()
    now[0] = 10.0
    assert breaker.allows()
    assert not breaker.failed(), "it is open already"
    assert not breaker.allows()
    now[0] = 29.9
    assert not breaker.allows()
    now[0] = 30.0
    assert breaker.allows()
    breaker.failed()
    assert breaker.wait_seconds == 35.0
    now[0] = 65.0
    assert breaker.succeeded()
    assert breaker.allows()
    assert not breaker.succeeded()
    assert breaker.wait_seconds == 10.0


def test_failures_must_be_in_a_row_to_open() -> None:
    breaker = Breaker(2, 10.0)
    assert not breaker.failed()
    breaker.succeeded()
    assert not breaker.failed()
    assert not breaker.open


def test_passes_are_joined_within_rows_span_and_shape() -> None:
    queue = Passes(100, 1 << 20, 100)
    for n in range(6):
        queue.put(a_pass(rows=2, at=n))
    queue.put(a_pass(rows=2, at=1_000))
    queue.put(a_pass(rows=2, at=1_001, width=4))
    sizes = [[item.observed_at for item in queue.group(6, 500)] for _ in range(5)]
    assert sizes == [[0, 1, 2], [3, 4, 5], [1_000], [1_001], []]


def test_a_pass_larger_than_a_batch_is_a_group_of_its_own() -> None:
    queue = Passes(100, 1 << 20, 100)
    queue.put(a_pass(rows=50))
    queue.put(a_pass(rows=1))
    assert [item.rows for item in queue.group(8, 10)] == [50]


def test_joined_rows_keep_their_order() -> None:
    acts = joined([a_pass(rows=2, at=5), a_pass(rows=1, at=6)])
    assert acts.observed_at == 5
    assert acts.require_logits().tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_the_queue_loses_nothing_uncounted_under_many_writers() -> None:
    queue, got, done = Passes(16, 1 << 20, 8), [0], threading.Event()

    def write() -> None:
        for _ in range(300):
            queue.put(a_pass())

    def read() -> None:
        while not done.is_set() or len(queue):
            queue.wait(0.01)
            while group := queue.group(8, 10):
                got[0] += len(group)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert got[0] + queue.take_shed() == 1200


def test_a_lingering_reader_is_called_when_enough_waits() -> None:
    queue = Passes(100, 1 << 20, 4)
    called = threading.Event()

    def wait() -> None:
        queue.linger(10 * PATIENCE_SECONDS)
        called.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    queue.put(a_pass(rows=3))
    assert not called.wait(0.05)
    queue.put(a_pass(rows=1))
    assert called.wait(PATIENCE_SECONDS)
    thread.join()


def test_notices_wait_once_each() -> None:
    queue = Passes(1, 1, 1)
    queue.tell("a")
    queue.tell("a")
    queue.tell("b")
    assert queue.take_notices() == ["a", "b"]
    assert queue.take_notices() == []


def test_requests_nest_and_end() -> None:
    assert current() is None
    with request(ids=["a"], segment="x"):
        with request(ids="b") as inner:
            assert current() is inner
        outer = current()
        assert outer is not None
        assert outer.sample_ids(1) == ("a",)
    assert current() is None


@pytest.mark.parametrize(
    ("asked", "rows", "ids", "segments", "complaint"),
    [
        (Request(), 2, (), (), ""),
        (Request("r"), 1, ("r",), (), ""),
        (Request("r"), 2, ("r/0", "r/1"), (), ""),
        (Request(("a", "b"), "s"), 2, ("a", "b"), ("s", "s"), ""),
        (Request(("a",), ("s", "t")), 2, (), ("s", "t"), "request ids: 1 given"),
        (Request((), ("s",)), 2, (), (), "request segment: 1 given"),
    ],
)
def test_a_request_names_rows(
    asked: Request, rows: int, ids: tuple[str, ...], segments: tuple[str, ...], complaint: str
) -> None:
    assert asked.sample_ids(rows) == ids
    assert asked.segments(rows) == segments
    assert asked.complaint(rows).startswith(complaint)
    assert bool(asked.complaint(rows)) == bool(complaint)


@pytest.mark.parametrize("wrong", [{"queue_passes": 0}, {"nice": 20}, {"linger_seconds": -1.0}])
def test_impossible_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ContractError, match="limits"):
        Limits(**wrong)  # type: ignore[arg-type]
