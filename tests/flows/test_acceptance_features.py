"""The acceptance experiments A4 (Mahalanobis) and A2 (logits against softmax), per seed.

FashionMNIST is known; MNIST, KMNIST and notMNIST are novel. The other detectors of features run on
the same activations and have to beat chance by far. Figures are printed (``pytest -s``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
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
from tests.data import data_path

SEEDS = (0, 1, 2)
LAYERS = ("b1", "b2", "b3", "features")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Activated:
    """The reference, and the activations of each test set, pooled."""

    seed: int
    reference: Reference
    tests: Mapping[str, Activations]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SEEDS)
def activated(request: pytest.FixtureRequest) -> Activated:
    folder = data_path("fashion_mnist_train.npz").parent
    train = example.load(folder, "fashion_mnist_train", example.TRAIN_ROWS)
    backbone, head = example.train_classifier(train, request.param)

    def pooled(images: example.Images) -> Activations:
        batches = list(example.activations(backbone, head, images))
        return Activations(
            {layer: torch.cat([features(acts, layer) for acts in batches]) for layer in LAYERS},
            torch.cat([acts.require_logits() for acts in batches]),
            labels=images.labels,
        )

    learnt = pooled(train)
    reference = Reference.from_arrays(
        learnt.layers,
        learnt.logits,
        labels=learnt.labels,
        head=(head.weight.detach(), head.bias.detach()),
        seed=request.param,
    )
    names = {"ID": "fashion_mnist_test", **example.OODS}
    tests = {n: pooled(example.load(folder, f, example.TEST_ROWS)) for n, f in names.items()}
    return Activated(request.param, reference, tests)


def aurocs(given: Activated, name: str, **options: Any) -> dict[str, float]:
    began = time.process_time()
    scorer = Scorer.learn(detectors.create(name, **options), given.reference)
    scores = {what: scorer.score(acts).numpy() for what, acts in given.tests.items()}
    took = time.process_time() - began
    found = {ood: auroc(scores["ID"], scores[ood]) for ood in example.OODS}
    recall = f" recall {float(scorer.state['recall']):.2f}" if options.get("coreset") else ""
    text = " ".join(f"{ood} {value:.3f}" for ood, value in found.items())
    sys.stdout.write(f"\nseed {given.seed}: {name} {options}: {text} ({took:.1f} s){recall}")
    return {**found, "seconds": took}


def test_mahalanobis(activated: Activated) -> None:
    late = aurocs(activated, "mahalanobis", layer="features")
    assert late["MNIST"] >= 0.96
    assert late["seconds"] < 5.0
    assert aurocs(activated, "mahalanobis", layer="b3")["MNIST"] >= 0.88
    assert aurocs(activated, "mahalanobis", layers=LAYERS)["MNIST"] >= 0.96
    assert aurocs(activated, "mahalanobis", layers=LAYERS, combine="sum")["MNIST"] >= 0.88
    early = aurocs(activated, "mahalanobis", layer="b1")
    assert early["MNIST"] < late["MNIST"]


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("mahalanobis", {}, 0.93),
        ("knn", {"k": 10, "normalize": False, "rows": 20_000}, 0.95),
    ],
)
def test_the_softmax_hinders(
    activated: Activated, name: str, options: dict[str, Any], least: float
) -> None:
    logits = aurocs(activated, name, layer="logits", **options)["MNIST"]
    softmax = aurocs(activated, name, layer="softmax", **options)["MNIST"]
    assert logits >= least
    assert logits - softmax >= 0.10


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
    activated: Activated, name: str, options: dict[str, Any], least: float
) -> None:
    assert aurocs(activated, name, layer="features", **options)["MNIST"] >= least


def test_loud_features_deceive_she(activated: Activated) -> None:
    """Its docstring says so: novel samples with large features look like the reference."""
    near = aurocs(activated, "cosine", layer="features")
    loud = aurocs(activated, "she", layer="features")
    assert all(loud[ood] < near[ood] - 0.2 for ood in example.OODS)
