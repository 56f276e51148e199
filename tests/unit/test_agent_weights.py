"""The agent beside a model with other weights than its detectors were fitted on."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import oodmon
import oodmon.agent.scoring
from oodmon.agent import Agent
from oodmon.config.parse import loads
from oodmon.errors import ConfigError
from oodmon.fitting import fit
from oodmon.fitting.learn import Fitting
from oodmon.fitting.sources import from_data
from oodmon.pipeline import Pipeline
from oodmon.records import Notice, ScoreBatch, Window
from oodmon.registry import detectors, taps
from oodmon.taps.identity import identify
from oodmon.windows import Windowing
from tests.agents import QUICK, Norm, Recording, attach
from tests.nets import build, images
from tests.waiting import eventually

NAMES = ("msp", "mahalanobis", "odin")
"""Nothing learnt, something learnt, and one that runs in the shadow worker."""


def fitted(model: nn.Module, *names: str) -> Fitting:
    inputs = images(60, seed=7)
    return fit(
        model,
        from_data((inputs, torch.arange(60) % 5), batch_size=20, seed=0),
        tap=taps.create("hooks"),
        detectors={name: detectors.create(name) for name in names or NAMES},
        model_name="net",
        version="1",
    )


@pytest.fixture(scope="module")
def known() -> Fitting:
    return fitted(build("resnet"))


def trained(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    functional.cross_entropy(model(images()), torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters(), 0.01).step()
    return model.requires_grad_(requires_grad=False)


def watch(
    model: nn.Module, known: Fitting, feed: Recording, *, check_weights: bool = True
) -> Agent:
    scorers = {name: one.scorer for name, one in known.detectors.items()}
    limits = replace(QUICK, shadow_passes=1000, shadow_duty=1.0, shadow_age_seconds=1e6)
    return attach(
        model,
        feed,
        scorers,  # type: ignore[arg-type]
        limits,
        shadow_budget=1.0,
        check_weights=check_weights,
    )


def serve(model: nn.Module, agent: Agent, feed: Recording, passes: int = 1) -> None:
    """Pass by pass, each scored by both threads."""
    for n in range(passes):
        before = len(feed.batches)
        with torch.no_grad():
            model(images(4, seed=n).to(next(model.parameters()).dtype))
        eventually(lambda due=before + 2: len(feed.batches) == due)  # type: ignore[misc]
    assert agent.stats().failures == 0


def digests(batches: list[ScoreBatch]) -> list[dict[str, str]]:
    """Of passes in turn: detector → digest, of both threads together."""
    beside = [dict(batch.digests) for batch in batches if not batch.repeats]
    shadow = [dict(batch.digests) for batch in batches if batch.repeats]
    return [one | other for one, other in zip(beside, shadow, strict=True)]


def notices(feed: Recording) -> list[str]:
    return [text for batch in feed.batches for text in batch.notices]


def own(known: Fitting) -> dict[str, str]:
    return {name: one.scorer.digest for name, one in known.detectors.items()}


def test_the_weights_that_were_fitted_are_known_again(
    known: Fitting, caplog: pytest.LogCaptureFixture
) -> None:
    model, feed = build("resnet"), Recording()
    with watch(model, known, feed) as agent:
        serve(model, agent, feed, 2)
    assert digests(feed.batches) == [own(known)] * 2
    assert notices(feed) == []
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_scores_on_other_weights_are_told_and_not_counted(
    known: Fitting, caplog: pytest.LogCaptureFixture
) -> None:
    model, feed = trained(build("resnet")), Recording()
    with watch(model, known, feed) as agent:
        serve(model, agent, feed, 3)
    for found in digests(feed.batches):
        assert found.keys() == own(known).keys()
        assert not set(found.values()) & set(own(known).values())
    assert len({tuple(found.items()) for found in digests(feed.batches)}) == 1
    # once by each thread, for its own detectors
    told = sorted(notices(feed))
    assert [text.split(": ")[0] for text in told] == ["msp, mahalanobis", "odin"]
    for text in told:
        assert "trained again" in text
        assert "run `oodmon fit`" in text
        assert text.endswith("their scores are not counted")
    assert sorted(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING) == told
    assert all(np.isfinite(c).all() for batch in feed.batches for c in batch.scores.values())
    # what the daemon makes of it
    pipeline = Pipeline(
        "net",
        "1",
        {name: one.calibration for name, one in known.detectors.items()},
        Windowing(length_seconds=60.0),
        {},
        {},
    )
    facts = [fact for batch in feed.batches for fact in pipeline.step(batch)]
    facts += pipeline.advance(feed.batches[-1].observed_at + 10**12)
    windows = [fact for fact in facts if isinstance(fact, Window) and fact.samples]
    for name in NAMES:
        histograms = [window.histogram(name) for window in windows]
        assert sum(h.scored for h in histograms) == 0
        assert sum(h.invalid for h in histograms) == 12
    said = [fact.text for fact in facts if isinstance(fact, Notice)]
    assert [text for text in said if "trained again" in text]
    assert len([text for text in said if "counted as invalid" in text]) == len(NAMES)


def test_another_precision_is_a_warning_in_the_log_alone(
    known: Fitting, caplog: pytest.LogCaptureFixture
) -> None:
    model, feed = build("resnet").bfloat16(), Recording()
    with watch(model, known, feed) as agent:
        serve(model, agent, feed, 2)
    assert digests(feed.batches) == [own(known)] * 2
    assert not [text for text in notices(feed) if "fitted on" in text]
    (first, second) = sorted(r.getMessage() for r in caplog.records if "fitted on" in r.message)
    assert first.startswith("msp, mahalanobis: fitted on the same weights but for rounding")
    assert second.startswith("odin: ")


def test_other_parameters_are_told_and_counted(known: Fitting) -> None:
    model, feed = build("resnet"), Recording()
    model.register_buffer("mean", torch.zeros(3))  # what a service may well put into it
    with watch(model, known, feed) as agent:
        serve(model, agent, feed, 2)
    assert digests(feed.batches) == [own(known)] * 2
    assert len(notices(feed)) == 2
    assert all("a model with other parameters" in text for text in notices(feed))
    assert not any("not counted" in text for text in notices(feed))


def test_weights_may_be_loaded_after_attaching(known: Fitting) -> None:
    model, feed = trained(build("resnet")), Recording()
    with watch(model, known, feed) as agent:
        model.load_state_dict(build("resnet").state_dict())
        serve(model, agent, feed)
    assert digests(feed.batches) == [own(known)]
    assert notices(feed) == []


def test_weights_that_are_exchanged_while_serving_are_noticed_and_welcomed_back(
    known: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oodmon.agent.scoring, "_LOOK_SECONDS", 0.0)
    model, feed = build("resnet"), Recording()
    before = copy.deepcopy(model.state_dict())
    with watch(model, known, feed) as agent:
        serve(model, agent, feed)
        model.load_state_dict(trained(model).state_dict())
        serve(model, agent, feed, 2)
        model.load_state_dict(before)
        serve(model, agent, feed, 2)
    first, *strange, fourth, fifth = digests(feed.batches)
    assert first == fourth == fifth == own(known)
    assert not any(set(each.values()) & set(first.values()) for each in strange)
    beside = [text for batch in feed.batches if not batch.repeats for text in batch.notices]
    away, back = beside
    assert "their scores are not counted" in away
    assert "are again those that the detectors were fitted on" in back


def test_it_is_looked_now_and_then_and_not_at_each_batch(
    known: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(model: nn.Module | None) -> str:
        looks.append(type(model).__name__)
        return known.detectors["msp"].scorer.weights

    monkeypatch.setattr(oodmon.agent, "identify", look)
    monkeypatch.setattr(oodmon.agent.scoring, "_LOOK_SECONDS", 1e6)
    model, feed = build("resnet"), Recording()
    with watch(model, known, feed) as agent:
        serve(model, agent, feed, 5)
    assert looks == ["ResNetLike"] * 2, "once by each thread"


@pytest.mark.parametrize("how", ["not to be checked", "cannot be told"])
def test_where_nothing_is_compared_all_counts(
    how: str, known: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "cannot be told":
        monkeypatch.setattr(oodmon.agent, "identify", lambda _model: "")
    model, feed = trained(build("resnet")), Recording()
    with watch(model, known, feed, check_weights=how != "not to be checked") as agent:
        serve(model, agent, feed)
    assert digests(feed.batches) == [own(known)]
    assert notices(feed) == []


class Counting(nn.Module):
    """Writes to a buffer of its own in every pass, in evaluation mode too."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = build("mlp")
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        logits: torch.Tensor = self.net(x)
        return logits


def test_a_model_that_writes_to_itself_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    changing = fitted(Counting(), "msp").detectors["msp"].scorer
    assert changing.weights == ""
    assert "passes change its parameters or buffers" in caplog.text
    assert fitted(build("mlp"), "msp").detectors["msp"].scorer.weights == identify(build("mlp"))


def test_scorers_of_others_may_have_weights_of_their_own() -> None:
    model, feed, scorer = build("resnet"), Recording(), Norm()
    scorer.to = lambda _device: scorer  # type: ignore[method-assign, assignment]
    scorer.weights = torch.ones(2)  # type: ignore[attr-defined]
    with attach(model, feed, {"norm": scorer}) as agent:
        with torch.no_grad():
            model(images())
        eventually(lambda: agent.stats().scored == 4)
    assert (agent.stats().failures, notices(feed)) == (0, [])


def test_a_calibration_of_other_weights_is_refused_even_where_nothing_is_learnt(
    known: Fitting, tmp_path: Path
) -> None:
    again, later = fitted(build("resnet")), fitted(trained(build("resnet")))
    for name, one in known.detectors.items():
        assert again.detectors[name].scorer.digest == one.scorer.digest
        other = later.detectors[name]
        assert other.scorer.digest != one.scorer.digest
        assert other.calibration.digest == other.scorer.digest
        other.scorer.save(tmp_path / name)
        assert type(other.scorer).load(tmp_path / name).weights == other.scorer.weights


@pytest.mark.parametrize(("line", "counted"), [("", False), ("  check_weights: false\n", True)])
def test_the_config_says_whether_weights_are_compared(
    line: str, counted: bool, known: Fitting, tmp_path: Path
) -> None:
    msp = known.detectors["msp"].scorer
    msp.save(tmp_path / "msp.safetensors")
    (tmp_path / "oodmon.yaml").write_text(
        "model: {name: net}\n"
        "agent:\n"
        "  tap: {type: hooks, overhead_budget: 1.0}\n"
        "  detectors: {msp: {type: msp}}\n"
        f"  states: {tmp_path}\n"
        "  feed: {type: memory}\n" + line
    )
    config = oodmon.load(tmp_path / "oodmon.yaml", "agent")
    assert config.agent is not None
    model = trained(build("resnet"))
    with oodmon.attach(model, config) as agent:
        with torch.no_grad():
            model(images())
        eventually(lambda: agent.stats().scored == 4)
    (delivery,) = config.agent.feed.component.reader().poll(10, 0.0)
    assert (delivery.batch.digests["msp"] == msp.digest) == counted


def test_a_word_that_is_neither_yes_nor_no_is_told() -> None:
    text = (
        "model: {name: net}\n"
        "agent: {detectors: {m: {type: msp}}, states: s/, feed: {type: memory}, check_weights: 3}\n"
    )
    with pytest.raises(ConfigError, match=r"2:87: agent\.check_weights: expected true or false"):
        loads(text.encode(), "agent")
