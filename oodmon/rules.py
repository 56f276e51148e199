"""Drift results → alerts: how long before anyone is told, and when it is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from oodmon.errors import ContractError
from oodmon.records import ALL, Alert, DriftResult

__all__ = ["Episode", "Rule", "Rules", "Transition"]


@dataclass(frozen=True)
class Rule:
    """When a drift test's results become an alert.

    Args:
        drift: id of the drift test.
        severity: info, warning or critical (free text, as Alertmanager's).
        detectors, segments: the streams to look at; empty means the result over all streams
            where the test has one (`budget`), else every stream by itself.
        for_windows: drifted windows in a row before the alert fires.
        resolve_after_windows: windows in a row without drift before it is resolved.
        labels: added to the alert's.
        triggers: ids of the triggers that a firing alert sets going.
    """

    drift: str
    severity: str = "warning"
    detectors: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    for_windows: int = 1
    resolve_after_windows: int = 3
    labels: Mapping[str, str] = field(default_factory=dict)
    triggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("for_windows", "resolve_after_windows"):
            if getattr(self, name) < 1:
                raise ContractError(f"{name}: {getattr(self, name)} is less than 1")

    def looks_at(self, results: Sequence[DriftResult]) -> Iterator[DriftResult]:
        """The results of one span that this rule decides on."""
        mine = [result for result in results if result.test == self.drift]
        if not self.detectors and not self.segments:
            overall = [result for result in mine if result.detector == ALL]
            yield from overall or mine
            return
        for result in mine:
            if result.detector == ALL:
                continue
            if self.detectors and result.detector not in self.detectors:
                continue
            if self.segments and result.segment not in self.segments:
                continue
            yield result


@dataclass(frozen=True, slots=True)
class Episode:
    """Where one rule stands with one stream.

    Attributes:
        drifted, calm: windows in a row with and without drift.
        started_at: start of the first drifted window of the row, ns.
        firing: people have been told.
        labels, severity: what they were told; kept, so that the end carries the same fingerprint
            even when the rule was changed meanwhile.
    """

    rule: str
    detector: str
    segment: str
    drifted: int = 0
    calm: int = 0
    started_at: int = 0
    firing: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    severity: str = ""


@dataclass(frozen=True, slots=True)
class Transition:
    """An episode that begins to fire, or that is over."""

    episode: Episode
    result: DriftResult | None

    @property
    def resolved(self) -> bool:
        """True where the episode is over."""
        return not self.episode.firing

    def alert(self, end: int, evidence: Mapping[str, Any]) -> Alert:
        """What people are told; `end`, ns, is when it was over, if it is."""
        return Alert(
            self.episode.rule,
            "resolved" if self.resolved else "firing",
            self.episode.severity,
            self.episode.started_at,
            end if self.resolved else 0,
            self.episode.labels,
            evidence,
        )


class Rules:
    """The rules of one pipeline and their episodes: a fold over drift results.

    Args:
        rules: id → rule.
        labels: of every alert, such as model and version.
    """

    def __init__(self, rules: Mapping[str, Rule], labels: Mapping[str, str]) -> None:
        self.rules = dict(rules)
        self.labels = dict(labels)
        self._episodes: dict[tuple[str, str, str], Episode] = {}
        self._orphans: list[Episode] = []

    def step(self, results: Sequence[DriftResult]) -> list[Transition]:
        """Take all results of one span."""
        found = [Transition(replace(orphan, firing=False), None) for orphan in self._orphans]
        self._orphans = []
        for name, rule in self.rules.items():
            for result in rule.looks_at(results):
                key = (name, result.detector, result.segment)
                before = self._episodes.get(key, Episode(*key))
                after = _moved(rule, before, result)
                if after.firing and not before.firing:
                    after = replace(
                        after, labels=self._labels(rule, result), severity=rule.severity
                    )
                if after.firing != before.firing:
                    found.append(Transition(after, result))
                if after.drifted or after.firing:
                    self._episodes[key] = after
                else:
                    self._episodes.pop(key, None)
        return found

    def _labels(self, rule: Rule, result: DriftResult) -> dict[str, str]:
        stream = {"test": rule.drift, "detector": result.detector, "segment": result.segment}
        return {**rule.labels, **self.labels, **stream}

    def freeze(self) -> list[dict[str, Any]]:
        """Episodes as plain JSON values."""
        return [asdict(episode) for episode in (*self._episodes.values(), *self._orphans)]

    def thaw(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Back from `freeze`.

        An episode that fires for a rule that is gone would never end for those who were told of
        it: it is resolved at the next step.
        """
        self._episodes, self._orphans = {}, []
        for row in rows:
            episode = Episode(**row)
            if episode.rule in self.rules:
                self._episodes[episode.rule, episode.detector, episode.segment] = episode
            elif episode.firing:
                self._orphans.append(episode)


def _moved(rule: Rule, before: Episode, result: DriftResult) -> Episode:
    if result.drifted:
        fresh = before.drifted == 0 and not before.firing
        drifted = before.drifted + 1
        return replace(
            before,
            drifted=drifted,
            calm=0,
            started_at=result.start if fresh else before.started_at,
            firing=before.firing or drifted >= rule.for_windows,
        )
    if not before.firing:
        return replace(before, drifted=0, calm=0, started_at=0)
    calm = before.calm + 1
    return replace(before, drifted=0, calm=calm, firing=calm < rule.resolve_after_windows)
