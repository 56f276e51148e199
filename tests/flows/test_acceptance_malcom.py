"""Compression of feature maps on FashionMNIST against glyphs: right, and no worse than averages."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

from examples import fashion_mnist as example
from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.data import data_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAYERS = ("b2", "b3")
FIT_ROWS = 4_000
ROWS = 1_000
LEAST = {"MNIST": 0.85, "KMNIST": 0.88, "notMNIST": 0.95}


@pytest.mark.parametrize("seed", [0])
def test_malcom_sees_glyphs_as_averages_do(seed: int) -> None:
    folder = data_path("fashion_mnist_train.npz").parent
    train = example.load(folder, "fashion_mnist_train", example.TRAIN_ROWS)
    backbone, _ = example.train_classifier(train, seed)
    backbone.eval()

    def maps(images: example.Images) -> Activations:
        with torch.inference_mode():
            parts = [backbone.layers(part) for part in torch.split(images.inputs, 500)]
        layers = {name: torch.cat([part[name] for part in parts]) for name in LAYERS}
        return Activations(layers=layers, labels=images.labels)

    learnt = maps(example.Images(train.inputs[:FIT_ROWS], train.labels[:FIT_ROWS]))
    names = {"ID": "fashion_mnist_test", **example.OODS}
    tests = {what: maps(example.load(folder, file, ROWS)) for what, file in names.items()}

    def seen(**options: Any) -> dict[str, float]:
        began = time.process_time()
        reference = Reference.from_arrays(learnt.layers, labels=learnt.labels, seed=seed)
        detector = detectors.create("malcom", layers=LAYERS, **options)
        scorer = Scorer.learn(detector, reference)
        took = time.process_time() - began
        scores = {what: scorer.score(acts).numpy() for what, acts in tests.items()}
        found = {ood: auroc(scores["ID"], scores[ood]) for ood in example.OODS}
        text = " ".join(f"{ood} {value:.3f}" for ood, value in found.items())
        sys.stdout.write(f"\nseed {seed}: malcom {options}: {text} (learnt in {took:.0f} s)")
        return found

    both, averages = seen(), seen(compression=False)
    for ood, least in LEAST.items():
        assert both[ood] >= least
        assert both[ood] >= averages[ood] - 0.03
