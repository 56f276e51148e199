"""Gram over the stages of a ResNet-18, beside pytorch-ood's with the same bounds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.detectors.frame import Call, Case
from oodmon.detectors import Reference, Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

CLASSES = 10
STAGES = {
    "stage1": (64, 32, 32),
    "stage2": (128, 16, 16),
    "stage3": (256, 8, 8),
    "stage4": (512, 4, 4),
}
POWERS = (1, 2, 3, 4, 5)
BATCH = 64
ROWS = 512
GOAL = 6.0


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """Gram's statistics."""
    draw = torch.Generator().manual_seed(0)
    layers = {
        name: torch.randn((ROWS, *shape), generator=draw).relu_() for name, shape in STAGES.items()
    }
    logits = torch.randn((ROWS, CLASSES), generator=draw) * 3.0
    reference = Reference.from_arrays(layers=layers, logits=logits, batch_size=BATCH)
    maps = {name: layer[:BATCH] * 1.05 for name, layer in layers.items()}
    found = logits[:BATCH]
    for what, options in (
        ("", {}),
        ("not / confidence", {"divide_by_confidence": False}),
        ("diagonal", {"statistic": "diag"}),
        ("powers 1..10", {"powers": tuple(range(1, 11))}),
    ):
        detector = detectors.create("gram", **{"powers": POWERS, **options})
        scorer = Scorer.learn(detector, reference)
        has_peer = peer is not None and what in ("", "not / confidence")
        yield Case(
            method="gram",
            what=what or "ResNet-18 stages",
            scorer=scorer,
            fresh=functools.partial(Activations, layers=maps, logits=found),
            rows=BATCH,
            theirs=_peer(peer, scorer, maps, found) if peer is not None and has_peer else None,
            same_formula=what == "not / confidence",
            goal=GOAL,
            remark="" if what else "theirs does not divide by the confidence",
        )


def _peer(peer: ModuleType, scorer: Scorer, maps: Mapping[str, Tensor], logits: Tensor) -> Call:
    """Their detector with our bounds and weights: their `fit` splits with an unseeded generator."""
    judge = peer.Gram(None, [None] * len(STAGES), CLASSES, list(POWERS))
    units = scorer.state["unit"] ** 2
    for end, attribute in (("lower", "feature_min"), ("upper", "feature_max")):
        bounds = [scorer.state[f"{name}.{end}"] * units[i] for i, name in enumerate(STAGES)]
        setattr(judge, attribute, [list(part.unbind(dim=1)) for part in bounds])
    judge.layer_norm = 1.0 / scorer.state["weight"]
    features = list(maps.values())

    def call() -> Tensor:
        found: Tensor = judge.predict_structured(logits, features)
        return found

    return call
