"""Detectors of features on FashionMNIST against glyphs: A4 (Mahalanobis), and the others beside it.

FashionMNIST is known; MNIST, KMNIST and notMNIST are novel. The others have to beat chance by far.
The figures are in docs/acceptance.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from examples import fashion_mnist as example
from oodmon.detectors import Reference, Scorer
from oodmon.detectors.features import features
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.fashion import SEEDS, classifier, sets
from tests.figures import Figures

LAYERS = ("b1", "b2", "b3", "features")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Activated:
    """The reference, and the activations of each test set, pooled."""

    seed: int
    reference: Reference
    tests: Mapping[str, Activations]


@pytest.fixture(scope="module", params=SEEDS)
def activated(request: pytest.FixtureRequest) -> Activated:
    backbone, head = classifier(request.param)

    def pooled(images: example.Images) -> Activations:
        batches = list(example.activations(backbone, head, images))
        return Activations(
            {layer: torch.cat([features(acts, layer) for acts in batches]) for layer in LAYERS},
            torch.cat([acts.require_logits() for acts in batches]),
            labels=images.labels,
        )

    tests = {name: pooled(images) for name, images in sets().items()}
    learnt = tests.pop("train")
    reference = Reference.from_arrays(
        learnt.layers,
        learnt.logits,
        labels=learnt.labels,
        head=(head.weight.detach(), head.bias.detach()),
        seed=request.param,
    )
    return Activated(request.param, reference, tests)


def aurocs(given: Activated, name: str, **options: Any) -> dict[str, float]:
    began = time.process_time()
    scorer = Scorer.learn(detectors.create(name, **options), given.reference)
    scores = {what: scorer.score(acts).numpy() for what, acts in given.tests.items()}
    took = time.process_time() - began
    return {**{o: auroc(scores["ID"], scores[o]) for o in example.OODS}, "seconds": took}


def test_mahalanobis(activated: Activated, figures: Figures) -> None:
    late = aurocs(activated, "mahalanobis", layer="features")
    early = aurocs(activated, "mahalanobis", layer="b1")
    found = {
        "features: MNIST": (late["MNIST"], 0.96),
        "features: KMNIST": (late["KMNIST"], 0.96),
        "features: notMNIST": (late["notMNIST"], 0.96),
        "third block: MNIST": (aurocs(activated, "mahalanobis", layer="b3")["MNIST"], 0.88),
        "four layers, concat: MNIST": (
            aurocs(activated, "mahalanobis", layers=LAYERS)["MNIST"],
            0.96,
        ),
        "four layers, sum: MNIST": (
            aurocs(activated, "mahalanobis", layers=LAYERS, combine="sum")["MNIST"],
            0.88,
        ),
        "features above first block: MNIST": (late["MNIST"] - early["MNIST"], 0.05),
    }
    for what, (value, least) in found.items():
        figures.hold("A4", f"mahalanobis, {what}", value, seed=activated.seed, least=least)
    assert late["seconds"] < 60.0  # some 2 of CPU time; far more would be another algorithm


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("relative_mahalanobis", {}, 0.90),
        ("knn", {}, 0.90),
        ("knn", {"k": 1, "coreset": 2_000}, 0.90),
        ("nnguide", {}, 0.60),
        ("residual", {}, 0.90),
        ("vim", {}, 0.90),
        ("pca", {}, 0.80),
        ("cosine", {}, 0.80),
        ("nci", {}, 0.70),
        ("fdbd", {}, 0.70),
        ("gmm", {}, 0.90),
        ("gmm", {"covariance": "diagonal"}, 0.80),
        ("gmm", {"covariance": "full"}, 0.90),
        ("gmm", {"covariance": "diagonal", "components": 30}, 0.80),
    ],
)
def test_other_detectors_of_features(
    activated: Activated, name: str, options: dict[str, Any], least: float, figures: Figures
) -> None:
    found = aurocs(activated, name, layer="features", **options)["MNIST"]
    told = ", ".join([name, *(f"{option} {value}" for option, value in options.items())])
    figures.hold("features", f"{told}: MNIST", found, seed=activated.seed, least=least)


def test_loud_features_deceive_she(activated: Activated, figures: Figures) -> None:
    """Its docstring says so: novel samples with large features look like the reference."""
    near = aurocs(activated, "cosine", layer="features")
    loud = aurocs(activated, "she", layer="features")
    for ood in example.OODS:
        gap = near[ood] - loud[ood]
        figures.hold("features", f"cosine above she: {ood}", gap, seed=activated.seed, least=0.2)
