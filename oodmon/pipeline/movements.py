"""Which predicted classes and segments grew or shrank while a change was going on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from oodmon.records import DriftResult, Window

__all__ = ["Movements", "is_suspicious"]

_MOST: Final = 5
"""Classes and segments that are named."""
_MEMORY: Final = 2**20
"""Samples beyond which the older half counts half."""
_STANDING_OUT: Final = 3.0
"""Standard errors of the difference of two shares."""

_Counts = dict[str, int]


def is_suspicious(result: DriftResult) -> bool:
    """Half of what an alarm takes, and the test has an idea since when; or an alarm."""
    grown = bool(result.since) and result.statistic >= result.threshold / 2.0
    return result.drifted or grown


class Movements:
    """A fold: the counts of quiet traffic, and those since a change was suspected."""

    def __init__(self) -> None:
        self._calm: dict[str, _Counts] = {"classes": {}, "segments": {}}
        self._lately: dict[str, _Counts] = {"classes": {}, "segments": {}}

    def take(self, panes: Sequence[Window], *, suspicious: bool) -> None:
        """Count the panes of one span.

        Args:
            panes: of all segments.
            suspicious: a change may be going on; when it is over, what was counted apart joins the
                rest.
        """
        found: dict[str, _Counts] = {"classes": {}, "segments": {}}
        for pane in panes:
            _add(found["segments"], pane.segment, pane.samples)
            for label, count in pane.predicted.items():
                _add(found["classes"], str(label), count)
        for kind, counts in found.items():
            if not suspicious:
                for name, count in self._lately[kind].items():
                    _add(counts, name, count)
                self._lately[kind] = {}
            kept = self._calm if not suspicious else self._lately
            for name, count in counts.items():
                _add(kept[kind], name, count)
            if sum(kept[kind].values()) > _MEMORY:
                kept[kind] = {name: count // 2 for name, count in kept[kind].items() if count > 1}

    def told(self) -> Mapping[str, list[Mapping[str, Any]]]:
        """Kind → those that moved most, with their counts before and since; may be empty."""
        return {
            kind: moved
            for kind in self._calm
            if (moved := _moved(self._calm[kind], self._lately[kind]))
        }

    def freeze(self) -> Mapping[str, Any]:
        """Plain JSON values."""
        return {"calm": self._calm, "lately": self._lately}

    def thaw(self, state: Mapping[str, Any]) -> None:
        """Back from `freeze`."""
        self._calm, self._lately = (
            {kind: dict(counts) for kind, counts in state[part].items()}
            for part in ("calm", "lately")
        )


def _add(counts: _Counts, name: str, count: int) -> None:
    if count:
        counts[name] = counts.get(name, 0) + count


def _moved(before: _Counts, since: _Counts) -> list[Mapping[str, Any]]:
    """By the difference of the two shares in standard errors, the greatest first."""
    all_before, all_since = sum(before.values()), sum(since.values())
    if not all_before or not all_since:
        return []
    found = []
    for name in before.keys() | since.keys():
        old, new = before.get(name, 0), since.get(name, 0)
        share = (old + new) / (all_before + all_since)
        error = math.sqrt(share * (1.0 - share) * (1.0 / all_before + 1.0 / all_since))
        change = new / all_since - old / all_before
        if error and abs(change) >= _STANDING_OUT * error:
            row = {
                "name": name,
                "before": old,
                "since": new,
                "share_before": old / all_before,
                "share_since": new / all_since,
            }
            found.append((-abs(change) / error, name, row))
    return [row for _, _, row in sorted(found, key=lambda entry: entry[:2])[:_MOST]]
