"""Logit-space scores on FashionMNIST against MNIST, for three seeds: what the softmax hides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from examples import fashion_mnist as example
from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.data import data_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Trained:
    """Logits of one trained backbone on the reference, on fresh data of its kind, and on MNIST."""

    def __init__(self, seed: int) -> None:
        folder = data_path("fashion_mnist_train.npz").parent
        train = example.load(folder, "fashion_mnist_train", example.TRAIN_ROWS)
        backbone, self.head = example.train_classifier(train, seed)
        backbone.eval()
        self.labels = train.labels
        with torch.inference_mode():
            sets = {
                name: example.load(folder, name, example.TEST_ROWS).inputs
                for name in ("fashion_mnist_test", "mnist_test")
            }
            self.features = {
                name: torch.cat([backbone(part) for part in torch.split(inputs, 512)])
                for name, inputs in {"train": train.inputs, **sets}.items()
            }
            self.logits = {name: self.head(found) for name, found in self.features.items()}

    def acts(self, name: str) -> Activations:
        return Activations(layers={"penultimate": self.features[name]}, logits=self.logits[name])

    def seen(self, name: str, **options: Any) -> float:
        """AUROC of MNIST against held-out FashionMNIST."""
        weight, bias = (part.detach() for part in (self.head.weight, self.head.bias))
        reference = Reference.from_arrays(
            layers={"penultimate": self.features["train"]},
            logits=self.logits["train"],
            labels=self.labels,
            head=(weight, bias),
        )
        scorer = Scorer.learn(detectors.create(name, **options), reference)
        inside, outside = (
            scorer.score(self.acts(which)).numpy() for which in ("fashion_mnist_test", "mnist_test")
        )
        return float(auroc(inside, outside))


@pytest.fixture(scope="module", params=[0, 1, 2])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Trained(request.param)
    torch.set_num_threads(threads)


def test_msp_is_the_baseline(trained: Trained) -> None:
    found = trained.seen("msp")
    assert 0.55 <= found <= 0.90
    assert found <= trained.seen("mahalanobis", layer="penultimate") - 0.08
    scorer = Scorer(detectors.create("msp"), {})
    rows = trained.logits["fashion_mnist_test"][:1000]
    scores = scorer.score(Activations(logits=rows)).numpy()
    assert len(np.unique(scores)) >= 990
    plain = Scorer(detectors.create("msp", scale="prob"), {}).score(Activations(logits=rows))
    torch.testing.assert_close(plain, -rows.softmax(1).amax(1), rtol=0, atol=1e-6)


def test_the_softmax_hides_what_the_logits_show(trained: Trained) -> None:
    by_logits = trained.seen("mahalanobis", layer="logits")
    assert by_logits >= 0.93
    assert by_logits - trained.seen("mahalanobis", layer="softmax") >= 0.10
    near = trained.seen("knn", layer="logits", k=10)
    assert near >= 0.95
    assert near - trained.seen("knn", layer="softmax", k=10) >= 0.10


def test_max_logit_sees_more_than_msp(trained: Trained) -> None:
    msp = trained.seen("msp")
    assert trained.seen("max_logit") >= msp + 0.03
    assert trained.seen("energy") >= msp + 0.03
    assert trained.seen("openmax") >= msp + 0.05
    assert trained.seen("react") >= msp + 0.05
