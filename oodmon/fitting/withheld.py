"""Classes of the reference as stand-ins for new ones: kept from a detector and from the head.

A class is taken out of the data that the detector learns from, and its logit and its row of the
head are taken away, so that neither can name it. The features know it still, because the model was
trained on it: how well its samples are told apart is the most that can be hoped for of a new class
like it, not what is to be expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from oodmon.contracts import Detector
from oodmon.detectors import Reference, Scorer
from oodmon.errors import OodmonError
from oodmon.evaluate import auroc
from oodmon.fitting.shares import Kept, moved
from oodmon.records import Activations

__all__ = ["UNSEEN", "classes_of", "withheld"]

UNSEEN: Final = "unseen class"
"""Name of the column."""

_LEAST: Final = 8
"""Held-out samples that a class needs, and the others too."""

_FEWEST: Final = 3
"""Classes of a head from which one can be taken."""

Head = tuple[Tensor, Tensor]


def classes_of(kept: Kept, held: Kept, limit: int, seed: int) -> tuple[int, ...]:
    """Which classes can be kept out, at most `limit` of them, drawn by the seed.

    None where samples have no labels, or the labels do not count the model's logits.
    """
    widths = set()
    for acts in (*kept.batches(), *held.batches()):
        if acts.labels is None or acts.logits is None or acts.logits.ndim != 2:
            return ()
        widths.add(acts.logits.shape[1])
    labels = [acts.labels for acts in held.batches() if acts.labels is not None]
    every = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    width = widths.pop() if len(widths) == 1 else 0
    if width < _FEWEST or not len(every) or int(every.max()) >= width or int(every.min()) < 0:
        return ()
    counts = torch.bincount(every, minlength=width)
    enough = (counts >= _LEAST) & (len(every) - counts >= _LEAST)
    usable = enough.nonzero().flatten().numpy()
    return tuple(int(c) for c in np.random.default_rng(seed).permutation(usable)[:limit])


def withheld(
    detector: Detector,
    kept: Kept,
    held: Kept,
    classes: tuple[int, ...],
    head: Head | None,
    seed: int,
    device: torch.device,
) -> float:
    """Mean AUROC of held-out samples of a class against the others', over these classes.

    The detector learns anew without each of them. NaN where it reads inputs or the model, from
    which no class can be taken, or cannot learn without one.
    """
    reads = detector.reads()
    if reads.inputs or reads.model:
        return math.nan
    found = []
    for label in classes:
        reference = Reference.from_batches(
            lambda label=label: _without(kept, label),  # type: ignore[misc]
            head=_cut(head, label),
            seed=seed,
            device=device,
        )
        usual, odd = [], []
        try:
            scorer = Scorer.learn(detector, reference)
            for acts in held.batches():
                scores = scorer.score(moved(_nameless(acts, label), device)).cpu()
                own = _labels(acts) == label
                odd.append(scores[own])
                usual.append(scores[~own])
        except OodmonError:
            return math.nan
        inside, outside = (_valid(torch.cat(parts)) for parts in (usual, odd))
        if min(len(inside), len(outside)) < _LEAST:
            return math.nan
        found.append(auroc(inside.numpy(), outside.numpy()))
    return float(np.mean(found)) if found else math.nan


def _without(kept: Kept, label: int) -> Iterator[Activations]:
    """What was kept, without the class: its rows, its logit; the labels close the gap."""
    for acts in kept.batches():
        rows = _labels(acts) != label
        if not bool(rows.any()):
            continue
        labels = _labels(acts)[rows]
        nameless = _nameless(acts, label)
        yield Activations(
            layers={name: tensor[rows] for name, tensor in nameless.layers.items()},
            logits=None if nameless.logits is None else nameless.logits[rows],
            labels=labels - (labels > label).long(),
        )


def _nameless(acts: Activations, label: int) -> Activations:
    """All rows, without the class's logit."""
    width = 0 if acts.logits is None else acts.logits.shape[1]
    return Activations(
        layers=acts.layers,
        logits=None if acts.logits is None else _dropped(acts.logits, label, width),
    )


def _dropped(logits: Tensor, label: int, width: int) -> Tensor:
    return logits[:, torch.arange(width) != label]


def _cut(head: Head | None, label: int) -> Head | None:
    if head is None or len(head[0]) <= label:
        return head
    rows = torch.arange(len(head[0]), device=head[0].device) != label
    return head[0][rows], head[1][rows]


def _labels(acts: Activations) -> Tensor:
    if acts.labels is None:  # `classes_of` gives no class where labels are missing
        return torch.full((acts.rows,), -1)
    return acts.labels


def _valid(scores: Tensor) -> Tensor:
    return scores[~scores.isnan()]
