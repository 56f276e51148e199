"""The data that detectors are checked on: four classes, maps, vectors, logits and images.

Every detector gets all of it, and vectors of their own for layers that it names otherwise; in a
layer called `faint` strange samples are nearer to nothing than to any class. What reads the model
gets a probe of a small one that is sure of the images of the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from oodmon.checks.detectors.model import CLASSES, IMAGE, NOISE, around, probe_on, strangeness
from oodmon.contracts import Detector
from oodmon.detectors.reference import Reference
from oodmon.detectors.scorer import Scorer
from oodmon.records import Activations

__all__ = [
    "LAYERS",
    "channels_last",
    "close",
    "each",
    "extremes",
    "joined",
    "learnt",
    "reference",
    "rows",
    "samples",
    "strided",
    "tensors",
]

LAYERS: Final = ("stage", "features")
"""What `Detector.pin` chooses from."""

_ROWS: Final = 400
_SEED: Final = 11
_SURE: Final = 8.0  # logit of the right class of a sample of the reference
_VECTOR: Final = 12
_MAP: Final = (6, 5, 4)
_SLIGHT: Final = 0.1  # of a head for maps: averaged, those of the classes hardly differ


def samples(detector: Detector, count: int, seed: int = 1, *, strange: bool = False) -> Activations:
    """Samples like the reference's, or strange ones: far from every class, the model unsure."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    names = dict.fromkeys((*LAYERS, *detector.reads().layers))
    layers = {
        name: around(name, _MAP if name == "stage" else (_VECTOR,), labels, draw, strange)
        for name in names
    }
    logits = torch.randn((count, CLASSES), generator=draw) * NOISE - 2.0
    if not strange:
        logits[torch.arange(count), labels] += _SURE + torch.rand(count, generator=draw)
    return Activations(
        layers=layers,
        logits=logits,
        inputs=around("inputs", IMAGE, labels, draw, strange),
        labels=labels,
        probe=probe_on("cpu") if detector.reads().model else None,
    )


def extremes(detector: Detector) -> Activations:
    """Finite and far out: zeros, 1e4 times the usual, logits that saturate, all logits equal."""
    usual = samples(detector, 6, seed=9)
    factor = torch.tensor([0.0, 1e4, 1e4, 1.0, 1.0, 1e-4])

    def stretched(tensor: Tensor) -> Tensor:
        return tensor * factor.reshape(-1, *[1] * (tensor.ndim - 1))

    logits = torch.zeros((6, CLASSES))
    logits[1, :2] = torch.tensor([1e4, -1e4])
    logits[2] = -1e4
    logits[3, 1] = -float("inf")
    logits[4, 2] = 200.0
    return Activations(
        layers={name: stretched(tensor) for name, tensor in usual.layers.items()},
        logits=logits,
        inputs=stretched(usual.require_inputs()),
        labels=usual.labels,
        probe=usual.probe,
    )


def reference(detector: Detector) -> Reference:
    """Labelled samples to learn from, in batches of 64, and a head for the first layer read."""
    acts = samples(detector, _ROWS, _SEED)
    return Reference.from_arrays(
        acts.layers,
        acts.logits,
        acts.inputs,
        acts.labels,
        head=_head(detector),
        seed=3,
        batch_size=64,
        probe=acts.probe,
    )


def _head(detector: Detector) -> tuple[Tensor, Tensor]:
    """Tells the classes apart as the samples' logits do, and is unsure of what is strange.

    Every weight is negative, the more so where strange samples are large: they have small logits,
    whatever of their features is clipped, pruned or scaled.
    """
    layers = detector.reads().layers
    vectors = [name for name in layers if name != "stage"]
    if layers and not vectors:
        centres, away = strangeness("stage", _MAP)
        centres, away = centres.flatten(2).mean(dim=2), away.flatten(1).mean(dim=1)
    else:
        centres, away = strangeness(vectors[0] if vectors else LAYERS[-1], (_VECTOR,))
    weight = _SURE * torch.linalg.pinv(centres).T
    fall = (away / away.mean()).clamp(min=0.5) * 2.2 * weight.max()
    if not vectors and layers:
        weight = weight * _SLIGHT
    return weight - fall, (centres @ fall).mean() - torch.full((CLASSES,), 2.0)


@functools.lru_cache(maxsize=16)
def learnt(detector: Detector) -> Scorer:
    """The detector's scorer on the reference; made once for all checks."""
    return Scorer.learn(detector, reference(detector))


def each(acts: Activations, change: Callable[[Tensor], Tensor]) -> Activations:
    """New activations with every floating tensor changed."""
    changed = Activations(
        layers={name: change(tensor) for name, tensor in acts.layers.items()},
        logits=None if acts.logits is None else change(acts.logits),
        inputs=None if acts.inputs is None else change(acts.inputs),
    )
    if acts.probe is None:
        return changed
    return dataclasses.replace(changed, probe=probe_on(changed.require_inputs().device.type))


def rows(acts: Activations, chosen: slice | Tensor) -> Activations:
    """Some of the rows."""
    return each(acts, lambda tensor: tensor[chosen])


def joined(first: Activations, second: Activations) -> Activations:
    """The rows of both."""
    return Activations(
        layers={
            name: torch.cat([tensor, second.layers[name]]) for name, tensor in first.layers.items()
        },
        logits=torch.cat([first.require_logits(), second.require_logits()]),
        inputs=torch.cat([first.require_inputs(), second.require_inputs()]),
        probe=first.probe,
    )


def tensors(acts: Activations) -> dict[str, Tensor]:
    """Every floating tensor, by name."""
    found = {f"layer {name}": tensor for name, tensor in acts.layers.items()}
    return {**found, "logits": acts.require_logits(), "inputs": acts.require_inputs()}


def strided(tensor: Tensor) -> Tensor:
    """The same values in every other element of memory."""
    wide = torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)
    return wide[..., 0]


def channels_last(tensor: Tensor) -> Tensor:
    """The same values with the channels innermost in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-3) -> None:
    """`AssertionError` unless two columns of scores agree, relative to their size and spread."""
    assert found.shape == expected.shape, (
        f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    )
    if not len(expected):
        return
    size = expected.abs().clamp(min=float(expected.abs().median()))
    worst = int(((found - expected).abs() / size.clamp(min=1e-6)).nan_to_num(nan=1e9).argmax())
    agree = torch.isclose(found, expected, rtol=0.0, atol=tolerance * float(size[worst]) + 1e-6)
    assert bool(agree[worst]), (
        f"{what}: row {worst} scored {float(found[worst])} and {float(expected[worst])}"
    )
