"""Reference rows that are known outliers, by their label: what some detectors also learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor

from oodmon.contracts import Reference
from oodmon.detectors.reference import gather
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["OUTLIER", "gather_outliers", "is_outlier"]

OUTLIER: Final = -1
"""The label of a reference row that is known to be no in-distribution sample."""


def is_outlier(acts: Activations, name: str) -> Tensor:
    """Which rows (B,) are known outliers; `ContractError` where there are no labels."""
    if acts.labels is None:
        raise ContractError(
            f"{name}: the reference has no labels, and {OUTLIER} is to mark known outliers"
        )
    return acts.labels == OUTLIER


def gather_outliers(
    reference: Reference, read: Callable[[Activations], Tensor], limit: int, name: str
) -> Tensor | None:
    """At most `limit` rows of known outliers, as `read` sees a batch; None where there are none."""
    if not any(bool(is_outlier(acts, name).any()) for acts in reference):
        return None
    (found,) = gather(reference, lambda acts: (read(acts)[is_outlier(acts, name)],), limit)
    return found
