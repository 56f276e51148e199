"""Auxiliary networks: methods that pytorch-ood does not have, so times without a ratio."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks.detectors.frame import Case
from oodmon.detectors import Reference, Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

CLASSES = 10
SETTINGS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("duq", "512 units", {"epochs": 1}, "features"),
    ("rnd", "512 units", {"epochs": 1}, "features"),
    ("deep_svdd", "512 units", {"epochs": 1, "pretraining": 0}, "features"),
    ("autoencoder", "512 units", {"epochs": 1}, "features"),
    ("memory_autoencoder", "512 units", {"epochs": 1}, "features"),
    ("flow", "512 units", {"epochs": 1}, "features"),
    ("rnd", "3x32x32 images", {"epochs": 1, "on": "inputs"}, "inputs"),
    ("svd_rnd", "3x32x32 images", {"epochs": 1}, "inputs"),
    ("vq_vae", "3x32x32 images", {"epochs": 1}, "inputs"),
    ("geom", "3x32x32 images", {"epochs": 1}, "inputs"),
    ("csi", "3x32x32 images", {"epochs": 1, "rows": 128, "bank": 128}, "inputs"),
    ("pixelcnn", "3x14x14 images", {"epochs": 1}, "inputs"),
)


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """Each at one, 32 and 256 samples."""
    del peer
    draw = torch.Generator().manual_seed(0)
    features = torch.randn((1024, 512), generator=draw).relu_()
    images = torch.rand((512, 3, 32, 32), generator=draw)
    labels = torch.randint(CLASSES, (1024,), generator=draw)
    for method, what, options, read in SETTINGS:
        reference = (
            Reference.from_arrays(inputs=images)
            if read == "inputs"
            else Reference.from_arrays(layers={"features": features}, labels=labels)
        )
        scorer = Scorer.learn(detectors.create(method, **options), reference)
        for rows in (1, 32, 256):
            layers = {} if read == "inputs" else {"features": features[:rows]}
            yield Case(
                method=method,
                what=f"{what} x{rows}",
                scorer=scorer,
                fresh=functools.partial(Activations, layers=layers, inputs=images[:rows]),
                rows=rows,
            )
