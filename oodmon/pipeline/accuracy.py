"""Estimated accuracy of quiet traffic, and of the traffic since a change was suspected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from oodmon.records import Histogram, Window

__all__ = ["Accuracy"]

_MEMORY: Final = 2**20
"""Samples beyond which the older half counts half."""
_SURE: Final = 2.0
"""Standard errors either side: about 95 %."""
_MILLIONTHS: Final = 1e6

_Sums = dict[str, tuple[int, int]]  # detector → samples judged, their expected errors in millionths


class Accuracy:
    """A fold: the expected errors of quiet traffic, and those since a change was suspected.

    Args:
        references: detector → its calibration scores; those that do not measure expected errors
            have no part in it.
    """

    def __init__(self, references: Mapping[str, Histogram]) -> None:
        self._known = {name: known for name, known in references.items() if known.judged}
        self._calm: _Sums = {}
        self._lately: _Sums = {}

    def take(self, panes: Sequence[Window], *, suspicious: bool) -> None:
        """Count the panes of one span, of all segments.

        Args:
            panes: each sample once.
            suspicious: a change may be going on; when it is over, what was counted apart joins the
                rest.
        """
        if not suspicious:
            for name, sums in self._lately.items():
                _add(self._calm, name, *sums)
            self._lately = {}
        kept = self._lately if suspicious else self._calm
        for pane in panes:
            for name in self._known.keys() & pane.detectors.keys():
                found = pane.detectors[name]
                _add(kept, name, found.judged, found.errors)

    def told(self) -> Mapping[str, list[Mapping[str, Any]]]:
        """`accuracy` → one row per detector that measures it; empty where none does.

        `before` is that of the quiet traffic, or of the reference where there was none; `now` that
        since the change was suspected, and `uncertainty` what chance explains either way.
        """
        rows: list[Mapping[str, Any]] = []
        for name in sorted(self._known.keys() & self._lately.keys()):
            judged, errors = self._lately[name]
            reference = self._known[name].accuracy
            now = _accuracy(judged, errors)
            rows.append(
                {
                    "detector": name,
                    "reference": reference,
                    "before": _accuracy(*self._calm[name]) if name in self._calm else reference,
                    "now": now,
                    "samples": judged,
                    # No variable in [0, 1] varies more than a coin of the same mean.
                    "uncertainty": _SURE * math.sqrt(max(now * (1.0 - now), 0.0) / judged),
                }
            )
        return {"accuracy": rows} if rows else {}

    def freeze(self) -> Mapping[str, Any]:
        """Plain JSON values."""
        return {"calm": self._calm, "lately": self._lately}

    def thaw(self, state: Mapping[str, Any]) -> None:
        """Back from `freeze`; detectors that are gone are left behind."""
        self._calm, self._lately = (
            {
                name: (int(judged), int(errors))
                for name, (judged, errors) in state[part].items()
                if name in self._known
            }
            for part in ("calm", "lately")
        )


def _add(sums: _Sums, name: str, judged: int, errors: int) -> None:
    if not judged:
        return
    before = sums.get(name, (0, 0))
    if before[0] > _MEMORY:
        before = before[0] // 2, before[1] // 2
    sums[name] = before[0] + judged, before[1] + errors


def _accuracy(judged: int, errors: int) -> float:
    return 1.0 - errors / _MILLIONTHS / judged
