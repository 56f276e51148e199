"""Shaped features and the head again: on vectors, on a ResNet-18's maps and on a ResNet-50's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.detectors.frame import Case
from oodmon.detectors import Reference, Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

MAPS = ((256, (512, 4, 4), 10), (64, (2048, 7, 7), 1000))
DICE_SHAPES = ((512, 10), (512, 1000), (2048, 1000))
DICE_GOALS = {(2048, 1000): 50.0}
ROWS = 256
PRUNED = 0.65

Judge = Callable[[Tensor], Tensor]


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """dice on vectors, the others on maps; all at one sample and at a batch."""
    for width, classes in DICE_SHAPES:
        yield from _dice(peer, width, classes)
    for rows, shape, classes in MAPS:
        yield from _shaped(peer, rows, shape, classes)


def _features(rows: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """As after a ReLU, half of them zeros."""
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed)).relu_()


def _head(width: int, classes: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn((classes, width), generator=draw) * (4.0 / width) ** 0.5
    return weight, torch.randn((classes,), generator=draw) * 0.1


def _dice(peer: ModuleType | None, width: int, classes: int) -> Iterator[Case]:
    weight, bias = _head(width, classes)
    known = _features(2000, (width,), 1)
    scorer = Scorer.learn(
        detectors.create("dice", sparsity=0.7),
        Reference.from_arrays(layers={"features": known}, head=(weight, bias)),
    )
    judge = None
    if peer is not None:
        judge = peer.DICE(None, weight, bias, 0.7)
        judge.masked_w, judge._is_fitted = scorer.state["weight"], True
    for rows in (1, ROWS):
        found = _features(rows, (width,), 2)
        yield Case(
            method="dice",
            what=f"{rows}, D={width}, C={classes}",
            scorer=scorer,
            fresh=functools.partial(Activations, layers={"features": found}),
            rows=rows,
            theirs=None if judge is None else functools.partial(judge.predict_features, found),
            same_formula=True,
            goal=DICE_GOALS.get((width, classes), 0.0) if rows > 1 else 0.0,
        )


def _shaped(
    peer: ModuleType | None, batch: int, shape: tuple[int, ...], classes: int
) -> Iterator[Case]:
    weight, bias = _head(shape[0], classes)
    known = _features(64, shape, 1)
    reference = Reference.from_arrays(layers={"map": known}, head=(weight, bias))

    def head(maps: Tensor) -> Tensor:
        return functional.linear(maps.mean(dim=(2, 3)), weight, bias)

    settings: tuple[tuple[str, str, dict[str, Any], str, dict[str, Any]], ...] = (
        ("react", "", {}, "ReAct", {}),
        ("vra", "", {"lower": 0.0}, "VRA", {}),
        ("scale", "", {"pruned": PRUNED}, "SCALE", {"percentile": PRUNED}),
        ("ash", "-s", {"kind": "s"}, "ASH", {"variant": "ash-s"}),
        ("ash", "-p", {"kind": "p"}, "ASH", {"variant": "ash-p"}),
        ("ash", "-b", {"kind": "b", "pruned": PRUNED}, "ASH", {"variant": "ash-b"}),
        ("rankfeat", "", {}, "RankFeat", {}),
    )
    for method, kind, options, their_name, theirs in settings:
        scorer = Scorer.learn(detectors.create(method, layer="map", **options), reference)
        judge: Any = None
        if peer is not None:
            if their_name == "ASH":
                theirs = {**theirs, "percentile": options.get("pruned", 0.9)}
            judge = getattr(peer, their_name)(None, head, **theirs)
            if method == "react":
                judge.threshold, judge._is_fitted = float(scorer.state["threshold"]), True
            if method == "vra":
                judge._lower_threshold = scorer.state["lower"]
                judge._upper_threshold = scorer.state["upper"]
        for rows in (1, batch):
            found = _features(rows, shape, 2) * torch.linspace(0.5, 1.5, rows)[:, None, None, None]
            yield Case(
                method=method,
                what=f"{kind[1:]} {rows}, {'x'.join(map(str, shape))}, C={classes}".strip(),
                scorer=scorer,
                fresh=functools.partial(Activations, layers={"map": found}),
                rows=rows,
                theirs=None
                if judge is None
                else functools.partial(judge.predict_feature_maps, found),
                same_formula=True,
            )
