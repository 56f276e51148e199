"""The pure fold: facts, restarts, wrong input, and what an alert tells."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from oodmon.calibration import Calibration
from oodmon.contracts import DriftTest
from oodmon.drift.budget import Budget
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.errors import ContractError, StateError
from oodmon.pipeline import Pipeline
from oodmon.pipeline.flagged import cut_at
from oodmon.records import ALL, DriftResult, Exceedance, Fact, Notice, ScoreBatch, Window
from oodmon.rules import Rule
from oodmon.windows import Windowing
from oodmon.wire import pack
from tests.streams import (
    EPOCH,
    SECOND,
    alerts,
    batch,
    calibration,
    exceedances,
    plain,
    stream,
)


def _pipeline(
    windowing: Windowing | None = None,
    rules: dict[str, Rule] | None = None,
    detectors: tuple[str, ...] = ("msp",),
    tests: dict[str, DriftTest[Any]] | None = None,
) -> Pipeline:
    return Pipeline(
        "m",
        "1",
        {name: calibration(detector=name) for name in detectors},
        windowing or Windowing(10, 0, 2),
        tests or {"budget": Budget("1 per 10000 windows"), "ks": KolmogorovSmirnov()},
        rules if rules is not None else {"novelty": Rule("budget", severity="critical")},
    )


def _run(pipeline: Pipeline, batches: list[ScoreBatch]) -> list[Fact]:
    facts = [fact for one in batches for fact in pipeline.step(one)]
    return facts + pipeline.advance(batches[-1].observed_at + 3600 * SECOND)


def test_a_shift_fires_once_and_the_alert_says_what_a_person_needs() -> None:
    batches = list(stream(400, shift_at=300, rows=16))
    facts = _run(_pipeline(), batches)
    (alert,) = alerts(facts)
    assert alert.status == "firing"
    assert alert.started_at == EPOCH + 300 * SECOND
    assert alert.labels == {
        "model": "m",
        "version": "1",
        "test": "budget",
        "detector": ALL,
        "segment": ALL,
    }
    evidence = alert.evidence
    assert evidence["statistic"] >= evidence["threshold"] == pytest.approx(4.0)
    assert evidence["effect"] > 0.5
    assert "1 per 10000 windows" in evidence["promise"]
    assert evidence["samples"] == 16 * 310, "ten seconds of novelty"
    assert evidence["novel"]
    assert all(int(name.split("/")[1]) >= 300 for name in evidence["novel"])
    assert alert.id == alerts(_run(_pipeline(), batches))[0].id


def test_the_samples_that_an_alert_names_are_of_the_change_and_of_all_of_it() -> None:
    """Not of the last window in which something was flagged, which may be of the day before."""
    rng = np.random.default_rng(5)
    batches = []
    for second in range(120):
        scores = rng.normal(size=32)
        scores[:] = np.minimum(scores, 2.0)
        if second in {12, 13}:
            scores[0] = 9.0  # odd, and no change
        if second >= 60:
            scores = scores * 0.7 + 0.5  # a change in which next to nothing is flagged
        if second in {60, 61}:
            scores[5] = 8.0
        batches.append(batch(scores, second, second))
    windowing = Windowing(1, 0, 0)
    tests: dict[str, DriftTest[Any]] = {
        "budget": Budget("1 per 1000 windows", tolerated_fraction=0.0)
    }
    facts = _run(_pipeline(windowing=windowing, tests=tests), batches)
    (alert,) = alerts(facts)
    assert alert.started_at > EPOCH + 61 * SECOND
    assert set(alert.evidence["novel"]) == {"agent/60/5", "agent/61/5"}


def test_an_episode_ends_and_its_evidence_starts_again_from_nothing() -> None:
    first = list(stream(60, rows=200))
    novel = [
        dataclasses.replace(one, scores={"msp": one.scores["msp"] + np.float32(3)})
        if 20 <= one.sequence < 30
        else one
        for one in first
    ]
    facts = _run(_pipeline(rules={"r": Rule("budget", resolve_after_windows=2)}), novel)
    fired, over = alerts(facts)
    assert (fired.status, over.status) == ("firing", "resolved")
    assert fired.fingerprint == over.fingerprint
    assert fired.started_at == over.started_at < over.ended_at
    after = [
        fact
        for fact in facts
        if isinstance(fact, DriftResult) and fact.detector == ALL and fact.start >= over.ended_at
    ]
    assert after
    assert all(result.statistic < 1.0 for result in after)


@pytest.mark.parametrize("windowing", [Windowing(10, 0, 2), Windowing(20, 5, 3)])
def test_restart_at_any_batch_gives_the_same_facts(windowing: Windowing) -> None:
    rng = np.random.default_rng(5)
    batches = []
    for one in stream(120, shift_at=80, rows=30, detectors=("msp", "gram"), shift=1.5):
        segment = rng.integers(0, 2, one.rows).astype(np.int32)
        jitter = int(rng.integers(-6, 1)) * SECOND
        batches.append(
            dataclasses.replace(
                one,
                segment=segment,
                segments=("eu", "us"),
                observed_at=one.observed_at + jitter,
                predicted=rng.integers(0, 5, one.rows).astype(np.int32),
                dropped=int(rng.integers(0, 3)),
            )
        )
    detectors = ("msp", "gram")
    whole = _run(_pipeline(windowing, detectors=detectors), batches)
    assert alerts(whole)
    for every in (1, 7):
        pipeline, facts = _pipeline(windowing, detectors=detectors), []
        for index, one in enumerate(batches):
            if index % every == 0:
                frozen = pipeline.freeze()
                pipeline = _pipeline(windowing, detectors=detectors)
                pipeline.thaw(frozen)
            facts += pipeline.step(one)
        facts += pipeline.advance(batches[-1].observed_at + 3600 * SECOND)
        assert [plain(fact) for fact in facts] == [plain(fact) for fact in whole]


def test_every_sample_is_counted_in_one_window_or_as_late() -> None:
    rng = np.random.default_rng(6)
    batches = [
        batch(rng.normal(size=5), float(rng.uniform(0, 100)), sequence) for sequence in range(200)
    ]
    facts = _run(_pipeline(), batches)
    windows = [fact for fact in facts if isinstance(fact, Window)]
    assert sum(w.samples + w.late for w in windows) == 1000
    assert sum(w.late for w in windows) > 0


def test_a_column_of_another_scorer_is_an_error_not_a_wrong_number() -> None:
    one = batch([9.0] * 8)
    foreign = dataclasses.replace(one, digests={"msp": "another"})
    extra = dataclasses.replace(one, scores={**one.scores, "new": one.scores["msp"]}, sequence=1)
    facts = _run(_pipeline(), [foreign, foreign, extra])
    notices = [fact for fact in facts if isinstance(fact, Notice)]
    assert len(notices) == 2, "told once each, not per batch"
    assert "another" in notices[0].text
    assert "digest-msp" in notices[0].text
    assert "'new' has no calibration" in notices[1].text
    (window,) = (fact for fact in facts if isinstance(fact, Window))
    assert (window.histogram("msp").invalid, window.histogram("msp").scored) == (16, 8)
    assert len(exceedances(facts)) == 8


def test_notices_of_the_agent_become_facts() -> None:
    (fact,) = _pipeline().step(batch([], notices=("breaker of `gram` opened",)))
    assert isinstance(fact, Notice)
    assert (fact.source, fact.key, fact.text) == ("agent", "0/0", "breaker of `gram` opened")


def test_flagged_samples_are_the_most_novel_and_bounded() -> None:
    rng = np.random.default_rng(7)
    flood = [batch(rng.normal(size=500) + 6, 0.1 * i, i) for i in range(20)]
    names = tuple(f"request-{i}" for i in range(500))
    flood[3] = dataclasses.replace(flood[3], sample_ids=names)
    found = exceedances(_run(_pipeline(), flood))
    assert len(found) == 100
    scores = sorted(np.concatenate([one.scores["msp"] for one in flood]), reverse=True)[:100]
    assert [e.score for e in found] == pytest.approx(scores)
    assert any(e.sample_id.startswith("request-") for e in found)
    assert any(e.sample_id.startswith("agent/") for e in found)
    assert all(e.p <= 0.001 for e in found)


def test_flags_keep_the_false_discovery_rate() -> None:
    """Half of the traffic is novel, then a tenth, then none: at most q of the flagged are false."""
    rng = np.random.default_rng(8)
    known = calibration(20_000)
    pipeline = Pipeline("m", "1", {"msp": known}, Windowing(10), {}, {}, flag_fdr=0.2)
    at = 0
    for novel, least in ((0.5, 0.8), (0.1, 0.3), (0.0, 0.0)):
        false, hit, flagged = [], 0, 0
        for _ in range(60):
            is_novel = rng.random(100) < novel
            names = tuple(f"{'novel' if new else 'known'}-{i}" for i, new in enumerate(is_novel))
            scores = rng.normal(size=100) + 3.5 * is_novel
            facts = pipeline.step(batch(scores, 10.0 * at, at, sample_ids=names))
            facts += pipeline.advance(EPOCH + 10 * SECOND * (at + 1) + 10 * SECOND)
            found = [fact.sample_id for fact in facts if isinstance(fact, Exceedance)]
            wrong = sum(name.startswith("known") for name in found)
            false.append(wrong / max(len(found), 1))
            hit += len(found) - wrong
            flagged += int(is_novel.sum())
            at += 1
        assert np.mean(false) <= 0.2 + 2 * np.std(false) / np.sqrt(len(false))
        assert hit >= least * flagged
    assert cut_at(np.zeros(64, np.int64), 0.1) == 0.0


def test_constant_and_all_nan_scores_have_defined_results() -> None:
    constant = [batch([0.25] * 50, float(i), i) for i in range(40)]
    nan = [batch([np.nan] * 50, float(i), i) for i in range(40)]
    flat = Calibration.from_scores("msp", "digest-msp", np.full(500, 0.25))
    pipeline = Pipeline(
        "m",
        "1",
        {"msp": flat},
        Windowing(10),
        {"b": Budget(), "ks": KolmogorovSmirnov()},
        {"r": Rule("b")},
    )
    assert alerts(_run(pipeline, constant)) == []
    results = [fact for fact in _run(_pipeline(), nan) if isinstance(fact, DriftResult)]
    assert results
    assert not any(result.drifted for result in results)


def test_wrong_model_and_wrong_options_are_named() -> None:
    with pytest.raises(ContractError, match="m/2"):
        _pipeline().step(dataclasses.replace(batch([0.0]), version="2"))
    with pytest.raises(ContractError, match="no drift test 'psi'"):
        _pipeline(rules={"r": Rule("psi")})
    with pytest.raises(ContractError, match="flag_level"):
        Pipeline("m", "1", {}, Windowing(), {}, {}, flag_level=0.0)
    with pytest.raises(ContractError, match="flag_fdr"):
        Pipeline("m", "1", {}, Windowing(), {}, {}, flag_fdr=1.0)


def test_thaw_leaves_behind_what_a_new_configuration_makes_meaningless() -> None:
    batches = list(stream(25, rows=50, shift_at=0))
    old = _pipeline()
    facts = [fact for one in batches for fact in old.step(one)]
    assert alerts(facts)
    frozen = old.freeze()

    recut = _pipeline(Windowing(60))
    recut.thaw(frozen)
    later = recut.step(batch([0.0], 26, 26))
    (notice,) = (fact for fact in later if isinstance(fact, Notice))
    assert "250 samples of open windows" in notice.text

    stricter = _pipeline(
        tests={"budget": Budget("1 per 99999 windows"), "ks": KolmogorovSmirnov()},
        rules={"new": Rule("budget")},
    )
    stricter.thaw(frozen)
    over = [a for a in alerts(_run(stricter, batches[-1:])) if a.status == "resolved"]
    assert [a.rule for a in over] == ["novelty"], "nobody is left with an alert that cannot end"

    with pytest.raises(StateError, match="schema"):
        _pipeline().thaw(pack({}, {"schema": "something/1"}))


def test_a_batch_that_repeats_adds_its_columns_and_counts_no_sample_again() -> None:
    pipeline = _pipeline(detectors=("msp", "odin"))
    of_class = np.zeros(8, np.int32)
    pipeline.step(batch(np.zeros(8), 1, predicted=of_class, dropped=2))
    pipeline.step(
        batch(
            np.zeros(3), 1, source="agent/shadow", detectors=("odin",), dropped=5, repeats=True,
            predicted=of_class[:3],
        )
    )  # fmt: skip
    (window,) = [f for f in pipeline.advance(EPOCH + 60 * SECOND) if isinstance(f, Window)]
    assert (window.samples, window.dropped, window.predicted) == (8, 2, {0: 8})
    assert {name: h.scored for name, h in window.detectors.items()} == {"msp": 8, "odin": 3}
    assert all(not h.invalid for h in window.detectors.values())
    assert pipeline.samples == 8
