"""What makes further passes, on a small network; and GradNorm, which needs none of them.

The passes themselves cost both sides the same. What differs is what is done around them, and for
GradNorm that a backward pass per sample is one product of two norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.detectors.frame import Case
from oodmon.detectors import Scorer
from oodmon.records import Activations
from oodmon.registry import detectors
from oodmon.taps.twin import Twin

ROWS = 64
NETWORKS = 8
HEADS = ((128, 10), (2048, 1000))
HEAD_ROWS = 64


def network() -> nn.Module:
    """Convolutions, batch norms and dropout: (B, 3, 32, 32) → (B, 10)."""
    torch.manual_seed(0)

    def stage(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Dropout2d(0.1),
        ]

    return nn.Sequential(
        *stage(3, 32), *stage(32, 64), *stage(64, 128),
        nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10),
    ).eval()  # fmt: skip


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """The family."""
    model = network()
    # Theirs makes its own gradients; a model that is served needs none.
    model.requires_grad_(requires_grad=False)
    twin = Twin(model)
    inputs = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = model(inputs)

    def fresh() -> Activations:
        return Activations(logits=logits, inputs=inputs, probe=twin)

    for temperature in (1.0, 1000.0):
        odin = detectors.create("odin", temperature=temperature, epsilon=0.0014)
        judge = None if peer is None else peer.ODIN(model, eps=0.0014, temperature=temperature)
        yield Case(
            "odin",
            f"{ROWS} images, T={temperature:g}",
            Scorer(odin, {}),
            fresh,
            ROWS,
            theirs=None if judge is None else partial(_outside, judge.predict, inputs),
            same_formula=temperature == 1.0,
            remark="" if temperature == 1.0 else "theirs is in float32: ties",
        )
    dropout = detectors.create("mc_dropout", passes=NETWORKS, measure="confidence")
    judge = None if peer is None else peer.MCD(model, samples=NETWORKS, mode="mean")
    yield Case(
        "mc_dropout",
        f"{ROWS} images, {NETWORKS} networks",
        Scorer(dropout, {}),
        fresh,
        ROWS,
        theirs=None if judge is None else partial(_outside, judge.predict, inputs),
        remark="theirs draws new masks for every row and call",
    )
    yield from _gradnorm(peer)


def _gradnorm(peer: ModuleType | None) -> Iterator[Case]:
    for width, classes in HEADS:
        torch.manual_seed(2)
        head = nn.Linear(width, classes)
        features = torch.rand(HEAD_ROWS, width, generator=torch.Generator().manual_seed(3))
        logits = head(features).detach()
        judge = None
        if peer is not None:
            judge = peer.GradNorm(head, param_filter=lambda name: name == "weight")
        yield Case(
            "gradnorm",
            f"{HEAD_ROWS}x{width}x{classes}",
            Scorer(detectors.create("gradnorm", layer="features"), {}),
            partial(_activations, features, logits),
            HEAD_ROWS,
            theirs=None if judge is None else partial(_outside, judge.predict, features),
            same_formula=True,
        )


def _activations(features: Tensor, logits: Tensor) -> Activations:
    return Activations(layers={"features": features}, logits=logits)


def _outside(predict: object, inputs: Tensor) -> Tensor:
    """Theirs takes gradients, which inference mode forbids."""
    assert callable(predict)
    with torch.inference_mode(mode=False):
        found: Tensor = predict(inputs.clone()).detach()
    return found
