"""Detectors with a network of their own, on real data: what each must see, and what it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from oodmon import Activations
from oodmon.contracts import Detector
from oodmon.detectors import Reference, Scorer
from oodmon.detectors.blurs import gaussian_blur, svd_blur
from oodmon.detectors.rnd import RND
from oodmon.detectors.svd_rnd import SVDRND
from oodmon.evaluate import auroc
from tests.data import data_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(name: str, rows: int, start: int = 0) -> Tensor:
    """(rows, 1, 28, 28) in [0, 1]: that part of a fixed permutation."""
    return labelled(name, rows, start)[0]


def labelled(name: str, rows: int, start: int = 0) -> tuple[Tensor, Tensor]:
    with np.load(data_path(f"{name}.npz")) as data:
        found, labels = data["images"], data["labels"]
    chosen = np.random.default_rng(0).permutation(len(found))[start : start + rows]
    return torch.from_numpy(found[chosen]).float().unsqueeze(1) / 255, torch.from_numpy(
        labels[chosen]
    )


def seen(scorer: Scorer, inside: Tensor, outside: Tensor) -> float:
    """AUROC of the inputs outside against those inside."""
    return float(
        auroc(
            scorer.score(Activations(inputs=inside)).numpy(),
            scorer.score(Activations(inputs=outside)).numpy(),
        )
    )


def learnt(detector: Detector, inputs: Tensor, seed: int = 0) -> Scorer:
    return Scorer.learn(detector, Reference.from_arrays(inputs=inputs, seed=seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_svd_rnd_sees_the_blur_that_rnd_cannot(seed: int) -> None:
    reference, inside = images("fashion_mnist_train", 10_000), images("fashion_mnist_test", 1_000)
    by_svd, by_gaussian = svd_blur(inside, 22), gaussian_blur(inside, 1.0)
    plain = learnt(RND(on="inputs", epochs=8), reference, seed)
    assert seen(plain, inside, by_svd) <= 0.60
    assert seen(plain, inside, by_gaussian) <= 0.60
    svd = learnt(SVDRND(blur="svd", strength=22, epochs=8), reference, seed)
    assert seen(svd, inside, by_svd) >= max(0.70, seen(plain, inside, by_svd) + 0.25)
    # a blur that it was not trained on
    assert seen(svd, inside, by_gaussian) >= 0.80
    gaussian = learnt(SVDRND(blur="gaussian", strength=1.0, epochs=8), reference, seed)
    assert seen(gaussian, inside, by_gaussian) >= 0.90
    # what it costs far out
    for scorer in (plain, svd, gaussian):
        assert seen(scorer, inside, images("mnist_test", 1_000)) >= 0.85
