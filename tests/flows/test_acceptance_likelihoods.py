"""Likelihoods of images (B5) and of texts (B6), before and after known outliers were shown.

The figures are in docs/acceptance.md.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oodmon import Activations
from oodmon.detectors import Scorer
from oodmon.detectors.blurs import gaussian_blur
from oodmon.detectors.language_model import LanguageModel
from oodmon.detectors.pixelcnn import PixelCNN
from tests.data import data_path
from tests.fashion import SEEDS, images, learnt, seen
from tests.figures import Figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.parametrize("seed", SEEDS)]


def mean_score(scorer: Scorer, inputs: Tensor) -> float:
    return float(scorer.score(Activations(inputs=inputs)).mean())


def test_pixel_likelihoods_are_inverted_until_outliers_are_shown(
    seed: int, figures: Figures
) -> None:
    reference, inside = images("fashion_mnist_train", 10_000), images("fashion_mnist_test", 1_000)
    outliers = images("notmnist_test", 5_000, start=2_500)
    alone = learnt(PixelCNN(epochs=4), reference, seed)
    told = learnt(PixelCNN(epochs=4, outliers=True), reference, seed, outliers)

    def hold(what: str, value: float, **bounds: float) -> None:
        figures.hold("B5", what, value, seed=seed, **bounds)

    hold("pixelcnn: darkened to 0.3", seen(alone, inside, inside * 0.3), most=0.40)
    hold("pixelcnn: Gaussian blur, σ 1", seen(alone, inside, gaussian_blur(inside, 1.0)), most=0.50)
    mnist, kmnist = images("mnist_test", 1_000), images("kmnist_test", 1_000)
    lifted = seen(told, inside, mnist)
    hold("pixelcnn with outliers: MNIST", lifted, least=0.80)
    hold("pixelcnn with outliers: MNIST, gain", lifted - seen(alone, inside, mnist), least=0.12)
    hold("pixelcnn with outliers: KMNIST", seen(told, inside, kmnist), least=0.93)
    bits = mean_score(alone, inside)
    hold("pixelcnn: bits per pixel, FashionMNIST", bits, most=1.05)
    hold("pixelcnn with outliers: bits, rise", mean_score(told, inside) - bits, most=0.1)


def characters(text: str, rows: int) -> Tensor:
    """Segments of 64 characters, letters and spaces only, as their codes."""
    plain = re.sub("[^a-z]+", " ", text.lower()).encode()
    whole = plain[: len(plain) // 64 * 64]
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8).reshape(-1, 64)[:rows]


def unpacked(name: str) -> str:
    with gzip.open(data_path(name), "rt", encoding="utf-8") as file:
        return file.read()


def texts() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Segments of news for learning and for judging, and of what is no news."""
    news: dict[str, str] = {"train": "", "test": ""}
    for line in unpacked("text_reuters52.jsonl.gz").splitlines():
        row = json.loads(line)
        news[row["split"]] += row["text"] + " "
    inside = characters(news["test"], 500)
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(inside.shape, generator=draw).argsort(dim=1)
    licence = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
    return (
        characters(news["train"], 8_000),
        inside,
        {
            "captions": characters(unpacked("text_multi30k_captions.txt.gz"), 500),
            "licence": characters(licence, 500),
            "random": torch.randint(97, 123, (500, 64), generator=draw),
            "shuffled": inside.gather(1, order),
        },
    )


def test_a_language_model_sees_other_text_and_learns_from_outliers(
    seed: int, figures: Figures
) -> None:
    reference, inside, outside = texts()
    outliers = characters(unpacked("text_tinyshakespeare.txt.gz"), 4_000)
    alone = learnt(LanguageModel(epochs=4), reference, seed)
    told = learnt(LanguageModel(epochs=4, outliers=True), reference, seed, outliers)

    def hold(what: str, value: float, **bounds: float) -> None:
        figures.hold("B6", what, value, seed=seed, **bounds)

    def flat(scorer: Scorer) -> Scorer:
        detector = scorer.detector
        assert isinstance(detector, LanguageModel)
        return Scorer(dataclasses.replace(detector, statistic="flatness"), scorer.state)

    least = {"captions": 0.95, "licence": 0.85, "random": 0.99, "shuffled": 0.98}
    for name, bound in least.items():
        before, after = (seen(one, inside, outside[name]) for one in (alone, told))
        hold(f"language_model: {name}", before, least=bound)
        hold(f"language_model with outliers: {name}, change", after - before, least=-0.02)
    before, after = (seen(flat(one), inside, outside["licence"]) for one in (alone, told))
    hold("language_model, flatness: licence, gain by outliers", after - before, least=0.05)
    bits = mean_score(alone, inside)
    hold("language_model: bits per character, news", bits, most=2.4)
    hold("language_model with outliers: bits, rise", mean_score(told, inside) - bits, most=0.35)
