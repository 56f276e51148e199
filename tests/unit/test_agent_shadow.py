"""The shadow worker: some passes, scored again on a twin; the model does not notice."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oodmon.agent import Agent, Limits, request
from oodmon.contracts import Reads
from oodmon.detectors import Scorer
from oodmon.errors import ContractError
from oodmon.records import Activations, ScoreBatch
from oodmon.registry import detectors
from tests.agents import Norm, Recording, attach
from tests.nets import build, images
from tests.waiting import PATIENCE_SECONDS, eventually

PROMPT = Limits(
    queue_passes=1000,
    linger_seconds=0.0,
    retry_seconds=0.05,
    nice=0,
    shadow_duty=1.0,
    shadow_passes=1000,
    shadow_age_seconds=3600.0,
)
"""Nothing waits, rests, steps back or is shed, so that tests see each batch at once."""


@dataclass
class Probed(Norm):
    """Reads the model; scores by its largest logit."""

    def reads(self) -> Reads:
        return Reads(inputs=True, model=True)

    def score(self, acts: Activations) -> Tensor:
        self.before(acts)
        return acts.require_probe().run(acts.require_inputs()).require_logits().amax(dim=1)

    def to(self, device: torch.device | str) -> Probed:
        return Probed(self.layers, self.before, self.digest, device)


def watch(model: nn.Module, feed: Recording, **options: Any) -> Agent:
    scorers: Mapping[str, Any] = options.pop("scorers", {"norm": Norm(), "probed": Probed()})
    limits = options.pop("limits", PROMPT)
    return attach(model, feed, scorers, limits, shadow_budget=1.0, **options)


def serve(model: nn.Module, passes: int = 1, rows: int = 4) -> None:
    with torch.inference_mode():
        for n in range(passes):
            model(images(rows, seed=n))


def shadows(feed: Recording) -> list[ScoreBatch]:
    return [batch for batch in feed.batches if batch.repeats]


def others(feed: Recording) -> list[ScoreBatch]:
    return [batch for batch in feed.batches if not batch.repeats]


def shadow_scored(agent: Agent) -> int:
    stats = agent.shadow_stats()
    return 0 if stats is None else stats.scored


def test_both_write_their_own_columns_of_the_same_samples() -> None:
    model, feed = build("resnet"), Recording()
    with watch(model, feed, clock=lambda: 77) as agent, request(segment="de"):
        serve(model, passes=3)
    beside, again = others(feed), shadows(feed)
    assert {batch.source for batch in beside} == {agent.source}
    assert {batch.source for batch in again} == {f"{agent.source}/shadow"}
    assert [batch.sequence for batch in again] == list(range(len(again)))
    assert all(list(batch.scores) == ["norm"] for batch in beside)
    assert all(list(batch.scores) == ["probed"] for batch in again)
    assert all(batch.digests.keys() == batch.scores.keys() for batch in feed.batches)
    ids = [name for batch in beside for name in batch.sample_ids]
    assert len(set(ids)) == 12
    assert ids == [name for batch in again for name in batch.sample_ids]
    with torch.no_grad():
        expected = torch.cat([model(images(4, seed=n)).amax(dim=1) for n in range(3)])
    found = np.concatenate([batch.scores["probed"] for batch in again])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert {batch.segments for batch in again} == {("de",)}
    assert not [notice for batch in feed.batches for notice in batch.notices]


def test_ids_of_requests_are_those_of_both() -> None:
    model, feed = build("mlp"), Recording()
    with watch(model, feed), request(ids=["a", "b", "c", "d"]):
        serve(model)
    assert [batch.sample_ids for batch in feed.batches] == [("a", "b", "c", "d")] * 2


def test_the_model_answers_as_ever_and_is_left_as_it_was() -> None:
    plain, model, feed = build("vgg"), build("vgg"), Recording()
    odin = Scorer.learn(detectors.create("odin"), None)  # type: ignore[arg-type]
    dropout = Scorer(detectors.create("mc_dropout", passes=3), {})
    hooked: list[int] = []
    handle = model.register_forward_hook(lambda *_: hooked.append(1))
    torch.manual_seed(5)
    dice = torch.get_rng_state()
    scorers = {"norm": Norm(), "odin": odin, "mc_dropout": dropout}
    with watch(model, feed, scorers=scorers) as agent:
        for n in range(6):
            with torch.inference_mode():
                assert torch.equal(model(images(4, seed=n)), plain(images(4, seed=n)))
        eventually(lambda: sum(batch.rows for batch in shadows(feed)) == 24)
    stats = agent.shadow_stats()
    assert stats is not None
    assert (stats.scored, stats.dropped, stats.fraction) == (24, 0, 1.0)
    assert torch.equal(dice, torch.get_rng_state())
    assert len(hooked) == 6, "the served model's own hooks saw passes that nobody served"
    handle.remove()
    for (name, was), now in zip(
        plain.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(was, now), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(not module.training and not module._forward_hooks for module in model.modules())
    for batch in shadows(feed):
        assert set(batch.scores) == {"odin", "mc_dropout"}
        assert all(np.isfinite(column).all() for column in batch.scores.values())


def test_a_slow_shadow_holds_nothing_up_and_sheds_the_oldest() -> None:
    model, feed = build("mlp"), Recording()
    gate = threading.Event()
    limits = dataclasses.replace(PROMPT, shadow_passes=3)
    scorers = {"norm": Norm(), "probed": Probed(before=lambda _: gate.wait(PATIENCE_SECONDS))}
    agent = watch(model, feed, scorers=scorers, limits=limits)
    serve(model)
    eventually(lambda: len(agent._gate.open().shadow[0]) == 0)  # type: ignore[index]
    serve(model, passes=10)
    eventually(lambda: sum(batch.rows for batch in others(feed)) == 44)
    assert not shadows(feed)
    gate.set()
    assert agent.detach()
    stats = agent.shadow_stats()
    assert stats is not None
    assert (stats.scored, stats.dropped) == (16, 28)
    assert sum(batch.dropped for batch in shadows(feed)) == 28
    assert sum(batch.dropped for batch in others(feed)) == 0


def test_passes_that_waited_too_long_are_shed() -> None:
    model, feed = build("mlp"), Recording()
    now = [1_000_000_000]
    gate = threading.Event()
    scorers = {"norm": Norm(), "probed": Probed(before=lambda _: gate.wait(PATIENCE_SECONDS))}
    limits = dataclasses.replace(PROMPT, shadow_age_seconds=2.0)
    agent = watch(model, feed, scorers=scorers, limits=limits, clock=lambda: now[0])
    serve(model)
    eventually(lambda: len(agent._gate.open().shadow[0]) == 0)  # type: ignore[index]
    serve(model, passes=2)
    now[0] += 10_000_000_000
    serve(model)
    gate.set()
    eventually(lambda: sum(batch.rows for batch in shadows(feed)) == 8)
    agent.detach()
    assert sum(batch.dropped for batch in shadows(feed)) == 8


def test_the_end_does_not_wait_for_all_that_is_left() -> None:
    model, feed = build("mlp"), Recording()
    scorers = {"norm": Norm(), "probed": Probed(before=lambda _: time.sleep(0.1))}
    agent = watch(model, feed, scorers=scorers)
    with torch.inference_mode():
        inputs = images(40)  # more than are joined with others
        for _ in range(300):
            model(inputs)
    agent.detach(timeout_seconds=1.0)
    # What is at work ends; nothing new is begun, else none of 300 passes would be shed.
    eventually(lambda: agent.detach(timeout_seconds=0.0))
    stats = agent.shadow_stats()
    assert stats is not None
    assert stats.dropped > 0
    assert stats.scored + stats.dropped == 300 * 40
    assert sum(batch.dropped for batch in shadows(feed)) == stats.dropped
    assert [writer.closed for writer in feed.writers] == [1, 1]


def test_what_raises_is_nan_and_then_left_alone() -> None:
    model, feed = build("mlp"), Recording()

    def fail(_acts: Activations) -> None:
        raise ZeroDivisionError("no luck")

    scorers = {"norm": Norm(), "bad": Probed(before=fail), "good": Probed()}
    with watch(model, feed, scorers=scorers) as agent:
        for n in range(6):
            serve(model)
            eventually(lambda n=n: shadow_scored(agent) == 4 * (n + 1))  # type: ignore[misc]
    for batch in shadows(feed):
        assert np.isnan(batch.scores["bad"]).all()
        assert np.isfinite(batch.scores["good"]).all()
    notices = [notice for batch in shadows(feed) for notice in batch.notices]
    assert any(notice.startswith("breaker of `bad` opened") for notice in notices)


def test_shadow_detectors_alone_count_their_samples() -> None:
    model, feed = build("mlp"), Recording()
    with watch(model, feed, scorers={"probed": Probed()}) as agent:
        serve(model, passes=2)
    assert {batch.source for batch in feed.batches} == {agent.source}
    assert not shadows(feed)
    assert feed.rows == 8
    assert all(len(batch.predicted) == batch.rows for batch in feed.batches)
    assert agent.shadow_stats() is None
    assert agent.stats().scored == 8


def test_what_the_shadow_reads_is_not_kept_for_the_others() -> None:
    model, feed = build("resnet"), Recording()
    beside: list[Activations] = []
    again: list[Activations] = []
    scorers = {"norm": Norm(before=beside.append), "probed": Probed(before=again.append)}
    with watch(model, feed, scorers=scorers):
        serve(model)
    assert beside[0].inputs is None
    assert list(beside[0].layers) == ["penultimate"]
    assert again[0].inputs is not None
    assert not again[0].layers
    assert again[0].probe is not None


def test_the_budget_decides_which_share_the_shadow_gets() -> None:
    model, feed = build("mlp"), Recording()
    scorers = {"norm": Norm(), "probed": Probed(before=lambda acts: _spin(0.003 * acts.rows))}
    with attach(model, feed, scorers, PROMPT, shadow_budget=0.02) as agent:
        for n in range(400):
            with torch.inference_mode():
                model(images(4, seed=n))
    stats = agent.shadow_stats()
    assert stats is not None
    assert stats.fraction < 0.05, "a pass costs more than it takes to serve it"
    assert 0 < stats.scored < 400
    assert agent.stats().scored == 1600
    named = {name for batch in others(feed) for name in batch.sample_ids if "pass-" in name}
    assert {name for batch in shadows(feed) for name in batch.sample_ids} <= named
    assert shadows(feed)[-1].sampled_fraction < 1.0


def _spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_model_that_answers_otherwise_in_evaluation_mode_is_told_once() -> None:
    model, feed = build("vgg").train(), Recording()
    with watch(model, feed), torch.no_grad():
        for n in range(3):
            model(images(16, seed=n))
    notices = [notice for batch in shadows(feed) for notice in batch.notices]
    assert len(notices) == 1
    assert notices[0].startswith("further passes answer otherwise than the served model did")
    assert model.training


def test_a_model_that_cannot_be_copied_is_an_error_when_attached() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()
            self.net = build("mlp")

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

    feed = Recording()
    with pytest.raises(ContractError, match="Holds cannot be copied for further passes: TypeError"):
        watch(Holds(), feed)
    assert not feed.writers


def test_inputs_that_are_not_enough_are_a_failure_of_the_scorer_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("mlp")

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.net(x * mask)

    model, feed = Two(), Recording()
    scorers = {"norm": Norm(layers=("net.4",)), "probed": Probed()}
    with watch(model, feed, scorers=scorers) as agent, torch.inference_mode():
        for n in range(5):
            model(images(4), torch.ones(()))
            eventually(lambda n=n: shadow_scored(agent) == 4 * (n + 1))  # type: ignore[misc]
    notices = [notice for batch in shadows(feed) for notice in batch.notices]
    assert any("calls the model with its first tensor alone" in notice for notice in notices)
    assert all(np.isnan(batch.scores["probed"]).all() for batch in shadows(feed))


@pytest.mark.parametrize(
    "change",
    [
        lambda: Limits(shadow_duty=0.0),
        lambda: Limits(shadow_age_seconds=0.0),
        lambda: Limits(shadow_rows=0),
        lambda: Limits(shadow_passes=0),
        lambda: attach(build("mlp"), Recording(), shadow_budget=0.0),
    ],
)
def test_impossible_options_are_named(change: Callable[[], Any]) -> None:
    with pytest.raises(ContractError, match="shadow"):
        change()
