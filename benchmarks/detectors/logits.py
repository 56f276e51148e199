"""Scores of the logits alone, at single samples, small batches and large ones."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.frame import Case
from oodmon.detectors import Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

SHAPES = ((1, 10), (32, 10), (256, 10), (1, 1000), (32, 1000), (256, 1000))
BULK = 256
PLAIN = {
    "msp": "MaxSoftmax",
    "max_logit": "MaxLogit",
    "energy": "EnergyBased",
    "entropy": "Entropy",
}
GOALS = {("max_logit", 1000): 5.0, ("gen", 1000): 4.0, ("openmax", 10): 50.0}
GOALS["openmax", 1000] = 50.0
TOGETHER = ("msp", "max_logit", "energy", "entropy")


def make_logits(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (B, C) with a peak at the label, and labels; not so sure that float32 saturates."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, classes), generator=draw) * 2.0
    labels = torch.randint(classes, (rows,), generator=draw)
    logits[torch.arange(rows), labels] += 6.0
    return logits, labels


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """The family."""
    for rows, classes in SHAPES:
        logits, _ = make_logits(rows, classes)
        for method, their_name in PLAIN.items():
            judge = None if peer is None else getattr(peer, their_name)(None)
            yield _case(method, Scorer(detectors.create(method), {}), logits, judge)


def _case(
    method: str, scorer: Scorer, logits: Tensor, judge: Any, *, same: bool = True, remark: str = ""
) -> Case:
    rows, classes = logits.shape
    bulk = rows == BULK
    return Case(
        method=method,
        what=f"{rows}x{classes}",
        scorer=scorer,
        fresh=functools.partial(Activations, logits=logits),
        rows=rows,
        theirs=None if judge is None else functools.partial(judge.predict_logits, logits),
        same_formula=same,
        goal=GOALS.get((method, classes), 0.0) if bulk else 0.0,
        counts=bulk,
        remark=remark,
    )


def notes(rounds: int) -> Iterator[str]:
    """Several detectors in one batch beside the dearest of them alone."""
    for rows, classes in SHAPES:
        logits, _ = make_logits(rows, classes)
        scorers = {name: Scorer(detectors.create(name), {}) for name in TOGETHER}
        times = max(3, 2000 // rows)
        ratios = []
        with torch.inference_mode():
            for _ in range(rounds + 1):
                alone = [_stretch([scorer], logits, times) for scorer in scorers.values()]
                ratios.append(_stretch(list(scorers.values()), logits, times) / max(alone))
        together = statistics.median(ratios[1:])
        yield (
            f"{' + '.join(TOGETHER)} at {rows}x{classes}: "
            f"{together:.2f}x the dearest alone (goal 1.3)"
        )


def _stretch(scorers: list[Scorer], logits: Tensor, times: int) -> float:
    batches = [Activations(logits=logits) for _ in range(times)]
    began = time.process_time()
    for acts in batches:
        for scorer in scorers:
            scorer.score(acts)
    return time.process_time() - began
