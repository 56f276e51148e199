"""Facts → metrics: what a committed group says about samples, windows, drift and alerts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import numpy as np

from oodmon.contracts import Reader
from oodmon.daemon.health import Health
from oodmon.daemon.intake import Fold
from oodmon.daemon.metrics import METRICS, Metrics
from oodmon.errors import FeedError
from oodmon.records import BIN_EDGES, SHADOW, Alert, DriftResult, Fact, Notice, Window
from oodmon.store.events import AgentSeen, Depth, Store

__all__ = ["Observer"]

_log = logging.getLogger(__name__)

_SECOND: Final = 1_000_000_000
_ACTIVE_WITHIN: Final = 300 * _SECOND
"""An agent counts as present for so long after its last batch, ns."""
_SHOWN: Final = 5
"""Problems of a feed that are shown in full."""
_WEIGHING: Final = frozenset({"budget"})
"""Drift tests whose statistic and threshold are log10 of evidence."""

# Bin i holds p in (lower, upper], so -log10(p) in [-log10(upper), -log10(lower)): the bucket is the
# first whose bound reaches the latter. The bounds are rounded, hence the slack.
_SLACK: Final = 1e-4
_DECADES: Final = np.array(METRICS["oodmon_ood_score"].buckets)
with np.errstate(divide="ignore"):
    _BUCKET: Final = np.searchsorted(_DECADES, -np.log10(BIN_EDGES[:-1]) - _SLACK, side="left")
_MIDDLE: Final = -np.log10((BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2)


class Observer:
    """Keeps the metrics that come from facts and from what can be read off the running parts.

    Args:
        metrics: where to.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._level = ""
        self._bins: dict[str, int] = {}
        self._damaged: tuple[Reader | None, int] = (None, 0)
        self._weighing: frozenset[str] = frozenset()
        self._open: dict[tuple[str, str, str, str], set[str]] = {}

    def configured(
        self, pipeline: Fold, flag_level: float, calibrated: Mapping[str, float]
    ) -> None:
        """The configuration in force.

        Args:
            pipeline: whose promises and calibrations are told.
            flag_level: the tail probability at which samples are flagged; the label `level`.
            calibrated: detector → when its calibration was made, seconds since the epoch.
        """
        put, add = self._metrics.put, self._metrics.add
        # A counter that appears with its first event hides that event from rate and increase.
        model = {"model": pipeline.model, "model_version": pipeline.version}
        for name in ("oodmon_samples_total", "oodmon_batches_lost_total", "oodmon_notices_total"):
            add(name, 0, **model)
        for reason in ("agent", "late", "rejected", "duplicate"):
            add("oodmon_samples_dropped_total", 0, **model, reason=reason)
        for result in ("accepted", "rejected", "duplicate"):
            add("oodmon_batches_total", 0, result=result)
        self._level = f"{flag_level:g}"
        self._weighing = frozenset(
            name for name, test in pipeline.tests.items() if test.name in _WEIGHING
        )
        self._metrics.clear("oodmon_promise_info")
        for test, promise in pipeline.promises().items():
            if promise:
                put("oodmon_promise_info", 1, test=test, promise=promise)
        self._metrics.clear("oodmon_promised_run_length_windows")
        for test, windows in pipeline.run_lengths().items():
            if windows:
                put("oodmon_promised_run_length_windows", windows, test=test)
        for detector, calibration in pipeline.calibrations.items():
            put("oodmon_reference_samples", len(calibration), detector=detector)
            known = calibration.reference().histogram(detector)
            if known.judged:
                put("oodmon_reference_accuracy_ratio", known.accuracy, detector=detector)
            # Up to the bin that holds the level, or the least p that so few scores can give.
            least = max(flag_level, 1 / (len(calibration) + 1)) * (1 - _SLACK)
            self._bins[detector] = int(np.searchsorted(BIN_EDGES[1:], least, side="left")) + 1
        for detector, made in calibrated.items():
            put("oodmon_reference_timestamp_seconds", made, detector=detector)

    def facts(self, facts: Iterable[Fact]) -> None:
        """Take the facts of one committed group."""
        for fact in facts:
            if isinstance(fact, Window):
                self._window(fact)
            elif isinstance(fact, DriftResult):
                self._drift(fact)
            elif isinstance(fact, Alert):
                self._alert(fact)
            elif isinstance(fact, Notice):
                self._metrics.add(
                    "oodmon_notices_total", model=fact.model, model_version=fact.version
                )

    def episodes(self, alerts: Iterable[Mapping[str, object]]) -> None:
        """Episodes that were open when the daemon stopped: rows of the store's alerts."""
        for row in alerts:
            model, version, rule, severity, status, fingerprint = (
                str(row[name])
                for name in ("model", "version", "rule", "severity", "status", "fingerprint")
            )
            self._episode(status, fingerprint, (model, version, rule, severity))

    def agents(self, agents: Iterable[AgentSeen], now_ns: int) -> None:
        """Present agents by model, and the least share that one of them scores."""
        counts: dict[tuple[str, str], int] = {}
        least: dict[tuple[str, str], float] = {}
        for agent in agents:
            if agent.source.endswith(SHADOW):
                continue  # the second voice of an agent that is counted
            key = (agent.model, agent.version)
            counts.setdefault(key, 0)
            if agent.observed_at >= now_ns - _ACTIVE_WITHIN:
                counts[key] += 1
                least[key] = min(least.get(key, 1.0), agent.sampled_fraction)
        self._metrics.clear("oodmon_sampled_ratio")
        for (model, version), count in counts.items():
            self._metrics.put("oodmon_agents", count, model=model, model_version=version)
        for (model, version), share in least.items():
            self._metrics.put("oodmon_sampled_ratio", share, model=model, model_version=version)

    def pipeline(self, pipeline: Fold) -> None:
        """How far event time has been seen, and what the drift tests measured about the traffic."""
        model = {"model": pipeline.model, "model_version": pipeline.version}
        put = self._metrics.put
        put("oodmon_watermark_timestamp_seconds", pipeline.watermark / _SECOND, **model)
        for (test, detector, segment), found in pipeline.measurements().items():
            stream = {**model, "test": test, "detector": detector, "segment": segment}
            for name, value in found.items():
                if f"oodmon_{name}" in METRICS:
                    put(f"oodmon_{name}", value, **stream)

    def queues(
        self, reader: Reader, health: Health, store: Store, receivers: Collection[str]
    ) -> None:
        """What waits in the feed and in the outbox; what fails here is told where it matters."""
        try:
            self.feed(reader, health)
            self.depths(store.depths(), receivers)
        except Exception as error:
            _log.debug("backlog or outbox cannot be counted: %s", error)

    def feed(self, reader: Reader, health: Health) -> None:
        """What waits in the feed, and what is wrong with it.

        A part that cannot be read turns readiness off, although the others go on.
        """
        put = self._metrics.put
        put("oodmon_feed_backlog_bytes", reader.backlog_bytes())
        damaged = reader.damaged_frames
        known, self._damaged = self._damaged, (reader, damaged)
        before = known[1] if known[0] is reader else 0
        self._metrics.add("oodmon_feed_damaged_total", damaged - before)
        problems = reader.problems()
        put("oodmon_feed_problems", len(problems))
        if problems:
            health.fail("partitions", FeedError("; ".join(problems[:_SHOWN])))
        else:
            health.mend("partitions")

    def depths(self, depths: Mapping[str, Depth], receivers: Collection[str]) -> None:
        """How far each receiver is behind."""
        put = self._metrics.put
        for receiver in {*depths, *receivers}:
            depth = depths.get(receiver, Depth(0, 0, 0))
            put("oodmon_outbox_pending", depth.pending, sink=receiver)
            put("oodmon_dead_letters", depth.dead, sink=receiver)
            oldest = depth.oldest_ns / _SECOND
            put("oodmon_outbox_oldest_timestamp_seconds", oldest, sink=receiver)

    def _window(self, window: Window) -> None:
        model, version = window.model, window.version
        self._metrics.put(
            "oodmon_window_last_closed_timestamp_seconds",
            window.end / _SECOND,
            model=model,
            model_version=version,
        )
        self._metrics.add("oodmon_windows_closed_total", model=model, model_version=version)
        # Sliding windows overlap; those that begin at a multiple of their length cut time into
        # parts, so counting them alone counts every sample once.
        if window.start % max(window.end - window.start, 1):
            return
        if window.late:
            self._metrics.add(
                "oodmon_samples_dropped_total",
                window.late,
                model=model,
                model_version=version,
                reason="late",
            )
        for detector, histogram in window.detectors.items():
            labels = {
                "model": model,
                "model_version": version,
                "detector": detector,
                "segment": window.segment,
            }
            buckets = np.bincount(_BUCKET, weights=histogram.counts, minlength=len(_DECADES) + 1)
            total = float(histogram.counts @ _MIDDLE)
            self._metrics.observe_counts("oodmon_ood_score", buckets.tolist(), total, **labels)
            if histogram.judged:
                accuracy = histogram.accuracy
                self._metrics.put("oodmon_estimated_accuracy_ratio", accuracy, **labels)
            self._metrics.add("oodmon_scores_invalid_total", histogram.invalid, **labels)
            flagged = int(histogram.counts[: self._bins.get(detector, 0)].sum())
            self._metrics.add("oodmon_ood_flagged_total", flagged, **labels, level=self._level)

    def _drift(self, result: DriftResult) -> None:
        labels = {
            "model": result.model,
            "model_version": result.version,
            "test": result.test,
            "detector": result.detector,
            "segment": result.segment,
        }
        put = self._metrics.put
        put("oodmon_drift_statistic", result.statistic, **labels)
        put("oodmon_drift_threshold", result.threshold, **labels)
        put("oodmon_drift_effect", result.effect, **labels)
        put("oodmon_drift_active", float(result.drifted), **labels)
        if result.test in self._weighing:
            put("oodmon_drift_evidence_log10", result.statistic, **labels)
            put("oodmon_drift_threshold_log10", result.threshold, **labels)

    def _alert(self, alert: Alert) -> None:
        model = alert.labels.get("model", "")
        version = alert.labels.get("version", "")
        labels = {
            "model": model,
            "model_version": version,
            "rule": alert.rule,
            "severity": alert.severity,
        }
        if alert.status == "firing":
            self._metrics.add("oodmon_drift_alarms_total", **labels)
            self._metrics.put(
                "oodmon_drift_last_alarm_timestamp_seconds", alert.started_at / _SECOND, **labels
            )
        self._episode(alert.status, alert.fingerprint, (model, version, alert.rule, alert.severity))

    def _episode(self, status: str, fingerprint: str, key: tuple[str, str, str, str]) -> None:
        episodes = self._open.setdefault(key, set())
        if status == "firing":
            episodes.add(fingerprint)
        else:
            episodes.discard(fingerprint)
        model, version, rule, severity = key
        self._metrics.put(
            "oodmon_alert_firing",
            len(episodes),
            model=model,
            model_version=version,
            rule=rule,
            severity=severity,
        )
