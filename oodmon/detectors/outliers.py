"""Reference rows that are known outliers, by their label: what some detectors also learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from oodmon.contracts import Detector, Reference
from oodmon.detectors.reference import gather, part_of
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["OUTLIER", "Inside", "gather_outliers", "is_outlier", "suited", "takes_outliers"]

OUTLIER: Final = -1
"""The label of a reference row that is known to be no in-distribution sample."""


class Inside:
    """A reference without its known outliers.

    Args:
        reference: the whole one.
    """

    def __init__(self, reference: Reference) -> None:
        self._whole = reference

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """Of the whole reference."""
        return self._whole.head

    @property
    def device(self) -> torch.device:
        """Of the whole reference."""
        return self._whole.device

    def generator(self) -> torch.Generator:
        """Of the whole reference."""
        return self._whole.generator()

    def progress(self, done: float, note: str = "") -> None:
        """Told to the whole reference."""
        self._whole.progress(done, note)

    def __iter__(self) -> Iterator[Activations]:
        for acts in self._whole:
            known = None if acts.labels is None else acts.labels == OUTLIER
            if known is None or not bool(known.any()):
                yield acts
            elif not bool(known.all()):
                yield part_of(acts, ~known)


def takes_outliers(detector: Detector) -> bool:
    """Whether it learns from known outliers: by its option or class variable `outliers`."""
    return bool(getattr(detector, "outliers", False))


def suited(detector: Detector, reference: Reference) -> Reference:
    """The reference as this detector is to see it: known outliers only where it learns from them.

    To all others such rows would pass for in-distribution samples.
    """
    return reference if takes_outliers(detector) else Inside(reference)


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
