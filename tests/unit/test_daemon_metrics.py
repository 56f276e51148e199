"""Names, bounds on series, the exposition text, and what facts do to the values."""

from __future__ import annotations

import re

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from oodmon.daemon.metrics import METRICS, OTHER, SERIES, Metrics
from oodmon.daemon.observe import Observer
from oodmon.drift.budget import Budget
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.pipeline import Pipeline
from oodmon.records import DriftResult, Notice, Window
from oodmon.rules import Rule
from oodmon.store.events import AgentSeen, Depth
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, alerts, batch, calibration, stream

MODEL = {"model": "m", "model_version": "1"}
STREAM = {**MODEL, "detector": "msp", "segment": ""}


def test_names_follow_prometheus_conventions() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"oodmon_[a-z0-9_]+", name)
        assert (metric.kind == "counter") == name.endswith("_total"), name
        assert len(metric.help) > 10
        assert not {"sample_id", "request", "user", "source"} & set(metric.labels), name
        assert not name.endswith(("_ms", "_ns", "_percent", "_kb")), name
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_the_text_is_what_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.add("oodmon_samples_total", 3, **MODEL)
    metrics.add("oodmon_samples_total", 4, **MODEL)
    metrics.put("oodmon_ready", 1)
    for value in (0.02, 0.02, 7, 1e9):
        metrics.observe("oodmon_end_to_end_delay_seconds", value)
    families = {
        family.name: family for family in text_string_to_metric_families(metrics.render().decode())
    }
    assert families["oodmon_samples"].samples[0].value == 7
    assert families["oodmon_ready"].samples[0].value == 1
    delays = families["oodmon_end_to_end_delay_seconds"].samples
    buckets = {s.labels["le"]: s.value for s in delays if s.name.endswith("_bucket")}
    assert (buckets["0.01"], buckets["0.05"], buckets["10.0"], buckets["+Inf"]) == (0, 2, 3, 4)
    assert next(s.value for s in delays if s.name.endswith("_count")) == 4
    assert next(s.value for s in delays if s.name.endswith("_sum")) == pytest.approx(1e9 + 7.04)
    assert "process_resident_memory_bytes" in families
    exported = {s.name for f in families.values() for s in f.samples if s.name[:6] == "oodmon"}
    assert exported <= SERIES


def test_series_beyond_the_cap_are_folded_and_sums_stay_right() -> None:
    metrics = Metrics(max_series=10)
    for n in range(200):
        segment = f"customer-{n}"
        metrics.add("oodmon_scores_invalid_total", **MODEL, detector="msp", segment=segment)
    text = metrics.render().decode()
    lines = [one for one in text.splitlines() if one.startswith("oodmon_scores_invalid_total{")]
    assert len(lines) == 11
    assert sum(float(one.rsplit(" ", 1)[1]) for one in lines) == 200
    folded = metrics.value("oodmon_series_folded_total", metric="oodmon_scores_invalid_total")
    assert folded == 190
    labels = {**MODEL, "detector": OTHER, "segment": OTHER}
    assert metrics.value("oodmon_scores_invalid_total", **labels) == 190


def test_models_beyond_the_cap_are_folded_too() -> None:
    metrics = Metrics(max_series=10)
    for n in range(200):
        metrics.add("oodmon_samples_total", model=f"m{n}", model_version="1")
    assert metrics.render().decode().count("oodmon_samples_total{") <= 21


def pipeline(windowing: Windowing) -> Pipeline:
    return Pipeline(
        "m",
        "1",
        {"msp": calibration()},
        windowing,
        {"budget": Budget("1 per 10000 windows"), "ks": KolmogorovSmirnov()},
        {"novelty": Rule("budget", severity="critical")},
    )


def observer(metrics: Metrics, made: Pipeline, level: float = 0.001) -> Observer:
    observer = Observer(metrics)
    observer.configured(made, level, {"msp": 1e9})
    return observer


@pytest.mark.parametrize("windowing", [Windowing(10, 0, 2), Windowing(20, 5, 2)])
def test_every_sample_is_counted_once_in_the_histogram_also_where_windows_overlap(
    windowing: Windowing,
) -> None:
    made = pipeline(windowing)
    metrics = Metrics()
    facts = [fact for one in stream(100) for fact in made.step(one)]
    observer(metrics, made).facts([*facts, *made.advance(EPOCH + 3600 * SECOND)])
    text = metrics.render().decode()
    total = next(
        float(one.rsplit(" ", 1)[1])
        for one in text.splitlines()
        if one.startswith("oodmon_ood_score_count")
    )
    assert total == 100 * 64


def test_flagged_samples_and_scores_are_counted_by_tail_probability() -> None:
    made = pipeline(Windowing(10, 0, 2))
    metrics = Metrics()
    watcher = observer(metrics, made, level=0.01)
    scores = np.concatenate([np.full(30, 9.0), np.full(70, -9.0), [np.nan] * 5])  # p: 0.0002, 1
    facts = [*made.step(batch(scores)), *made.advance(EPOCH + 60 * SECOND)]
    watcher.facts(facts)
    assert metrics.value("oodmon_ood_flagged_total", **STREAM, level="0.01") == 30
    assert metrics.value("oodmon_scores_invalid_total", **STREAM) == 5
    buckets = {
        m.group(1): float(m.group(2))
        for m in re.finditer(r'oodmon_ood_score_bucket{.*le="([^"]+)".*} (\S+)', _text(metrics))
    }
    assert buckets["0.12494"] == 70
    assert buckets["3.33333"] == 70
    assert buckets["4.0"] == buckets["+Inf"] == 100


def _text(metrics: Metrics) -> str:
    return metrics.render().decode()


def test_drift_and_episodes() -> None:
    made = pipeline(Windowing(10, 0, 2))
    metrics = Metrics()
    watcher = observer(metrics, made)
    facts = [fact for one in stream(300, shift_at=150) for fact in made.step(one)]
    (firing,) = alerts(facts)
    watcher.facts(facts)
    rule = {**MODEL, "rule": "novelty", "severity": "critical"}
    assert metrics.value("oodmon_alert_firing", **rule) == 1
    assert metrics.value("oodmon_drift_alarms_total", **rule) == 1
    assert metrics.value("oodmon_drift_last_alarm_timestamp_seconds", **rule) == pytest.approx(
        firing.started_at / SECOND
    )
    budget = {**MODEL, "test": "budget", "detector": "*", "segment": "*"}
    evidence = metrics.value("oodmon_drift_evidence_log10", **budget)
    assert evidence >= metrics.value("oodmon_drift_threshold_log10", **budget) == 4
    assert metrics.value("oodmon_drift_active", **budget) == 1
    watcher.pipeline(made)
    stream_of = {**STREAM, "test": "budget"}
    assert metrics.value("oodmon_block_length_samples", **stream_of) >= 1
    assert "oodmon_autocorrelation_ratio{" in _text(metrics)
    watermark = metrics.value("oodmon_watermark_timestamp_seconds", **MODEL)
    assert watermark == pytest.approx(EPOCH / SECOND + 299)
    text = _text(metrics)
    assert 'oodmon_drift_statistic{detector="msp",model="m"' in text
    assert not re.search(r'evidence_log10{[^}]*test="ks"', text), "KS has no evidence in log10"
    assert 'oodmon_promise_info{promise="' in text
    assert metrics.value("oodmon_reference_samples", detector="msp") == 5000
    assert metrics.value("oodmon_reference_timestamp_seconds", detector="msp") == 1e9


def test_an_episode_that_was_open_before_a_restart_is_known_and_ends() -> None:
    metrics = Metrics()
    watcher = Observer(metrics)
    row = {
        "model": "m",
        "version": "1",
        "rule": "novelty",
        "severity": "critical",
        "status": "firing",
    }
    watcher.episodes([{**row, "fingerprint": "a"}, {**row, "fingerprint": "b"}])
    labels = {**MODEL, "rule": "novelty", "severity": "critical"}
    assert metrics.value("oodmon_alert_firing", **labels) == 2
    watcher.episodes([{**row, "fingerprint": "a", "status": "resolved"}])
    assert metrics.value("oodmon_alert_firing", **labels) == 1
    assert metrics.value("oodmon_drift_alarms_total", **labels) == 0, "they did not begin now"


def test_agents_depths_and_notices() -> None:
    metrics = Metrics()
    watcher = Observer(metrics)
    now = EPOCH + 1000 * SECOND
    watcher.agents(
        [
            AgentSeen("a", "m", "1", 1, now, 1, 0, 0.5),
            AgentSeen("b", "m", "1", 1, now, 1, 0, 0.25),
            AgentSeen("b/shadow", "m", "1", 1, now, 1, 0, 0.002),
            AgentSeen("gone", "m", "1", 1, EPOCH, 1, 0, 0.001),
            AgentSeen("old", "m", "0", 1, EPOCH, 1, 0, 0.001),
        ],
        now,
    )
    assert metrics.value("oodmon_agents", **MODEL) == 2
    assert metrics.value("oodmon_agents", model="m", model_version="0") == 0
    assert metrics.value("oodmon_sampled_ratio", **MODEL) == 0.25
    assert 'oodmon_sampled_ratio{model="m",model_version="0"}' not in _text(metrics)
    watcher.depths({"sinks.a": Depth(3, 2, 5 * SECOND)}, ["sinks.a", "sinks.b"])
    assert metrics.value("oodmon_outbox_pending", sink="sinks.a") == 3
    assert metrics.value("oodmon_dead_letters", sink="sinks.a") == 2
    assert metrics.value("oodmon_outbox_oldest_timestamp_seconds", sink="sinks.a") == 5
    assert 'oodmon_outbox_pending{sink="sinks.b"} 0.0' in _text(metrics)
    watcher.facts([Notice("m", "1", "a", 1, "k", "breaker opened")])
    assert metrics.value("oodmon_notices_total", **MODEL) == 1


def test_counters_without_labels_begin_at_nought() -> None:
    # `increase` sees a first failure only where the series was there before.
    text = Metrics().render().decode()
    for name, metric in METRICS.items():
        if metric.kind == "counter" and not metric.labels:
            assert f"\n{name} 0.0\n" in text, name


def test_counters_that_rules_watch_exist_from_the_start() -> None:
    metrics = Metrics()
    observer(metrics, pipeline(Windowing(10, 0, 2)))
    text = _text(metrics)
    for series in (
        'oodmon_samples_total{model="m",model_version="1"} 0.0',
        'oodmon_batches_lost_total{model="m",model_version="1"} 0.0',
        'oodmon_samples_dropped_total{model="m",model_version="1",reason="late"} 0.0',
    ):
        assert series in text


def test_late_samples_and_infinite_statistics() -> None:
    metrics = Metrics()
    watcher = Observer(metrics)
    watcher.facts(
        [
            Window("m", "1", "", 0, 10, late=4),
            DriftResult("m", "1", "t", "d", "", 0, 10, float("inf"), 1.0, True, 0.1, 5, 5),
        ]
    )
    assert metrics.value("oodmon_samples_dropped_total", **MODEL, reason="late") == 4
    assert "+Inf" in _text(metrics)
