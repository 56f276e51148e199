"""Which predictions are kept, so that labels that come later can be held against them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

from oodmon.errors import ContractError
from oodmon.promises import Promise

__all__ = ["LABELS", "Labelling"]

LABELS: Final = "labels"
"""What rules call the test on true losses, in the place of a drift test's id."""


@dataclass(frozen=True)
class Labelling:
    """Keep predictions by sample id.

    Args:
        share: of the samples, chosen by a hash of the id, so that every replica and every replay
            chooses the same, (0, 1].
        over_seconds: the accuracy is told of samples that were observed within this, back from the
            newest closed window.
        least_labels: fewer than these tell nothing.
        false_alarms: how often rules on `labels` may be wrong: "1 per 30 days".
        tolerated_loss: of true accuracy against the reference's, that needs no alarm, [0, 0.5].
        least_accuracy: where above 0, what is compared with in the place of both, below 1.
    """

    share: float = 1.0
    over_seconds: float = 604_800.0
    least_labels: int = 100
    false_alarms: str = "1 per 30 days"
    tolerated_loss: float = 0.02
    least_accuracy: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ContractError(f"share: {self.share} is not in (0, 1]")
        if not (math.isfinite(self.over_seconds) and self.over_seconds > 0.0):
            raise ContractError(f"over_seconds: {self.over_seconds} is not above 0")
        if self.least_labels < 1:
            raise ContractError(f"least_labels: {self.least_labels} is not at least 1")
        Promise.parse(self.false_alarms)
        if not 0.0 <= self.tolerated_loss <= 0.5:
            raise ContractError(f"tolerated_loss: {self.tolerated_loss} is not in [0, 0.5]")
        if not 0.0 <= self.least_accuracy < 1.0:
            raise ContractError(f"least_accuracy: {self.least_accuracy} is not in [0, 1)")

    def keeps(self, sample_id: str) -> bool:
        """Whether the prediction of this sample is kept."""
        if self.share >= 1.0:
            return True
        name = sample_id.encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        return drawn < self.share * 2**64
