"""The agent beside real forward passes: what it writes, and what it keeps from the model."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oodmon.agent import Agent, Limits, Request, request
from oodmon.errors import ContractError, FeedError
from oodmon.records import Activations
from oodmon.taps.hooks import Hooks
from tests.agents import Norm, Recording, attach
from tests.nets import Wrapped, build, images
from tests.waiting import PATIENCE_SECONDS, eventually


def serve(model: nn.Module, passes: int = 1, rows: int = 4) -> None:
    with torch.inference_mode():
        for n in range(passes):
            model(images(rows, seed=n))


def test_scores_classes_and_names_reach_the_feed() -> None:
    model, feed = build("resnet"), Recording()
    with (
        attach(model, feed, clock=lambda: 77) as agent,
        request(ids=["a", "b", "c", "d"], segment=["x", "y", "x", "y"]),
    ):
        serve(model)
    (batch,) = feed.batches
    with torch.no_grad():
        logits = model(images())
    assert (batch.model, batch.version, batch.source) == ("net", "1", agent.source)
    assert (batch.sequence, batch.observed_at) == (0, 77)
    assert batch.sample_ids == ("a", "b", "c", "d")
    assert [batch.segments[code] for code in batch.segment] == ["x", "y", "x", "y"]
    assert np.array_equal(batch.predicted, logits.argmax(1).to(torch.int32).numpy())
    assert batch.scores["norm"].dtype == np.float32
    assert batch.digests == {"norm": Norm().digest}
    assert (batch.dropped, batch.sampled_fraction, batch.notices) == (0, 1.0, ())
    assert feed.writers[0].closed == 1
    assert all(not m._forward_hooks for m in model.modules())


def test_scores_do_not_depend_on_how_passes_were_joined() -> None:
    model, feed = build("resnet"), Recording()
    gate = threading.Event()
    scorer = Norm(before=lambda _acts: gate.wait(PATIENCE_SECONDS))
    agent = attach(model, feed, {"norm": scorer}, clock=lambda: 77)  # near in time: joined
    serve(model, passes=20, rows=2)
    gate.set()
    agent.detach()
    assert feed.rows == 40
    assert len(feed.batches) < 20, "small passes were not joined"
    joined = np.concatenate([batch.scores["norm"] for batch in feed.batches])
    alone = Recording()
    with attach(model, alone) as each:
        for n in range(20):
            serve_one(model, n)
            eventually(lambda n=n: each.stats().scored == 2 * (n + 1))  # type: ignore[misc]
    assert len(alone.batches) == 20
    np.testing.assert_allclose(
        joined, np.concatenate([b.scores["norm"] for b in alone.batches]), rtol=1e-5
    )


def serve_one(model: nn.Module, seed: int) -> None:
    with torch.inference_mode():
        model(images(2, seed=seed))


def test_sequences_have_no_gaps_and_rows_are_named_by_place() -> None:
    model, feed = build("mlp"), Recording()
    with attach(model, feed) as agent:
        for n in range(5):
            serve(model)
            eventually(lambda n=n: agent.stats().batches == n + 1)  # type: ignore[misc]
    assert [batch.sequence for batch in feed.batches] == list(range(5))
    assert feed.batches[3].sample_id(2) == f"{agent.source}/3/2"


def test_a_large_pass_is_scored_in_parts_and_written_as_one() -> None:
    model, feed, seen = build("mlp"), Recording(), []
    scorer = Norm(before=lambda acts: seen.append(acts.rows))
    with attach(model, feed, {"norm": scorer}, Limits(linger_seconds=0, batch_rows=16)):
        serve(model, rows=40)
    assert seen == [16, 16, 8]
    assert [batch.rows for batch in feed.batches] == [40]


def test_passes_of_different_shapes_are_not_joined() -> None:
    model, feed = build("resnet"), Recording()
    scorers = {"norm": Norm(layers=("stage1",))}
    limits = Limits(linger_seconds=600.0)  # until the end
    with attach(model, feed, scorers, limits, clock=lambda: 77), torch.no_grad():
        model(torch.zeros(1, 3, 16, 16))
        model(torch.zeros(1, 3, 32, 32))
    assert [batch.rows for batch in feed.batches] == [1, 1]


def test_a_scorer_that_fails_gives_nan_and_its_breaker_opens_once_and_closes_again() -> None:
    model, feed = build("mlp"), Recording()
    working: list[bool] = []

    def fail(_acts: Activations) -> None:
        if not working:
            raise ZeroDivisionError("no luck")

    scorers = {"bad": Norm(before=fail), "good": Norm()}
    with attach(model, feed, scorers) as agent:
        for n in range(7):
            serve(model)
            eventually(lambda n=n: agent.stats().batches == n + 1)  # type: ignore[misc]
        assert agent.stats().failures >= 5
        working.append(True)

        def scores_again() -> bool:
            due = agent.stats().batches + 1
            serve(model)
            eventually(lambda: agent.stats().batches == due)
            return bool(np.isfinite(feed.batches[-1].scores["bad"]).all())

        eventually(scores_again)
    for batch in feed.batches[:7]:
        assert np.isnan(batch.scores["bad"]).all()
        assert np.isfinite(batch.scores["good"]).all()
    assert np.isfinite(feed.batches[-1].scores["bad"]).all()
    notices = [notice for batch in feed.batches for notice in batch.notices]
    assert notices == [
        "breaker of `bad` opened for 0.05 s after 5 failures: ZeroDivisionError: no luck",
        "breaker of `bad` closed: it scores again",
    ]
    assert feed.batches[4].notices, "the notice goes out with the batch that opened it"


def test_scores_of_a_wrong_shape_count_as_a_failure() -> None:
    class Wrong(Norm):
        def score(self, acts: Activations) -> torch.Tensor:
            return torch.zeros(acts.rows, 2)

        def to(self, device: Any) -> Norm:
            return self

    model, feed = build("mlp"), Recording()
    with attach(model, feed, {"wrong": Wrong()}):
        serve(model)
    assert np.isnan(feed.batches[0].scores["wrong"]).all()


def test_a_full_queue_sheds_the_oldest_and_counts() -> None:
    model, feed, gate = build("mlp"), Recording(), threading.Event()
    scorer = Norm(before=lambda _acts: gate.wait(PATIENCE_SECONDS))
    limits = Limits(linger_seconds=0, queue_passes=3, batch_rows=4)
    agent = attach(model, feed, {"norm": scorer}, limits)
    serve(model)
    eventually(lambda: len(agent._gate.open().queue) == 0)  # the first is with the scorer
    serve(model, passes=10)
    assert not feed.batches, "the model waited for the scorer"
    with torch.no_grad():
        last = nn.Sequential(*list(model.children())[:-1])(images(seed=9)).square().sum(1)
    gate.set()
    agent.detach()
    assert feed.rows == 16
    assert sum(batch.dropped for batch in feed.batches) == 28
    assert agent.stats().dropped == 28
    np.testing.assert_allclose(feed.batches[-1].scores["norm"], last.numpy(), rtol=1e-6)


def test_a_queue_is_bounded_in_bytes_and_says_when_one_pass_is_too_large() -> None:
    model, feed = build("mlp"), Recording()
    with attach(model, feed, limits=Limits(linger_seconds=0, queue_bytes=100)) as agent:
        serve(model)
    assert (feed.rows, agent.stats().dropped) == (0, 4)
    assert "more than the queue may (100)" in feed.batches[0].notices[0]
    assert feed.batches[0].dropped == 4


@pytest.mark.parametrize("how", ["refuses", "raises"])
def test_what_the_feed_does_not_take_is_counted_and_told_later(how: str) -> None:
    trouble = iter([how, how])

    def behave() -> bool:
        now = next(trouble, "")
        if now == "raises":
            raise OSError("disk full")
        return not now

    model, feed = build("mlp"), Recording(behave)
    with attach(model, feed) as agent:
        for n in range(3):
            serve(model)
            eventually(lambda n=n: agent.stats().sampled == 4 * (n + 1))  # type: ignore[misc]
    (batch,) = feed.batches
    assert (batch.sequence, batch.dropped, batch.rows) == (0, 8, 4)


def test_a_feed_that_cannot_be_opened_is_an_error_at_attach_and_leaves_no_hook() -> None:
    class Closed(Recording):
        def writer(self, source: str) -> Any:
            raise FeedError("no disk")

    model = build("mlp")
    with pytest.raises(FeedError, match="no disk"):
        attach(model, Closed())
    assert all(not m._forward_hooks for m in model.modules())


def test_what_cannot_be_attached_closes_the_writer() -> None:
    feed = Recording()
    with pytest.raises(ContractError, match="nowhere"):
        attach(build("mlp"), feed, {"norm": Norm(layers=("nowhere",))})
    assert feed.writers[0].closed == 1
    with pytest.raises(ContractError, match="at least one scorer"):
        Agent.attach(build("mlp"), tap=Hooks(), scorers={}, feed=feed, model_name="m", version="1")
    with pytest.raises(ContractError, match="overhead_budget"):
        attach(build("mlp"), feed, budget=2.0)


def test_a_layer_that_never_runs_is_told_and_scores_are_nan() -> None:
    model, feed = build("cnn"), Recording()
    model.add_module("never", nn.Linear(2, 2))
    with attach(
        model, feed, {"norm": Norm(layers=("never",))}, Limits(linger_seconds=0, failures=1)
    ):
        serve(model)
    (batch,) = feed.batches
    assert np.isnan(batch.scores["norm"]).all()
    assert "layer 'never' was not tapped" in batch.notices[0]


def test_a_model_whose_output_has_no_logits_is_told_once_and_counted() -> None:
    model, feed = nn.Conv2d(3, 4, 3), Recording()
    with attach(model, feed, {"norm": Norm(layers=())}, Limits(retry_seconds=60)) as agent:
        serve(model, passes=7)
    (batch,) = feed.batches
    assert batch.rows == 0
    assert batch.dropped == 20, "five passes were tried, then the tap's breaker opened"
    assert agent.stats().failures == 5
    assert [n for n in batch.notices if "breaker of the tap opened" in n]
    assert [n for n in batch.notices if "logits: expected a floating (B, C)" in n]


def test_the_models_own_exceptions_are_no_failures() -> None:
    model, feed = build("mlp"), Recording()
    with attach(model, feed) as agent:
        for _ in range(8):
            with pytest.raises(RuntimeError, match="shapes"):
                model(torch.zeros(2, 5))
        serve(model)
    assert agent.stats().failures == 0
    assert feed.rows == 4


def test_requests_that_do_not_fit_are_told_and_left_out() -> None:
    model, feed = build("mlp"), Recording()
    with attach(model, feed), request(ids=["only one"], segment=["a", "b"]):
        serve(model)
    (batch,) = feed.batches
    assert (batch.sample_ids, batch.segments) == ((), ())


def test_named_and_unnamed_passes_can_share_a_batch() -> None:
    model, feed = build("mlp"), Recording()
    limits = Limits(linger_seconds=600.0)  # until the end
    with attach(model, feed, limits=limits, clock=lambda: 77) as agent:
        with agent.request(ids="call", segment="de"):
            serve(model, rows=2)
        serve(model, rows=1)
    (batch,) = feed.batches
    assert batch.sample_ids == ("call/0", "call/1", f"{agent.source}/0/2")
    assert [batch.segments[code] for code in batch.segment] == ["de", "de", ""]


def test_a_callable_may_name_the_samples_and_may_fail() -> None:
    answers: list[Callable[[], Any]] = [lambda: Request("one"), lambda: None, lambda: 1 // 0]
    model, feed = build("mlp"), Recording()
    with attach(model, feed, request=lambda: answers.pop(0)()) as agent:
        for n in range(3):
            serve(model, rows=1)
            eventually(lambda n=n: agent.stats().batches == n + 1)  # type: ignore[misc]
    assert [batch.sample_ids for batch in feed.batches] == [("one",), (), ()]
    assert "request callable failed: ZeroDivisionError" in feed.batches[2].notices[0]


def test_many_threads_are_told_apart() -> None:
    model, feed = build("resnet"), Recording()
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for n in range(20):
                with request(ids=f"{number}-{n}"), torch.inference_mode():
                    model(images(1, seed=number))
        except BaseException as error:
            failures.append(error)

    with attach(model, feed) as agent:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert agent.stats().seen == 120
    assert feed.rows + agent.stats().dropped == 120
    with torch.no_grad():
        expected = [
            float(features(model, images(1, seed=n)).mean((2, 3)).square().sum()) for n in range(6)
        ]
    for batch in feed.batches:
        for name, score in zip(batch.sample_ids, batch.scores["norm"], strict=True):
            assert score == pytest.approx(expected[int(name.split("-")[0])], rel=1e-4)


def features(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = model.relu(model.bn1(model.conv1(x)))
    out: torch.Tensor = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    return out


def test_a_single_logit_is_a_yes_or_no() -> None:
    model, feed = nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), Recording()
    with attach(model, feed):
        serve(model, rows=8)
    with torch.no_grad():
        expected = (model(images(8))[:, 0] > 0).to(torch.int32)
    assert np.array_equal(feed.batches[0].predicted, expected.numpy())


def test_the_scoring_thread_does_not_change_how_others_compute() -> None:
    model, feed, seen = build("mlp"), Recording(), []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scorer = Norm(before=lambda _acts: seen.append(torch.get_num_threads()))
        with attach(model, feed, {"norm": scorer}):
            serve(model)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [1]
        assert later == [2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_detach_in_time_and_not_in_time() -> None:
    model, feed, gate = build("mlp"), Recording(), threading.Event()
    agent = attach(model, feed, {"norm": Norm(before=lambda _acts: gate.wait(PATIENCE_SECONDS))})
    serve(model)
    assert not agent.detach(timeout_seconds=0.05)
    gate.set()
    assert agent.detach()
    assert agent.detach()
    assert (feed.rows, feed.writers[0].closed) == (4, 1)


def test_an_agent_that_saw_nothing_closes_its_writer() -> None:
    feed = Recording()
    assert attach(build("mlp"), feed).detach()
    assert (feed.batches, feed.writers[0].closed) == ([], 1)


def test_outputs_of_every_kind_are_scored() -> None:
    for how in ("tuple", "dict", "nested", "dataclass"):
        model, feed = Wrapped(how).eval(), Recording()
        with attach(model, feed):
            serve(model)
        assert np.isfinite(feed.batches[0].scores["norm"]).all(), how
        assert len(feed.batches[0].predicted) == 4


FORKING = """
import os, sys, torch
from tests.agents import Recording, attach
from tests.nets import build, images

model, feed = build("mlp"), Recording()
agent = attach(model, feed)
with torch.no_grad():
    model(images(2))
parent = agent.source
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    with torch.no_grad():
        model(images(3))
    done = agent.detach()
    mine = [w for w in feed.writers if w.source != parent]
    theirs = [w for w in feed.writers if w.source == parent]
    told = (done, len(mine), [b.rows for w in mine for b in w.batches],
            [b.sequence for w in mine for b in w.batches], [w.closed for w in theirs],
            agent.source != parent)
    os.write(writing, repr(told).encode())
    os._exit(0)
os.waitpid(child, 0)
told = os.read(reading, 1000).decode()
assert told == "(True, 1, [3], [0], [0], True)", told
with torch.no_grad():
    model(images(2))
assert agent.detach()
assert agent.source == parent
assert feed.rows == 4, feed.rows
assert {b.source for b in feed.batches} == {parent}
"""


def test_a_forked_process_watches_on_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr


EXITING = """
import torch
from pathlib import Path
from tests.agents import Recording, attach
from tests.nets import build, images
import atexit
feed = Recording()
atexit.register(lambda: print("rows", feed.rows))
model = build("mlp")
agent = attach(model, feed)
with torch.no_grad():
    model(images(2))
"""


def test_a_process_that_just_ends_still_writes_its_scores() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXITING], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.strip() == "rows 2", done.stderr
