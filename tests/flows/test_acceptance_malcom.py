"""Compression of feature maps on FashionMNIST against glyphs (A6): no worse than averages.

The figures are in docs/acceptance.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples import fashion_mnist as example
from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.fashion import SEEDS, classifier, sets
from tests.figures import Figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAYERS = ("b2", "b3")
FIT_ROWS = 4_000
ROWS = 1_000
LEAST = {"MNIST": 0.85, "KMNIST": 0.88, "notMNIST": 0.95}


@pytest.mark.parametrize("seed", SEEDS)
def test_malcom_sees_glyphs_as_averages_do(seed: int, figures: Figures) -> None:
    backbone, _ = classifier(seed)

    def maps(name: str, rows: int) -> Activations:
        images = example.head_of(sets()[name], rows)
        with torch.inference_mode():
            parts = [backbone.layers(part) for part in torch.split(images.inputs, 500)]
        layers = {layer: torch.cat([part[layer] for part in parts]) for layer in LAYERS}
        return Activations(layers=layers, labels=images.labels)

    learnt = maps("train", FIT_ROWS)
    tests = {name: maps(name, ROWS) for name in ("ID", *example.OODS)}

    def seen(**options: Any) -> dict[str, float]:
        reference = Reference.from_arrays(learnt.layers, labels=learnt.labels, seed=seed)
        detector = detectors.create("malcom", layers=LAYERS, **options)
        scorer = Scorer.learn(detector, reference)
        scores = {what: scorer.score(acts).numpy() for what, acts in tests.items()}
        return {ood: auroc(scores["ID"], scores[ood]) for ood in example.OODS}

    both, averages = seen(), seen(compression=False)
    for ood, least in LEAST.items():
        figures.hold("A6", f"malcom: {ood}", both[ood], seed=seed, least=least)
        gain = both[ood] - averages[ood]
        figures.hold("A6", f"malcom above averages alone: {ood}", gain, seed=seed, least=-0.03)
