"""Features of a made-up classifier, and its head: what detectors of features are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from oodmon.detectors import Reference


def blobs(rows: int, width: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features after a ReLU around class centres that depend on width and classes alone."""
    centres, mix = _fixed(width, classes)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draw)
    found = centres[labels] + torch.randn((rows, width), generator=draw) @ mix
    return found.relu(), labels


def strange(rows: int, width: int, classes: int = 5, seed: int = 0) -> Tensor:
    """Features of no class: the usual values, in the wrong places."""
    return blobs(rows, width, classes, seed)[0].roll(1, dims=1)


def head(width: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) that tell the nearest centre."""
    centres = _fixed(width, classes)[0].relu()
    weight = centres - centres.mean(dim=0)
    return weight, -(weight * (centres + centres.mean(dim=0))).sum(dim=1) / 2.0


def logits(rows: Tensor, classes: int = 5) -> Tensor:
    weight, bias = head(rows.shape[1], classes)
    return rows @ weight.T + bias


def reference(
    rows: Tensor, labels: Tensor, classes: int = 5, batch_size: int = 256, known: bool = True
) -> Reference:
    """Layer "f", logits, labels, and the head if it is to be known."""
    return Reference.from_arrays(
        {"f": rows},
        logits(rows, classes),
        labels=labels,
        head=head(rows.shape[1], classes) if known else None,
        batch_size=batch_size,
    )


def _fixed(width: int, classes: int) -> tuple[Tensor, Tensor]:
    fixed = torch.Generator().manual_seed(width + classes)
    centres = torch.randn((classes, width), generator=fixed) * 2.0 + 1.0
    return centres, torch.randn((width, width), generator=fixed) / width**0.5
