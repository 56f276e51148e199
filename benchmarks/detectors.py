"""Throughput of each detector beside pytorch-ood's, where it has the method: ratios in one run.

    python benchmarks/detectors.py

One thread, the same tensors, calls in turn, CPU time; each ratio is the median over paired rounds.
Ours is `Scorer.score` on fresh activations, so nothing is shared between calls; theirs is the call
on precomputed logits or maps. Both run in inference mode. Where both compute the same formula the
rank agreement is printed too.

pytorch-ood's package imports torchvision for its data sets, which its detectors do not need. So the
package is entered here without running its `__init__`: `pip install --no-deps pytorch-ood` is
enough. Where it is not installed the peer's columns stay empty, and the reason is printed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.records import Activations
from oodmon.registry import detectors

CLASSES = 10
STAGES = {"stage1": (64, 32, 32), "stage2": (128, 16, 16), "stage3": (256, 8, 8)}
STAGES["stage4"] = (512, 4, 4)
POWERS = (1, 2, 3, 4, 5)
LOGIT_PEERS = {
    "msp": "MaxSoftmax",
    "max_logit": "MaxLogit",
    "energy": "EnergyBased",
    "entropy": "Entropy",
}
LOGIT_SHAPES = ((1, 10), (32, 10), (256, 10), (32, 1000), (256, 1000))
GRAM_BATCH = 64
GRAM_ROWS = 512
ROUND_SECONDS = 0.02
BULK = 256
GRAM_GOAL = 5.0

Call = Callable[[], Tensor]


def peer_module() -> types.ModuleType | None:
    """pytorch-ood's detectors without the rest of the package; prints why not, if not."""
    spec = importlib.util.find_spec("pytorch_ood")
    if spec is None or spec.submodule_search_locations is None:
        print("pytorch-ood is not installed (pip install --no-deps pytorch-ood==0.4.0): no ratios")
        return None
    package = types.ModuleType("pytorch_ood")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["pytorch_ood"] = package
    try:
        return importlib.import_module("pytorch_ood.detector")
    except ImportError as error:
        print(f"pytorch-ood cannot be imported ({error}): no ratios")
        return None


def seconds(call: Call, times: int) -> float:
    """CPU seconds a call: on a shared machine the wall clock counts what others do."""
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def compare(
    scorer: Scorer, fresh: Callable[[], Activations], theirs: Call | None, rounds: int
) -> tuple[float, float | None]:
    """CPU seconds a call of ours, and how many times as long theirs takes; medians over rounds.

    The activations are made beforehand, as the tap makes them once for all detectors.
    """

    def ours(times: int) -> float:
        batches = [fresh() for _ in range(times)]
        began = time.process_time()
        for acts in batches:
            scorer.score(acts)
        return (time.process_time() - began) / times

    ours(2)
    times = max(1, int(ROUND_SECONDS / max(ours(3), 1e-6)))
    mine, ratios = [], []
    for number in range(rounds + 1):
        taken = ours(times)
        ratio = None if theirs is None else seconds(theirs, times) / taken
        if number:  # the first round warms up
            mine.append(taken)
            if ratio is not None:
                ratios.append(ratio)
    return statistics.median(mine), statistics.median(ratios) if ratios else None


def agreement(ours: Tensor, theirs: Tensor) -> float:
    return float(spearmanr(ours.double().numpy(), theirs.double().numpy()).statistic)


def line(what: str, rows: int, taken: float, ratio: float | None, rank: float | None) -> None:
    ratio_text = "" if ratio is None else f"{ratio:8.2f}x"
    rank_text = "" if rank is None else f"{rank:10.6f}"
    print(f"{what:34}{taken * 1e6:12.1f}{rows / taken:14,.0f}{ratio_text:>10}{rank_text:>11}")


def logit_rows(peer: types.ModuleType | None, rounds: int) -> dict[str, float]:
    ratios = {}
    draw = torch.Generator().manual_seed(0)
    for rows, classes in LOGIT_SHAPES:
        logits = torch.randn((rows, classes), generator=draw) * 2.0
        logits[torch.arange(rows), torch.randint(classes, (rows,), generator=draw)] += 6.0
        for name, their_name in LOGIT_PEERS.items():
            scorer = Scorer(detectors.create(name), {})
            fresh = functools.partial(Activations, logits=logits)
            theirs: Call | None = None
            rank = None
            if peer is not None:
                judge = getattr(peer, their_name)(None)

                def theirs(judge: Any = judge, logits: Tensor = logits) -> Tensor:
                    found: Tensor = judge.predict_logits(logits)
                    return found

                rank = agreement(scorer.score(fresh()), theirs()) if rows > 1 else None
            label = f"{name} {rows}x{classes}"
            taken, ratio = compare(scorer, fresh, theirs, rounds)
            if ratio is not None:
                ratios[label] = ratio
            line(label, rows, taken, ratio, rank)
    return ratios


def gram_rows(peer: types.ModuleType | None, rounds: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    layers = {
        name: torch.randn((GRAM_ROWS, *shape), generator=draw).relu_()
        for name, shape in STAGES.items()
    }
    logits = torch.randn((GRAM_ROWS, CLASSES), generator=draw) * 3.0
    reference = Reference.from_arrays(layers=layers, logits=logits, batch_size=GRAM_BATCH)
    maps = {name: layer[:GRAM_BATCH] * 1.05 for name, layer in layers.items()}
    found = logits[:GRAM_BATCH]
    fresh = functools.partial(Activations, layers=maps, logits=found)
    ratios = {}
    for what, options in (
        ("gram", {}),
        ("gram, not / confidence", {"divide_by_confidence": False}),
        ("gram diag", {"statistic": "diag"}),
        ("gram powers 1..10", {"powers": tuple(range(1, 11))}),
    ):
        detector = detectors.create("gram", **{"powers": POWERS, **options})
        scorer = Scorer.learn(detector, reference)
        same_formula = what == "gram, not / confidence"
        theirs = gram_peer(peer, scorer, maps, found) if peer and what.startswith("gram") else None
        if what in ("gram diag", "gram powers 1..10"):
            theirs = None
        rank = (
            agreement(scorer.score(fresh()), theirs())
            if theirs is not None and same_formula
            else None
        )
        taken, ratio = compare(scorer, fresh, theirs, max(3, rounds // 3))
        if ratio is not None:
            ratios[what] = ratio
        line(f"{what} {GRAM_BATCH}", GRAM_BATCH, taken, ratio, rank)
    return ratios


def gram_peer(
    peer: types.ModuleType, scorer: Scorer, maps: Mapping[str, Tensor], logits: Tensor
) -> Call:
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


def other_rows(rounds: int) -> None:
    """Methods that the peer does not have."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn((1024, 512), generator=draw).relu_()
    images = torch.rand((512, 3, 32, 32), generator=draw)
    labels = torch.randint(CLASSES, (1024,), generator=draw)
    for what, name, options, arrays in (
        ("duq 512 units", "duq", {"epochs": 1}, {"layers": {"f": features}, "labels": labels}),
        ("rnd 512 units", "rnd", {"epochs": 1}, {"layers": {"f": features}}),
        ("rnd 3x32x32 images", "rnd", {"epochs": 1, "on": "inputs"}, {"inputs": images}),
    ):
        scorer = Scorer.learn(
            detectors.create(name, **options),
            Reference.from_arrays(**arrays),
        )
        for rows in (1, 32, 256):
            layers = {"f": features[:rows]} if "layers" in arrays else {}
            fresh = functools.partial(Activations, layers=layers, inputs=images[:rows])
            taken, _ = compare(scorer, fresh, None, rounds)
            line(f"{what} x{rows}", rows, taken, None, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds per ratio")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a goal is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer = peer_module()
    print(f"{'detector, rows x classes':34}{'us a call':>12}{'samples/s':>14}", end="")
    print(f"{'peer/ours':>10}{'Spearman':>11}")
    with torch.inference_mode():
        ratios = logit_rows(peer, options.rounds)
        grams = gram_rows(peer, options.rounds)
    other_rows(options.rounds)
    if not ratios:
        return 0
    slow = [f"{label} {ratio:.2f}x" for label, ratio in ratios.items() if ratio < 1.0]
    bulk = [text for text in slow if f" {BULK}x" in text]
    met = grams["gram"] >= GRAM_GOAL and not bulk
    print(f"\nslower than pytorch-ood at batch {BULK}: {', '.join(bulk) or 'none'}")
    print(f"slower at smaller batches: {', '.join(t for t in slow if t not in bulk) or 'none'}")
    print("(msp and entropy do more there than the peer's: their order survives saturation)")
    print(f"gram {grams['gram']:.1f}x, goal {GRAM_GOAL:.0f}x: {'met' if met else 'MISSED'}")
    return 1 if options.strict and not met else 0


if __name__ == "__main__":
    sys.exit(main())
