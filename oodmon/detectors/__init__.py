"""Raw out-of-distribution scores: one file per mechanism, higher is more OOD.

`Reference` (what a detector learns from) and `Scorer` (a detector with what it learnt) are loaded
on first use, because both need torch and the catalogue's names must be readable without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oodmon.detectors.reference import Reference
    from oodmon.detectors.scorer import Scorer

__all__ = ["Reference", "Scorer"]


def __getattr__(name: str) -> Any:
    if name == "Reference":
        from oodmon.detectors.reference import Reference

        return Reference
    if name == "Scorer":
        from oodmon.detectors.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
