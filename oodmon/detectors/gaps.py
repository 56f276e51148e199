"""What the softmax says, in the log domain throughout: exact for any gap, and on any device."""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.detectors.order import top_values

__all__ = ["MARK", "Answer", "Gaps"]

MARK: Final = 1e30
"""Stands in place of the winning logit's gap, and is the widest that there can be: exp(-1e30) is 0,
and 0 times it is as well."""


class Answer(Protocol):
    """What the softmax says of each row, as new tensors (B,); NaN where a logit is NaN or +inf."""

    def log_wrong(self) -> Tensor:
        """log(1 - p) of the largest probability p, < 0."""

    def log_odds(self) -> Tensor:
        """log((1 - p) / p), unbounded."""

    def log_sure(self) -> Tensor:
        """log p, <= 0."""

    def log_partition(self) -> Tensor:
        """log sum exp of the logits."""

    def largest(self) -> Tensor:
        """The largest logit."""

    def entropy(self) -> Tensor:
        """-sum p log p, >= 0."""

    def mean_other(self) -> Tensor:
        """Mean probability of the other classes, weighted by their probabilities, <= 1 - p."""

    def log_likeliest(self, count: int) -> Tensor:
        """log p of the `count` likeliest classes (B, count), in no order.

        For the predicted class log min(p, 1 - p): log p is lost in rounding where p is near 1.
        """


class Gaps:
    """Any device, any gap: in the log domain throughout, for which nothing waits on the host."""

    def __init__(self, logits: Tensor) -> None:
        self._top, self._label = logits.max(dim=1, keepdim=True)
        # added to the winner's gap of 0, so that a row with an infinite logit stays NaN
        gaps = logits.sub(self._top).scatter_(1, self._label, -MARK, reduce="add")
        self._gaps = gaps.clamp_(min=-MARK)
        self._shares = self._gaps.softmax(dim=1)
        self._odds = self._gaps.amax(dim=1).sub_(self._shares.amax(dim=1).log_())

    def log_wrong(self) -> Tensor:
        """See `Answer`."""
        return functional.logsigmoid(self._odds)

    def log_odds(self) -> Tensor:
        """See `Answer`."""
        return self._odds.clone()

    def log_sure(self) -> Tensor:
        """See `Answer`."""
        return functional.softplus(self._odds).neg_()

    def log_partition(self) -> Tensor:
        """See `Answer`."""
        return functional.softplus(self._odds).add_(self._top.squeeze(1))

    def largest(self) -> Tensor:
        """See `Answer`."""
        return self._top.squeeze(1).clone()

    def entropy(self) -> Tensor:
        """log(1 + odds) - (1 - p) (mean gap of the others), so that nothing cancels."""
        mean = (self._shares * self._gaps).sum(dim=1)
        return functional.softplus(self._odds).addcmul_(self._odds.sigmoid(), mean, value=-1.0)

    def mean_other(self) -> Tensor:
        """See `Answer`."""
        return self._shares.square().sum(dim=1).mul_(self._odds.sigmoid())

    def log_doubt(self) -> Tensor:
        """log min(p, 1 - p) of the largest probability p, (B,)."""
        return functional.softplus(self._odds.abs()).neg_()

    def log_likeliest(self, count: int) -> Tensor:
        """See `Answer`."""
        found = self._gaps - functional.softplus(self._odds).unsqueeze(1)
        own = self.log_doubt().unsqueeze(1)
        if count < found.shape[1]:
            return torch.cat([own, top_values(found, count - 1)], dim=1)
        return found.scatter_(1, self._label, own)
