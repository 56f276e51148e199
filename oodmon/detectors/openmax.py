"""Logits recalibrated by how extreme their distance from each class's mean logits is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.odds import log_partition_of, two_sided
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["OpenMax", "fit_extremes"]

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]

_STEPS: Final = 100
_SHARPEST: Final = 1e6
"""A rate is at most this over the tail's own spread: a tail of equal distances is a step."""

_UNSEEN: Final = -1e30
"""Location of a class that no reference row belongs to: any distance from it is extreme."""

_LEAST: Final = -1e15
"""A logit counts as at least this in a distance, whose square stays in range."""

_AT_ONCE: Final = 1 << 18
"""Logits gathered at once: what is worked on stays in the cache."""


@detectors.register("openmax")
@dataclass(frozen=True)
class OpenMax(Detector):
    """Probability of an unknown class, taken from the likeliest classes as far as they do not fit.

    Reads      logits (B, C); labels while learning
    Options    tail: largest distances per class that the extreme-value law is fitted to; alpha:
               classes that are revised; euclid_weight of the Euclidean distance, the cosine
               distance has the rest; correct_only: rows that the model gets right, as the paper
    Learns     mean (C, C) of each class's logits, rate and location (C,) of its law
    Score      log-odds of the unknown class, unbounded
    Reference  Bendale and Boult, CVPR 2016, algorithms 1 and 2

    LibMR adds 10,000 to the distances before it fits a Weibull law. That is the Gumbel law of
    minima of the distances themselves up to terms of distance / 10,000, so that law is fitted, by
    maximum likelihood and for all classes at once; it does not depend on the logits' unit.
    The score is the log-odds and not the probability: it does not saturate. A class without
    reference rows has weight one, so what the model gives to it counts as unknown. pytorch-ood
    takes the distance from a class as 0 unless some row of the batch is given to it, so its scores
    depend on the batch; with few classes in large batches both agree.
    Traps: an activation below zero is revised towards zero, as in the paper, so it grows; and the
    share of the reference that lies in the tails is taken for half unknown, so `tail` must be small
    beside the rows per class (20 of 1,000, as the authors have it).
    """

    tail: int = 20
    alpha: int = 10
    euclid_weight: float = 1.0
    correct_only: bool = True

    paper: ClassVar[Paper | None] = Paper(
        "Towards Open Set Deep Networks",
        "Bendale and Boult",
        "CVPR",
        2016,
        "https://arxiv.org/abs/1511.06233",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "alpha·C"

    def __post_init__(self) -> None:
        if self.tail < 2 or self.alpha < 1:
            raise ContractError(
                f"detectors.openmax: tail {self.tail} and alpha {self.alpha}: "
                "at least 2 and 1 expected"
            )
        if not 0.0 <= self.euclid_weight <= 1.0:
            raise ContractError(
                f"detectors.openmax.euclid_weight: {self.euclid_weight} is not in [0, 1]"
            )

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"tail": 5}, {"tail": 5, "alpha": 2, "euclid_weight": 0.5})

    def reads(self) -> Reads:
        """Logits, and labels while learning."""
        return Reads(logits=True, labels=True)

    def learn(self, reference: Reference) -> State:
        """Two passes: the means, then each row's distance; what is kept is 12 bytes a row."""
        total = count = torch.zeros(0)
        for acts in reference:
            logits, label = self._chosen(acts)
            if not len(total):
                width = logits.shape[1]
                total, count = logits.new_zeros(width, width), logits.new_zeros(width)
            total.index_add_(0, label, logits)
            count += torch.bincount(label, minlength=len(count)).to(count)
        if not bool((count > 0).any()):
            raise ContractError("openmax: the reference holds no row that can be learnt from")
        mean = total / count.clamp(min=1.0).unsqueeze(1)
        distances, labels = [], []
        for acts in reference:
            logits, label = self._chosen(acts)
            distances.append(self._distance(logits, mean[label]).float())
            labels.append(label)
        rate, location = fit_extremes(torch.cat(distances), torch.cat(labels), len(mean), self.tail)
        return {"mean": mean.float(), "rate": rate.float(), "location": location.float()}

    def check(self, state: State) -> None:
        """Mean (C, C), rate and location (C,)."""
        if set(state) != {"mean", "rate", "location"}:
            raise StateError(
                f"openmax: state: expected location, mean and rate, found {sorted(state)}"
            )
        width = len(state["rate"])
        for name, shape in (("mean", (width, width)), ("rate", (width,)), ("location", (width,))):
            if tuple(state[name].shape) != shape:
                raise StateError(
                    f"openmax: state {name!r}: expected {shape}, found {tuple(state[name].shape)}"
                )

    def score(self, acts: Activations, state: State) -> Tensor:
        """The unknown class gets a part w (alpha - rank) / alpha of each of the likeliest."""
        logits, mean = two_sided(acts).float(), state["mean"]
        classes = len(mean)
        if logits.shape[1] != classes:
            raise ContractError(f"openmax: learnt with {classes} classes, found {logits.shape[1]}")
        count = min(self.alpha, classes)
        top, label = logits.topk(count, dim=1)
        logits, whole = logits.clamp(min=_LEAST), logits
        distance = self._from_means(logits, mean, label)
        weight = ((distance - state["location"][label]) * state["rate"][label]).exp_()
        weight = weight.neg_().expm1_().neg_()
        rank = torch.arange(count, 0, -1, device=logits.device, dtype=logits.dtype) / count
        # a class that is ruled out by a logit of -inf has nothing to give
        taken = torch.where(top == -torch.inf, 0.0, top * weight.mul_(rank))
        revised = whole.scatter(1, label, top - taken)
        return taken.sum(dim=1) - log_partition_of(revised)

    def _from_means(self, logits: Tensor, mean: Tensor, label: Tensor) -> Tensor:
        """Distance (B, A) of each row from the means of its classes (B, A)."""
        size = max(1, _AT_ONCE // (label.shape[1] * len(mean)))
        if not logits.is_cpu:
            return self._distance(logits.unsqueeze(1), mean[label])
        if self.euclid_weight == 1.0:
            return torch.from_numpy(_euclid(logits.numpy(), mean.numpy(), label.numpy(), size))
        parts = [
            self._distance(logits[i : i + size].unsqueeze(1), mean[label[i : i + size]])
            for i in range(0, len(logits), size)
        ]
        return torch.cat(parts) if parts else logits.new_zeros(label.shape)

    def _distance(self, logits: Tensor, mean: Tensor) -> Tensor:
        """Distance over the last dimension."""
        if self.euclid_weight == 0.0:
            return 1.0 - torch.cosine_similarity(mean, logits, dim=-1)
        away = mean - logits
        euclid = away.square_().sum(dim=-1).sqrt_()
        if self.euclid_weight == 1.0:
            return euclid
        cosine = 1.0 - torch.cosine_similarity(mean, logits, dim=-1)
        return self.euclid_weight * euclid + (1.0 - self.euclid_weight) * cosine

    def _chosen(self, acts: Activations) -> tuple[Tensor, Tensor]:
        """Float64 logits and labels of the rows that are learnt from."""
        logits = two_sided(acts).double()
        if acts.labels is None:
            raise ContractError("openmax: the reference has no labels")
        label = acts.labels
        chosen = logits.isfinite().all(dim=1) & (label >= 0) & (label < logits.shape[1])
        if self.correct_only:
            chosen &= logits.argmax(dim=1) == label
        return logits[chosen], label[chosen]


def _euclid(logits: Floats, mean: Floats, label: Places, size: int) -> Floats:
    """Euclidean distances, `size` rows at a time in one piece of memory."""
    rows, count = label.shape
    found = np.empty((rows, count), logits.dtype)
    room = np.empty((min(rows, size) * count, len(mean)), logits.dtype)
    for start in range(0, rows, size):
        part = logits[start : start + size]
        away = room[: len(part) * count]
        mean.take(label[start : start + size].reshape(-1), axis=0, out=away, mode="clip")
        cube = away.reshape(len(part), count, -1)
        cube -= part[:, np.newaxis]
        np.vecdot(cube, cube, out=found[start : start + size])
    return np.sqrt(found, out=found)


def fit_extremes(
    distances: Tensor, labels: Tensor, classes: int, tail: int
) -> tuple[Tensor, Tensor]:
    """Rate s and location a (K,) of P(d) = 1 - exp(-exp(s (d - a))), fitted to each class's tail.

    Maximum likelihood over the `tail` largest distances d of each class: s solves
    sum d e^{sd} / sum e^{sd} - 1 / s = mean d, whose left side rises in s, so Newton's method in
    log s inside a bracket finds it for all classes at once; then a = log mean e^{sd} / s. A class
    without rows gets a location below every distance.
    """
    d, present = _tails(distances.double(), labels, classes, tail)
    number = present.sum(dim=1)
    count = number.clamp(min=1)
    largest = d.masked_fill(~present, -torch.inf).amax(dim=1)
    largest = torch.where(number > 0, largest, 0.0)
    below = torch.where(present, d - largest.unsqueeze(1), 0.0)  # <= 0, so that e^{sd} <= 1
    mean = below.sum(dim=1) / count
    floor = torch.finfo(torch.float32).eps * largest.abs() + torch.finfo(torch.float32).tiny
    spread = (-mean).clamp(min=floor)
    low, high = (1.0 / spread).log() - 4.0, (_SHARPEST / spread).log()
    log_s = (1.0 / spread).log()
    for _ in range(_STEPS):
        s = log_s.exp()
        e = torch.where(present, (s.unsqueeze(1) * below).exp(), 0.0)
        norm = e.sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        first = (e * below).sum(dim=1) / norm
        second = (e * below.square()).sum(dim=1) / norm - first.square()
        value = first - 1.0 / s - mean
        high = torch.where(value > 0.0, log_s, high)
        low = torch.where(value > 0.0, low, log_s)
        after = log_s - value / (s * second.clamp(min=0.0) + 1.0 / s)
        log_s = torch.where((after > low) & (after < high), after, (low + high) / 2)
    s = log_s.exp()
    e = torch.where(present, (s.unsqueeze(1) * below).exp(), 0.0)
    location = largest + (e.sum(dim=1) / count).clamp(min=torch.finfo(torch.float64).tiny).log() / s
    seen = number > 0
    return torch.where(seen, s, 1.0), torch.where(seen, location, _UNSEEN)


def _tails(distances: Tensor, labels: Tensor, classes: int, tail: int) -> tuple[Tensor, Tensor]:
    """The largest distances of each class, (K, tail), and which of them there are."""
    order = distances.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    label = labels[order]
    number = torch.bincount(labels, minlength=classes)
    place = torch.arange(len(label), device=label.device) - (number.cumsum(0) - number)[label]
    near = place < tail
    found = distances.new_zeros(classes, tail)
    present = torch.zeros(classes, tail, dtype=torch.bool, device=labels.device)
    found[label[near], place[near]] = distances[order][near]
    present[label[near], place[near]] = True
    return found, present
