"""Batches → groups: nothing twice, a refused batch leaves no trace, gaps are told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from oodmon.contracts import Delivery
from oodmon.daemon.intake import Intake
from oodmon.daemon.metrics import Metrics
from oodmon.drift.budget import Budget
from oodmon.errors import ContractError
from oodmon.pipeline import Pipeline
from oodmon.records import Fact, Notice, ScoreBatch
from oodmon.rules import Rule
from oodmon.store.events import AgentSeen
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, alerts, batch, calibration, plain, stream


class Brittle(Pipeline):
    """A pipeline that breaks, after it has changed its memory, on batches of marked rows."""

    def step(self, batch: ScoreBatch) -> list[Fact]:
        facts = super().step(batch)
        if batch.rows == 13:
            raise ZeroDivisionError("a plugin's own bug")
        return facts


def pipeline(cls: type[Pipeline] = Pipeline) -> Pipeline:
    return cls(
        "m",
        "1",
        {"msp": calibration()},
        Windowing(10, 0, 2),
        {"budget": Budget("1 per 10000 windows")},
        {"novelty": Rule("budget")},
    )


def delivered(batches: Sequence[ScoreBatch]) -> list[Delivery]:
    return [Delivery(one, one.source, str(n)) for n, one in enumerate(batches)]


def test_good_batches_give_the_facts_of_the_pipeline_alone() -> None:
    batches = list(stream(60, shift_at=40))
    plainly = pipeline()
    expected = [fact for one in batches for fact in plainly.step(one)]
    intake = Intake(pipeline(), [], Metrics())
    for delivery in delivered(batches):
        intake.take(delivery)
    assert [plain(f) for f in intake.group.facts] == [plain(f) for f in expected]
    assert alerts(intake.group.facts)
    assert intake.group.positions == {"agent": "59"}
    assert intake.group.batches == len(intake.group.accepted) == 60
    (seen,) = intake.group.agents.values()
    assert (seen.sequence, seen.samples, seen.lost) == (59, 60 * 64, 0)


@pytest.mark.parametrize("commit_every", [1, 7, 1000])
def test_a_refused_batch_leaves_no_trace_in_what_is_concluded(commit_every: int) -> None:
    good = list(stream(80, shift_at=60))
    alone = pipeline(Brittle)
    expected = [plain(fact) for one in good for fact in alone.step(one)]
    mixed: list[ScoreBatch] = []
    for n, one in enumerate(good):
        mixed.append(one)
        if n % 3 == 0:  # breaks half-way, an hour ahead: windows would close if it left a trace
            mixed.append(batch([9.0] * 13, n + 3600, n // 3, source="bad"))
        if n % 5 == 0:
            mixed.append(
                ScoreBatch("other", "9", "lost", n // 5, EPOCH, {"msp": np.zeros(2, "f4")})
            )
    metrics = Metrics()
    intake = Intake(pipeline(Brittle), [], metrics)
    facts: list[Fact] = []
    for n, delivery in enumerate(delivered(mixed)):
        intake.take(delivery)
        if n % commit_every == 0:
            facts += intake.group.facts
            intake.committed(intake.pipeline.freeze())
    facts += intake.group.facts
    told = [fact for fact in facts if isinstance(fact, Notice)]
    assert [plain(f) for f in facts if not isinstance(f, Notice)] == expected
    assert intake.pipeline.freeze() == alone.freeze()
    assert metrics.value("oodmon_batches_total", result="rejected") == 27 + 16
    assert {(n.source, n.text.split(":")[0]) for n in told} == {
        ("bad", "a batch was rejected"),
        ("lost", "a batch was rejected"),
    }
    assert "a plugin's own bug" in next(n.text for n in told if n.source == "bad")
    assert len(told) == 2, "one notice for all that a source had refused for one reason on one day"


def test_time_that_passed_is_kept_when_a_batch_is_undone() -> None:
    intake = Intake(pipeline(Brittle), [], Metrics())
    intake.take(Delivery(batch([0.0], 0), "agent", "0"))
    for seconds in range(1, 40):
        intake.advance(EPOCH + seconds * SECOND)
    closed = len(intake.group.facts)
    assert closed
    before = intake.pipeline.freeze()
    intake.take(Delivery(batch([0.0] * 13, 50, source="bad"), "bad", "0"))
    assert intake.pipeline.freeze() == before
    assert len(intake.group.facts) == closed + 1  # the notice


def test_repeated_batches_are_skipped_and_gaps_are_counted() -> None:
    metrics = Metrics()
    intake = Intake(pipeline(), [], metrics)
    batches = list(stream(10))
    for one in [*batches[:5], batches[3], batches[4], *batches[7:]]:
        intake.take(Delivery(one, "agent", str(one.sequence)))
    assert metrics.value("oodmon_batches_total", result="duplicate") == 2
    assert metrics.value("oodmon_batches_total", result="accepted") == 8
    assert metrics.value("oodmon_batches_lost_total", model="m", model_version="1") == 2
    (seen,) = intake.group.agents.values()
    assert (seen.lost, seen.sequence, seen.samples) == (2, 9, 8 * 64)
    assert [fact.source for fact in intake.group.facts if isinstance(fact, Notice)] == ["agent"]


def test_an_agent_that_began_anew_counts_from_zero_again() -> None:
    metrics = Metrics()
    intake = Intake(pipeline(), [], metrics)
    for one in [*stream(5), batch([0.0], 20, 0), batch([0.0], 21, 1)]:
        intake.take(Delivery(one, "agent", "p"))
    assert metrics.value("oodmon_batches_total", result="accepted") == 7
    assert intake.agents["agent"].sequence == 1


def test_what_the_store_knew_of_an_agent_counts() -> None:
    metrics = Metrics()
    heard = AgentSeen("agent", "m", "1", 4, EPOCH + 4 * SECOND, 320, 7, 1.0)
    intake = Intake(pipeline(), [heard], metrics)
    for one in stream(8):
        intake.take(Delivery(one, "agent", "p"))
    assert metrics.value("oodmon_batches_total", result="duplicate") == 5
    assert metrics.value("oodmon_batches_total", result="accepted") == 3
    (seen,) = intake.group.agents.values()
    assert (seen.samples, seen.dropped) == (320 + 3 * 64, 7), "totals go on over a restart"


def test_agents_that_come_and_go_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodmon.daemon.intake.MAX_AGENTS", 3)
    intake = Intake(pipeline(), [], Metrics())
    for n in range(6):
        intake.take(Delivery(batch([0.0], n, source=f"pod-{n}"), f"pod-{n}", "0"))
    assert set(intake.agents) == {"pod-3", "pod-4", "pod-5"}
    assert len(intake.group.agents) == 6, "what was seen of them is stored all the same"


def test_samples_that_an_agent_shed_are_counted() -> None:
    metrics = Metrics()
    intake = Intake(pipeline(), [], metrics)
    intake.take(Delivery(batch([0.0], dropped=41), "agent", "p"))
    labels = {"model": "m", "model_version": "1"}
    assert metrics.value("oodmon_samples_dropped_total", **labels, reason="agent") == 41
    (seen,) = intake.group.agents.values()
    assert seen.dropped == 41


def test_a_pipeline_is_swapped_between_groups_only() -> None:
    intake = Intake(pipeline(), [], Metrics())
    intake.take(Delivery(batch([0.0]), "agent", "p"))
    with pytest.raises(ContractError, match="between groups"):
        intake.swap(pipeline())
    intake.committed(intake.pipeline.freeze())
    fresh = pipeline()
    intake.swap(fresh)
    assert intake.pipeline is fresh


def test_what_a_shadow_worker_repeats_is_no_traffic_and_what_it_sheds_no_loss() -> None:
    metrics = Metrics()
    intake = Intake(pipeline(), [], metrics)
    batches = [batch(np.zeros(8)), batch(np.zeros(3), source="a/shadow", dropped=5, repeats=True)]
    for delivery in delivered(batches):
        intake.take(delivery)
    of_model = {"model": "m", "model_version": "1"}
    assert metrics.value("oodmon_samples_total", **of_model) == 8
    assert metrics.value("oodmon_samples_dropped_total", **of_model, reason="agent") == 0
    assert intake.agents["a/shadow"].dropped == 5
