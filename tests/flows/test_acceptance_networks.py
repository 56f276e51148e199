"""Detectors with a network of their own, on real data (B2, B3, B4, B7): what each must see.

And what it cannot. The figures are in docs/acceptance.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from oodmon import Activations
from oodmon.contracts import Detector
from oodmon.detectors import Reference, Scorer
from oodmon.detectors.blurs import gaussian_blur, svd_blur
from oodmon.detectors.csi import CSI
from oodmon.detectors.deep_svdd import DeepSAD, DeepSVDD
from oodmon.detectors.flow import Flow
from oodmon.detectors.reconstruction import VQVAE, Autoencoder, MemoryAutoencoder
from oodmon.detectors.rnd import RND
from oodmon.detectors.svd_rnd import SVDRND
from oodmon.detectors.transformations import Geom
from oodmon.evaluate import auroc
from tests.fashion import SEEDS, classifier, images, labelled, learnt, seen, sets
from tests.figures import Figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.parametrize("seed", SEEDS)]


@pytest.fixture(scope="module")
def inside() -> Tensor:
    return images("fashion_mnist_test", 1_000)


def test_svd_rnd_sees_the_blur_that_rnd_cannot(seed: int, inside: Tensor, figures: Figures) -> None:
    reference = images("fashion_mnist_train", 10_000)
    tests = {
        "SVD blur, 22 values": svd_blur(inside, 22),
        "Gaussian blur, σ 1": gaussian_blur(inside, 1.0),
        "MNIST": images("mnist_test", 1_000),
    }
    by_svd, by_gaussian, far = tests

    def found(detector: Detector) -> dict[str, float]:
        scorer = learnt(detector, reference, seed)
        return {name: seen(scorer, inside, test) for name, test in tests.items()}

    def hold(what: str, value: float, **bounds: float) -> None:
        figures.hold("B2", what, value, seed=seed, **bounds)

    plain = found(RND(on="inputs", epochs=8))
    hold(f"rnd on pixels: {by_svd}", plain[by_svd], most=0.60)
    hold(f"rnd on pixels: {by_gaussian}", plain[by_gaussian], most=0.60)
    svd = found(SVDRND(blur="svd", strength=22, epochs=8))
    hold(f"svd_rnd, svd: {by_svd}", svd[by_svd], least=0.70)
    unseen = svd[by_gaussian]
    hold(f"svd_rnd, svd: {by_gaussian}, not trained on", unseen, least=0.60, expected=0.80)
    for name in (by_svd, by_gaussian):
        hold(f"svd_rnd, svd: {name}, above rnd", svd[name] - plain[name], least=0.25)
    gaussian = found(SVDRND(blur="gaussian", strength=1.0, epochs=8))
    hold(f"svd_rnd, gaussian: {by_gaussian}", gaussian[by_gaussian], least=0.90)
    # what it costs far out
    for name, aurocs in (("rnd on pixels", plain), ("svd_rnd, svd", svd)):
        hold(f"{name}: {far}", aurocs[far], least=0.70)
    hold(f"svd_rnd, gaussian: {far}", gaussian[far], least=0.85)


@pytest.mark.parametrize("normal", [0, 5])
def test_deep_sad_learns_from_a_few_known_outliers(
    normal: int, seed: int, figures: Figures
) -> None:
    reference, labels = labelled("fashion_mnist_train", 20_000)
    tested, classes = labelled("fashion_mnist_test", 3_000)
    inside, outside = tested[classes == normal], tested[classes != normal]
    own = reference[labels == normal]
    others = [reference[labels == label] for label in range(10) if label != normal][:3]
    options: dict[str, Any] = {"on": "inputs", "epochs": 20, "pretraining": 10}

    def found(detector: Detector, outliers: Tensor | None = None) -> float:
        return seen(learnt(detector, own, seed, outliers), inside, outside)

    alone = found(DeepSVDD(**options))
    told = found(DeepSAD(**options), torch.cat([other[:60] for other in others]))
    few = found(DeepSAD(**options), others[0][:20])
    of = f"class {normal} against the others"
    figures.hold("B3", f"deep_svdd, {of}", alone, seed=seed, least=0.58)
    figures.hold("B3", f"deep_sad, 180 outliers, {of}", told, seed=seed, least=0.75)
    # deep_svdd alone sees more than was expected, which leaves less to gain
    what, least = f"deep_sad, 180 outliers, {of}, gain", {0: 0.03, 5: -0.02}[normal]
    figures.hold("B3", what, told - alone, seed=seed, least=least, expected=0.10)
    figures.hold("B3", f"deep_sad, 20 outliers, {of}, gain", few - alone, seed=seed, least=-0.02)


def test_confirmed_outliers_lift_what_resembles_them(
    seed: int, inside: Tensor, figures: Figures
) -> None:
    reference, outside = images("fashion_mnist_train", 20_000), images("mnist_test", 1_000)
    options: dict[str, Any] = {"on": "inputs", "epochs": 3, "pretraining": 3}
    alone = learnt(DeepSVDD(**options), reference, seed)
    told = learnt(
        DeepSAD(**options), reference, seed, outliers=images("kmnist_test", 200, start=2_000)
    )
    before, after = (seen(scorer, inside, outside) for scorer in (alone, told))
    # how much depends on what deep_svdd sees alone, which scatters widely with the seed
    what = "200 KMNIST images confirmed: MNIST, gain"
    figures.hold("B3", what, after - before, seed=seed, least=0.0, expected=0.10)


def test_a_classifier_of_rotations_sees_other_data(
    seed: int, inside: Tensor, figures: Figures
) -> None:
    detector = Geom(epochs=4, statistic="dirichlet")
    scorer = learnt(detector, images("fashion_mnist_train", 10_000), seed)
    # the other statistic learns the same classifier
    shared = {name: part for name, part in scorer.state.items() if name != "concentration"}
    plain = Scorer(dataclasses.replace(detector, statistic="mean"), shared)
    for name in ("mnist", "kmnist"):
        outside = images(f"{name}_test", 1_000)
        for statistic, one in (("mean", plain), ("dirichlet", scorer)):
            what = f"geom, rotations, {statistic}: {name.upper()}"
            figures.hold("B4", what, seen(one, inside, outside), seed=seed, least=0.85)


def test_contrasting_shifted_instances_sees_other_data(seed: int, figures: Figures) -> None:
    scorer = learnt(CSI(epochs=6), images("fashion_mnist_train", 3_000), seed)
    inside = images("fashion_mnist_test", 500)
    for name, least in (("MNIST", 0.85), ("notMNIST", 0.78), ("KMNIST", 0.75)):
        found = seen(scorer, inside, images(f"{name.lower()}_test", 500))
        figures.hold("B7", f"csi: {name}", found, seed=seed, least=least)


@pytest.mark.parametrize(
    ("detector", "unlike"),
    [
        (Autoencoder(on="inputs", epochs=10), 0.90),
        (MemoryAutoencoder(on="inputs", epochs=10), 0.90),
        (VQVAE(epochs=10), 0.70),
    ],
    ids=["autoencoder", "memory", "vq_vae"],
)
def test_autoencoders_prefer_what_is_blurred(
    detector: Detector, unlike: float, seed: int, inside: Tensor, figures: Figures
) -> None:
    scorer = learnt(detector, images("fashion_mnist_train", 5_000), seed)
    name = detector.name
    far = seen(scorer, inside, images("mnist_test", 1_000))
    figures.hold("B2 baselines", f"{name}: MNIST", far, seed=seed, least=unlike)
    # the flaw that svd_rnd is for
    blurred = seen(scorer, inside, gaussian_blur(inside, 1.0))
    figures.hold("B2 baselines", f"{name}: Gaussian blur, σ 1", blurred, seed=seed, most=0.3)
    dark = seen(scorer, inside, inside * 0.3)
    figures.hold("B2 baselines", f"{name}: darkened to 0.3", dark, seed=seed, most=0.1)


def test_a_flow_on_features_sees_other_data(seed: int, figures: Figures) -> None:
    backbone, _ = classifier(seed)

    @torch.inference_mode()
    def features(name: str) -> Tensor:
        return torch.cat([backbone(part) for part in torch.split(sets()[name].inputs, 500)])

    scorer = Scorer.learn(Flow(), Reference.from_arrays({"f": features("train")}, seed=seed))
    inside = scorer.score(Activations({"f": features("ID")})).numpy()
    for name in ("MNIST", "KMNIST", "notMNIST"):
        outside = scorer.score(Activations({"f": features(name)})).numpy()
        found = float(auroc(inside, outside))
        figures.hold("D3", f"flow on features: {name}", found, seed=seed, least=0.90)
