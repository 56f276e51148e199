"""Scores of the logits alone, at single samples, small batches and large ones."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.frame import Case, Joint
from oodmon.detectors import Reference, Scorer
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
GOALS = {
    ("max_logit", 1000): 5.0,
    ("gen", 1000): 4.0,
    ("openmax", 10): 50.0,
    ("openmax", 1000): 50.0,
}
STATE = ("mean", "rate", "location")
TOGETHER = ("msp", "max_logit", "energy", "entropy")


def make_logits(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (B, C) with a peak at the label, and labels; not so sure that float32 saturates."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, classes), generator=draw) * 2.0
    labels = torch.randint(classes, (rows,), generator=draw)
    logits[torch.arange(rows), labels] += 6.0
    return logits, labels


def cases(peer: ModuleType | None) -> Iterator[Case]:
    """The family: what learns nothing at every shape, what learns at the large ones."""
    for rows, classes in SHAPES:
        logits, _ = make_logits(rows, classes)
        for method, their_name in PLAIN.items():
            judge = None if peer is None else getattr(peer, their_name)(None)
            yield _case(method, Scorer(detectors.create(method), {}), logits, judge)
        prob = Scorer(detectors.create("msp", scale="prob"), {})
        judge = None if peer is None else peer.MaxSoftmax(None)
        yield _case("msp", prob, logits, judge, what=", -max p")
        for top in {10: (10,), 1000: (100, 1000)}[classes]:
            judge = None if peer is None else peer.GEN(None, M=top)
            scorer = Scorer(detectors.create("gen", top=top), {})
            yield _case("gen", scorer, logits, judge, same=False, what=f", top {top}")
        yield _case("doctor", Scorer(detectors.create("doctor"), {}), logits, None)
    for classes in (10, 1000):
        yield from _learnt(peer, classes)


def _learnt(peer: ModuleType | None, classes: int) -> Iterator[Case]:
    logits, labels = make_logits(30 * classes if classes > 100 else 10_000, classes, seed=1)
    reference = Reference.from_arrays(logits=logits, labels=labels)
    kl = Scorer.learn(detectors.create("kl_matching"), reference)
    openmax = Scorer.learn(
        detectors.create("openmax", tail=20, alpha=10, correct_only=False), reference
    )
    warm = Scorer.learn(detectors.create("temperature_scaling"), reference)
    judges: dict[str, Any] = {}
    if peer is not None:
        judges["kl"] = peer.KLMatching(None).fit_logits(logits)
        judges["warm"] = peer.TemperatureScaling(None)
        judges["warm"].t.data.fill_(float(warm.state["temperature"]))
        judges["warm"]._is_fitted = True
        judges["openmax"] = _openmax(peer, openmax)
    for rows in (1, 32, BULK):
        probe, _ = make_logits(rows, classes, seed=2)
        yield _case("kl_matching", kl, probe, judges.get("kl"))
        yield _case("temperature_scaling", warm, probe, judges.get("warm"))
        # theirs takes the distance from a class that no row of the batch is given to as 0
        whole = len(probe[0]) <= 10
        yield _case("openmax", openmax, probe, judges.get("openmax"), same=whole)


def _openmax(peer: ModuleType, ours: Scorer) -> Any:
    """Theirs with our means and laws: SciPy's fits of a Weibull moved by 10,000 do not converge."""
    judge = peer.OpenMax(None, tailsize=20, alpha=10)
    layer = importlib.import_module("pytorch_ood.detector.openmax.numpy")
    law = importlib.import_module("pytorch_ood.detector.openmax.libnotmr")
    found = layer.OpenMax(tailsize=20, alpha=10)
    mean, rate, location = (ours.state[key].double().numpy() for key in STATE)
    found.n_dims, found.alpha = len(mean), min(len(mean), 10)
    for number in range(len(mean)):
        found.centers[number] = mean[number]
        found.distributions[number] = weibull = law.LibNotMR(tailsize=20)
        weibull.min_val = 0.0
        weibull.c = rate[number] * (weibull.translation + location[number])
        weibull.scale = weibull.translation + location[number]
    judge._openmax = found
    return judge


def _case(
    method: str, scorer: Scorer, logits: Tensor, judge: Any, *, same: bool = True, what: str = ""
) -> Case:
    rows, classes = logits.shape
    bulk = rows == BULK
    return Case(
        method=method,
        what=f"{rows}x{classes}{what}",
        scorer=scorer,
        fresh=functools.partial(Activations, logits=logits),
        rows=rows,
        theirs=None if judge is None else functools.partial(judge.predict_logits, logits),
        same_formula=same,
        goal=GOALS.get((method, classes), 0.0) if bulk else 0.0,
    )


def notes(rounds: int) -> Iterator[Joint]:
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
        yield Joint(TOGETHER, f"{rows}x{classes}", rows, statistics.median(ratios[1:]))


def _stretch(scorers: list[Scorer], logits: Tensor, times: int) -> float:
    batches = [Activations(logits=logits) for _ in range(times)]
    began = time.process_time()
    while batches:
        acts = batches.pop()
        for scorer in scorers:
            scorer.score(acts)
    return time.process_time() - began
