"""What the daemon tells Prometheus: every exported name in one table, and the values behind it.

Names, units and labels follow Prometheus' conventions: prefix ``oodmon_``, base units, ``_total``
on counters. The number of series per metric is capped: what comes beyond the cap is counted under
``other``, and `oodmon_series_folded_total` counts how often that happened. Nothing here is named
by a request, a user or a sample.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "METRICS", "OTHER", "SERIES", "Metric", "Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "other"
"""The label value under which series beyond the cap are counted."""

MAX_SERIES: Final = 500
"""Series per metric before new ones are folded into `OTHER`."""

_MODEL: Final = ("model", "model_version")
_STREAM: Final = (*_MODEL, "detector", "segment")
_TEST: Final = (*_MODEL, "test", "detector", "segment")
_FAST: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SLOW: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
# Upper bounds of -log10(p) that lie on the window's bin edges: p = 0.75, 0.5, 0.25, 0.2, 0.1 and
# then three to a decade.
_DECADES: Final = (
    0.12494, 0.30103, 0.60206, 0.69897, 1.0,
    1.33333, 1.66667, 2.0, 2.33333, 2.66667, 3.0, 3.33333, 3.66667, 4.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric: its full name, kind, meaning, labels and (histograms) upper bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query can use."""
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "gauge", text, labels)


METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        _gauge("oodmon_build_info", "Always 1; the labels say what runs", "version", "python"),
        _gauge("oodmon_lease_held", "1 while this daemon works, 0 while it stands by for another"),
        _gauge("oodmon_ready", "1 while the daemon does its work, 0 while it cannot"),
        # Intake
        _counter("oodmon_samples_total", "Scored samples taken in", *_MODEL),
        _counter(
            "oodmon_samples_dropped_total",
            "Samples not counted: shed by the agent, late, rejected, or delivered twice",
            *_MODEL,
            "reason",
        ),
        _counter("oodmon_batches_total", "Score batches by what became of them", "result"),
        _counter(
            "oodmon_batches_lost_total", "Batches missing from the agents' numbering", *_MODEL
        ),
        _counter("oodmon_notices_total", "Notices by agents, pipeline and daemon", *_MODEL),
        _gauge("oodmon_agents", "Agents heard of within the last five minutes", *_MODEL),
        _gauge(
            "oodmon_sampled_ratio", "Least share of served samples that an agent scores", *_MODEL
        ),
        _gauge("oodmon_feed_backlog_bytes", "Bytes in the feed that are not yet settled"),
        _gauge("oodmon_feed_max_bytes", "Backlog at which agents begin to shed; 0 if unknown"),
        _counter("oodmon_feed_damaged_total", "Damaged places in the feed that were passed over"),
        _gauge("oodmon_feed_problems", "Parts of the feed that cannot be read at present"),
        _counter("oodmon_feed_failures_total", "Times that the feed could not be read"),
        _counter(
            "oodmon_intake_requests_total", "Requests to the HTTP intake by answer", "kind", "code"
        ),
        # Scores and drift
        Metric(
            "oodmon_ood_score",
            "histogram",
            "Samples of closed windows by -log10 of the tail probability; higher is more OOD",
            _STREAM,
            _DECADES,
        ),
        _counter(
            "oodmon_scores_invalid_total", "Samples that a detector could not score", *_STREAM
        ),
        _counter(
            "oodmon_ood_flagged_total", "Samples at or below the flag level", *_STREAM, "level"
        ),
        _gauge(
            "oodmon_estimated_accuracy_ratio",
            "Share of right answers in the newest window, estimated without labels",
            *_STREAM,
        ),
        _gauge(
            "oodmon_reference_accuracy_ratio",
            "The same estimate on the reference: what it was when all was well",
            "detector",
        ),
        _gauge("oodmon_labelled_samples", "Recent samples with a label", *_MODEL),
        _counter("oodmon_label_messages_total", "Messages of the labels' topic", "result"),
        _gauge("oodmon_accuracy_ratio", "Share of right answers among them", *_MODEL),
        _gauge("oodmon_accuracy_low_ratio", "Lower end of its 95 % interval", *_MODEL),
        _gauge("oodmon_accuracy_high_ratio", "Upper end of its 95 % interval", *_MODEL),
        _gauge("oodmon_estimate_shift_ratio", "What labels add to the estimate", *_MODEL),
        _gauge(
            "oodmon_corrected_accuracy_ratio",
            "The estimate on all recent samples, set right by the labels on some",
            *_MODEL,
        ),
        _counter("oodmon_windows_closed_total", "Windows closed", *_MODEL),
        _gauge(
            "oodmon_window_last_closed_timestamp_seconds",
            "End of the newest closed window",
            *_MODEL,
        ),
        _gauge("oodmon_watermark_timestamp_seconds", "How far event time has been seen", *_MODEL),
        _gauge("oodmon_drift_statistic", "What the drift test computed last", *_TEST),
        _gauge("oodmon_drift_threshold", "What the statistic is compared with", *_TEST),
        _gauge(
            "oodmon_drift_evidence_log10", "Evidence for a change, of tests that weigh it", *_TEST
        ),
        _gauge("oodmon_drift_threshold_log10", "Evidence at which such a test alarms", *_TEST),
        _gauge("oodmon_drift_effect", "Size of the drift in the test's own measure", *_TEST),
        _gauge("oodmon_drift_active", "1 where the test's last window drifted", *_TEST),
        _gauge("oodmon_alert_firing", "1 while an episode is open", *_MODEL, "rule", "severity"),
        _counter("oodmon_drift_alarms_total", "Episodes that began", *_MODEL, "rule", "severity"),
        _gauge(
            "oodmon_drift_last_alarm_timestamp_seconds",
            "Start of the newest episode",
            *_MODEL,
            "rule",
            "severity",
        ),
        _gauge(
            "oodmon_promise_info", "Always 1; the false-alarm promise in words", "test", "promise"
        ),
        _gauge(
            "oodmon_promised_run_length_windows",
            "Expected windows between false alarms, at least",
            "test",
        ),
        _gauge("oodmon_autocorrelation_ratio", "Lag-one autocorrelation of the scores", *_TEST),
        _gauge("oodmon_block_length_samples", "Samples that count as one for the test", *_TEST),
        _gauge("oodmon_reference_samples", "Scores that the calibration rests on", "detector"),
        _gauge("oodmon_reference_timestamp_seconds", "When the calibration was made", "detector"),
        # Work
        Metric(
            "oodmon_processing_duration_seconds",
            "histogram",
            "Time for one group of batches, by stage",
            ("stage",),
            _FAST,
        ),
        Metric(
            "oodmon_end_to_end_delay_seconds",
            "histogram",
            "From the forward pass to the commit of what was concluded",
            (),
            _SLOW,
        ),
        _gauge("oodmon_store_up", "1 while the last transaction succeeded"),
        _counter("oodmon_store_failures_total", "Transactions that failed and were retried"),
        _gauge("oodmon_store_size_bytes", "What the store takes on disk"),
        _gauge(
            "oodmon_store_max_bytes", "What it may take; beyond, history goes early. 0: no limit"
        ),
        _gauge("oodmon_disk_free_bytes", "Free for oodmon on the disk of feed or store", "part"),
        _gauge("oodmon_disk_size_bytes", "Size of that disk", "part"),
        _counter("oodmon_store_pruned_total", "Rows deleted for age or size", "kind"),
        # Delivery
        _counter("oodmon_sink_deliveries_total", "Events by what became of them", "sink", "result"),
        Metric(
            "oodmon_sink_delivery_duration_seconds",
            "histogram",
            "Time of one call of a sink or trigger",
            ("sink",),
            _SLOW,
        ),
        _gauge("oodmon_sink_up", "1 while the last call of the sink succeeded", "sink"),
        _gauge("oodmon_sink_stalled", "1 while a call runs longer than its timeout", "sink"),
        _counter("oodmon_dead_letters_total", "Events given up on", "sink"),
        _gauge("oodmon_dead_letters", "Events among the dead letters", "sink"),
        _gauge("oodmon_dead_letters_bytes", "What these take in the store", "sink"),
        _gauge("oodmon_outbox_pending", "Events waiting for delivery", "sink"),
        _gauge("oodmon_outbox_pending_bytes", "What these take in the store", "sink"),
        _gauge(
            "oodmon_outbox_oldest_timestamp_seconds", "Time of the oldest waiting event", "sink"
        ),
        _counter("oodmon_retrain_requests_total", "Retraining requests", "trigger", "result"),
        # Reload
        _gauge("oodmon_config_last_reload_successful", "1 if the last reload took effect"),
        _gauge(
            "oodmon_config_last_reload_success_timestamp_seconds", "When the configuration was read"
        ),
        _counter("oodmon_series_folded_total", "Updates counted under `other`", "metric"),
    )
}
"""Full name → metric: dashboards and alert rules are tested against this table."""

SERIES: Final = frozenset(name for metric in METRICS.values() for name in metric.series)
"""Every name that a query may use."""


@dataclass(slots=True)
class _Buckets:
    counts: list[float]
    total: float = 0.0


@dataclass(slots=True)
class _Values:
    numbers: dict[tuple[str, ...], float] = field(default_factory=dict)
    buckets: dict[tuple[str, ...], _Buckets] = field(default_factory=dict)


class Metrics(Collector):
    """The values of the table, behind a registry of their own; safe to call from any thread.

    Args:
        max_series: series per metric before new ones are folded into `OTHER`.
    """

    def __init__(self, max_series: int = MAX_SERIES) -> None:
        self._max_series = max_series
        self._lock = threading.Lock()
        self._values = {name: _Values() for name in METRICS}
        for name, metric in METRICS.items():
            if metric.kind == "counter" and not metric.labels:
                # `increase` sees the first failure only where there was a nought before it.
                self._values[name].numbers[()] = 0.0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def add(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Raise a counter."""
        with self._lock:
            self._raise(name, self._key(name, labels, self._values[name].numbers), amount)

    def put(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            numbers = self._values[name].numbers
            numbers[self._key(name, labels, numbers)] = value

    def clear(self, name: str) -> None:
        """Forget every series of a gauge whose streams may have gone."""
        with self._lock:
            self._values[name].numbers.clear()

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Count one value in a histogram."""
        counts = [0.0] * (len(METRICS[name].buckets) + 1)
        counts[bisect_left(METRICS[name].buckets, value)] = 1.0
        self.observe_counts(name, counts, value, **labels)

    def observe_counts(
        self, name: str, counts: Iterable[float], total: float, /, **labels: str
    ) -> None:
        """Add counts per bucket (one more than there are bounds) and the sum of the values."""
        with self._lock:
            held = self._values[name].buckets
            key = self._key(name, labels, held)
            buckets = held.get(key)
            if buckets is None:
                buckets = held[key] = _Buckets([0.0] * (len(METRICS[name].buckets) + 1))
            buckets.counts = [a + b for a, b in zip(buckets.counts, counts, strict=True)]
            buckets.total += total

    def value(self, name: str, /, **labels: str) -> float:
        """A counter or gauge as it stands; 0 where nothing was told."""
        with self._lock:
            key = tuple(labels[label] for label in METRICS[name].labels)
            return self._values[name].numbers.get(key, 0.0)

    def collect(self) -> Iterator[Family]:
        """The families, for prometheus-client."""
        with self._lock:
            families = [self._family(metric) for metric in METRICS.values()]
        yield from families

    def describe(self) -> Iterator[Family]:
        """Nothing: the registry then need not collect when this registers."""
        return iter(())

    def render(self) -> bytes:
        """The exposition text, format 0.0.4."""
        return generate_latest(self.registry)

    def _key(
        self, name: str, labels: dict[str, str], held: Mapping[tuple[str, ...], object]
    ) -> tuple[str, ...]:
        key = tuple(labels[label] for label in METRICS[name].labels)
        if key in held or len(held) < self._max_series:
            return key
        # The model stays, so that sums by model remain right.
        folded = tuple(
            value if label in _MODEL else OTHER
            for label, value in zip(METRICS[name].labels, key, strict=True)
        )
        if folded not in held and len(held) >= 2 * self._max_series:
            folded = (OTHER,) * len(key)
        self._raise("oodmon_series_folded_total", (name,), 1.0)
        return folded

    def _raise(self, name: str, key: tuple[str, ...], amount: float) -> None:
        numbers = self._values[name].numbers
        numbers[key] = numbers.get(key, 0.0) + amount

    def _family(self, metric: Metric) -> Family:
        values = self._values[metric.name]
        if metric.kind == "histogram":
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for key, held in values.buckets.items():
                seen = 0.0
                rows = []
                for bound, count in zip((*metric.buckets, None), held.counts, strict=True):
                    seen += count
                    rows.append(("+Inf" if bound is None else repr(float(bound)), seen))
                histogram.add_metric(key, rows, held.total)
            return histogram
        numbers: CounterMetricFamily | GaugeMetricFamily
        if metric.kind == "counter":
            numbers = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
        else:
            numbers = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        for key, number in values.numbers.items():
            numbers.add_metric(key, number)
        return numbers
