"""Scores of the logits on FashionMNIST against MNIST (A1, A2): what the softmax hides.

The figures are in docs/acceptance.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.fashion import SEEDS, classifier, sets
from tests.figures import Figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Trained:
    """What a trained classifier makes of the reference, of fresh data of its kind, and of MNIST."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        backbone, self.head = classifier(seed)
        self.labels = sets()["train"].labels
        with torch.inference_mode():
            self.features = {
                name: torch.cat([backbone(part) for part in torch.split(sets()[name].inputs, 512)])
                for name in ("train", "ID", "MNIST")
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
            seed=self.seed,
        )
        scorer = Scorer.learn(detectors.create(name, **options), reference)
        inside, outside = (scorer.score(self.acts(which)).numpy() for which in ("ID", "MNIST"))
        return float(auroc(inside, outside))


@pytest.fixture(scope="module", params=SEEDS)
def trained(request: pytest.FixtureRequest) -> Trained:
    return Trained(request.param)


def test_msp_is_the_baseline(trained: Trained, figures: Figures) -> None:
    found, seed = trained.seen("msp"), trained.seed
    figures.hold("A1", "msp: MNIST", found, seed=seed, least=0.55)
    figures.hold("A1", "msp: MNIST, not above", found, seed=seed, most=0.90)
    gap = trained.seen("mahalanobis", layer="penultimate") - found
    figures.hold("A1", "mahalanobis above msp: MNIST", gap, seed=seed, least=0.08)
    scorer = Scorer(detectors.create("msp"), {})
    rows = trained.logits["ID"][:1000]
    distinct = len(np.unique(scorer.score(Activations(logits=rows)).numpy())) / len(rows)
    figures.hold("A1", "msp: share of distinct scores", distinct, seed=seed, least=0.99)
    plain = Scorer(detectors.create("msp", scale="prob"), {}).score(Activations(logits=rows))
    torch.testing.assert_close(plain, -rows.softmax(1).amax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("mahalanobis", {}, 0.93), ("knn", {"k": 10, "normalize": False, "rows": 20_000}, 0.95)],
    ids=["mahalanobis", "knn"],
)
def test_the_softmax_hides_what_the_logits_show(
    trained: Trained, name: str, options: dict[str, Any], least: float, figures: Figures
) -> None:
    found = trained.seen(name, layer="logits", **options)
    gap = found - trained.seen(name, layer="softmax", **options)
    figures.hold("A2", f"{name} of logits: MNIST", found, seed=trained.seed, least=least)
    figures.hold("A2", f"{name}: logits above softmax, MNIST", gap, seed=trained.seed, least=0.10)


@pytest.mark.parametrize(
    ("name", "least"), [("max_logit", 0.03), ("energy", 0.03), ("openmax", 0.05), ("react", 0.05)]
)
def test_these_see_more_than_msp(
    trained: Trained, name: str, least: float, figures: Figures
) -> None:
    gain = trained.seen(name) - trained.seen("msp")
    figures.hold("A2", f"{name} above msp: MNIST", gain, seed=trained.seed, least=least)
